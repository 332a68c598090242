"""Keepers as the tests see them: which live, and that nothing is left of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

DEADLINE_S = 30


def keepers(root: str | Path) -> list[int]:
    """Process ids of the keepers whose RAM tier lies below `root`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"ckpt.keeper" in command and os.fsencode(root) in command:
                found.append(int(entry.name))
    return sorted(found)


def until(what: str, condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    """Poll until `condition` holds; an AssertionError naming `what` if it does not in time."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_s} s: {what}"
        time.sleep(0.01)


def kill_keepers(root: str | Path) -> int:
    """SIGKILL; how many there were. None is left when this returns."""
    pids = keepers(root)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until("the keepers are dead", lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids))
    return len(pids)


def forget() -> None:
    """Return once the RAM tier of this session holds nothing: what is restored then comes from the store."""
    root = os.environ["CKPT_RAM_DIR"]
    until(f"no keeper and no file is left in {root}", lambda: is_clean(root))


def is_clean(root: str | Path) -> bool:
    """No keeper below `root`, and nothing in it."""
    return not keepers(root) and not any(Path(root).iterdir())
