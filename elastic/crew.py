"""The workers of this node as their board shows them: asked to stop, watched, and made to say where they are.

One board for each generation. Made on the main thread, looked at on the service's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from ckpt.board import Board, Worker
from elastic.decide import Pace, hang_limit_s
from elastic.messages import Stack
from elastic.stacks import collect, locate

log = logging.getLogger("elastic")

PACE_S, PACE_STEPS = 5.0, 3  # what a pace is taken over, at least


@dataclass(frozen=True)
class Look:
    """`heeds`, `paused`: of all workers that run. `leaves`: why this node shall leave, and within how many seconds.

    `hangs`: what one of them does not do any more, said once. `paces`: how fast they were since these were said last.
    """

    heeds: bool = False
    paused: bool = False
    leaves: tuple[str, float] | None = None
    hangs: str = ""
    paces: tuple[Pace, ...] = ()


class Crew:
    """All that concerns the board."""

    def __init__(self, stated_hang_limit_s: float) -> None:
        self._stated_s = stated_hang_limit_s
        self._board: Board | None = None
        self._hung = False
        self._before: dict[int, Worker] = {}  # when their paces were said last, by rank
        self._lock = threading.Lock()

    def begin(self) -> str:
        """Where the workers that start next find their board."""
        with self._lock:
            if self._board is not None:
                self._board.close()
            self._board, self._hung = Board(), False
            self._before.clear()
            return self._board.path

    def ask(self) -> None:
        """Have them stop at a step on which all ranks agree."""
        with self._lock:
            if self._board is not None:
                self._board.ask()

    def workers(self) -> list[Worker]:
        with self._lock:
            return self._board.workers() if self._board is not None else []

    def step(self) -> int:
        """How far they are, or were."""
        return max((worker.step for worker in self.workers()), default=0)

    def saved(self) -> int:
        """The newest step that they had saved since they started; 0: none."""
        return max((worker.saved for worker in self.workers()), default=0)

    def look(self, running: int) -> Look:
        """What they say, of whom `running` run."""
        seen = self.workers()
        return Look(
            heeds=0 < running <= sum(worker.heeds for worker in seen),
            paused=0 < running <= sum(worker.paused for worker in seen),
            leaves=next((worker.leaves for worker in seen if worker.leaves is not None), None),
            hangs=self._hang(seen),
            paces=tuple(self._paces(seen)),
        )

    def _paces(self, seen: list[Worker]) -> Iterator[Pace]:
        for worker in seen:
            before = self._before.setdefault(worker.rank, worker)
            steps, seen_s = worker.moves - before.moves, worker.seen_s - before.seen_s
            if steps >= PACE_STEPS and seen_s >= PACE_S:
                self._before[worker.rank] = worker
                yield Pace(worker.rank, (worker.own_s - before.own_s) / steps, seen_s / steps)

    def _hang(self, seen: list[Worker]) -> str:
        for worker in seen:
            limit_s = hang_limit_s(self._stated_s, worker.limit_s, worker.moves, worker.longest_s)
            if worker.watched and not self._hung and limit_s is not None and worker.moved_s > limit_s:
                self._hung = True
                return f"rank {worker.rank} has made no step for {worker.moved_s:.0f} s, since step {worker.step}"
        return ""

    def trace(self) -> tuple[Stack, ...]:
        """Their stacks, in full into this agent's log; where each rank is. Blocking."""
        found = collect(self.workers())
        for worker, text in found:
            log.warning("rank %d, process %d:\n%s", worker.rank, worker.pid, text)
        return tuple(locate(worker.rank, text) for worker, text in found)
