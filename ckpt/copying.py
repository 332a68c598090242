"""`ckpt cp`: committed steps of one run into another, in any store. Every byte is verified on the way.

A step keeps the name of its attempt, its parts and its data files; it gets a MANIFEST and a commit record of its new
run, so that the log over there orders it. What was copied before an interruption is not copied again where it is read
back as what it was; in a run that is signed it is, since nobody vouches for what stands there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Final, TypeAlias

import msgspec
import torch

from ckpt.adapt.tensors import bytes_view
from ckpt.buffers import each
from ckpt.check import header_faults, in_order
from ckpt.datafile import DataFile, open_data
from ckpt.errors import CkptError, Corrupt, Incompatible
from ckpt.holder import Holder, commit_parts
from ckpt.manifest import (
    BLOCK_BYTES,
    PART_LIMIT_BYTES,
    RAW,
    Chunk,
    Digest,
    Part,
    PartRef,
    content_digest_of,
    data_name,
    decode_part,
    encode_part,
    part_name,
)
from ckpt.plan import ALIGN_BYTES, RUN_BYTES, Extent, Run, Segment, lay_out
from ckpt.reading import read_segment, verify, verify_chunks
from ckpt.records import Commit
from ckpt.restorer import StepReader
from ckpt.run import RunDirectory
from ckpt.writing import check_follows

OnBytes = Callable[[int], None]
_BUFFER_BYTES: Final = RUN_BYTES + 2 * ALIGN_BYTES
_Piece: TypeAlias = tuple[int, int, int, int]  # chunk index, its first and last byte, first byte in the run


def copy_steps(
    source: RunDirectory, commits: Sequence[Commit], holder: Holder, on_bytes: OnBytes = lambda nbytes: None
) -> list[Commit]:
    """Copy `commits` of `source`, oldest first, into the run of `holder`; the commits that they became.

    Those that are there already are left alone. Raises Corrupt, before its commit, for a step that is damaged;
    Incompatible where the run has passed a step that it lacks, or had it. What was committed before stays.
    `on_bytes` hears of the progress, in bytes as the source stores them.
    """
    made = []
    for commit in commits:
        view = holder.run.log.read()
        if commit.attempt not in view.commits:
            made.append(_copy_step(source, commit, holder, on_bytes))
        elif commit.attempt not in {each.attempt for each in view.standing()}:
            raise Incompatible(
                f"step {commit.step} was in {holder.run.url} once: it was deleted there, or left behind by going back. "
                "Nothing was copied of it; copy it into another run"
            )
    return made


def _copy_step(source: RunDirectory, commit: Commit, holder: Holder, on_bytes: OnBytes) -> Commit:
    target = holder.run
    check_follows(target, commit.step)
    start = holder.ensure_started("cp")
    reader = StepReader(source, commit)
    refs = []
    for rank in range(reader.manifest.world.size):
        part = _copy_part(reader, rank, target, on_bytes)
        data = encode_part(part)
        refs.append(PartRef(len(data), target.digest(data), part.data_bytes, part.content_digest()))
    manifest = msgspec.structs.replace(
        reader.manifest,
        generation=start.generation,
        parts=tuple(refs),
        content_digest=content_digest_of(reader.manifest.world, (ref.content_digest for ref in refs)),
        sources=(),
    )
    return commit_parts(target, manifest, start.nonce)


def _copy_part(reader: StepReader, rank: int, target: RunDirectory, on_bytes: OnBytes) -> Part:
    """The part as it stands in the target afterwards, its data file beside it: whole and unpacked."""
    part, attempt = reader.part(rank), reader.commit.attempt
    path = target.attempt_path(attempt, part_name(rank))
    if (there := _standing(target, path, part)) is not None:
        on_bytes(part.data_bytes)
        return there
    if part.data_name == data_name(rank):
        with closing(reader.open_data(rank)) as file:
            for key, problem in header_faults(file, part):
                raise Corrupt(f"{file.name}: {f'tensor {key}: ' if key else ''}{problem}. Nothing was committed")
    with ExitStack() as stack:
        files = {name: stack.enter_context(closing(reader.open_data(rank, name))) for name in _files(part)}
        copied = _copy_data(files, part, target, reader.threads, on_bytes)
    target.store.put(path, encode_part(copied))
    return copied


def _files(part: Part) -> set[str]:
    return {chunk.file for chunk in part.chunks}


def _standing(target: RunDirectory, path: str, part: Part) -> Part | None:
    """The part at `path`, if it holds the same, and its data file reads as it says."""
    if target.log.signs:
        return None
    try:
        found = decode_part(target.store.read(path, limit_bytes=PART_LIMIT_BYTES), path)
        alike = found.content_digest() == part.content_digest() and found.attempt == part.attempt
        if not alike or any(chunk.packed or chunk.file for chunk in found.chunks):
            return None
        with closing(open_data(target.store, target.attempt_path(part.attempt, data_name(part.rank)))) as file:
            whole = file.size() == found.data_bytes and not any(header_faults(file, found))
            return found if whole and not any(verify_chunks(file, in_order(found.chunks))) else None
    except CkptError:
        return None


def _copy_data(
    files: Mapping[str, DataFile], part: Part, target: RunDirectory, threads: int, on_bytes: OnBytes
) -> Part:
    """Write all chunks of `part` into one data file; the part that says so, with the digests of the target's run."""
    layout = lay_out([Extent(c.key, c.offset, c.shape, c.dtype, c.raw_bytes) for c in part.chunks])
    digests: list[dict[int, bytes]] = [{} for _ in part.chunks]
    writer = target.store.write_data(target.attempt_path(part.attempt, data_name(part.rank)), layout.data_bytes)

    def act(run: Run, buffer: torch.Tensor) -> None:
        memory = bytes_view(buffer)
        view, scratch = memory[: run.nbytes], memory[_BUFFER_BYTES:]
        if not run.pieces:
            view[:] = layout.header[run.at : run.at + run.nbytes]
        for group in _side_by_side(run, part):
            _read_group(files, group, part, view, scratch)
        end = 0
        for index, start, stop, at in run.pieces:
            view[end:at] = bytes(at - end)
            end = at + stop - start
            digests[index][start] = _digested(part.chunks[index], view[at:end], start, target.digest)
        if run.pieces:
            view[end:] = bytes(run.nbytes - end)
        writer.write(run.at, view)
        on_bytes(run.nbytes * part.data_bytes // layout.data_bytes)

    try:
        each((*layout.header_runs, *layout.runs), act, threads, 2 * _BUFFER_BYTES)
    except BaseException:
        writer.abandon()
        raise
    writer.finish()
    chunks = tuple(
        msgspec.structs.replace(
            chunk,
            file="",
            at=at,
            stored_bytes=chunk.raw_bytes,
            codec=RAW,
            frames=b"",
            digests=b"".join(found[start] for start in sorted(found)),
        )
        for chunk, at, found in zip(part.chunks, layout.starts, digests, strict=True)
    )
    return msgspec.structs.replace(part, chunks=chunks, data_bytes=layout.data_bytes)


def _side_by_side(run: Run, part: Part) -> Iterator[list[_Piece]]:
    """The pieces of a run, together where they lie as close in one file of the source: read at once."""
    group: list[_Piece] = []
    for piece in run.pieces:
        chunk = part.chunks[piece[0]]
        if group and (chunk.packed or _shift(group[-1], part) != _shift(piece, part)):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _shift(piece: _Piece, part: Part) -> tuple[str, int]:
    index, start, _, at = piece
    return part.chunks[index].file, part.chunks[index].at + start - at


def _read_group(
    files: Mapping[str, DataFile], group: list[_Piece], part: Part, view: memoryview, scratch: memoryview
) -> None:
    file = files[part.chunks[group[0][0]].file]
    segments = [(Segment(part.chunks[index], start, stop, ()), at) for index, start, stop, at in group]
    if len(group) == 1:
        segment, at = segments[0]
        read_segment(file, segment, view[at : at + segment.stop - segment.start], scratch)
        return
    (_, shift), first, (last, end) = _shift(group[0], part), group[0][3], segments[-1]
    file.read(shift + first, view[first : end + last.stop - last.start])
    for segment, at in segments:
        verify(file.name, segment, view[at : at + segment.stop - segment.start], segment.start)


def _digested(chunk: Chunk, memory: memoryview, start: int, digest: Digest) -> bytes:
    """The digests of the blocks in `memory`, which was verified: those of the chunk where they are of the same kind."""
    size = chunk.digest_bytes
    if size == len(digest(b"")):
        return chunk.digests[start // BLOCK_BYTES * size : -(-(start + len(memory)) // BLOCK_BYTES) * size]
    return b"".join(digest(memory[at : at + BLOCK_BYTES]) for at in range(0, len(memory), BLOCK_BYTES))
