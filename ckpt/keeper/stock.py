"""What this node brought to the store lately, and what of a sealed snapshot lies there already. Pure.

A chunk is there already if an earlier attempt holds a box of the same tensor at the same place with the same digests.
Which attempts may be referred to is the coordinator's word: it alone knows what is committed and what stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import msgspec

from ckpt.keeper.orders import Order, Persist
from ckpt.manifest import Chunk, Part
from ckpt.plan import Extent, FileLayout, lay_out

ATTEMPTS_LIMIT = 4  # remembered; the one that is referred to is the newest committed
WORTH_IT = 0.05  # share of bytes that did not change last time: then digests come before the first byte is stored
LIVE_SHARE = 0.5  # of a file that stays for our sake alone: with less than that, its chunks are stored again

_Place: TypeAlias = tuple[str, tuple[int, ...], tuple[int, ...], str]


class Stock:
    """The parts that this node stored, of the last few attempts."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[int, Part]] = {}
        self._file_bytes: dict[str, int] = {}
        self._unchanged: dict[int, float] = {}  # by rank: share of the bytes that its last two parts have in common

    def add(self, part: Part) -> None:
        """`part` stands in the store, with its data file."""
        before = next((parts[part.rank] for parts in reversed(self._parts.values()) if part.rank in parts), None)
        if before is not None and before.attempt != part.attempt:
            self._unchanged[part.rank] = _share_in_common(before, part)
        self._parts.setdefault(part.attempt, {})[part.rank] = part
        self._file_bytes[f"{part.attempt}/{part.data_name}"] = part.data_bytes
        while len(self._parts) > ATTEMPTS_LIMIT:
            del self._parts[next(iter(self._parts))]
        known = {chunk.file for parts in self._parts.values() for part in parts.values() for chunk in part.chunks}
        self._file_bytes = {
            file: n for file, n in self._file_bytes.items() if file in known or file.partition("/")[0] in self._parts
        }

    def is_worth_it(self, said: Persist, rank: int) -> bool:
        """Whether so much stayed as it was last time that digests should come first, and then what changed."""
        return said.base in self._parts and self._unchanged.get(rank, 0.0) > WORTH_IT

    def in_store(self, said: Persist, chunks: Sequence[Chunk]) -> dict[int, Chunk]:
        """The chunks, by index, that need not be stored again, as references to where they lie.

        A file that stays in any case may be referred to for little; one that would stay for this alone only if at
        least LIVE_SHARE of it is still in use.
        """
        there = self._places(said.base)
        found = {}
        for index, chunk in enumerate(chunks):
            known = there.get((chunk.key, chunk.offset, chunk.shape, chunk.dtype))
            if known is not None and known.digests == chunk.digests:
                found[index] = known
        live: dict[str, int] = {}
        for chunk in found.values():
            live[chunk.file] = live.get(chunk.file, 0) + chunk.stored_bytes
        wanted = {
            file
            for file, nbytes in live.items()
            if file.partition("/")[0] in said.lasting or nbytes >= LIVE_SHARE * self._file_bytes.get(file, nbytes)
        }
        return {index: chunk for index, chunk in found.items() if chunk.file in wanted}

    def _places(self, attempt: str | None) -> Mapping[_Place, Chunk]:
        parts = self._parts.get(attempt or "", {})
        return {
            (chunk.key, chunk.offset, chunk.shape, chunk.dtype): _as_reference(part, chunk)
            for part in parts.values()
            for chunk in part.chunks
        }


def _as_reference(part: Part, chunk: Chunk) -> Chunk:
    return chunk if chunk.file else msgspec.structs.replace(chunk, file=f"{part.attempt}/{part.data_name}")


def _share_in_common(one: Part, other: Part) -> float:
    before = {(chunk.key, chunk.offset, chunk.shape): chunk.digests for chunk in one.chunks}
    same = [c.raw_bytes for c in other.chunks if before.get((c.key, c.offset, c.shape)) == c.digests]
    return sum(same) / max(1, sum(chunk.raw_bytes for chunk in other.chunks))


def without(order: Order, in_store: Mapping[int, Chunk]) -> tuple[Order, FileLayout]:
    """The order for a file that leaves out the slots `in_store`, and the layout of that file.

    Its runs are the header's first, then the others in the order of the file.
    """
    left = [slot for index, slot in enumerate(order.slots) if index not in in_store]
    file = lay_out([Extent(slot.key, slot.offset, slot.shape, slot.dtype, slot.nbytes) for slot in left])
    slots = tuple(msgspec.structs.replace(slot, at=at) for slot, at in zip(left, file.starts, strict=True))
    runs = tuple((run.at, run.nbytes) for run in (*file.header_runs, *file.runs))
    return msgspec.structs.replace(order, data_bytes=file.data_bytes, slots=slots, runs=runs), file
