"""A data file of packed blocks, written in the order in which its runs were copied, while they are packed in parallel.

Owns the way from a run's raw bytes to whole pages in the file. Sizes are known only afterwards: there is no header, the
part says where each chunk lies.
"""

from __future__ import annotations

import mmap
import threading
import time
from array import array
from collections.abc import Callable, Collection, Sequence

import msgspec

from ckpt.errors import SaveFailed
from ckpt.keeper.orders import Order
from ckpt.keeper.persist import Piece, pieces_of
from ckpt.manifest import BLOCK_BYTES, PACKED, Chunk, most_packed
from ckpt.packing import pack
from ckpt.plan import ALIGN_BYTES, RUN_BYTES
from ckpt.sharding import ITEMSIZE
from ckpt.store import DataWriter

AHEAD = 8  # runs that are packed and wait for an earlier one
_LOOK_S = 0.5


def most_bytes(order: Order) -> int:
    """The most bytes that the packed file of `order` can have."""
    packed = sum(slot.nbytes + slot.blocks * most_packed(0, ITEMSIZE[slot.dtype]) for slot in order.slots)
    return -(-packed // ALIGN_BYTES) * ALIGN_BYTES


class Packer:
    """A DataWriter for the runs of `order` that stores their blocks packed, but for the slots in `left_out`.

    `gave_up()`: whether somebody who works on an earlier run has failed.
    """

    in_order = False

    def __init__(
        self, order: Order, into: DataWriter, left_out: Collection[int], gave_up: Callable[[], bool], deadline: float
    ) -> None:
        self._into, self._left_out, self._gave_up, self._deadline = into, left_out, gave_up, deadline
        self._order, self._pieces = order, pieces_of(order)
        self._index = {at: index for index, (at, _) in enumerate(order.runs)}
        self._frames = [array("I", bytes(4 * slot.blocks)) for slot in order.slots]
        self._starts: dict[int, int] = {}
        self._early: dict[int, list[tuple[Piece, list[bytes]]]] = {}
        self._next, self._at = 0, 0
        self._pages, self._spare = _pages(), list[memoryview]()
        self._changed = threading.Condition()

    def write(self, at: int, memory: memoryview) -> None:
        index = self._index[at]
        packed = [(piece, self._pack(piece, memory)) for piece in self._pieces[index] if piece[0] not in self._left_out]
        with self._changed:
            while index > self._next + AHEAD:
                if self._gave_up() or time.monotonic() > self._deadline:
                    raise SaveFailed("an earlier part of the data file could not be packed")
                self._changed.wait(_LOOK_S)
            self._early[index] = packed
            full = self._take()
            self._changed.notify_all()
        self._store(full)

    def finish(self, nbytes: int | None = None) -> None:
        with self._changed:
            used = self._at % RUN_BYTES
            end = -(-used // ALIGN_BYTES) * ALIGN_BYTES
            self._pages[used:end] = bytes(end - used)
            first = self._at - used
        if end:
            self._into.write(first, self._pages[:end])
        self.data_bytes = first + end
        self._into.finish(self.data_bytes)

    def abandon(self) -> None:
        self._into.abandon()

    def chunks(self, raw: Sequence[Chunk]) -> tuple[Chunk, ...]:
        """The chunks of the order, given as they lie in memory, as they were stored; without those left out."""
        return tuple(
            msgspec.structs.replace(
                chunk,
                at=self._starts[index],
                stored_bytes=sum(self._frames[index]),
                codec=PACKED,
                frames=self._frames[index].tobytes(),
            )
            for index, chunk in enumerate(raw)
            if index not in self._left_out
        )

    def _pack(self, piece: Piece, memory: memoryview) -> list[bytes]:
        index, start, stop, at = piece
        itemsize = ITEMSIZE[self._order.slots[index].dtype]
        raw = memory[at : at + stop - start]
        return [pack(raw[first : first + BLOCK_BYTES], itemsize) for first in range(0, len(raw), BLOCK_BYTES)]

    def _take(self) -> list[tuple[int, memoryview]]:
        """Put the runs whose turn it is into pages; the pages that are full."""
        full: list[tuple[int, memoryview]] = []
        while self._next in self._early:
            for (slot, start, _, _), blocks in self._early.pop(self._next):
                self._starts.setdefault(slot, self._at)
                for number, block in enumerate(blocks, start // BLOCK_BYTES):
                    self._frames[slot][number] = len(block)
                    self._append(block, full)
            self._next += 1
        return full

    def _append(self, block: bytes, full: list[tuple[int, memoryview]]) -> None:
        done = 0
        while done < len(block):
            used = self._at % RUN_BYTES
            nbytes = min(RUN_BYTES - used, len(block) - done)
            self._pages[used : used + nbytes] = block[done : done + nbytes]
            done, self._at = done + nbytes, self._at + nbytes
            if self._at % RUN_BYTES == 0:
                full.append((self._at - RUN_BYTES, self._pages))
                self._pages = self._spare.pop() if self._spare else _pages()

    def _store(self, full: Sequence[tuple[int, memoryview]]) -> None:
        for at, pages in full:
            self._into.write(at, pages)
            with self._changed:
                self._spare.append(pages)


def _pages() -> memoryview:
    return memoryview(mmap.mmap(-1, RUN_BYTES))
