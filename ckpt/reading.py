"""From data files to tensors: threads, buffers, descriptors and the way each byte takes live here.

    in the page cache, or wanted by other ranks here too    straight into the target, or through a buffer
    not in the page cache, wanted by this rank alone        direct I/O into a buffer, and on from there

The page cache is what the ranks of a machine share: what several of them want is read through it, so that the disk
is asked once, and each rank starts elsewhere. Every block is verified before anybody can use it. A thread holds one
buffer of RUN_BYTES and a few pages, and another one where it unpacks; at most OPEN_FILES files are open beside those in
use.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

import torch

from ckpt.adapt.tensors import bytes_view
from ckpt.adapt.values import dtype_from_name
from ckpt.buffers import each, narrow, typed
from ckpt.datafile import STEP_BYTES, DataFile
from ckpt.errors import Corrupt, Incompatible, StorageError
from ckpt.manifest import BLOCK_BYTES, digest, matches
from ckpt.packing import unpack
from ckpt.plan import ALIGN_BYTES, RUN_BYTES, Copy, Fetch, LoadPlan, Segment, copy_boxes
from ckpt.sharding import ITEMSIZE
from ckpt.slices import Slice, flat_span

READ_THREADS = 3  # the disk works on while two verify and copy; more only wait for each other where it is not asked
READ_AHEAD = 8  # fetches of at most RUN_BYTES each
TURN = 16  # fetches that a rank reads first, of those it shares with others
OPEN_FILES = 32
_BUFFER_BYTES = RUN_BYTES + 4 * ALIGN_BYTES  # direct I/O brings whole pages; packed blocks can be a little longer


@dataclass(frozen=True)
class Neighbours:
    """The readers of one step that share a page cache: this is number `index` of `count`.

    `wanted`: what the others read, boxes by stored key. What is missing there is read twice, never wrong.
    """

    index: int = 0
    count: int = 1
    wanted: Mapping[str, Sequence[Slice]] = field(default_factory=dict)


ALONE = Neighbours()


def machine() -> bytes:
    """Equal for processes under one kernel, in containers too: they share a page cache."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return digest(boot.read_bytes() if boot.exists() else os.uname().nodename.encode())


def read_data(
    open_file: Callable[[int, str], DataFile],
    plan: LoadPlan,
    tensors: Sequence[torch.Tensor],
    neighbours: Neighbours = ALONE,
    threads: int = READ_THREADS,
) -> None:
    """Fill the targets of `plan`; `tensors[i]` is the local tensor of target i.

    `open_file(i, file)` opens what chunks of part i call `file`.
    `Corrupt`, naming file and tensor, when a block does not match its digest or the file ends early: some targets
    are overwritten then.
    """
    with ExitStack() as stack:
        files = _Files(open_file)
        stack.callback(files.close)
        turns = _announced(files, _in_turn(plan.fetches, neighbours), neighbours)
        packed = any(segment.chunk.packed for fetch in plan.fetches for segment in fetch.segments)
        nbytes = _BUFFER_BYTES + RUN_BYTES * packed
        each(turns, lambda turn, buffer: _read_fetch(files, turn, buffer, tensors), threads, nbytes)


def verify_chunks(file: DataFile, segments: Iterable[Segment]) -> Iterator[tuple[Segment, str]]:
    """Read `segments` (RUN_BYTES each at most) of `file` and yield those that are damaged, with the reason.

    What the disk cannot read (EIO) is damaged too; any other failure of the store is raised.
    """
    buffer = torch.empty(_BUFFER_BYTES + RUN_BYTES, dtype=torch.uint8)  # never pinned: a check leaves the GPU alone
    for segment in segments:
        try:
            view = bytes_view(buffer)
            read_segment(file, segment, view[: segment.stop - segment.start], view[RUN_BYTES:])
        except (Corrupt, StorageError) as error:
            cause = error.__cause__
            if isinstance(error, StorageError) and not (isinstance(cause, OSError) and cause.errno == errno.EIO):
                raise
            yield segment, str(error)


# Files


@dataclass
class _Open:
    """An open file, and how many threads read it now."""

    file: DataFile
    users: int = 0


class _Files:
    """The data files that fetches name; those used last stay open."""

    def __init__(self, open_file: Callable[[int, str], DataFile]) -> None:
        self._open_file, self._open = open_file, dict[tuple[int, str], _Open]()  # in the order of their last use
        self._lock = threading.Lock()

    @contextmanager
    def use(self, fetch: Fetch) -> Iterator[DataFile]:
        name = fetch.part, fetch.file
        with self._lock:
            found = self._open.pop(name, None) or _Open(self._open_file(*name))
            self._open[name] = found
            found.users += 1
            idle = [other for other, held in self._open.items() if not held.users]
            for other in idle[: max(0, len(self._open) - OPEN_FILES)]:
                self._open.pop(other).file.close()
        try:
            yield found.file
        finally:
            with self._lock:
                found.users -= 1

    def close(self) -> None:
        for found in self._open.values():
            found.file.close()
        self._open.clear()


# Which way, and when


class _Way(Enum):
    CACHED = auto()  # ordinary reads
    COLD = auto()  # direct reads


@dataclass(frozen=True, slots=True)
class _Turn:
    fetch: Fetch
    way: _Way


def _in_turn(fetches: Sequence[Fetch], neighbours: Neighbours) -> Iterator[Fetch]:
    """The fetches; of every `count` turns each neighbour begins with another, so that all bring a share of them.

    Nobody is further ahead than that, so little of the page cache has to last.
    """
    window = TURN * neighbours.count
    for first in range(0, len(fetches), window):
        part = fetches[first : first + window]
        begin = len(part) * neighbours.index // neighbours.count
        yield from part[begin:]
        yield from part[:begin]


def _announced(files: _Files, fetches: Iterable[Fetch], neighbours: Neighbours) -> Iterator[_Turn]:
    """The fetches, each with its way; the kernel hears of what it shall bring a few before their turn."""
    ahead: list[_Turn] = []
    for fetch in fetches:
        ahead.append(_Turn(fetch, _way(files, fetch, neighbours)))
        if len(ahead) > READ_AHEAD:
            yield ahead.pop(0)
    yield from ahead


def _way(files: _Files, fetch: Fetch, neighbours: Neighbours) -> _Way:
    with files.use(fetch) as file:
        cached = file.cached(fetch.at, fetch.nbytes)
        if cached is False and not _is_shared(fetch, neighbours.wanted):
            return _Way.COLD
        if not cached:
            file.announce(fetch.at, fetch.nbytes)
    return _Way.CACHED


def _is_shared(fetch: Fetch, wanted: Mapping[str, Sequence[Slice]]) -> bool:
    """Whether others read some of these bytes too."""
    return any(_meets(segment, box) for segment in fetch.segments for box in wanted.get(segment.chunk.key, ()))


def _meets(segment: Segment, box: Slice) -> bool:
    chunk = segment.chunk
    if not (meet := chunk.box.intersect(box)):
        return False
    low, high = (edge * ITEMSIZE[chunk.dtype] for edge in flat_span(chunk.shape, meet.relative_to(chunk.offset)))
    return low < segment.stop and segment.start < high


# One fetch


def _read_fetch(files: _Files, turn: _Turn, buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    fetch, first = turn.fetch, turn.fetch.segments[0]
    with files.use(fetch) as file:
        if first.in_place is None:
            _through_buffer(file, turn, buffer, tensors)
            return
        target = bytes_view(tensors[first.copies[0].target])[first.in_place : first.in_place + fetch.nbytes]
        if turn.way is _Way.COLD:
            _cold_in_place(file, fetch, buffer, target)
        else:
            _in_place(file, fetch, target)


def _in_place(file: DataFile, fetch: Fetch, target: memoryview) -> None:
    segment, nbytes = fetch.segments[0], file.step_bytes or fetch.nbytes
    for start in range(0, fetch.nbytes, nbytes):
        step = target[start : start + nbytes]
        file.read(fetch.at + start, step)
        verify(file.name, segment, step, segment.start + start)


def _cold_in_place(file: DataFile, fetch: Fetch, buffer: torch.Tensor, target: memoryview) -> None:
    segment, memory = fetch.segments[0], bytes_view(buffer)
    first = file.read_cold(fetch.at, fetch.nbytes, memory)
    into = ctypes.addressof(ctypes.c_ubyte.from_buffer(target))
    for start in range(0, fetch.nbytes, STEP_BYTES):
        stop = min(start + STEP_BYTES, fetch.nbytes)
        verify(file.name, segment, memory[first + start : first + stop], segment.start + start)
        ctypes.memmove(into + start, buffer.data_ptr() + first + start, stop - start)  # releases the GIL


def _through_buffer(file: DataFile, turn: _Turn, buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    fetch, memory, first = turn.fetch, bytes_view(buffer), 0
    if turn.way is _Way.COLD:
        first = file.read_cold(fetch.at, fetch.nbytes, memory)
    else:
        file.read(fetch.at, memory[: fetch.nbytes])
    for segment in fetch.segments:
        begin, end = segment.span
        at, nbytes = first + begin - fetch.at, segment.stop - segment.start
        if segment.chunk.packed:
            packed, at = memory[at : at + end - begin], _BUFFER_BYTES
            _unpack(file.name, segment, packed, memory[at : at + nbytes])
        verify(file.name, segment, memory[at : at + nbytes], segment.start)
        for copy in segment.copies:
            _copy_out(file.name, segment, copy, buffer, at, tensors[copy.target])


def read_segment(file: DataFile, segment: Segment, into: memoryview, scratch: memoryview) -> None:
    """Read the raw bytes of `segment` and verify them; packed ones go through `scratch`, RUN_BYTES and a page."""
    first, last = segment.span
    if segment.chunk.packed:
        file.read(first, scratch[: last - first])
        _unpack(file.name, segment, scratch[: last - first], into)
    else:
        file.read(first, into)
    verify(file.name, segment, into, segment.start)


def _unpack(path: str, segment: Segment, packed: memoryview, into: memoryview) -> None:
    chunk, (base, _) = segment.chunk, segment.span
    for start in range(segment.start, segment.stop, BLOCK_BYTES):
        stop = min(start + BLOCK_BYTES, segment.stop)
        first, last = chunk.span(start, stop)
        block = into[start - segment.start : stop - segment.start]
        try:
            unpack(packed[first - base : last - base], block, ITEMSIZE[chunk.dtype])
        except Corrupt as error:
            block_number, at = start // BLOCK_BYTES, list(chunk.offset)
            raise Corrupt(f"{path}: tensor {chunk.key} at {at} is damaged: block {block_number}: {error}") from error


def verify(path: str, segment: Segment, memory: memoryview, first: int) -> None:
    """`memory` holds the chunk's raw bytes from `first`, on a block border, on."""
    chunk, nbytes = segment.chunk, segment.chunk.digest_bytes
    for start in range(0, len(memory), BLOCK_BYTES):
        block = (first + start) // BLOCK_BYTES
        if not matches(memory[start : start + BLOCK_BYTES], chunk.digests[block * nbytes : (block + 1) * nbytes]):
            raise Corrupt(
                f"{path}: tensor {chunk.key} at {list(chunk.offset)} is damaged: block {block}, file bytes "
                f"{chunk.at + block * BLOCK_BYTES} and on, does not match its digest"
            )


def _copy_out(path: str, segment: Segment, copy: Copy, buffer: torch.Tensor, at: int, target: torch.Tensor) -> None:
    dtype = dtype_from_name(segment.chunk.dtype)
    for first, box, part, goes in copy_boxes(segment, copy):
        source = narrow(typed(buffer, at + first, box.shape, dtype), part)
        into = narrow(target, goes)
        if not copy.compare:
            with torch.no_grad():
                into.copy_(source)
        elif not _same_bytes(into, source.to(into.dtype)):
            raise Incompatible(
                f"{path}: {segment.chunk.key} is tied to, or shares memory with, another tensor in your state, "
                "but the checkpoint holds different values for the two. Give each its own memory before you restore."
            )


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    raw = [t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return torch.equal(*raw)
