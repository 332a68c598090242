"""The coordinator of a generation: what is stored next, when all is there, and the commit. No collective anywhere.

`Ledger` decides and touches nothing: it is told what happened and answers what to do. It lives in the keeper of
rank 0's node; commits happen in the order in which the saves were asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import msgspec

from ckpt import errors
from ckpt.errors import Incompatible, SaveFailed
from ckpt.holder import commit_parts
from ckpt.keeper.orders import Broken, Complete, Job, Ordered, Outcome, Persist, Sealed, Stored, Summary
from ckpt.layout import World
from ckpt.log import View
from ckpt.manifest import SOURCES_LIMIT, Manifest, content_digest_of
from ckpt.records import Commit
from ckpt.retention import kept_for_itself
from ckpt.run import RunDirectory
from ckpt.signing import KEY_VARIABLE
from ckpt.symbolic import decode_world

GRACE_S = 10.0  # for the keepers of other nodes to come back, once a new start waits
LOST_S = 1.0  # the same, where it is known that a node is lost: for what is under way
REMEMBERED = 64  # outcomes, for keepers that ask again


@dataclass
class Attempt:
    """What the coordinator knows of one attempt."""

    job: Job
    deadline: float
    one_node: bool  # all ranks are on it: no keeper of another node can be on its way
    nodes: dict[int, str] = field(default_factory=dict)  # by rank
    layouts: bytes = b""
    summary: Summary | None = None
    sealed: dict[int, Sealed] = field(default_factory=dict)
    stored: dict[int, Stored] = field(default_factory=dict)
    replicas: dict[bytes, tuple[int, tuple[str, ...], bytes]] = field(default_factory=dict)
    complete: bool = False
    persisting: bool = False
    committing: bool = False

    def missing(self) -> list[int]:
        """Ranks whose part is not stored."""
        return [rank for rank in range(self.job.world_size) if rank not in self.stored]


@dataclass(frozen=True)
class Commits:
    """All parts of this attempt are in the store: commit it."""

    attempt: Attempt


Action = Persist | Complete | Outcome | Commits


class Ledger:
    """The attempts that are not resolved yet. Every method returns what is to be done now, in this order."""

    def __init__(self) -> None:
        self.open: dict[str, Attempt] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.settling_since: float | None = None
        self.grace_s = GRACE_S
        self._generation = 0
        self._ranks_on: dict[str, int] = {}  # by each node that ordered anything in this generation
        self._quiet: set[str] = set()  # nodes whose workers are gone

    def ordered(self, node: str, said: Ordered, now: float) -> list[Action]:
        if known := self.outcomes.get(said.job.attempt):
            return [known]
        one_node = said.local_world == said.job.world_size
        attempt = self.open.setdefault(said.job.attempt, Attempt(said.job, now + said.job.deadline_s, one_node))
        if said.job != attempt.job:
            return self._fail(attempt, "SaveFailed", f"rank {said.rank} describes {said.job.attempt} differently")
        attempt.nodes[said.rank] = node
        self._note(node, said)
        if said.summary is not None:
            attempt.summary, attempt.layouts = said.summary, said.layouts
        again: list[Action] = [Persist(said.job.attempt)] if attempt.persisting else []
        return again + self._advance()

    def _note(self, node: str, said: Ordered) -> None:
        if said.job.generation > self._generation:
            self._generation = said.job.generation
            self._ranks_on, self._quiet = {}, set()
        if said.job.generation == self._generation:
            self._ranks_on[node] = said.local_world
            self._quiet.discard(node)

    def quiet(self, node: str) -> None:
        """No worker of `node` will order anything more, unless it says so by ordering."""
        self._quiet.add(node)

    def _is_quiet(self, attempt: Attempt, here: set[str]) -> bool:
        """Whether every node of the attempt's generation is here, and none will order what it has not."""
        whole = sum(self._ranks_on.values()) == attempt.job.world_size
        return whole and attempt.job.generation == self._generation and self._ranks_on.keys() <= here & self._quiet

    def sealed(self, said: Sealed) -> list[Action]:
        attempt = self.open.get(said.attempt)
        if attempt is None or said.rank in attempt.sealed:
            return []
        attempt.sealed[said.rank] = said
        if problem := _drifted(attempt, said):
            return self._fail(attempt, "Incompatible", problem)
        return self._advance()

    def stored(self, said: Stored) -> list[Action]:
        attempt = self.open.get(said.attempt)
        if attempt is None:
            return []
        attempt.stored.setdefault(said.rank, said)
        return self._advance()

    def broken(self, said: Broken) -> list[Action]:
        attempt = self.open.get(said.attempt)
        return self._fail(attempt, said.kind, f"rank {said.rank}: {said.message}") if attempt else []

    def resolved(self, outcome: Outcome) -> list[Action]:
        """The commit of an attempt succeeded or failed. A stale generation's other attempts fail with it."""
        self._end(outcome)
        if outcome.kind == "Fenced":
            return [self._end(Outcome(name, kind="Fenced", message=outcome.message)) for name in list(self.open)]
        return self._advance()

    def tick(self, now: float, connected: Iterable[str]) -> list[Action]:
        """Deadlines; and, once a new start waits, attempts that lack ranks whose workers or keepers are gone."""
        late: list[Action] = []
        here = set(connected)
        settling = self.settling_since is not None
        waited = self.settling_since is not None and now > self.settling_since + self.grace_s
        for attempt in list(self.open.values()):
            if attempt.committing:
                continue
            lost = [rank for rank in attempt.missing() if attempt.nodes.get(rank) not in here]
            if now > attempt.deadline:
                why = f"rank {_some(attempt.missing())} did not deliver within {attempt.job.deadline_s:g} s."
                late += self._fail(attempt, "SaveFailed", why)
            elif lost and (waited or (settling and (attempt.one_node or self._is_quiet(attempt, here)))):
                late += self._fail(attempt, "SaveFailed", f"rank {_some(lost)} died before its part was stored.")
        if late:
            late += self._advance()
        if not self.open:
            self.settling_since, self.grace_s = None, GRACE_S
        return late

    def _advance(self) -> list[Action]:
        actions: list[Action] = []
        in_order = sorted(self.open.values(), key=lambda attempt: (attempt.job.generation, attempt.job.index))
        for attempt in in_order:
            if not attempt.complete and len(attempt.sealed) == attempt.job.world_size and attempt.summary is not None:
                attempt.complete = True
                actions.append(Complete(attempt.job.attempt))
        chosen, left_out = choose_next(in_order)
        for attempt in left_out:
            actions.append(self._end(Outcome(attempt.job.attempt, left_out=True)))
        if chosen is not None:
            chosen.persisting = True
            actions.append(Persist(chosen.job.attempt))
        rest = [attempt for attempt in in_order if attempt.job.attempt in self.open]
        if rest and rest[0].complete and not rest[0].missing() and not rest[0].committing:
            rest[0].committing = True
            actions.append(Commits(rest[0]))
        return actions

    def _fail(self, attempt: Attempt, kind: str, message: str) -> list[Action]:
        if attempt.committing:
            return []
        why = message.rstrip(".")
        text = f"{attempt.job.attempt} was not committed: {why}. Every older step is as it was."
        return [self._end(Outcome(attempt.job.attempt, kind=kind, message=text)), *self._advance()]

    def _end(self, outcome: Outcome) -> Outcome:
        self.open.pop(outcome.attempt, None)
        self.outcomes[outcome.attempt] = outcome
        while len(self.outcomes) > REMEMBERED:
            del self.outcomes[next(iter(self.outcomes))]
        return outcome


def choose_next(in_order: list[Attempt]) -> tuple[Attempt | None, list[Attempt]]:
    """The attempt to bring to the store next, and those that are left out for it.

    One at a time, the oldest first, once rank 0 has said what it is: what it may refer to follows from that, for all
    ranks alike. Where the store may leave steps out, the newest that is complete in RAM goes first, and what is older
    than that is left out: at once, so that its memory is free for the next.
    """
    waiting = [attempt for attempt in in_order if not attempt.persisting]
    newest = next((attempt for attempt in reversed(in_order) if attempt.complete), None)
    left_out = []
    if newest is not None:
        older = waiting[: waiting.index(newest)] if newest in waiting else []
        left_out = [attempt for attempt in older if attempt.job.newest_only]
    waiting = [attempt for attempt in waiting if attempt not in left_out]
    busy = any(attempt.persisting and attempt.missing() for attempt in in_order)
    return (waiting[0] if waiting and waiting[0].summary is not None and not busy else None), left_out


def _drifted(attempt: Attempt, said: Sealed) -> str:
    """Replicas that were equal when their layout was first saved may have drifted apart since."""
    for group, keys, digests in said.replicas:
        rank, first_keys, first = attempt.replicas.setdefault(group, (said.rank, keys, digests))
        if first != digests:
            pairs = zip(keys, _eights(first), _eights(digests), strict=True) if keys == first_keys else ()
            names = ", ".join([key for key, *both in pairs if both[0] != both[1]][:20])
            one, other = sorted((rank, said.rank))
            return (
                f"ranks {one} and {other} hold different values under the same key: {names}. They are replicas "
                "that have drifted apart. Make them equal, or wrap what differs on purpose in ckpt.PerRank(obj)."
            )
    return ""


def _eights(data: bytes) -> list[bytes]:
    return [data[at : at + 8] for at in range(0, len(data), 8)]


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


# The commit


def commit(run: RunDirectory, attempt: Attempt) -> Commit:
    """Write the MANIFEST of `attempt` and append its commit record (`commit_parts`). Blocking."""
    job, summary = attempt.job, attempt.summary
    assert summary is not None
    world = world_of(attempt.layouts)
    stored = [attempt.stored[rank] for rank in range(job.world_size)]
    weak = [rank for rank, part in enumerate(stored) if len(part.ref.part_digest) != len(run.digest(b""))]
    if weak:
        raise Incompatible(
            f"{job.attempt} was not committed: {KEY_VARIABLE} is not set alike for all keepers, the one of rank "
            f"{_some(weak)} differs from the coordinator's. Set it on every node, end those keepers and start again; "
            "every older step is as it was."
        )
    manifest = Manifest(
        step=job.step,
        generation=job.generation,
        attempt=job.attempt,
        parent=None,
        world=world,
        ownership=summary.ownership,
        parts=tuple(part.ref for part in stored),
        content_digest=content_digest_of(world, (part.ref.content_digest for part in stored)),
        metrics=summary.metrics,
        sources=tuple(sorted({source for part in stored for source in part.sources})),
    )
    return commit_parts(run, manifest, job.holder)


def base_for(view: View, job: Job, summary: Summary) -> tuple[Persist, frozenset[str]]:
    """How an attempt is brought to the store, and which attempts must stay until it is resolved.

    It may refer to the head and to what that refers to. Once these are SOURCES_LIMIT, it is stored whole.
    """
    head = view.head
    if head is None or len(head.sources) >= SOURCES_LIMIT:
        return Persist(job.attempt), frozenset()
    held = frozenset((head.attempt, *head.sources))
    following = msgspec.structs.replace(
        head,
        generation=job.generation,
        attempt=job.attempt,
        step=job.step,
        parent=head.attempt,
        metrics=summary.metrics,
    )
    staying = kept_for_itself(view.after(following), summary.keep)
    return Persist(job.attempt, head.attempt, held & frozenset(staying)), held


@lru_cache(maxsize=4)
def world_of(layouts: bytes) -> World:
    return decode_world(layouts)


def failure(attempt: str, error: BaseException) -> Outcome:
    """The outcome that tells of `error`, by the nearest type that callers know."""
    known = [kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind]
    kind = known[0] if known else SaveFailed.__name__
    return Outcome(attempt, kind=kind, message=str(error) or repr(error))
