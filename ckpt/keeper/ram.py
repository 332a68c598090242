"""The RAM tier of a run on this node: a tmpfs directory laid out like every other tier, which outlives the workers.

    <root>/holdfast-<uid>/<nonce of the run>-<digest of its address>/
        run                  the run's address, so that anybody can start its keeper again
        lock                 held by the keeper as long as it lives
        users                held shared by every worker; who holds it alone may remove the directory
        socket, log          where the keeper listens, and what it has to say
        layouts/<digest>     layouts that orders refer to
        steps/<attempt>/     r00003.safetensors, .order (what is copied), .sealed (its digests), .part,
                             .stored (what stands in the store)

`<root>` is CKPT_RAM_DIR, else /dev/shm. Everything below it belongs to one user and is refused otherwise.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ckpt.errors import StorageError
from ckpt.manifest import data_name, digest
from ckpt.records import parse_attempt
from ckpt.run import RunDirectory

DEFAULT_ROOT = "/dev/shm"
SHARE_OF_FREE_MEMORY = 0.5
SNAPSHOTS_LIMIT = 3  # one that is being stored, the newest whole one, and one that is being filled

_GONE = ".gone"  # ends the name of a directory that is being removed
_FILES = ("order", "sealed", "part", "stored")


def ram_root() -> str:
    return os.environ.get("CKPT_RAM_DIR") or DEFAULT_ROOT


@dataclass(frozen=True)
class RamTier:
    """The directory of one run on this node. Touches nothing until `make`."""

    root: str
    name: str

    @classmethod
    def of(cls, run: RunDirectory) -> Self:
        """That of the run that stands there: a copy of its directory is another run, with a keeper of its own."""
        path = run.store.local_path("")
        place = digest(os.fsencode(run.url if path is None else os.path.realpath(path))).hex()[:8]
        return cls(ram_root(), f"{run.nonce}-{place}")

    @property
    def run_nonce(self) -> str:
        return self.name.rpartition("-")[0]

    @property
    def home(self) -> str:
        """The directory of all runs of this user."""
        return os.path.join(self.root, f"holdfast-{os.getuid()}")

    @property
    def path(self) -> str:
        return os.path.join(self.home, self.name)

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def attempt(self, attempt: str) -> str:
        if parse_attempt(attempt) is None:
            raise ValueError(f"{attempt!r} is not an attempt's name")
        return os.path.join(self.path, "steps", attempt)

    def data(self, attempt: str, rank: int) -> str:
        return os.path.join(self.attempt(attempt), data_name(rank))

    def beside(self, attempt: str, rank: int, suffix: str) -> str:
        return os.path.join(self.attempt(attempt), f"r{rank:05d}.{suffix}")

    def exists(self) -> bool:
        return os.path.isdir(self.path)

    def make(self) -> None:
        """Make the directories, for this user alone. `StorageError` if another user's stand in their place."""
        try:
            os.makedirs(self.root, exist_ok=True)
            for directory in (self.home, self.path, self.file("steps"), self.file("layouts")):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(directory, 0o700)
                found = os.lstat(directory)
                if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                    raise StorageError(
                        f"{directory} is not a directory of this user alone: somebody else may have made it. Remove "
                        "it, or set CKPT_RAM_DIR to a tmpfs directory of your own."
                    )
        except OSError as error:
            raise StorageError(
                f"make {self.path}: {error.strerror}. The keeper needs a directory on this node for its socket: set "
                "CKPT_RAM_DIR to a tmpfs directory that this user can write."
            ) from error

    def remove(self) -> None:
        """Remove the directory with all that is in it, and the user's own if nothing else is left.

        At once for whoever makes it anew meanwhile: nothing of the new one is removed.
        """
        gone = f"{self.path}.{os.getpid()}{_GONE}"
        with contextlib.suppress(OSError):
            os.rename(self.path, gone)
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(self.home)

    def attempts(self) -> list[str]:
        """Attempts that have files here, by step."""
        try:
            names = os.listdir(self.file("steps"))
        except FileNotFoundError:
            return []
        parsed = ((parse_attempt(name), name) for name in names)
        return [name for key, name in sorted((key, name) for key, name in parsed if key is not None)]

    def ranks(self, attempt: str, suffix: str) -> list[int]:
        """Ranks that have a file of this kind in the attempt."""
        try:
            names = os.listdir(self.attempt(attempt))
        except FileNotFoundError:
            return []
        stems = (name[1:].partition(".") for name in names if name.startswith("r"))
        return sorted(int(rank) for rank, _, kind in stems if kind == suffix and rank.isdecimal())

    def write(self, path: str, data: bytes) -> None:
        """Make or replace a small file as a whole: also for a reader that comes after this process was killed."""
        temporary = f"{path}.tmp{os.getpid()}"
        with open(temporary, "wb") as file:
            file.write(data)
        os.rename(temporary, path)

    def drop(self, attempt: str, rank: int, *, keep_data: bool = False) -> None:
        """Forget the snapshot of `rank`; the marks that make it readable go first."""
        for suffix in _FILES if keep_data else (*_FILES, "safetensors"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.beside(attempt, rank, suffix))
        with contextlib.suppress(OSError):
            os.rmdir(self.attempt(attempt))

    def drop_attempt(self, attempt: str) -> None:
        shutil.rmtree(self.attempt(attempt), ignore_errors=True)


def runs_on_this_node(root: str) -> Iterator[RamTier]:
    """The RAM tiers of this user's runs; what somebody began to remove, and was killed, is removed."""
    home = os.path.join(root, f"holdfast-{os.getuid()}")
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(home)):
            if name.endswith(_GONE):
                shutil.rmtree(os.path.join(home, name), ignore_errors=True)
            else:
                yield RamTier(root, name)


class Claim:
    """A lock on a file of the tier that goes when its process does."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def take(cls, path: str, *, shared: bool = False) -> Claim | None:
        """The claim, or None if another process holds it. The file must still be the one at `path` afterwards."""
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:
                return None  # the directory was removed
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(fd)):
                    return cls(fd)
            os.close(fd)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def node_name(root: str) -> str:
    """Equal for processes that share this RAM root, and for no others."""
    os.makedirs(root, exist_ok=True)
    found = os.stat(root)
    boot = Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot.read_text().strip() if boot.exists() else os.uname().nodename
    return digest(f"{boot_id} {found.st_dev} {found.st_ino}".encode()).hex()


def snapshots_that_fit(data_bytes: int, budget_bytes: int, wanted: int) -> int:
    """How many snapshots of `data_bytes` the budget holds, at most `wanted`; 0: not even one."""
    return min(wanted, budget_bytes // max(data_bytes, 1))


def free_bytes(root: str) -> int:
    """Bytes that this tmpfs and this container's memory still have room for."""
    room = os.statvfs(root)
    return max(0, min(room.f_bavail * room.f_frsize, _free_memory_bytes(), *_cgroup_rooms()))


def _free_memory_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _cgroup_rooms() -> Iterator[int]:
    """What each memory cgroup above this process still allows; page cache that can be dropped counts as free."""
    yield 1 << 62
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        while group.is_relative_to(base):
            with contextlib.suppress(OSError, ValueError, KeyError):
                limit = int((group / names[0]).read_text())
                used = int((group / names[1]).read_text())
                cached = dict(item.split() for item in (group / "memory.stat").read_text().splitlines())
                yield limit - used + int(cached[names[2]])
            if group == base:
                break
            group = group.parent
