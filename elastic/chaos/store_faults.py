"""Faults of what a run is stored on: a disk that is full, read-only, slow, still, or fails; a bucket that errs."""

from __future__ import annotations

import asyncio
import subprocess
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from elastic.chaos import processes
from elastic.chaos.bucket import Bucket
from elastic.chaos.cgroups import GroundError
from elastic.chaos.disk import Disk
from elastic.chaos.fault import Fault

SLOW_MS = 200.0
ERROR_SHARE = 0.3
ATTACH_LIMIT_S = 10.0
WRITES, FLUSHES = ("pwrite64", "pwritev", "fsync", "fdatasync"), ("fsync", "fdatasync")


class DiskFull(Fault):
    """The store has no byte left, until it has again: saves wait or fail, and nothing older is touched."""

    kind, stands_for, heals = "disk-full", "a quota or disk that is full", True
    promise = "no committed step is lost; once there is room, saves go on"
    needs = frozenset({"boxes", "disk"})
    restarts, storage = False, True

    async def inject(self) -> str:
        return f"the last {await asyncio.to_thread(self._disk().fill) >> 10} KiB of the store were taken"

    async def heal(self) -> None:
        await asyncio.to_thread(self._disk().free)

    def _disk(self) -> Disk:
        if self.ground.disk is None:
            raise GroundError(f"{self.kind} needs a disk of its own for the run: set store_mb in the scenario")
        return self.ground.disk


class ReadOnly(DiskFull):
    """The store's file system turns read-only, as after an error: 1 of 584 faults in a trace of 400 servers
    (arXiv 2502.03885)."""

    kind, stands_for = "read-only", "a file system that turned read-only"

    async def inject(self) -> str:
        await asyncio.to_thread(self._disk().read_only, True)
        return "the store refuses every write"

    async def heal(self) -> None:
        await asyncio.to_thread(self._disk().read_only, False)


class DiskStall(DiskFull):
    """The store's file system stands still: who writes waits in the kernel, where no signal reaches it, as where a
    file server does not answer. No share was published."""

    kind, stands_for = "disk-stall", "a file server that does not answer"
    promise = "training goes on, no committed step is lost, and saves go on once it answers"

    async def inject(self) -> str:
        await asyncio.to_thread(self._disk().freeze)
        return "every write to the store waits in the kernel"

    async def heal(self) -> None:
        await asyncio.to_thread(self._disk().thaw)


class Traced(Fault):
    """System calls of a node's agent, workers and keeper, and of what they start, meet what `injected` says, by strace,
    until it is healed."""

    heals, restarts, storage = True, False, True
    _tracer: asyncio.subprocess.Process | None = None
    needs = frozenset({"strace"})
    calls: ClassVar[Sequence[str]]

    @abstractmethod
    def injected(self) -> str:
        """What strace is to do to `calls`."""

    async def inject(self) -> str:
        agent = self.node.agent()
        traced = sorted({*self.node.workers(), *self.node.keepers(), *([agent] if agent else [])})
        if not traced:
            raise GroundError(f"{self.node.name} has no agent, worker or keeper")
        calls = ",".join(self.calls)
        self._tracer = await asyncio.create_subprocess_exec(
            "strace", "-f", "-qqq", "-o", str(self._log), "-e", f"trace={calls}",
            "-e", f"inject={calls}:{self.injected()}", "-p", ",".join(map(str, traced)),
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + ATTACH_LIMIT_S
        while not all(processes.is_traced(pid) for pid in traced):
            if time.monotonic() > deadline or self._tracer.returncode is not None:
                await self.heal()
                raise GroundError(f"strace could not be attached to {self.node.name}")
            await asyncio.sleep(0.01)
        return f"{calls} of {len(traced)} processes of {self.node.name} meet {self.injected()}"

    async def heal(self) -> None:
        if self._tracer is not None:
            if self._tracer.returncode is None:
                self._tracer.terminate()  # it lets go of them
            await self._tracer.wait()

    @property
    def met(self) -> int:
        said = self._log.read_text(errors="replace") if self._log.exists() else ""
        return said.count("(INJECTED)") + said.count("(DELAYED)")

    @property
    def _log(self) -> Path:
        return self.ground.folder / f"{self.node.name}.{self.kind}"


class FsyncFails(Traced):
    """Every fsync of a node fails with EIO: the disk took the data and cannot keep them. No share was published.

    What is then in the page cache is not believed: the save fails, and the next one writes everything anew.
    """

    kind, stands_for = "fsync-fails", "a disk that cannot keep what it took"
    promise = "no committed step is lost: the save that met it is not committed, and later ones are"
    calls = FLUSHES

    def injected(self) -> str:
        return "error=EIO"


class SlowDisk(Traced):
    """Every pwrite and fsync of a node takes `amount` ms (200) more, as on a disk that remaps its sectors, or that
    others use. No share was published."""

    kind, stands_for = "slow-disk", "a disk that became slow"
    promise = "the run goes on; steps become durable later"
    calls = WRITES

    def injected(self) -> str:
        return f"delay_enter={int((self.amount or SLOW_MS) * 1000)}"


class StoreErrors(Fault):
    """A share `amount` (0.3) of the requests to the bucket is answered with 500, 503 or 429, or reset."""

    kind, stands_for, heals = "store-errors", "an object store that is overloaded", True
    promise = "survived: requests are tried again, and no committed step is lost"
    needs = frozenset({"s3"})
    restarts, storage = False, True
    _met_before = 0
    faults: ClassVar[Sequence[str]] = ("500", "503", "429", "reset")

    async def inject(self) -> str:
        share = ERROR_SHARE if self.amount is None else self.amount
        self._bucket().fail(share, self.faults)
        self._met_before = self._bucket().met
        return f"{share:.0%} of the requests to the bucket meet {', '.join(self.faults)}"

    async def heal(self) -> None:
        self._bucket().fail(0.0, ())

    @property
    def met(self) -> int | None:
        return self.ground.bucket.met - self._met_before if self.ground.bucket is not None else None

    def _bucket(self) -> Bucket:
        if self.ground.bucket is None:
            raise GroundError(f'{self.kind} needs a bucket: set store = "s3" in the scenario')
        return self.ground.bucket


class LostReplies(StoreErrors):
    """A share of the requests is done, and its answer never arrives: was the record written or not?"""

    kind, stands_for = "lost-replies", "answers of an object store that are lost"
    promise = "survived: what was not answered is read back, and nothing is committed twice"
    faults = ("lost", "cut")


class StoreStall(StoreErrors):
    """A share of the requests is not answered, and the connection stays open."""

    kind, stands_for = "store-stall", "an object store that does not answer"
    faults = ("stall",)


class StoreAway(StoreErrors):
    """The bucket cannot be reached by any node: its cable carries nothing."""

    kind, stands_for = "store-away", "an object store that is away"
    promise = "training goes on, no membership changes, and saves go on once it is back"
    needs = frozenset({"boxes", "s3"})

    async def inject(self) -> str:
        self._bucket().away(True)
        return "no node reaches the bucket"

    async def heal(self) -> None:
        self._bucket().away(False)

    @property
    def met(self) -> int | None:
        return None
