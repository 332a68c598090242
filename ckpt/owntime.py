"""How much of its time a rank spends on its own work, and not waiting for other ranks: seen by looking now and then.

Stock torch does not tell how long a collective waited, and many are called from C++. So a thread looks, 20 times a
second, at where the thread that trains is. All of a backward pass counts as waiting: that is where gradients are
exchanged, and the ranks leave it together. What a GPU computes while its host waits is not seen.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

INTERVAL_S = 0.05
DEPTH_LIMIT = 200
WAITING = (  # (end of the file's name, function or ""): frames of a thread that waits for other ranks
    ("torch/distributed/distributed_c10d.py", ""),
    ("torch/autograd/graph.py", "_engine_run_backward"),  # where gradients are reduced
    ("ckpt/ranks.py", ""),
)


def is_waiting(file: str, function: str) -> bool:
    """Whether a frame is one of a thread that waits for other ranks."""
    return any(file.endswith(end) and only in ("", function) for end, only in WAITING)


class Watch:
    """Looks at the thread that makes it, until it is closed: `count(ns, own)` hears of each stretch of time."""

    def __init__(self, count: Callable[[int, bool], None]) -> None:
        self._count, self._trains = count, threading.get_ident()
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="ckpt-owntime", daemon=True).start()

    def _run(self) -> None:
        before = time.monotonic_ns()
        while not self._closed.wait(INTERVAL_S):
            own, now = not _waits(sys._current_frames().get(self._trains)), time.monotonic_ns()
            self._count(now - before, own)
            before = now

    def close(self) -> None:
        """From here on it counts one stretch more, at most. Idempotent."""
        self._closed.set()


def _waits(frame: FrameType | None) -> bool:
    for _ in range(DEPTH_LIMIT):
        if frame is None:
            return False
        if is_waiting(frame.f_code.co_filename, frame.f_code.co_name):
            return True
        frame = frame.f_back
    return False
