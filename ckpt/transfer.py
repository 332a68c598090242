"""Bytes between tensors and data files: threads, aligned buffers and the budget for both live here.

Writing gathers a run of the plan into a page-aligned buffer, digests it while it is in the cache, and writes it
past the page cache. Reading brings whole blocks straight into the target where the plan says so, else through a
buffer, and verifies every block before anybody can use it. A thread holds one buffer of RUN_BYTES, no more.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import TypeVar

import torch

from ckpt.adapt.tensors import bytes_view
from ckpt.adapt.values import dtype_from_name
from ckpt.errors import Corrupt, Incompatible, StorageError
from ckpt.manifest import BLOCK_BYTES, DIGEST_BYTES, digest
from ckpt.plan import ALIGN_BYTES, RUN_BYTES, Copy, Fetch, LoadPlan, PlannedChunk, Run, SavePlan, Segment, copy_boxes
from ckpt.sharding import ITEMSIZE
from ckpt.slices import Slice, flat_boxes, flat_span, is_flat, whole

WRITE_THREADS = 2
READ_THREADS = 2
CACHED_BYTES = BLOCK_BYTES  # read, then verified while it is in the core's own cache
READ_AHEAD = 8  # fetches of at most RUN_BYTES each

T = TypeVar("T")


def write_data(path: str, plan: SavePlan, tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """Create the data file of `plan` at `path`, durable but for its name in the directory.

    `tensors[i]` is the local tensor of chunk i. Returns the digests of each chunk's blocks, joined.
    `StorageError` if the file system refuses; an incomplete file is then left for the next clean-up.
    """
    digests = [bytearray(-(-chunk.nbytes // BLOCK_BYTES) * DIGEST_BYTES) for chunk in plan.chunks]
    sources = [_Source(chunk, tensor) for chunk, tensor in zip(plan.chunks, tensors, strict=True)]
    try:
        with ExitStack() as stack:
            fd = _create(path, plan.data_bytes)
            stack.callback(os.close, fd)
            header = _buffer(len(plan.header))
            bytes_view(header)[:] = plan.header
            _write(fd, header, len(plan.header), 0)
            _each(plan.runs, lambda run, buffer: _write_run(fd, run, buffer, sources, digests), WRITE_THREADS)
            os.fsync(fd)
    except OSError as error:
        raise StorageError(
            f"write {path}: {error.strerror} ({errno.errorcode.get(error.errno or 0, '?')}). "
            "This attempt is abandoned; every older step is as it was."
        ) from error
    return [bytes(found) for found in digests]


def read_data(path_of: Callable[[int], str], plan: LoadPlan, tensors: Sequence[torch.Tensor]) -> None:
    """Fill the targets of `plan`; `tensors[i]` is the local tensor of target i, `path_of(part)` its data file.

    `Corrupt`, naming file and tensor, when a block does not match its digest or the file ends early: some targets
    are overwritten then.
    """
    files = _Files(path_of)
    with ExitStack() as stack:
        stack.callback(files.close)
        ahead = _announced(files, plan.fetches)
        _each(ahead, lambda fetch, buffer: _read_fetch(files, fetch, buffer, tensors), READ_THREADS)


def verify_chunks(path: str, segments: Iterable[Segment]) -> Iterator[tuple[Segment, str]]:
    """Read `segments` (RUN_BYTES each at most) of one file and yield those that are damaged, with the reason.

    What the disk cannot read (EIO) is damaged too; any other failure of the store is raised.
    """
    buffer = torch.empty(RUN_BYTES, dtype=torch.uint8)  # never pinned: a check leaves the GPU alone
    files = _Files(lambda _: path)
    try:
        for segment in segments:
            try:
                view = bytes_view(buffer)[: segment.stop - segment.start]
                files.read(0, segment.chunk.at + segment.start, view)
                _verify(path, segment, view, segment.start)
            except (Corrupt, StorageError) as error:
                cause = error.__cause__
                if isinstance(error, StorageError) and not (isinstance(cause, OSError) and cause.errno == errno.EIO):
                    raise
                yield segment, str(error)
    finally:
        files.close()


def _each(items: Iterable[T], act: Callable[[T, torch.Tensor], None], threads: int) -> None:
    """Run `act(item, buffer)` for each item on a few threads; the first error ends them all and is raised."""
    queue, lock, stop = iter(items), threading.Lock(), threading.Event()

    def work() -> None:
        buffer = _buffer(RUN_BYTES)
        while not stop.is_set():
            with lock:
                item = next(queue, None)
            if item is None:
                return
            try:
                act(item, buffer)
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(threads, thread_name_prefix="ckpt-io") as pool:
        done, _ = wait([pool.submit(work) for _ in range(threads)], return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


def _buffer(nbytes: int) -> torch.Tensor:
    """Page-aligned host memory, pinned where there is a CUDA device."""
    raw = torch.empty(nbytes + ALIGN_BYTES, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return raw[-raw.data_ptr() % ALIGN_BYTES :][:nbytes]


# Writing


class _Source:
    """Where the raw bytes of a planned chunk come from: plain memory where they lie in one run, else a view."""

    def __init__(self, chunk: PlannedChunk, tensor: torch.Tensor) -> None:
        box = Slice(chunk.owned.at, chunk.owned.box.shape)
        self.view = _narrow(tensor, box)
        self.itemsize = ITEMSIZE[chunk.spec.dtype]
        self.address: int | None = None
        if tensor.device.type == "cpu" and tensor.is_contiguous() and is_flat(tuple(tensor.shape), box):
            self.address = tensor.data_ptr() + flat_span(tuple(tensor.shape), box)[0] * self.itemsize

    def copy_to(self, buffer: torch.Tensor, at: int, start: int, stop: int) -> None:
        """Raw bytes [start, stop) of the chunk to `buffer[at:]`."""
        if self.address is not None:
            ctypes.memmove(buffer.data_ptr() + at, self.address + start, stop - start)  # releases the GIL
            return
        shape = tuple(self.view.shape)
        for box in flat_boxes(shape, start // self.itemsize, stop // self.itemsize):
            first = at + flat_span(shape, box)[0] * self.itemsize - start
            _typed(buffer, first, box.shape, self.view.dtype).copy_(_narrow(self.view, box))


def _write_run(
    fd: int, run: Run, buffer: torch.Tensor, sources: Sequence[_Source], digests: Sequence[bytearray]
) -> None:
    memory = bytes_view(buffer)
    end = 0
    for index, start, stop, at in run.pieces:
        memory[end:at] = bytes(at - end)
        sources[index].copy_to(buffer, at, start, stop)
        end = at + stop - start
        for block in range(start, stop, BLOCK_BYTES):
            found = digest(memory[at + block - start : at + min(block + BLOCK_BYTES, stop) - start])
            place = block // BLOCK_BYTES * DIGEST_BYTES
            digests[index][place : place + DIGEST_BYTES] = found
    memory[end : run.nbytes] = bytes(run.nbytes - end)
    _write(fd, buffer, run.nbytes, run.at)


def _create(path: str, nbytes: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.open(path, flags & ~os.O_EXCL, 0o666)  # no direct I/O here; the refused open may have made the file
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            os.close(fd)
            raise
    return fd


def _write(fd: int, buffer: torch.Tensor, nbytes: int, at: int) -> None:
    memory = bytes_view(buffer)
    done = 0
    while done < nbytes:
        written = os.pwrite(fd, memory[done:nbytes], at + done)
        if written <= 0:
            raise OSError(errno.EIO, "a write made no progress")
        done += written
        if done % ALIGN_BYTES and done < nbytes:
            done -= done % ALIGN_BYTES  # direct I/O goes on from a page border


# Reading


class _Files:
    """Open data files of the parts, each opened once."""

    def __init__(self, path_of: Callable[[int], str]) -> None:
        self._path_of, self._open = path_of, dict[int, int]()
        self._lock = threading.Lock()

    def path(self, part: int) -> str:
        return self._path_of(part)

    def read(self, part: int, at: int, into: memoryview) -> None:
        fd = self._fd(part)
        done = 0
        while done < len(into):
            try:
                got = os.preadv(fd, [into[done:]], at + done)
            except OSError as error:
                what = f"read {self.path(part)} at byte {at + done}: {error.strerror}"
                raise (Corrupt if error.errno == errno.EIO else StorageError)(what) from error
            if got == 0:
                raise Corrupt(
                    f"{self.path(part)}: ends at byte {at + done}, its manifest says it has {at + len(into)} or more"
                )
            done += got

    def announce(self, fetch: Fetch) -> None:
        os.posix_fadvise(self._fd(fetch.part), fetch.at, fetch.nbytes, os.POSIX_FADV_WILLNEED)

    def _fd(self, part: int) -> int:
        with self._lock:
            if part not in self._open:
                path = self.path(part)
                try:
                    self._open[part] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                except FileNotFoundError:
                    raise Corrupt(f"{path}: this data file of a committed step is missing") from None
                except OSError as error:
                    raise StorageError(f"open {path}: {error.strerror}") from error
            return self._open[part]

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


def _announced(files: _Files, fetches: Sequence[Fetch]) -> Iterable[Fetch]:
    """The fetches; the kernel hears of each a few before its turn, so that a cold disk is kept busy."""
    for index, fetch in enumerate(fetches):
        for later in fetches[index + READ_AHEAD : index + READ_AHEAD + 1] if index else fetches[: READ_AHEAD + 1]:
            files.announce(later)
        yield fetch


def _read_fetch(files: _Files, fetch: Fetch, buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    path = files.path(fetch.part)
    first = fetch.segments[0]
    if first.in_place is not None:
        memory = bytes_view(tensors[first.copies[0].target])[first.in_place : first.in_place + fetch.nbytes]
        for start in range(0, fetch.nbytes, CACHED_BYTES):
            step = memory[start : start + CACHED_BYTES]
            files.read(fetch.part, fetch.at + start, step)
            _verify(path, first, step, first.start + start)
        return
    memory = bytes_view(buffer)[: fetch.nbytes]
    files.read(fetch.part, fetch.at, memory)
    for segment in fetch.segments:
        at = segment.chunk.at + segment.start - fetch.at
        _verify(path, segment, memory[at : at + segment.stop - segment.start], segment.start)
        for copy in segment.copies:
            _copy_out(path, segment, copy, buffer, at, tensors[copy.target])


def _verify(path: str, segment: Segment, memory: memoryview, first: int) -> None:
    """`memory` holds the chunk's raw bytes from `first`, on a block border, on."""
    digests, chunk = segment.chunk.digests, segment.chunk
    for start in range(0, len(memory), BLOCK_BYTES):
        block = (first + start) // BLOCK_BYTES
        if digest(memory[start : start + BLOCK_BYTES]) != digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]:
            raise Corrupt(
                f"{path}: tensor {chunk.key} at {list(chunk.offset)} is damaged: block {block}, file bytes "
                f"{chunk.at + block * BLOCK_BYTES} and on, does not match its digest"
            )


def _copy_out(path: str, segment: Segment, copy: Copy, buffer: torch.Tensor, at: int, target: torch.Tensor) -> None:
    dtype = dtype_from_name(segment.chunk.dtype)
    for first, box, part, goes in copy_boxes(segment, copy):
        source = _narrow(_typed(buffer, at + first, box.shape, dtype), part)
        into = _narrow(target, goes)
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


def _typed(buffer: torch.Tensor, at: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    nbytes = dtype.itemsize
    for n in shape:
        nbytes *= n
    raw = buffer[at : at + nbytes]
    if at % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(tuple(shape))


def _narrow(tensor: torch.Tensor, box: Slice) -> torch.Tensor:
    if box == whole(tuple(tensor.shape)):
        return tensor
    for dim, (offset, length) in enumerate(zip(box.offset, box.shape, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor
