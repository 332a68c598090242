"""What an agent lived through, kept in the run's directory for `elastic report`.

    elastic/ledger/<node>.<number>.json    a batch of one agent's events, never replaced

Order and durations within an agent are of its monotonic clock. Wall clocks only place agents beside each other on a
page: no decision depends on them. All of it is best effort: what cannot be written waits, bounded, and training never
does.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from ckpt.board import Worker
from ckpt.errors import Corrupt, NotFound
from ckpt.run import RunDirectory
from ckpt.store import AlreadyExists

LEDGER = "elastic/ledger"
BATCH_LIMIT_BYTES = 1 << 20
EVENTS_LIMIT = 1000  # that wait for a store that is away; older ones are dropped
EVERY_S, EVERY_LIMIT_S = 30.0, 600.0  # between batches while nothing changes: twice as long each time
SAMPLES = 30  # of a worker's progress in a batch

What = Literal["begun", "restoring", "restored", "step", "failed", "killed", "left"]


class Happening(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that an agent saw, `at` seconds after it started. `text`: the reason, or how a worker failed.

    `members`: names, of a generation that begins. `rank` is a worker's.
    `blocked_s`: how long saves held the worker up since what was said of it before.
    """

    at: float
    what: What
    generation: int
    rank: int = -1
    step: int = 0
    text: str = ""
    code: int | None = None
    members: tuple[str, ...] = ()
    blocked_s: float = 0.0


class Batch(msgspec.Struct, frozen=True):
    """`unix_s`: when this agent started, by its wall clock."""

    node: str
    name: str
    number: int
    unix_s: float
    happenings: tuple[Happening, ...]


class Ledger:
    """An agent's end: what it saw and has not written yet. One thread; nothing here blocks."""

    def __init__(self, node: str, name: str, now: Callable[[], float] = time.monotonic) -> None:
        self._node, self._name, self._now = node, name, now
        self._began, self._unix_s = now(), time.time()
        self._waiting: deque[Happening] = deque(maxlen=EVENTS_LIMIT)
        self._pending: Batch | None = None  # being written, or of unknown outcome
        self._number, self._generation = 0, 0
        self._every_s, self._due_at = EVERY_S, self._began + EVERY_S
        self._seen: dict[str, float] = {}  # of the worker that is followed, in this generation

    def begun(self, generation: int, members: Sequence[str], reason: str) -> None:
        self._generation, self._seen = generation, {}
        self._say("begun", members=tuple(members), text=reason)
        self._changed()

    def failed(self, rank: int, code: int | None, text: str, step: int) -> None:
        """A worker ended by itself, and not well; `code` is negative for a signal."""
        self._say("failed", rank=rank, code=code, text=text, step=step)
        self._changed()

    def killed(self, reason: str, workers: Sequence[Worker]) -> None:
        """This node's workers must end; `workers` as they were."""
        self.follow(workers, last=True)
        self._say("killed", text=reason)
        self._changed()

    def left(self, reason: str, code: int, workers: Sequence[Worker]) -> None:
        """This agent ends."""
        self.follow(workers, last=True)
        self._say("left", text=reason, code=code)
        self._changed()

    def follow(self, workers: Sequence[Worker], *, last: bool = False) -> None:
        """How far they are; the lowest rank stands for them. Says it now and then, and when it is the `last`."""
        worker = min(workers, key=lambda one: one.rank, default=None)
        if worker is None:
            return
        seen = self._seen
        if "restoring" not in seen:
            seen["restoring"] = 1.0
            self._say("restoring", rank=worker.rank)
        if (worker.heeds or worker.step) and "step" not in seen:
            seen.update(step=worker.step - max(worker.moves - 1, 0), at=self._now(), blocked_s=0.0)
            self._say("restored", rank=worker.rank, step=worker.step - max(worker.moves - 1, 0))
        sample_s = self._every_s / SAMPLES
        if worker.step > seen.get("step", worker.step) and (last or self._now() - seen["at"] >= sample_s):
            blocked_s = worker.blocked_s - seen["blocked_s"]
            seen.update(step=worker.step, at=self._now(), blocked_s=worker.blocked_s)
            self._say("step", rank=worker.rank, step=worker.step, blocked_s=round(blocked_s, 3))

    def due(self) -> bool:
        """Whether there is a batch to be written now."""
        return bool(self._waiting or self._pending) and self._now() >= self._due_at

    def batch(self) -> Batch:
        """What waits; the same again until it is `written`, as its name stands for what is in it."""
        self._every_s = min(2 * self._every_s, EVERY_LIMIT_S)
        self._due_at = self._now() + self._every_s
        if self._pending is None:
            self._pending = Batch(self._node, self._name, self._number, self._unix_s, tuple(self._waiting))
            self._waiting.clear()
        return self._pending

    def written(self) -> None:
        """The batch stands in the store."""
        self._pending = None
        self._number += 1

    def _changed(self) -> None:
        self._every_s, self._due_at = EVERY_S, self._now()

    def _say(self, what: What, **facts: object) -> None:
        at = round(self._now() - self._began, 3)
        self._waiting.append(Happening(at, what, self._generation, **facts))  # type: ignore[arg-type]


def write_batch(run: RunDirectory, batch: Batch) -> None:
    """Write it under a name of its own; one that stands there already is a try before whose answer was lost."""
    if batch.happenings:
        with contextlib.suppress(AlreadyExists):
            run.store.create(f"{LEDGER}/{batch.node}.{batch.number:06d}.json", msgspec.json.encode(batch))


def read_ledger(run: RunDirectory) -> list[Batch]:
    """All batches, each agent's in order; a damaged one is left out."""
    found = []
    with contextlib.suppress(NotFound):
        for name in run.store.list(LEDGER):
            with contextlib.suppress(NotFound, Corrupt, msgspec.MsgspecError):
                data = run.store.read(f"{LEDGER}/{name}", limit_bytes=BATCH_LIMIT_BYTES)
                found.append(msgspec.json.decode(data, type=Batch))
    return sorted(found, key=lambda batch: (batch.node, batch.number))
