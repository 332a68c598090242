"""What this machine and a store can do, by doing it, and what that makes of a save: `ckpt bench`.

Owns the measuring (`measure`) and the arithmetic (`cost_of`, pure). Data moves as in a save and a restore: runs of
4 MiB, in as many threads as a keeper takes, past the page cache, fsynced or uploaded in parts. One process measures,
so what several ranks of a node share (memory, disk, network) is measured as a whole, and what each has for itself is
not multiplied.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Final

from ckpt.datafile import open_data
from ckpt.doctor import scratch_folder
from ckpt.errors import Corrupt, StorageError
from ckpt.interval import Interval
from ckpt.keeper.node import IO_THREADS
from ckpt.keeper.ram import free_bytes, ram_root
from ckpt.manifest import BLOCK_BYTES, Digest
from ckpt.plan import RUN_BYTES
from ckpt.reading import READ_THREADS
from ckpt.store import REQUESTS, Store, by_requests

MOVES: Final = 5  # two copies, digests, to the store and back
RECORDS: Final = 9
RECORD_BYTES: Final = 1024
RECORDS_OF_A_SAVE: Final = 3  # one after the other: the part, the MANIFEST, the record

OnBytes = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured. `first_copy_bytes_per_s`: into memory of the RAM tier that was never used before, as at the
    first save. `record_s`: for one small file that is created exclusively. What is read is verified."""

    first_copy_bytes_per_s: float
    copy_bytes_per_s: float
    digest_bytes_per_s: float
    write_bytes_per_s: float
    read_bytes_per_s: float
    record_s: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a save of `state_bytes` from this machine costs, in seconds, and the interval that follows from it.

    `copied_s` is what training waits at most: what its optimizers update is copied while it goes on. `lost` is the
    share of the time, 0 to 1, that saves and failures take at this interval.
    """

    state_bytes: int
    first_copied_s: float
    copied_s: float
    durable_s: float
    restored_s: float
    mtbf_s: float
    interval_s: float
    lost: float


def cost_of(rates: Rates, state_bytes: int, mtbf_s: float) -> Cost:
    """The cost of saving `state_bytes` on a machine of these `rates` that fails every `mtbf_s` seconds on average.

    Copying, digests and writing overlap, so the slowest of them counts.
    """
    copied_s = state_bytes / rates.copy_bytes_per_s
    slowest = min(rates.copy_bytes_per_s, rates.digest_bytes_per_s, rates.write_bytes_per_s)
    durable_s = state_bytes / slowest + RECORDS_OF_A_SAVE * rates.record_s
    interval = Interval(mtbf_s)
    interval.saved(copied_s, durable_s)
    return Cost(
        state_bytes=state_bytes,
        first_copied_s=state_bytes / rates.first_copy_bytes_per_s,
        copied_s=copied_s,
        durable_s=durable_s,
        restored_s=state_bytes / rates.read_bytes_per_s,
        mtbf_s=mtbf_s,
        interval_s=interval.seconds,
        lost=interval.expected_loss,
    )


def amount(nbytes: int) -> int:
    """Bytes that `measure` moves each time when asked for `nbytes`: whole runs that fit into free memory three times.

    StorageError where not even one run does.
    """
    try:
        os.makedirs(ram_root(), exist_ok=True)
        room = free_bytes(ram_root()) // 3
    except OSError as error:
        raise _no_ram(error.strerror) from error
    runs = min(math.ceil(nbytes / RUN_BYTES), room // RUN_BYTES)
    if runs < 1:
        raise _no_ram(f"there is no room for {RUN_BYTES >> 20} MiB")
    return runs * RUN_BYTES


def _no_ram(why: str | None) -> StorageError:
    return StorageError(
        f"{ram_root()}: {why}. The RAM tier of a run lies there: name another tmpfs directory in CKPT_RAM_DIR, or "
        "measure less, with --mb"
    )


def measure(store: Store, nbytes: int, digest: Digest, on_bytes: OnBytes) -> Rates:
    """Move `nbytes` (of `amount`) MOVES times: in memory, and into a folder of its own in `store` and back.

    `on_bytes` hears of the progress in bytes, from any thread. Raises StorageError where the store refuses, Corrupt
    where it gives back other bytes than it took.
    """
    with _memory(nbytes) as data:
        fresh, again = _ram(data, on_bytes)
        digests: list[bytes] = []

        def take(at: int) -> None:
            digests.append(_digests(data[at : at + RUN_BYTES], digest))
            on_bytes(RUN_BYTES)

        digesting = _rate(nbytes, lambda: _in_threads(take, nbytes, 1))
        with scratch_folder(store, "bench") as folder:
            writing = _rate(nbytes, lambda: _write(store, f"{folder}/data", data, on_bytes))
            reading = _rate(nbytes, lambda: _read(store, f"{folder}/data", digests, digest, on_bytes))
            record_s = median(_record_s(store, f"{folder}/log/{number}") for number in range(RECORDS))
    return Rates(
        first_copy_bytes_per_s=fresh,
        copy_bytes_per_s=again,
        digest_bytes_per_s=digesting,
        write_bytes_per_s=writing,
        read_bytes_per_s=reading,
        record_s=record_s,
    )


@contextmanager
def _memory(nbytes: int) -> Iterator[memoryview]:
    """Page-aligned memory full of bytes that no store can pack."""
    memory = mmap.mmap(-1, nbytes)
    random = secrets.token_bytes(1 << 20)
    for at in range(0, nbytes, len(random)):
        memory[at : at + len(random)] = secrets.token_bytes(16) + random[16:]
    with memoryview(memory) as view:
        yield view


def _rate(nbytes: int, act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return nbytes / max(time.monotonic() - began, 1e-9)


def _ram(data: memoryview, on_bytes: OnBytes) -> tuple[float, float]:
    """Speed of a copy into new memory of the RAM tier, and of one into the same again."""
    try:
        with tempfile.TemporaryFile(dir=ram_root()) as file:
            os.posix_fallocate(file.fileno(), 0, len(data))
            with mmap.mmap(file.fileno(), len(data)) as arena:

                def copy(at: int) -> None:
                    arena[at : at + RUN_BYTES] = data[at : at + RUN_BYTES]
                    on_bytes(RUN_BYTES)

                first, later = (_rate(len(data), lambda: _in_threads(copy, len(data), 1)) for _ in range(2))
                return first, later
    except OSError as error:
        raise _no_ram(error.strerror) from error


def _digests(run: memoryview, digest: Digest) -> bytes:
    return b"".join(digest(run[block : block + BLOCK_BYTES]) for block in range(0, len(run), BLOCK_BYTES))


def _write(store: Store, path: str, data: memoryview, on_bytes: OnBytes) -> None:
    writer = store.write_data(path, len(data))

    def write(at: int) -> None:
        writer.write(at, data[at : at + RUN_BYTES])
        on_bytes(RUN_BYTES)

    try:
        _in_threads(write, len(data), REQUESTS if writer.in_order else IO_THREADS)
    except BaseException:
        writer.abandon()
        raise
    writer.finish()


def _read(store: Store, path: str, expected: Sequence[bytes], digest: Digest, on_bytes: OnBytes) -> None:
    """Past the page cache, each block verified, as a restore does."""
    file, buffers = open_data(store, path), threading.local()

    def read(at: int) -> None:
        if not hasattr(buffers, "view"):
            buffers.view = memoryview(mmap.mmap(-1, RUN_BYTES))
        file.read_cold(at, RUN_BYTES, buffers.view)
        if _digests(buffers.view, digest) != expected[at // RUN_BYTES]:
            raise Corrupt(f"{file.name}: other bytes came back than were written. Keep no run here")
        on_bytes(RUN_BYTES)

    with closing(file):
        _in_threads(read, len(expected) * RUN_BYTES, REQUESTS if by_requests(store) else READ_THREADS)


def _in_threads(act: Callable[[int], None], nbytes: int, threads: int) -> None:
    """`act` at the first byte of each run of `nbytes`."""
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(act, range(0, nbytes, RUN_BYTES)):
            pass


def _record_s(store: Store, path: str) -> float:
    began = time.monotonic()
    store.create(path, bytes(RECORD_BYTES))
    return time.monotonic() - began
