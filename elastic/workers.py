"""The agent's workers as processes: which there are, SIGKILL for their groups, how they ended, and their guard."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from elastic import guard

log = logging.getLogger("elastic")

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
error_files: dict[int, str] = {}  # of workers that had another environment when their process began (`elastic.warm`)


@dataclass(frozen=True)
class Ended:
    """How a worker ended: its exit code, or the signal that killed it."""

    pid: int
    code: int | None
    signal: int | None

    @property
    def well(self) -> bool:
        return self.code == 0


class Workers:
    """Everything that torchrun starts from this process: children that lead a session of their own."""

    def __init__(self, agent: str) -> None:
        os.environ[guard.VARIABLE] = agent  # workers inherit it: that is how the guard finds them
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, agent],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def pids(self) -> list[int]:
        """The process groups of the workers that run, or have ended and are not collected yet."""
        found = []
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                if pid != self._guard.pid and os.getsid(pid) == pid:
                    found.append(pid)
        return found

    def kill(self) -> list[int]:
        """SIGKILL all groups; whom there was to kill."""
        pids = self.pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        return pids

    def farewell(self) -> None:
        """Let the guard go without killing anybody; the agent is about to end by itself. Idempotent."""
        if self._guard.stdin is not None and not self._guard.stdin.closed:
            with contextlib.suppress(OSError):
                self._guard.stdin.write(guard.FAREWELL)
                self._guard.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.wait(timeout=5)


def _children() -> Iterator[int]:
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            yield from map(int, (task / "children").read_text().split())


def look_at(pid: int) -> Ended | None:
    """How the child `pid` ended, left for its parent to collect; None while it runs. ChildProcessError: too late."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    killed = found.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
    return Ended(pid, None if killed else found.si_status, found.si_status if killed else None)


def error_file_of(pid: int) -> str:
    """Where the worker `pid` writes what it failed of, if its script is decorated for that; empty: not known (yet)."""
    if pid in error_files:
        return error_files[pid]
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            name, _, value = entry.partition(b"=")
            if name == ERROR_FILE.encode():
                return os.fsdecode(value)
    return ""


def watch(pid: int, add_reader: Callable[..., None], remove_reader: Callable[[int], object],
          ended: Callable[[Ended], None]) -> None:  # fmt: skip
    """Call `ended` once the child `pid` has ended, if torchrun does not collect it first."""
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(pid)

        def readable() -> None:
            remove_reader(descriptor)
            os.close(descriptor)
            with contextlib.suppress(ChildProcessError):
                if (how := look_at(pid)) is not None:
                    ended(how)

        add_reader(descriptor, readable)
