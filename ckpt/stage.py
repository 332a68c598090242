"""Staging: the owned slices of this rank, copied straight into the data file of the RAM tier.

Owns the memory of this rank's snapshots and the threads that copy. A snapshot's memory is used again once its step is
resolved and a newer one is whole in RAM. Where there is no room for a whole one, the copy streams through a ring of a
few places, which the keeper empties.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from ckpt import direct
from ckpt.adapt import bytes_view
from ckpt.buffers import narrow, typed
from ckpt.errors import DeadlineExceeded, StorageError
from ckpt.events import point
from ckpt.keeper.courier import Pending
from ckpt.keeper.orders import Replicas
from ckpt.keeper.ram import RamTier
from ckpt.plan import RUN_BYTES, PlannedChunk, Run, SavePlan
from ckpt.sharding import ITEMSIZE
from ckpt.slices import Slice, flat_boxes, flat_span, is_flat

log = logging.getLogger("ckpt")

RING_PLACES = 8
REPORT_RUNS = 4  # the keeper hears of the copy every so many runs
BATCH_RUNS = 16  # copies from a device that are under way together
_FAULT_BYTES = 2 << 20  # a populating thread holds the lock that every other mmap of the process needs
_MADV_POPULATE_WRITE = 23

_libc = ctypes.CDLL(None, use_errno=True)


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class Memory:
    """Mapped memory that a keeper can map too, registered with CUDA where there is a device. Owns `fd`."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd = fd
        try:
            os.posix_fallocate(fd, 0, nbytes)  # what does not fit must fail here, not kill the process at a page fault
            self._map = mmap.mmap(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.nbytes = nbytes
        self._faulted_in = torch.cuda.is_available()
        if torch.cuda.is_available():
            _cuda().cudaHostRegister(self.bytes.data_ptr(), nbytes, 0)

    def put(self, at: int, address: int, nbytes: int) -> None:
        """Copy plain memory to `bytes[at:]`; without a page fault for each page while none was there before."""
        if self._faulted_in:
            ctypes.memmove(self.bytes.data_ptr() + at, address, nbytes)  # releases the GIL
        else:
            direct.write_all(self._fd, memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B"), at)

    def fault_in(self) -> None:
        """Map every page, so that later copies run at the speed of warm memory."""
        if self._faulted_in:
            return
        for at in range(0, self.nbytes, _FAULT_BYTES):
            span = ctypes.c_size_t(min(_FAULT_BYTES, self.nbytes - at))
            _libc.madvise(ctypes.c_void_p(self.bytes.data_ptr() + at), span, _MADV_POPULATE_WRITE)  # frees the GIL
        self._faulted_in = True

    def release(self) -> None:
        if torch.cuda.is_available():
            _cuda().cudaHostUnregister(self.bytes.data_ptr())
        self.bytes = torch.empty(0, dtype=torch.uint8)
        os.close(self._fd)


class Arena:
    """Room for one whole snapshot: a file of the RAM tier that goes from attempt to attempt by its name."""

    def __init__(self, ram: RamTier, rank: int, nbytes: int) -> None:
        self._ram, self._rank, self._nbytes = ram, rank, nbytes
        self.user: Pending | None = None
        self._attempt = ""
        self.path = ram.file(f"spare.r{rank:05d}.{os.getpid()}.{id(self)}")
        ram.make()
        self.memory = self._create()

    def _create(self) -> Memory:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            return Memory(fd, self._nbytes)
        except BaseException:
            os.unlink(self.path)
            raise

    def rename_to(self, attempt: str) -> None:
        """Become the data file of `attempt`; what it held before is no snapshot from here on."""
        if self._attempt:
            self._ram.drop(self._attempt, self._rank, keep_data=True)
        directory = self._ram.attempt(attempt)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        path = self._ram.data(attempt, self._rank)
        try:
            os.rename(self.path, path)
        except FileNotFoundError:  # the keeper dropped what it held, as no worker it knows needs it
            self.memory.release()
            self.path = path
            self.memory = self._create()
        if self._attempt:
            self._ram.drop(self._attempt, self._rank, keep_data=True)  # its directory is empty now
        self._attempt, self.path = attempt, path

    def remove(self) -> None:
        """Give the memory back; the keeper removes what has become a snapshot."""
        self.memory.release()
        if not self._attempt:
            os.unlink(self.path)


class Ring:
    """A few places through which a snapshot streams. Its own memory, so it needs no room on the tmpfs."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("holdfast-ring", os.MFD_CLOEXEC)
        self.memory = Memory(self.fd, RING_PLACES * RUN_BYTES)

    def close(self) -> None:
        self.memory.release()


class Source:
    """Where the raw bytes of a planned chunk come from: plain memory where they lie in one run, else a view.

    Looked at when its turn to be copied comes; `save` has returned by then.
    """

    def __init__(self, chunk: PlannedChunk, tensor: torch.Tensor) -> None:
        self._chunk, self._tensor = chunk, tensor

    @cached_property
    def _box(self) -> Slice:
        return Slice(self._chunk.owned.at, self._chunk.owned.box.shape)

    @cached_property
    def _address(self) -> int | None:
        tensor, shape = self._tensor, tuple(self._tensor.shape)
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not is_flat(shape, self._box):
            return None
        return tensor.data_ptr() + flat_span(shape, self._box)[0] * tensor.element_size()

    def copy_to(self, memory: Memory, at: int, start: int, stop: int) -> None:
        """Raw bytes [start, stop) of the chunk to `at` of `memory`; from a device, enqueued on the current stream."""
        if self._address is not None:
            memory.put(at, self._address + start, stop - start)
            return
        view, shape, itemsize = narrow(self._tensor, self._box), self._box.shape, ITEMSIZE[self._chunk.spec.dtype]
        for box in flat_boxes(shape, start // itemsize, stop // itemsize):
            first = at + flat_span(shape, box)[0] * itemsize - start
            typed(memory.bytes, first, box.shape, view.dtype).copy_(narrow(view, box), non_blocking=True)


@dataclass(frozen=True)
class CopyPlan:
    """The runs of a data file in the order in which they are copied: the first `now` before `save` returns."""

    plan: SavePlan
    runs: tuple[Run, ...]
    now: int

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        return tuple((run.at, run.nbytes) for run in self.runs)


def plan_copy(plan: SavePlan, overlapped: frozenset[str]) -> CopyPlan:
    """The header, then all runs that hold anything but tensors of `overlapped`, then the rest in file order."""
    keys = [chunk.owned.key for chunk in plan.chunks]
    later = [run for run in plan.file.runs if all(keys[piece[0]] in overlapped for piece in run.pieces)]
    first = [run for run in plan.file.runs if any(keys[piece[0]] not in overlapped for piece in run.pieces)]
    now = [*plan.file.header_runs, *first]
    return CopyPlan(plan, (*now, *later), len(now))


class Copy:
    """One snapshot being copied, by the calling thread first and by a few others after it."""

    def __init__(
        self, plan: CopyPlan, tensors: Sequence[torch.Tensor], memory: Memory, pending: Pending, ready: object
    ) -> None:
        self._plan, self._memory, self._pending, self._ready = plan, memory, pending, ready
        self._sources = [Source(chunk, tensor) for chunk, tensor in zip(plan.plan.chunks, tensors, strict=True)]
        self._header = torch.frombuffer(bytearray(plan.plan.file.header), dtype=torch.uint8)
        self._devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
        self._lock = threading.Lock()
        self._next, self._prefix, self._early = 0, 0, set[int]()
        self._quiet = False

    def work_alone(self, stop: int, threads: int) -> None:
        """Copy the runs below `stop`; the keeper hears of them once all are there, and takes no share of the CPUs."""
        self._quiet = True
        _in_threads(lambda: self.work(stop), threads)
        self._quiet = False
        self._pending.progress(self._prefix)

    def work(self, stop: int) -> None:
        """Copy runs below `stop` that nobody has taken yet; returns when there is none left to take."""
        streams = [torch.cuda.Stream(device) for device in self._devices]  # type: ignore[no-untyped-call]
        for stream in streams:
            stream.wait_event(self._ready)  # type: ignore[arg-type]
        while batch := self._take(stop, BATCH_RUNS if streams else 1):
            for index in batch:
                if not self._pending.place_of(index):
                    return
                self._copy(index, streams)
            for stream in streams:
                stream.synchronize()
            self._done(batch)

    def _take(self, stop: int, count: int) -> range:
        with self._lock:
            first = self._next
            self._next = max(first, min(first + count, stop))
            return range(first, self._next)

    def _copy(self, index: int, streams: Sequence[torch.cuda.Stream]) -> None:
        run, ring = self._plan.runs[index], self._pending.order.ring
        into = index % ring * RUN_BYTES if ring else run.at
        view, end = bytes_view(self._memory.bytes[into : into + run.nbytes]), 0
        if not run.pieces:
            view[:] = bytes_view(self._header[run.at : run.at + run.nbytes])
            return
        for source, start, stop, at in run.pieces:
            view[end:at] = bytes(at - end)
            with _on(streams):
                self._sources[source].copy_to(self._memory, into + at, start, stop)
            end = at + stop - start
        view[end:] = bytes(run.nbytes - end)

    def _done(self, batch: range) -> None:
        with self._lock:
            self._early.update(batch)
            before = self._prefix
            while self._prefix in self._early:
                self._early.remove(self._prefix)
                self._prefix += 1
            told = before // REPORT_RUNS, self._prefix // REPORT_RUNS
            prefix = self._prefix
        if not self._quiet and (told[0] != told[1] or prefix == len(self._plan.runs)):
            self._pending.progress(prefix)


class _on:  # noqa: N801
    """Inside the given streams, of one device each."""

    def __init__(self, streams: Sequence[torch.cuda.Stream]) -> None:
        self._contexts = [torch.cuda.stream(stream) for stream in streams]

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(None, None, None)


class Stage:
    """The memory of this rank's snapshots, and the copies into it."""

    def __init__(self, ram: RamTier, rank: int) -> None:
        self._ram, self._rank = ram, rank
        self._arenas: list[Arena] = []
        self._ring: Ring | None = None
        self._limit, self._nbytes, self._ahead, self._threads = 0, 0, 1, 1
        self._changed = threading.Condition()
        self._running: list[threading.Thread] = []  # one may still make memory ahead when the next one copies
        self._making: object = None

    def prepare(self, nbytes: int, limit: int, ahead: int, threads: int) -> None:
        """From now on snapshots have `nbytes`; at most `limit` are held, 0: they stream through a ring.

        `ahead` of them are made before they are needed. Nothing of this rank may be on its way.
        """
        self._release()
        self._nbytes, self._limit, self._ahead, self._threads = nbytes, limit, min(ahead, limit), threads

    @property
    def holds(self) -> int:
        """Snapshots that fit in RAM; 0: they stream."""
        return self._limit

    def changed(self) -> None:
        """Some snapshot of this rank was resolved, or is whole in RAM now."""
        with self._changed:
            self._changed.notify_all()

    def has_room(self) -> bool:
        """Whether a snapshot could be taken without waiting."""
        with self._changed:
            return self._has_room()

    def _has_room(self) -> bool:
        if self._limit == 0:
            return self._user is None or self._user.outcome is not None
        return self._room() is not None or (self._making is None and len(self._arenas) < self._limit)

    _user: Pending | None = None  # of the ring

    def _room(self) -> Arena | None:
        """An arena whose snapshot is resolved and, where there are several, not the newest that is whole.

        While the second one is being made there is one: better used again at once than waited for.
        """
        free = [arena for arena in self._arenas if arena.user is None]
        done = [a for a in self._arenas if a.user is not None and a.user.outcome is not None]
        whole = [a for a in self._arenas if a.user is not None and a.user.complete]
        several = len(self._arenas) > 1 or (self._limit > 1 and self._making is None)
        newest = max(whole, key=lambda a: a.user.order.job.index, default=None) if several else None  # type: ignore[union-attr]
        older = [arena for arena in done if arena is not newest]
        return (free + sorted(older, key=lambda a: a.user.order.job.index))[0] if free or older else None  # type: ignore[union-attr]

    def wait_for_room(self, timeout_s: float) -> None:
        """Return once `take` would not wait. `DeadlineExceeded` if that is not within `timeout_s`."""
        with self._changed:
            if not self._changed.wait_for(self._has_room, timeout_s):
                raise DeadlineExceeded(
                    f"no earlier save became durable within {timeout_s:g} s, so there is no memory for another one. Is "
                    "the store stuck? Steps that were committed are as they were."
                )

    def take(self, timeout_s: float) -> Arena | Ring:
        """Memory for the next snapshot. `DeadlineExceeded` if none is free within `timeout_s`."""
        while True:
            self.wait_for_room(timeout_s)
            with self._changed:
                arena = self._room() or (self._make() if self._making is None and self._limit else None)
                if arena is not None:
                    return arena
                if self._limit == 0:
                    self._ring = self._ring or Ring()
                    return self._ring

    def _make(self) -> Arena | None:
        """One more arena, if the limit allows and there is room; with none at all, fall back to the ring."""
        if len(self._arenas) >= self._limit:
            return None
        try:
            self._arenas.append(Arena(self._ram, self._rank, self._nbytes))
            return self._arenas[-1]
        except (OSError, StorageError) as error:
            self._limit = len(self._arenas)
            if self._limit == 0:
                log.warning(
                    "rank %d: no room for a snapshot of %d bytes in %s (%s): saves stream through a ring of %d MiB "
                    "instead, and nothing survives there. Give CKPT_RAM_DIR a larger tmpfs.",
                    self._rank, self._nbytes, self._ram.root, error, RING_PLACES * RUN_BYTES >> 20,
                )  # fmt: skip
            return None

    def begin(
        self,
        place: Arena | Ring,
        pending: Pending,
        plan: CopyPlan,
        tensors: Sequence[torch.Tensor],
        replicas: Callable[[], Replicas],
        *,
        streamed: bool,
    ) -> None:
        """Copy what must be copied now, and the rest in the background; `pending` hears of the end or the failure.

        `streamed`: the caller waits for the store anyway, so that the keeper begins with what is copied.
        """
        point("copy", step=pending.order.job.step, rank=pending.order.rank, attempt=pending.attempt)
        if isinstance(place, Arena):
            place.user = pending
        else:
            self._user = pending
        ready = None
        if any(tensor.device.type == "cuda" for tensor in tensors):
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        copy = Copy(plan, tensors, place.memory, pending, ready)
        try:
            if streamed or isinstance(place, Ring):
                _in_threads(lambda: copy.work(plan.now), self._threads)
            else:
                copy.work_alone(plan.now, self._threads)
        except BaseException as error:
            pending.abort(error)
            raise
        # A daemon: an interpreter that ends waits for its saves itself, and a killed one for nothing.
        prepare = None if streamed else place.memory
        act = partial(self._rest, copy, len(plan.runs), pending, replicas, prepare)
        thread = threading.Thread(target=act, daemon=True)
        self._running = [*(each for each in self._running if each.is_alive()), thread]
        thread.start()

    def _rest(
        self, copy: Copy, runs: int, pending: Pending, replicas: Callable[[], Replicas], prepare: Memory | None
    ) -> None:
        try:
            _in_threads(lambda: copy.work(runs), self._threads)
            pending.copied(replicas())
        except BaseException as error:
            pending.abort(error)
        if prepare is not None:  # while the store is waited for, it has the CPUs
            prepare.fault_in()
            self._make_ahead()

    def _make_ahead(self) -> None:
        """Have the next arena ready, and its pages too, so that no later copy pays for fresh memory."""
        with self._changed:
            if self._making is not None or len(self._arenas) >= self._ahead:
                return
            self._making = object()
        try:
            arena = Arena(self._ram, self._rank, self._nbytes)
            arena.memory.fault_in()
        except (OSError, StorageError):
            arena = None
        with self._changed:
            self._making = None
            if arena is None:
                self._limit = max(1, len(self._arenas))
            else:
                self._arenas.append(arena)
            self._changed.notify_all()

    def _release(self) -> None:
        for thread in self._running:
            thread.join()
        self._running = []
        with self._changed:
            self._changed.wait_for(lambda: self._making is None)
            for arena in self._arenas:
                arena.remove()
            self._arenas.clear()
            if self._ring is not None:
                self._ring.close()
                self._ring = None

    def close(self) -> None:
        """End what is being copied, and give all memory back."""
        self._release()


def _in_threads(act: Callable[[], None], threads: int) -> None:
    """Run `act` in this thread and in `threads` - 1 others; the first error is raised once all have ended."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    others = [threading.Thread(target=work, name="ckpt-copy", daemon=True) for _ in range(threads - 1)]
    for other in others:
        other.start()
    work()
    for other in others:
        other.join()
    if errors:
        raise errors[0]
