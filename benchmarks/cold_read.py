"""Reading a data file against the disk's limit: cold and warm, direct and through the page cache.

    python benchmarks/cold_read.py [--dir DIR] [--gb 1.5] [--rounds 3]

The limits: 2 threads that read the same bytes by direct I/O into aligned buffers, 4 MiB at a time; 2 threads that read
it through the page cache with read-ahead; warm, 2 threads with preadv into touched memory. Ours: `read_data`, digests
verified, with the bytes wanted by this process alone (direct when cold) and by others too (through the page cache).
The page cache is dropped for the file before each cold read. Each round runs all of them in an order of its own.
"""

import argparse
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from machine import busy, default_folder, describe

from ckpt.adapt.tensors import bytes_view
from ckpt.buffers import each
from ckpt.datafile import LocalFile
from ckpt.direct import open_cold
from ckpt.manifest import BLOCK_BYTES, Chunk, digest
from ckpt.plan import RUN_BYTES, LoadPlan, Target, plan_load
from ckpt.reading import Neighbours, read_data
from ckpt.sharding import Whole, pieces_of
from ckpt.slices import whole

READERS = 2
TENSOR_BYTES = 64 << 20
READ_AHEAD_BYTES = 32 << 20


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--dir", type=Path, default=default_folder())
    options.add_argument("--gb", type=float, default=1.5)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    print(describe(given.dir))
    if found := busy():
        print(found)
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="cold-read-") as folder:
        path = Path(folder) / "data"
        report(measure(path, *prepare(path, int(given.gb * 1e9) // TENSOR_BYTES), given.rounds))


def prepare(path: Path, count: int) -> tuple[LoadPlan, list[torch.Tensor]]:
    """A data file of `count` tensors, the plan to read it, and touched memory to read it into."""
    content = torch.randint(0, 256, (TENSOR_BYTES,), dtype=torch.uint8)
    memory = bytes_view(content)
    digests = b"".join(digest(memory[at : at + BLOCK_BYTES]) for at in range(0, TENSOR_BYTES, BLOCK_BYTES))
    with path.open("wb") as stream:
        for _ in range(count):
            stream.write(memory)
        os.fsync(stream.fileno())
    shape = (TENSOR_BYTES,)
    chunks = [
        Chunk(str(i), (0,), shape, "uint8", "", i * TENSOR_BYTES, TENSOR_BYTES, "raw", digests) for i in range(count)
    ]
    targets = [Target(str(i), pieces_of(Whole(), shape, 0), shape, direct=True) for i in range(count)]
    return plan_load(targets, {0: chunks}), [torch.ones(shape, dtype=torch.uint8) for _ in range(count)]


def measure(
    path: Path, plan: LoadPlan, tensors: list[torch.Tensor], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each round."""
    shared = Neighbours(0, 1, {fetch.segments[0].chunk.key: [whole((TENSOR_BYTES,))] for fetch in plan.fetches})
    ours = partial(read_data, lambda _: LocalFile(str(path)), plan, tensors)
    cold: dict[str, Callable[[], None]] = {
        "cold: limit, direct": partial(read_direct, path),
        "cold: limit, read-ahead": partial(read_buffered, path, tensors, READ_AHEAD_BYTES),
        "cold: ours, direct": ours,
        "cold: ours, page cache": partial(ours, shared),
    }
    warm: dict[str, Callable[[], None]] = {
        "warm: limit, preadv": partial(read_buffered, path, tensors, 0),
        "warm: ours": ours,
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (*cold, *warm)}
    for _ in range(rounds):
        for name in random.sample(list(cold), len(cold)):
            drop(path)
            found[name].append(timed(cold[name]))
        read_buffered(path, tensors, 0)
        for name in random.sample(list(warm), len(warm)):
            found[name].append(timed(warm[name]))
    return found


def drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def timed(act: Callable[[], None]) -> tuple[float, float]:
    used, began = cpu_s(), time.perf_counter()
    act()
    return time.perf_counter() - began, cpu_s() - used


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def read_direct(path: Path) -> None:
    fd = open_cold(str(path))
    steps = range(0, path.stat().st_size, RUN_BYTES)
    each(steps, lambda at, buffer: check(os.preadv(fd, [bytes_view(buffer)], at)), READERS)
    os.close(fd)


def read_buffered(path: Path, tensors: list[torch.Tensor], ahead_bytes: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    views = [bytes_view(tensor) for tensor in tensors]

    def announced() -> Iterable[int]:
        for at in range(0, len(views) * TENSOR_BYTES, RUN_BYTES):
            if ahead_bytes:
                start, nbytes = (at + ahead_bytes, RUN_BYTES) if at else (0, ahead_bytes + RUN_BYTES)
                os.posix_fadvise(fd, start, nbytes, os.POSIX_FADV_WILLNEED)
            yield at

    def read(at: int, _: torch.Tensor) -> None:
        first = at % TENSOR_BYTES
        check(os.preadv(fd, [views[at // TENSOR_BYTES][first : first + RUN_BYTES]], at))

    each(announced(), read, READERS)
    os.close(fd)


def check(got: int) -> None:
    if got != RUN_BYTES:
        raise OSError(f"a read brought {got} bytes of {RUN_BYTES}")


def report(found: dict[str, list[tuple[float, float]]]) -> None:
    print(f"{'':26}median s  CPU s   rounds, s")
    for name, rounds in found.items():
        wall, cpu = (statistics.median(figures) for figures in zip(*rounds, strict=True))
        print(f"{name:26}{wall:8.3f}{cpu:7.2f}   {' '.join(f'{wall:.2f}' for wall, _ in rounds)}")


if __name__ == "__main__":
    main()
