"""A save that was asked for, as its caller sees it."""

from __future__ import annotations

import time
from collections.abc import Callable

from ckpt.errors import CkptError, SaveFailed
from ckpt.keeper.courier import Pending, error_of
from ckpt.records import Commit


class SaveHandle:
    """A save that was asked for. Not collective: each rank waits for itself, and hears of the same end."""

    def __init__(self, step: int, pending: Pending | None, newer: Callable[[], SaveHandle | None]) -> None:
        self.step = step
        self._pending, self._newer = pending, newer

    @property
    def skipped(self) -> bool:
        """Whether this step does not come to the store, because the store was busy with earlier ones."""
        return self._pending is None or (self._pending.outcome is not None and self._pending.outcome.left_out)

    def wait(self, timeout_s: float | None = None) -> Commit:
        """Its commit, once it is durable; that of the newer step that took its place if it was skipped.

        `DeadlineExceeded` after `timeout_s`: it is still being saved then. Any other error says why it was not
        committed; older steps are as they were.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        handle: SaveHandle | None = self
        while handle is not None:
            if handle._pending is not None:
                left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                outcome = handle._pending.wait(left)
                if outcome.commit is not None:
                    return outcome.commit
                if not outcome.left_out:
                    handle._pending.told = True
                    raise error_of(outcome)
            handle = handle._newer()
        raise SaveFailed(f"step {self.step} was skipped, since the store was busy, and no later one was saved.")

    def wait_copied(self) -> None:
        """Return once the state may be changed by hand; `step()` of its optimizers waits by itself."""
        if self._pending is not None:
            self._pending.wait_copied()

    def done(self) -> bool:
        """Whether it is decided: committed, failed or skipped."""
        return self._pending is None or self._pending.outcome is not None

    def exception(self) -> CkptError | None:
        """Why it was not committed; None if it was, was skipped, or is not decided yet."""
        outcome = self._pending.outcome if self._pending is not None else None
        return None if outcome is None or outcome.commit or outcome.left_out else error_of(outcome)
