"""One rank's snapshot, from shared memory to its part: digests, and the data file written past the page cache.

The bytes may still be coming: a run is taken as soon as the worker says that it is copied. Threads live here, a few
for each snapshot; memory is only mapped, never copied.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence

from ckpt.errors import SaveFailed
from ckpt.keeper.orders import Order
from ckpt.manifest import BLOCK_BYTES, Chunk, Digest, Part
from ckpt.plan import ALIGN_BYTES, RUN_BYTES, FileLayout
from ckpt.sharding import ITEMSIZE
from ckpt.store import DataWriter

Piece = tuple[int, int, int, int]  # slot, first and last byte of its chunk, first byte in the run


class Maps:
    """Memory of workers, mapped once for all snapshots that come through it: to map its pages takes longer than to
    digest them. Owns a descriptor for each; what no name leads to any more is let go of by `trim`."""

    def __init__(self) -> None:
        self._maps: dict[tuple[int, int], tuple[int, mmap.mmap]] = {}

    def of(self, fd: int, nbytes: int) -> mmap.mmap:
        """The memory behind `fd`, which this takes over."""
        found = os.fstat(fd)
        file = found.st_dev, found.st_ino
        if found.st_size < nbytes:  # a mapping that ends too early would kill this process
            os.close(fd)
            raise SaveFailed("the memory of a snapshot is smaller than its order says")
        if file in self._maps and len(self._maps[file][1]) == nbytes:
            os.close(fd)
            return self._maps[file][1]
        self.trim()
        try:
            made = mmap.mmap(fd, nbytes, prot=mmap.PROT_READ)
        except BaseException:
            os.close(fd)
            raise
        if found.st_nlink and file not in self._maps:
            self._maps[file] = fd, made
        else:
            os.close(fd)  # a ring, whose memory has no name
        return made

    def trim(self) -> None:
        for file, (fd, memory) in list(self._maps.items()):
            if os.fstat(fd).st_nlink == 0:
                with contextlib.suppress(BufferError):  # in use
                    memory.close()
                    os.close(fd)
                    del self._maps[file]


class Memory:
    """The copied bytes of one rank: a whole data file in RAM, or a ring through which it streams."""

    def __init__(self, order: Order, memory: mmap.mmap) -> None:
        self._order = order
        self._view = memoryview(memory)

    @staticmethod
    def bytes_of(order: Order) -> int:
        return order.ring * order.place_bytes if order.ring else order.data_bytes

    @property
    def whole(self) -> memoryview:
        """The data file, where it is there as a whole."""
        return self._view

    def run(self, index: int) -> memoryview:
        at, nbytes = self._order.runs[index]
        if self._order.ring:
            at = index % self._order.ring * self._order.place_bytes
        return self._view[at : at + nbytes]

    def close(self) -> None:
        self._view.release()


class Regrouped:
    """Chunks that lie in `memory`, put together for a data file of another layout, a run at a time.

    `places[i]` is where chunk i of the new file begins in memory. Each thread has one buffer.
    """

    def __init__(self, memory: Memory, file: FileLayout, places: Sequence[int]) -> None:
        self._whole, self._file, self._places = memory.whole, file, places
        self._runs = (*file.header_runs, *file.runs)
        self._buffers = threading.local()

    def run(self, index: int) -> memoryview:
        run, view, end = self._runs[index], self._buffer(), 0
        if not run.pieces:
            view[: run.nbytes] = self._file.header[run.at : run.at + run.nbytes]
        for chunk, start, stop, at in run.pieces:
            view[end:at] = bytes(at - end)
            end = at + stop - start
            view[at:end] = self._whole[self._places[chunk] + start : self._places[chunk] + stop]
        if run.pieces:
            view[end : run.nbytes] = bytes(run.nbytes - end)
        return view[: run.nbytes]

    def _buffer(self) -> memoryview:
        if not hasattr(self._buffers, "view"):
            self._buffers.view = memoryview(mmap.mmap(-1, RUN_BYTES + ALIGN_BYTES))  # page-aligned
        found: memoryview = self._buffers.view
        return found


class Copying:
    """How much of a snapshot is there, for the threads that wait for it."""

    def __init__(self, total: int) -> None:
        self.total, self._copied, self._gone = total, 0, ""
        self._changed = threading.Condition()

    def advance(self, runs: int) -> None:
        with self._changed:
            self._copied = max(self._copied, min(runs, self.total))
            self._changed.notify_all()

    def give_up(self, why: str) -> None:
        """Wake all who wait; they raise SaveFailed with `why`."""
        with self._changed:
            self._gone = why
            self._changed.notify_all()

    @property
    def gave_up(self) -> bool:
        return bool(self._gone)

    def wait_for(self, index: int, deadline: float) -> None:
        """Return once run `index` is copied."""
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: self._copied > index or self._gone, max(deadline - time.monotonic(), 0)
            )
            if self._gone or not arrived:
                raise SaveFailed(self._gone or "the copy did not end within commit_timeout_s")


def pieces_of(order: Order) -> tuple[tuple[Piece, ...], ...]:
    """For each run of the order, which bytes of which chunks lie in it. `SaveFailed` if a run cuts a block."""
    slots = sorted((slot.at, index) for index, slot in enumerate(order.slots))
    starts = [at for at, _ in slots]
    found = []
    for at, nbytes in order.runs:
        inside: list[Piece] = []
        for _, index in slots[max(bisect_right(starts, at) - 1, 0) : bisect_right(starts, at + nbytes - 1)]:
            slot = order.slots[index]
            start, stop = max(at - slot.at, 0), min(at + nbytes - slot.at, slot.nbytes)
            if start < stop:
                if start % BLOCK_BYTES or (stop % BLOCK_BYTES and stop != slot.nbytes):
                    raise SaveFailed(f"{order.job.attempt}: a run of rank {order.rank} cuts a block of {slot.key}")
                inside.append((index, start, stop, slot.at + start - at))
        found.append(tuple(inside))
    return tuple(found)


def sample(order: Order, memory: Memory, last: int, nbytes: int) -> Iterator[tuple[memoryview, int]]:
    """Blocks of the last runs up to run `last`, about `nbytes` in all, and the item size of each."""
    pieces, taken = pieces_of(order), 0
    for index in range(last, -1, -1):
        for slot, start, stop, at in pieces[index]:
            if taken < nbytes:
                size = min(BLOCK_BYTES, stop - start)
                yield memory.run(index)[at : at + size], ITEMSIZE[order.slots[slot].dtype]
                taken += size


class Digests:
    """The block digests of each slot, as they come in."""

    def __init__(self, order: Order, digest: Digest) -> None:
        self.digest, self._nbytes = digest, len(digest(b""))
        self._slots = [bytearray(slot.blocks * self._nbytes) for slot in order.slots]

    def take(self, piece: Piece, memory: memoryview) -> None:
        index, start, stop, at = piece
        for block in range(start, stop, BLOCK_BYTES):
            first = at + block - start
            found = self.digest(memory[first : at + min(block + BLOCK_BYTES, stop) - start])
            place = block // BLOCK_BYTES * self._nbytes
            self._slots[index][place : place + self._nbytes] = found

    def of(self, index: int) -> bytes:
        return bytes(self._slots[index])

    def chunks(self, order: Order) -> tuple[Chunk, ...]:
        """What the slots of `order` hold, in its data file."""
        return tuple(
            Chunk(slot.key, slot.offset, slot.shape, slot.dtype, "", slot.at, slot.nbytes, "raw", self.of(index))
            for index, slot in enumerate(order.slots)
        )


def take_in(
    order: Order,
    memory: Memory | Regrouped,
    copying: Copying,
    into: DataWriter | None,
    digest: Digest,
    *,
    threads: int,
    deadline: float,
    freed: Callable[[int], None] = lambda runs: None,
) -> Digests:
    """Digest every run as it is copied, and write it `into` a data file if one is given; finished at the end.

    `freed(n)`: the first n runs are no longer needed in memory; called from any thread. Raises StorageError if the
    store refuses, SaveFailed if the copy ends early or `deadline` (monotonic) passes.
    """
    digests, taken = Digests(order, digest), _Prefix(freed)

    def act(index: int) -> None:
        copying.wait_for(index, deadline)
        try:
            with memory.run(index) as view:
                for piece in pieces[index]:
                    digests.take(piece, view)
                if into is not None:
                    into.write(order.runs[index][0], view)
        except BaseException as error:
            copying.give_up(f"another part of it failed: {error}")  # nobody waits for what is of no use
            raise
        taken.done(index)

    indices: Sequence[int] = range(len(order.runs))
    if into is not None and into.in_order and not order.ring:
        indices = sorted(indices, key=lambda index: order.runs[index][0])
    try:
        pieces = pieces_of(order)
        _in_threads(indices, act, threads)
    except BaseException:
        if into is not None:
            into.abandon()
        raise
    if into is not None:
        into.finish()
    return digests


class _Prefix:
    """Turns runs that end in any order into how many from the first on have ended."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell, self._next, self._early = tell, 0, set[int]()
        self._lock = threading.Lock()

    def done(self, index: int) -> None:
        with self._lock:
            self._early.add(index)
            before = self._next
            while self._next in self._early:
                self._early.remove(self._next)
                self._next += 1
            if self._next > before:
                self._tell(self._next)


def _in_threads(items: Iterable[int], act: Callable[[int], None], threads: int) -> None:
    """Run `act` for all items, in order of their begin; the first error ends all and is raised."""
    queue: Iterator[int] = iter(items)
    lock, errors = threading.Lock(), list[BaseException]()

    def work() -> None:
        while not errors:
            with lock:
                item = next(queue, None)
            if item is None:
                return
            try:
                act(item)
            except BaseException as error:
                errors.append(error)

    others = [threading.Thread(target=work, name="keeper-io", daemon=True) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()
    if errors:
        raise errors[0]


def part_of(order: Order, chunks: tuple[Chunk, ...], data_bytes: int) -> Part:
    """The part of `order` whose chunks lie as given, its own in a data file of `data_bytes`."""
    return Part(order.rank, order.job.attempt, data_bytes, chunks, order.values, order.rank_values)
