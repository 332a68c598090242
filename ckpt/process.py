"""What a training loop needs of its process: SIGTERM, a bar that shows where it is, no garbage collection midway."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("ckpt")


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's cycle collector walks all that torch has imported, 0.1 s a time; saving and planning leave no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class OnSigterm:
    """While entered, SIGTERM calls `act` instead of ending the process; elsewhere than the main thread a no-op."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._before: Any = None
        self._active = False

    def __enter__(self) -> None:
        if self._active:
            return
        try:
            self._before = signal.signal(signal.SIGTERM, self._handle)
            self._active, self._pid = True, os.getpid()
        except ValueError:
            log.info("not in the main thread: SIGTERM will not save")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            self._act()
            return
        signal.signal(signal.SIGTERM, self._before)  # a forked child must not outlive its parent's terminate()
        os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.signal(signal.SIGTERM, self._before)
            self._active = False


class StepBar:
    """A bar on stderr on rank 0 of a job at a terminal; nothing elsewhere."""

    def __init__(self, first: int, total: int, rank: int) -> None:
        self._bar = Progress(
            TextColumn("steps"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=rank != 0 or not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("steps", total=total, completed=first)

    def __enter__(self) -> Callable[[int], None]:
        self._bar.start()
        if self._bar.disable:
            return lambda done: None
        return lambda done: self._bar.update(self._task, completed=done)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
