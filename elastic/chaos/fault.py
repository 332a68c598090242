"""What a fault is: done to a node of the ground once, and undone where it heals.

`share`: percent of the 419 unexpected interruptions in 54 days of training on 16,384 H100 (arXiv 2407.21783, table 5)
that had the cause which the fault stands for; None where no figure was published. `needs`: what the ground must be
able to do. `restarts`: whether the run can only go on in a new generation. `heals`: whether there is something to
undo. `storage`: whether it is done to what a run is stored on, so that saves must go on after it. `live`: whether
`inject` waits for a worker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from elastic.chaos.cgroups import GroundError
from elastic.chaos.ground import Ground
from elastic.chaos.nodes import Boxed, Node


class Fault(ABC):
    """What is done to `node` of `ground`. Injected once; `heal` is idempotent."""

    kind: ClassVar[str]
    stands_for: ClassVar[str]
    share: ClassVar[float | None] = None
    promise: ClassVar[str] = "survived: no committed step is lost, and all go on in the next generation"
    needs: ClassVar[frozenset[str]] = frozenset()
    restarts: ClassVar[bool] = True
    heals: ClassVar[bool] = False
    storage: ClassVar[bool] = False
    live: ClassVar[bool] = False

    def __init__(self, ground: Ground, node: Node, amount: float | None = None) -> None:
        self.ground, self.node, self.amount = ground, node, amount
        self.nodes = [node.name]

    @abstractmethod
    async def inject(self) -> str:
        """Do it; what was done, for the report. GroundError if there is nothing to do it to."""

    async def heal(self) -> None:  # noqa: B027
        """Undo it."""

    @property
    def met(self) -> int | None:
        """How often it was met, where that is counted; 0: it did nothing to anybody."""
        return None

    def _worker(self) -> int:
        if not (found := self.node.workers()):
            raise GroundError(f"{self.node.name} has no worker")
        return found[0]

    def _boxed(self) -> Boxed:
        if not isinstance(self.node, Boxed):
            raise GroundError(f"{self.kind} needs nodes in namespaces, so root")
        return self.node
