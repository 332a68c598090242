"""Looking at processes through /proc: who descends from whom, and what each is for."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

KEEPER = b"ckpt.keeper"


def children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, parents before their children."""
    found, rest = list[int](), [pid]
    while rest:
        below = children(rest.pop())
        found += below
        rest += below
    return found


def marked(variable: str, value: str) -> list[int]:
    """Every process that was started with this in its environment, the caller aside."""
    found, wanted = [], os.fsencode(f"{variable}={value}")
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return sorted(found)


def is_keeper(pid: int) -> bool:
    return KEEPER in _command(pid)


def described(pid: int) -> str:
    """The process as a person would name it."""
    return f"{pid} {b' '.join(_command(pid)).decode(errors='replace').strip()[:120]}"


def state(pid: int) -> str:
    """The kernel's letter for what it does (R, S, D, T, Z), or "" where it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def lives(pid: int) -> bool:
    return state(pid) not in ("", "Z", "X")


def is_traced(pid: int) -> bool:
    """Whether another process traces every thread of it, as strace does."""
    found = False
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended
                if "TracerPid:\t0\n" in (task / "status").read_text():
                    return False
                found = True
    return found


def kill(pids: Iterable[int], number: int = signal.SIGKILL) -> list[int]:
    """Send a signal; whom it reached."""
    reached = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            reached.append(pid)
    return reached


def _command(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []
