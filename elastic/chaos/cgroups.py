"""Control groups of either version, for what the kernel does to a whole node: freeze it, limit its memory or CPU."""

from __future__ import annotations

import time
from pathlib import Path

from ckpt.errors import CkptError

FREEZE_LIMIT_S = 10.0
PERIOD_US = 100_000


class GroundError(CkptError):
    """The machine refused something that a node or a fault needs."""


def root_of(controller: str) -> tuple[Path, int] | None:
    """Where groups of a controller (`freezer`, `memory`, `cpu`) are made, and the version; None if nowhere."""
    version_2: Path | None = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        place, kind, options = Path(before.split()[4]), after.split()[0], after.split()[-1].split(",")
        if kind == "cgroup" and controller in options:
            return place, 1
        if kind == "cgroup2":
            version_2 = place
    if version_2 is None:
        return None
    enabled = (version_2 / "cgroup.subtree_control").read_text().split()
    return (version_2, 2) if controller == "freezer" or controller in enabled else None


class Cgroup:
    """A group of one controller for the processes of a node; they are put in by writing to `path`/cgroup.procs."""

    def __init__(self, path: Path, version: int) -> None:
        self.path, self.version = path, version

    @classmethod
    def make(cls, controller: str, name: str) -> Cgroup:
        found = root_of(controller)
        if found is None:
            raise GroundError(f"there is no {controller} control group on this machine")
        (path := found[0] / name).mkdir()
        return cls(path, found[1])

    def freeze(self, frozen: bool) -> None:
        """Stop or go on, every process at once; returns when it is so."""
        names = {1: ("freezer.state", "FROZEN", "THAWED"), 2: ("cgroup.freeze", "1", "0")}
        name, yes, no = names[self.version]
        (self.path / name).write_text(yes if frozen else no)
        deadline = time.monotonic() + FREEZE_LIMIT_S
        while self.is_frozen() != frozen:
            if time.monotonic() > deadline:
                raise GroundError(f"{self.path} was not frozen within {FREEZE_LIMIT_S:g} s")
            time.sleep(0.01)

    def is_frozen(self) -> bool:
        if self.version == 1:
            return (self.path / "freezer.state").read_text().strip() == "FROZEN"
        return "frozen 1" in (self.path / "cgroup.events").read_text()

    def remove(self) -> None:
        """Once its processes are gone, a frozen group's by being thawed first."""
        deadline = time.monotonic() + FREEZE_LIMIT_S
        while self.path.exists() and time.monotonic() < deadline:
            try:
                self.path.rmdir()
            except OSError:
                time.sleep(0.01)

    def limit_memory(self, limit_bytes: int | None) -> None:
        """What lies above it is killed by the kernel; None takes the limit away."""
        name, none = ("memory.limit_in_bytes", "-1") if self.version == 1 else ("memory.max", "max")
        (self.path / name).write_text(none if limit_bytes is None else str(limit_bytes))

    def memory_bytes(self) -> int:
        name = "memory.usage_in_bytes" if self.version == 1 else "memory.current"
        return int((self.path / name).read_text())

    def limit_cpu(self, cpus: float | None) -> None:
        """So much of a CPU for all of them together; None takes the limit away."""
        quota = int(cpus * PERIOD_US) if cpus is not None else None
        if self.version == 1:
            (self.path / "cpu.cfs_quota_us").write_text(str(quota if quota is not None else -1))
        else:
            (self.path / "cpu.max").write_text(f"{quota if quota is not None else 'max'} {PERIOD_US}")

    def cpu_limit(self) -> float | None:
        name = "cpu.cfs_quota_us" if self.version == 1 else "cpu.max"
        quota = (self.path / name).read_text().split()[0]
        return None if quota in ("-1", "max") else int(quota) / PERIOD_US
