"""Faults that damage bytes: of the newest step in the store, of its copy in a node's memory, of the live state."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path

from ckpt.records import Commit
from elastic.chaos import processes
from elastic.chaos.cgroups import GroundError
from elastic.chaos.fault import Fault

FLIPPED_BIT = 0x10
TORN_SHARE = 4  # a torn file loses a quarter


class Damage(Fault):
    """What is done to the data files of the newest step in the store."""

    promise = "detected: `ckpt check` names the file, and no restore takes it"
    restarts = False

    async def inject(self) -> str:
        head = self._newest()
        files = sorted((self.ground.store / "steps" / head.attempt).glob("*.safetensors"))
        return f"of step {head.step}, {self._damage(files)}"

    @abstractmethod
    def _damage(self, files: list[Path]) -> str:
        """Do it to `files`, sorted; what was done. GroundError if there are too few."""

    def _newest(self) -> Commit:
        with self.ground.opened() as run:
            head = run.log.read().head
        if head is None:
            raise GroundError("nothing is committed yet")
        return head


class BitRot(Damage):
    """A bit of each data file of the newest step flips in the store: silent corruption was 1.4 % of all causes."""

    kind, stands_for, share = "bit-rot", "silent data corruption", 1.4

    def _damage(self, files: list[Path]) -> str:
        return f"a bit changed in {_flipped(files)}"


class TornWrite(Damage):
    """Each data file of the newest step loses its tail, as where a disk acknowledged what it had not written.

    No share was published.
    """

    kind, stands_for = "torn-write", "a disk that acknowledges early and loses power"

    def _damage(self, files: list[Path]) -> str:
        for file in files:
            os.truncate(file, (size := file.stat().st_size) - size // TORN_SHARE)
        return f"{', '.join(file.name for file in files)} lost the last quarter"


class SwappedShards(Damage):
    """The first and the last data file of the newest step exchange their contents, as after a repair by hand.

    No share was published. Each file is whole in itself: only what the step says of it can tell.
    """

    kind, stands_for = "swapped-shards", "a copy that mixed up files"

    def _damage(self, files: list[Path]) -> str:
        if len(files) < 2:
            raise GroundError("the newest step has one data file: swapping needs two ranks that write")
        one, other = files[0], files[-1]
        aside = one.with_name(f"{one.name}.aside")
        one.rename(aside)
        other.rename(one)
        aside.rename(other)
        return f"{one.name} and {other.name} were exchanged"


class RotInRam(Damage):
    """A bit flips in a node's copies of committed steps in memory, and its workers are killed, so that all restore.

    Memory without ECC, or with an error that ECC did not see; silent corruption was 1.4 % of all causes, wherever.
    """

    kind, stands_for, restarts = "rot-in-ram", "a memory error in a copy of the state", True
    promise = "survived: the copy in memory is refused, and the same step is read from the store"

    async def inject(self) -> str:
        workers = self.node.workers()
        if not workers:
            raise GroundError(f"{self.node.name} has no worker")
        with self.ground.opened() as run:
            committed = {one.attempt for one in run.log.read().standing()}
        held = [file for file in self.node.ram.glob("holdfast-*/*/steps/*/*.safetensors")
                if file.parent.name in committed and file.with_suffix(".sealed").exists()]  # fmt: skip
        if not held:
            raise GroundError(f"{self.node.name} holds no committed step in memory")
        processes.kill(workers)
        return f"in memory of {self.node.name}, {self._damage(sorted(held))}; its workers were killed"

    def _damage(self, files: list[Path]) -> str:
        return f"a bit changed in {_flipped(files)}"


def _flipped(files: Iterable[Path]) -> str:
    return ", ".join(f"byte {_flip(file)} of {file.parent.name}/{file.name}" for file in files)


def _flip(file: Path) -> int:
    """Change a bit in the middle of a file; where."""
    with open(file, "r+b") as data:
        at = os.fstat(data.fileno()).st_size // 2
        data.seek(at)
        byte = data.read(1)[0]
        data.seek(at)
        data.write(bytes([byte ^ FLIPPED_BIT]))
    return at
