"""What went wrong with a job of late: which node failed first, and how often a restart came to nothing.

Pure. The leader counts. What it counted stands in the start of the next generation, and is said when one ends: whoever
leads next goes on from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

BACKOFF_LIMIT_S = 30.0
BLAMED_LIMIT = 50  # a start's record is bounded


@dataclass(frozen=True)
class Failures:
    """`row`: failures in a row, each soon after its generation began, with no commit in between.

    `head`: the newest attempt that was committed at the last of them. `step`: after which step all of the row were; 0
    if that was not always the same, or is not known. `blamed`: which node failed first, and when (seconds of one
    monotonic clock), oldest first.
    """

    row: int = 0
    head: str | None = None
    step: int = 0
    blamed: tuple[tuple[str, float], ...] = ()

    def blame(self, node: str, at_s: float) -> Failures:
        return replace(self, blamed=(*self.blamed[1 - BLAMED_LIMIT :], (node, at_s)))

    def count(self, step: int, head: str | None, *, soon: bool) -> Failures:
        """One more, after `step`. `soon`: its generation had not lasted long."""
        if not (self.row and soon and head == self.head):
            return replace(self, row=1, head=head, step=step)
        return replace(self, row=self.row + 1, step=step if step == self.step else 0)

    def quarantined(self, now_s: float, *, failures: int, window_s: float) -> frozenset[str]:
        """Nodes that were the first to fail `failures` times within `window_s`; nobody if `failures` is 0.

        Nobody either where several nodes did: then it is not the node.
        """
        recent = [node for node, at in self.blamed if now_s - at <= window_s]
        found = {node for node in recent if failures and recent.count(node) >= failures}
        return frozenset(found) if len(found) == 1 else frozenset()

    def shifted(self, by_s: float) -> Failures:
        """The same by a clock that shows `by_s` more: -now to tell them, now to hear them."""
        return replace(self, blamed=tuple((node, at + by_s) for node, at in self.blamed))


NO_FAILURES = Failures()


def backoff_s(failures: int) -> float:
    """How long to wait before the workers start again, after so many failures in a row without a commit."""
    return min(BACKOFF_LIMIT_S, 2.0 ** (failures - 3)) if failures >= 3 else 0.0
