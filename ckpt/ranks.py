"""How the ranks of a run speak to each other: a small process group of our own, used from the calling thread only.

The training's groups are never touched, and no collective runs in the background. Every wait ends after
`timeout_s`; a rank that is gone or late is named where the transport can tell.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from ckpt.errors import DeadlineExceeded, Incompatible

T = TypeVar("T")


class Ranks(Protocol):
    """The ranks of a run, as one of them sees them. Every method but `close` is collective."""

    rank: int
    size: int

    def gather(self, data: bytes) -> list[bytes]:
        """What every rank brought, in order of rank."""

    def share(self, data: bytes, source: int = 0) -> bytes:
        """What `source` brought; the others' argument is ignored."""

    def maximum(self, data: bytes) -> bytes:
        """The largest value of each byte among all ranks; all bring as many bytes."""

    def begin_maximum(self, data: bytes) -> Callable[[], bytes]:
        """`maximum`, begun now and read by calling the result."""

    def meet(self) -> None:
        """Wait for all ranks; `DeadlineExceeded` that, on rank 0, names those that did not come."""

    def close(self) -> None: ...


@dataclass
class Alone:
    """A process by itself."""

    rank: int = 0
    size: int = 1

    def gather(self, data: bytes) -> list[bytes]:
        return [data]

    def share(self, data: bytes, source: int = 0) -> bytes:
        return data

    def maximum(self, data: bytes) -> bytes:
        return data

    def begin_maximum(self, data: bytes) -> Callable[[], bytes]:
        return lambda: data

    def meet(self) -> None:
        return

    def close(self) -> None:
        return


class Gloo:
    """All ranks of the default process group, over a gloo group of our own."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._maximum = dist.AllreduceOptions()
        self._maximum.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)

    def gather(self, data: bytes) -> list[bytes]:
        own = torch.tensor([len(data)], dtype=torch.int64)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        self._do(lambda: dist.all_gather(sizes, own, group=self._group))
        longest = max(int(size) for size in sizes)
        if not longest:
            return [b""] * self.size
        padded = _tensor(data + bytes(longest - len(data)))
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        self._do(lambda: dist.all_gather(found, padded, group=self._group))
        return [_bytes(tensor)[: int(size)] for tensor, size in zip(found, sizes, strict=True)]

    def share(self, data: bytes, source: int = 0) -> bytes:
        size = torch.tensor([len(data)], dtype=torch.int64)
        self._do(lambda: dist.broadcast(size, group_src=source, group=self._group))
        if not int(size):
            return b""
        tensor = _tensor(data) if self.rank == source else torch.empty(int(size), dtype=torch.uint8)
        self._do(lambda: dist.broadcast(tensor, group_src=source, group=self._group))
        return _bytes(tensor)

    def maximum(self, data: bytes) -> bytes:
        return self.begin_maximum(data)()

    def begin_maximum(self, data: bytes) -> Callable[[], bytes]:
        if not data:
            return lambda: b""
        tensor = _tensor(data)
        work = self._do(lambda: self._group.allreduce([tensor], self._maximum))  # in every step: past torch's checks

        def read() -> bytes:
            self._do(work.wait)
            return _bytes(tensor)

        return read

    def meet(self) -> None:
        limit = timedelta(seconds=self.timeout_s)
        try:
            dist.monitored_barrier(self._group, timeout=limit, wait_all_ranks=True)
        except RuntimeError as error:
            named = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
            who = f"rank {named[1].strip()}" if named else "another rank (the log of rank 0 names it)"
            raise DeadlineExceeded(f"{who} died, or did not come within {self.timeout_s:g} s.") from error

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group(self._group)

    def _do(self, act: Callable[[], T]) -> T:
        try:
            return act()
        except RuntimeError as error:
            raise DeadlineExceeded(
                f"rank {self.rank}: another rank died, or did not answer within {self.timeout_s:g} s ({error}). "
                "Committed steps are as they were; restart the job to go on from the newest."
            ) from error


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.numel())


def connect(timeout_s: float) -> Ranks:
    """The ranks of this job. `Incompatible` if WORLD_SIZE says there are several but none can be reached."""
    if dist.is_available() and dist.is_initialized():
        return Gloo(timeout_s) if dist.get_world_size() > 1 else Alone()
    world = os.environ.get("WORLD_SIZE", "1")
    if world.isdecimal() and int(world) > 1:
        raise Incompatible(
            f"WORLD_SIZE is {world}, but torch.distributed has no process group yet, so the ranks would save over "
            "each other. Call torch.distributed.init_process_group(...) before ckpt is used."
        )
    return Alone()
