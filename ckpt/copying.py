"""`ckpt cp`: committed steps of one run into another, in any store. Every byte is verified on the way.

A step keeps the name of its attempt, its parts and its data files; it gets a MANIFEST and a commit record of its new
run, so that the log over there orders it. What was copied before an interruption is not copied again: a part is
written after its data file, so a part that stands there says that both are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import msgspec
import torch

from ckpt.adapt.tensors import bytes_view
from ckpt.buffers import each
from ckpt.check import header_faults
from ckpt.datafile import DataFile
from ckpt.errors import CkptError, Corrupt, Incompatible
from ckpt.holder import Holder, append_commit
from ckpt.manifest import (
    BLOCK_BYTES,
    PART_LIMIT_BYTES,
    Chunk,
    Digest,
    Part,
    PartRef,
    content_digest_of,
    data_name,
    encode_manifest,
    encode_part,
    part_name,
)
from ckpt.plan import ALIGN_BYTES, RUN_BYTES, Segment
from ckpt.reading import verify
from ckpt.records import Commit
from ckpt.restorer import StepReader
from ckpt.run import RunDirectory

OnBytes = Callable[[int], None]
_BUFFER_BYTES: Final = RUN_BYTES + ALIGN_BYTES


@dataclass(frozen=True)
class _Piece:
    """Whole pages of a data file. `held`: (chunk, its first and last byte, where in the piece) of what lies there."""

    at: int
    nbytes: int
    held: tuple[tuple[int, int, int, int], ...] = ()


def copy_steps(
    source: RunDirectory, commits: Sequence[Commit], holder: Holder, on_bytes: OnBytes = lambda nbytes: None
) -> list[Commit]:
    """Copy `commits` of `source`, oldest first, into the run of `holder`; the commits that they became.

    Those that are there already are left alone. Raises Corrupt, before its commit, for a step that is damaged;
    Incompatible where the run has passed a step that it lacks. What was committed before stays.
    """
    made = []
    for commit in commits:
        if commit.attempt not in holder.run.log.read().commits:
            made.append(_copy_step(source, commit, holder, on_bytes))
    return made


def _copy_step(source: RunDirectory, commit: Commit, holder: Holder, on_bytes: OnBytes) -> Commit:
    target, head = holder.run, holder.view.head
    if head is not None and commit.step <= head.step:
        raise Incompatible(
            f"step {commit.step} cannot be added to {target.url}, whose newest step is {head.step}: steps only grow. "
            "Copy to another place, or the steps in their order"
        )
    start = holder.ensure_started("cp")
    reader = StepReader(source, commit)
    refs, contents = [], []
    for rank in range(reader.manifest.world.size):
        part = _copy_part(reader, rank, target, on_bytes)
        data = encode_part(part)
        refs.append(PartRef(len(data), target.digest(data), part.data_bytes))
        contents.append(part.content_digest())
    manifest = msgspec.structs.replace(
        reader.manifest,
        generation=start.generation,
        parent=head.attempt if head else None,
        parts=tuple(refs),
        content_digest=content_digest_of(reader.manifest.world, contents),
    )
    data = encode_manifest(manifest)
    target.store.put(target.attempt_path(commit.attempt, "MANIFEST"), data)
    return append_commit(target, manifest, data, start.generation, start.nonce)


def _copy_part(reader: StepReader, rank: int, target: RunDirectory, on_bytes: OnBytes) -> Part:
    """The part as it stands in the target afterwards, its data file beside it."""
    part, attempt = reader.part(rank), reader.commit.attempt
    path = target.attempt_path(attempt, part_name(rank))
    if _stands_there(target, path, part):
        on_bytes(part.data_bytes)
        return part
    with closing(reader.open_data(rank)) as file:
        for key, problem in header_faults(file, part):
            raise Corrupt(f"{file.name}: {f'tensor {key}: ' if key else ''}{problem}. Nothing was committed")
        part = _copy_data(file, part, target, reader.threads, on_bytes)
    target.store.put(path, encode_part(part))
    return part


def _stands_there(target: RunDirectory, path: str, part: Part) -> bool:
    try:
        return target.store.read(path, limit_bytes=PART_LIMIT_BYTES) == encode_part(part)
    except CkptError:
        return False


def _copy_data(file: DataFile, part: Part, target: RunDirectory, threads: int, on_bytes: OnBytes) -> Part:
    """Copy a data file; the part with the digests that the target's run uses."""
    digests: list[dict[int, bytes]] = [{} for _ in part.chunks]
    writer = target.store.write_data(target.attempt_path(part.attempt, data_name(part.rank)), part.data_bytes)

    def act(piece: _Piece, buffer: torch.Tensor) -> None:
        view = bytes_view(buffer)[: piece.nbytes]
        file.read(piece.at, view)
        for index, start, stop, at in piece.held:
            chunk, memory = part.chunks[index], view[at : at + stop - start]
            verify(file.name, Segment(chunk, start, stop, ()), memory, start)
            digests[index][start] = _digested(chunk, memory, start, target.digest)
        writer.write(piece.at, view)
        on_bytes(piece.nbytes)

    try:
        each(_pieces(part, file.name), act, threads, _BUFFER_BYTES)
    except BaseException:
        writer.abandon()
        raise
    writer.finish()
    chunks = tuple(
        msgspec.structs.replace(chunk, digests=b"".join(found[start] for start in sorted(found)))
        for chunk, found in zip(part.chunks, digests, strict=True)
    )
    return msgspec.structs.replace(part, chunks=chunks)


def _digested(chunk: Chunk, memory: memoryview, start: int, digest: Digest) -> bytes:
    """The digests of the blocks in `memory`, which was verified: those of the chunk where they are of the same kind."""
    size = chunk.digest_bytes
    if size == len(digest(b"")):
        return chunk.digests[start // BLOCK_BYTES * size : -(-(start + len(memory)) // BLOCK_BYTES) * size]
    return b"".join(digest(memory[at : at + BLOCK_BYTES]) for at in range(0, len(memory), BLOCK_BYTES))


def _pieces(part: Part, name: str) -> Iterator[_Piece]:
    """The data file in whole pages: large chunks in runs, small ones as they lie together, and what lies between."""
    ordered = sorted(enumerate(part.chunks), key=lambda found: found[1].at)
    cuts = [number for number, (_, chunk) in enumerate(ordered) if chunk.at % ALIGN_BYTES == 0]
    if ordered and (not cuts or cuts[0]):
        raise Incompatible(f"{name}: its chunks do not begin on a page, as those of this library do")
    at = 0
    for first, stop in pairwise([*cuts, len(ordered)]):
        group = ordered[first:stop]
        begin, last = group[0][1].at, group[-1][1]
        end = min(-(-(last.at + last.stored_bytes) // ALIGN_BYTES) * ALIGN_BYTES, part.data_bytes)
        yield from _gap(at, begin)
        yield from _group(group, begin, end, name)
        at = end
    yield from _gap(at, part.data_bytes)


def _group(group: Sequence[tuple[int, Chunk]], begin: int, end: int, name: str) -> Iterator[_Piece]:
    if len(group) == 1:
        index, chunk = group[0]
        for start in range(0, end - begin, RUN_BYTES):
            nbytes = min(RUN_BYTES, end - begin - start)
            yield _Piece(begin + start, nbytes, ((index, start, min(start + nbytes, chunk.raw_bytes), 0),))
        return
    if end - begin > _BUFFER_BYTES:
        raise Incompatible(f"{name}: small chunks lie together in more bytes than this library packs")
    yield _Piece(begin, end - begin, tuple((index, 0, chunk.raw_bytes, chunk.at - begin) for index, chunk in group))


def _gap(at: int, stop: int) -> Iterator[_Piece]:
    for first in range(at, stop, RUN_BYTES):
        yield _Piece(first, min(RUN_BYTES, stop - first))
