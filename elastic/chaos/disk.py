"""A file system of its own for a run: a real one, that can be full, refuse writes, or stand still."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

from elastic.chaos.cgroups import GroundError
from elastic.chaos.held import Held

LIMIT_S = 20.0
FROZEN_LIMIT_S = 120
FREEZER = """
trap '' HUP INT PIPE TERM
fsfreeze -f "$0" || exit 1
echo frozen
timeout -s KILL "$1" cat > /dev/null
fsfreeze -u "$0"
"""  # nothing but SIGKILL keeps it from its last line


class Disk:
    """An ext4 in an image file beside `place`, mounted there in a mount namespace that ends with this process."""

    def __init__(self, place: Path, size_mb: int) -> None:
        self._place, self._size_mb = place, size_mb
        self._held = Held("mount")
        self._pid = 0
        self._freezer: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        self._pid = self._held.open()
        self._place.mkdir(exist_ok=True)
        image = self._place.with_suffix(".image")
        with open(image, "wb") as file:
            file.truncate(self._size_mb << 20)
        self._run("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
        self._run("mount", "-o", "loop", str(image), str(self._place))
        image.unlink()  # it goes with the mount, and that with the namespace
        (self.seen_at / "lost+found").rmdir()

    @property
    def before(self) -> list[str]:
        """What stands before a command that shall see the disk."""
        return ["nsenter", "-t", str(self._pid), "-m"]

    @property
    def seen_at(self) -> Path:
        """Where this process, which is outside, finds it."""
        return Path(f"/proc/{self._pid}/root{self._place}")

    def fill(self) -> int:
        """Leave no room; how many bytes that took."""
        taken, piece = 0, 1 << 30
        with open(self.seen_at / ".ballast", "wb") as file:
            while piece:
                try:
                    os.posix_fallocate(file.fileno(), taken, piece)
                    taken += piece
                except OSError:
                    piece //= 2
        return taken

    def free(self) -> None:
        (self.seen_at / ".ballast").unlink(missing_ok=True)

    def read_only(self, yes: bool) -> None:
        """Refuse every write, or none. Tried again while a file is open for writing."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                return self._run("mount", "-o", f"remount,{'ro' if yes else 'rw'}", str(self._place))
            except GroundError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def freeze(self) -> None:
        """Have every write wait in the kernel, where no signal ends a wait, until `thaw`.

        Another process thaws it: when this one has ended, however, and after 120 s at the latest.
        """
        if self._freezer is not None:
            raise GroundError(f"the file system at {self._place} stands still already")
        self._freezer = subprocess.Popen(
            [*self.before, "sh", "-c", FREEZER, str(self._place), str(FROZEN_LIMIT_S)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._freezer.stdout is not None
        if self._freezer.stdout.readline() != b"frozen\n":
            with contextlib.suppress(GroundError):
                self.thaw()
            raise GroundError(f"the file system at {self._place} could not be frozen")

    def thaw(self) -> None:
        """Idempotent. GroundError if it still stands still."""
        freezer, self._freezer = self._freezer, None
        if freezer is None:
            return
        try:
            freezer.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise GroundError(f"the file system at {self._place} was not thawed within {LIMIT_S:g} s") from error
        if freezer.returncode:
            raise GroundError(f"the file system at {self._place} could not be thawed")

    def close(self) -> None:
        """The file system goes with the last process that sees it."""
        with contextlib.suppress(GroundError):
            self.thaw()
        self._held.close()
        with contextlib.suppress(OSError):
            self._place.with_suffix(".image").unlink(missing_ok=True)

    def _run(self, *command: str) -> None:
        try:
            done = subprocess.run(
                [*self.before, *command], capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise GroundError(f"{' '.join(command)} took more than {LIMIT_S:g} s") from error
        if done.returncode:
            raise GroundError(f"{' '.join(command)}: {done.stderr.strip()}")
