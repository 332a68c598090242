"""Namespaces that nobody lives in: held open by a process that ends with this one."""

from __future__ import annotations

import subprocess
import time

from elastic.chaos import processes
from elastic.chaos.cgroups import GroundError

START_LIMIT_S = 20.0


class Held:
    """A new namespace of `kind`: "net" or "mount"."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._process = subprocess.Popen(
            ["unshare", f"--{kind}", "--fork", "--kill-child=KILL", "cat"],
            stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._pid = 0

    def open(self) -> int:
        """The process that lives in it. GroundError if the machine does not allow it."""
        deadline = time.monotonic() + START_LIMIT_S
        while not (found := processes.children(self._process.pid)):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise GroundError(f"no {self._kind} namespace can be made here; root is needed")
            time.sleep(0.01)
        self._pid = found[0]
        return self._pid

    def close(self) -> None:
        """The namespace goes with the last process in it, and what was mounted in it, too. Idempotent."""
        processes.kill([self._pid] if self._pid else [])
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._pid = 0
