"""Every interleaving of a few writers on one log, explored breadth-first with the real `View` and `decide_*`.

A writer's atomic actions: read to the end and decide; create the next slot (which wins, loses, wins with the reply
lost, or hangs and arrives later, if at all); read back. It may crash and start again at any point. Checked in every
state:

    (a) an acknowledged commit is in the lineage, unless the holder itself went back to an older step on purpose
    (b) no step is acknowledged twice in one lineage
    (c) a record stands in one slot at most
    (d) a generation has one holder, and no two writers believe to be it
    (e) a commit of a generation that was not current is never in the lineage
    (f) the head is the newest generation's last commit, else the commit its start is based on

The same search must find a violation once a rule is broken; the last test breaks them one by one.
"""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
from msgspec import structs

from ckpt.errors import CkptError, Fenced
from ckpt.log import HEAD, View, decide_commit, decide_start
from ckpt.records import Commit, Record, Start, Unknown, attempt_name, decode_record, encode_record, parse_attempt


class Writer(NamedTuple):
    phase: str = "stopped"  # stopped, ready, deciding (creates next), unsure (reads back next)
    nonces: int = 0
    generation: int = 0
    holder_nonce: str = ""
    at: int = 0  # the step its training state is at
    fresh: bool = False  # nothing committed since its start: it may adopt what others left
    intent: tuple[str, str, str] = ("", "", "")  # start | rollback | commit, nonce, base or attempt
    slot: int = -1
    record: int = -1


class Spent(NamedTuple):
    starts: int = 0
    commits: int = 0
    crashes: int = 0
    lost: int = 0
    rollbacks: int = 0


class State(NamedTuple):
    log: tuple[int, ...]  # per slot, the number of its record in Model.records
    writers: tuple[Writer, ...]
    acknowledged: frozenset[str] = frozenset()
    complete: frozenset[str] = frozenset()  # attempts whose data is whole, committed or not
    in_flight: frozenset[tuple[int, int]] = frozenset()  # (slot, record): creates that may still arrive
    spent: Spent = Spent()


@dataclass(frozen=True)
class Protocol:
    """The rules under test, each of which can be replaced by a broken one."""

    after: Callable[[View, Record], View] = View.after
    start: Callable[..., Start] = decide_start
    commit: Callable[..., Commit] = decide_commit
    is_mine: Callable[[Record, str], bool] = lambda standing, nonce: standing.nonce == nonce
    decides_again: bool = True


@dataclass(frozen=True)
class Facts:
    """What one log says, worked out without `View` where it is the specification."""

    view: View
    lineage: frozenset[str]
    excused: frozenset[str]  # commits that a holder left behind on purpose
    violation: str | None


class Model:
    def __init__(self, bounds: Spent, writers: int, protocol: Protocol) -> None:
        self.bounds, self.protocol = bounds, protocol
        self.initial = State((), (Writer(),) * writers)
        self.records: list[Record] = []
        self._numbers: dict[bytes, int] = {}
        self._facts: dict[tuple[int, ...], Facts] = {}

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        for slot, record in state.in_flight:
            rest = state.in_flight - {(slot, record)}
            if slot == len(state.log):
                yield "a late create arrives", state._replace(log=(*state.log, record), in_flight=rest)
            else:
                yield "a late create is refused", state._replace(in_flight=rest)
        for index, writer in enumerate(state.writers):
            if index and state.writers[index - 1 : index + 1] == (Writer(), Writer()):
                break  # writers that have done nothing yet are alike: only the first of them moves
            for label, following in self._actions(state, index, writer):
                yield f"w{index} {label}", following

    def _actions(self, state: State, index: int, writer: Writer) -> Iterator[tuple[str, State]]:
        if writer.phase == "stopped":
            yield from self._intend(state, index, "start", "", starts=1)
            return
        if writer.phase == "ready":
            yield from self._choices(state, index, writer)
        elif writer.phase == "deciding":
            yield from self._create(state, index, writer)
        else:
            yield "reads back", self._read_back(state, index, writer)
        if spent := self._spend(state, crashes=1):
            yield "crashes", _with(state._replace(spent=spent), index, Writer(nonces=writer.nonces))

    def _choices(self, state: State, index: int, writer: Writer) -> Iterator[tuple[str, State]]:
        attempt = attempt_name(writer.at + 1, f"w{index}x{writer.nonces}")
        yield from self._intend(state, index, "commit", attempt, commits=1)
        if writer.fresh:
            left = state.complete - self.facts(state.log).view.commits.keys()
            for attempt in sorted(attempt for attempt in left if _step(attempt) > writer.at):
                yield from self._intend(state, index, "commit", attempt, commits=1)
        head = self.facts(state.log).view.head
        if head is not None:
            yield from self._intend(state, index, "rollback", head.parent or "", starts=1, rollbacks=1)

    def _intend(self, state: State, index: int, kind: str, argument: str, **cost: int) -> Iterator[tuple[str, State]]:
        spent = self._spend(state, **cost)
        if spent is None:
            return
        writer = state.writers[index]
        intent = (kind, f"w{index}x{writer.nonces}", argument)
        writer = writer._replace(nonces=writer.nonces + 1, intent=intent, record=-1)
        complete = state.complete | {argument} if kind == "commit" else state.complete
        state = state._replace(spent=spent, complete=complete)
        yield f"decides to {kind} {argument}", self._decide(state, index, writer)

    def _decide(self, state: State, index: int, writer: Writer) -> State:
        """Read to the end and decide, in one action: the log is append-only, so later reads only see more."""
        if writer.record >= 0 and not self.protocol.decides_again:
            return _with(state, index, writer._replace(phase="deciding", slot=len(state.log)))
        try:
            record = self._proposal(self.facts(state.log).view, writer)
        except Fenced:
            return _with(state, index, Writer(nonces=writer.nonces))
        except CkptError:
            return _with(state, index, writer._replace(phase="ready"))
        number = self._number(record)
        return _with(state, index, writer._replace(phase="deciding", slot=len(state.log), record=number))

    def _proposal(self, view: View, writer: Writer) -> Record:
        kind, nonce, argument = writer.intent
        if kind == "start":
            return self.protocol.start(view, nonce=nonce, run_id=None, reason=kind)
        if kind == "rollback":
            return self.protocol.start(
                view,
                nonce=nonce,
                run_id=None,
                reason=kind,
                base=argument or None,
                expected_generation=writer.generation,
            )
        return self.protocol.commit(
            view,
            generation=writer.generation,
            holder_nonce=writer.holder_nonce,
            nonce=nonce,
            step=_step(argument),
            attempt=argument,
            manifest_digest="00",
            manifest_bytes=0,
            content_digest="00",
            metrics={},
            world=1,
            unix_s=0.0,
            nbytes=0,
        )

    def _create(self, state: State, index: int, writer: Writer) -> Iterator[tuple[str, State]]:
        unsure = writer._replace(phase="unsure")
        won = state._replace(log=(*state.log, writer.record))
        wins = writer.slot == len(state.log)
        if wins:
            yield "creates its slot", self._done(won, index, writer)
        else:
            yield "finds its slot taken", _with(state, index, unsure)
        if wins and (spent := self._spend(state, lost=1)):
            yield "creates its slot, reply lost", _with(won._replace(spent=spent), index, unsure)
            late = state.in_flight | {(writer.slot, writer.record)}
            yield "times out", _with(state._replace(spent=spent, in_flight=late), index, unsure)

    def _read_back(self, state: State, index: int, writer: Writer) -> State:
        standing = [self.records[number] for number in state.log[writer.slot :]]
        if any(self.protocol.is_mine(record, writer.intent[1]) for record in standing):
            return self._done(state, index, writer)
        return self._decide(state, index, writer)

    def _done(self, state: State, index: int, writer: Writer) -> State:
        kind, nonce, argument = writer.intent
        ready = writer._replace(phase="ready", intent=("", "", ""), slot=-1, record=-1)
        if kind == "commit":
            ready = ready._replace(at=_step(argument), fresh=False)
            return _with(state._replace(acknowledged=state.acknowledged | {argument}), index, ready)
        record = self.records[writer.record]
        assert isinstance(record, Start)
        at = _step(record.base) if record.base else 0
        return _with(
            state, index, ready._replace(generation=record.generation, holder_nonce=nonce, at=at, fresh=kind == "start")
        )

    def _spend(self, state: State, **cost: int) -> Spent | None:
        after = state.spent._replace(**{name: getattr(state.spent, name) + n for name, n in cost.items()})
        return after if all(used <= limit for used, limit in zip(after, self.bounds, strict=True)) else None

    def _number(self, record: Record) -> int:
        data = encode_record(record)
        if data not in self._numbers:
            self._numbers[data] = len(self.records)
            decoded = decode_record(data)
            assert not isinstance(decoded, Unknown)
            self.records.append(decoded)
        return self._numbers[data]

    def violation(self, state: State) -> str | None:
        facts = self.facts(state.log)
        if facts.violation:
            return facts.violation
        if lost := state.acknowledged - facts.lineage - facts.excused:
            return f"(a) acknowledged and lost: {sorted(lost)}"
        steps = [_step(attempt) for attempt in state.acknowledged & facts.lineage]
        if len(steps) != len(set(steps)):
            return "(b) a step was acknowledged twice in one lineage"
        held = [writer.generation for writer in state.writers if writer.generation]
        if len(held) != len(set(held)):
            return f"(d) two writers believe to hold one generation: {held}"
        return None

    def facts(self, log: tuple[int, ...]) -> Facts:
        if log not in self._facts:
            records = [self.records[number] for number in log]
            view = self.protocol.after(self.facts(log[:-1]).view, records[-1]) if records else View()
            lineage = view.lineage()
            excused = frozenset(_excused(records))
            names = frozenset(commit.attempt for commit in lineage)
            self._facts[log] = Facts(view, names, excused, _log_violation(records, view, lineage))
        return self._facts[log]


def _log_violation(records: list[Record], view: View, lineage: tuple[Commit, ...]) -> str | None:
    if len({record.nonce for record in records}) != len(records):
        return "(c) one record stands in two slots"
    starts: list[Start] = []
    current: dict[str, Commit] = {}
    generation, head = 0, None
    for record in records:
        if isinstance(record, Start) and record.generation == generation + 1:
            generation, head = record.generation, record.base
            starts.append(record)
        elif isinstance(record, Commit) and record.generation == generation and _author(record) == _author(starts[-1]):
            current[record.attempt] = record
            head = record.attempt
    if [start.nonce for start in starts] != [start.nonce for start in view.starts] or generation != view.generation:
        return "(d) the generations and their holders are not those of the log"
    if stale := [commit.attempt for commit in lineage if current.get(commit.attempt) != commit]:
        return f"(e) commits of a stale generation were selected: {stale}"
    if head != (view.head.attempt if view.head else None):
        return f"(f) the head is {view.head and view.head.attempt}, it should be {head}"
    return None


def _excused(records: list[Record]) -> Iterator[str]:
    """Attempts left behind on purpose by a rollback: only the holder of the generation before may do that."""
    commits: dict[str, Commit] = {}
    holder = ""
    for record in records:
        if isinstance(record, Commit):
            commits.setdefault(record.attempt, record)
        elif isinstance(record, Start):
            writer = _author(record)
            if record.reason == "rollback" and holder == writer:
                kept, following = set(), record.base
                while following is not None:
                    kept.add(following)
                    following = commits[following].parent
                yield from commits.keys() - kept
            holder = writer


def _author(record: Record) -> str:
    return record.nonce.split("x")[0]


def _step(attempt: str) -> int:
    parsed = parse_attempt(attempt)
    assert parsed is not None
    return parsed[0]


def _with(state: State, index: int, writer: Writer) -> State:
    return state._replace(writers=(*state.writers[:index], writer, *state.writers[index + 1 :]))


@dataclass(frozen=True)
class Found:
    states: int
    logs: int
    violation: str | None
    trace: tuple[str, ...]


def explore(writers: int, bounds: Spent, protocol: Protocol) -> Found:
    """Visit every reachable state; stop at the first violation, with a shortest trace to it."""
    gc.disable()  # millions of small tuples, none of them in a cycle
    try:
        return _explore(Model(bounds, writers, protocol))
    finally:
        gc.enable()


def _explore(model: Model) -> Found:
    came_from: dict[State, tuple[State, str] | None] = {model.initial: None}
    waiting = deque([model.initial])
    while waiting:
        state = waiting.popleft()
        if broken := model.violation(state):
            return Found(len(came_from), len(model._facts), broken, _trace(came_from, state))
        for label, following in model.successors(state):
            if following not in came_from:
                came_from[following] = (state, label)
                waiting.append(following)
    return Found(len(came_from), len(model._facts), None, ())


def _trace(came_from: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    labels: list[str] = []
    while (step := came_from[state]) is not None:
        state, label = step
        labels.append(label)
    return tuple(reversed(labels))


NORMAL = Protocol()


@pytest.mark.parametrize(
    ("writers", "bounds"),
    [
        (2, Spent(starts=3, commits=3, crashes=2, lost=1, rollbacks=1)),
        (3, Spent(starts=3, commits=2, crashes=1, lost=1, rollbacks=0)),
    ],
)
def test_no_interleaving_breaks_the_rules(writers: int, bounds: Spent) -> None:
    _check(writers, bounds)


@pytest.mark.prove
@pytest.mark.parametrize(
    ("writers", "bounds"),
    [
        (2, Spent(starts=4, commits=4, crashes=2, lost=1, rollbacks=1)),
        (3, Spent(starts=4, commits=2, crashes=1, lost=1, rollbacks=1)),
        (3, Spent(starts=3, commits=3, crashes=1, lost=1, rollbacks=1)),
    ],
)
def test_no_interleaving_breaks_the_rules_larger(writers: int, bounds: Spent) -> None:
    _check(writers, bounds)


def _check(writers: int, bounds: Spent) -> None:
    found = explore(writers, bounds, NORMAL)
    print(f"{writers} writers, {bounds}: {found.states} states, {found.logs} logs", file=sys.stderr)
    assert found.violation is None, "\n".join((found.violation or "", *found.trace))
    assert found.states > 1000


def _commits_without_a_fence(view: View, *, generation: int, holder_nonce: str, **fields: Any) -> Commit:
    return structs.replace(_commits_as_the_holder(view, **fields), generation=generation)


def _commits_as_the_holder(view: View, **fields: Any) -> Commit:
    assert view.holder is not None
    own = {"generation": view.generation, "holder_nonce": view.holder.nonce}
    return decide_commit(view, **(fields | own))


def _counts_any_generation(view: View, record: Record) -> View:
    if isinstance(record, Commit):
        record = structs.replace(record, generation=view.generation)
    return view.after(record)


def _ignores_the_base(view: View, record: Record) -> View:
    after = view.after(record)
    return replace(after, head=view.head) if isinstance(record, Start) else after


def _starts_without_expecting(view: View, *, expected_generation: int | None = None, **fields: Any) -> Start:
    return decide_start(view, **fields)


def _names_the_base_it_saw_first() -> Callable[..., Start]:
    """The mistake of naming the parent before the generation is won."""
    seen: dict[str, str | None] = {}

    def start(view: View, *, nonce: str, base: str | None = HEAD, **fields: Any) -> Start:
        record = decide_start(view, nonce=nonce, base=base, **fields)
        return structs.replace(record, base=seen.setdefault(nonce, record.base))

    return start


@pytest.mark.parametrize(
    ("broken", "invariant"),
    [
        (replace(NORMAL, commit=_commits_without_a_fence), "(a)"),
        (replace(NORMAL, commit=_commits_as_the_holder), "(e)"),
        (replace(NORMAL, commit=_commits_without_a_fence, after=_counts_any_generation), "(e)"),
        (replace(NORMAL, after=_ignores_the_base), "(f)"),
        (replace(NORMAL, start=_starts_without_expecting), "(a)"),
        (replace(NORMAL, start=_names_the_base_it_saw_first()), "(a)"),
        (replace(NORMAL, is_mine=lambda standing, nonce: True), "(d)"),
        (replace(NORMAL, decides_again=False), "(d)"),
    ],
    ids=[
        "commit without a fence",
        "commit in the holder's name",
        "stale commits count",
        "head ignores the base",
        "going back without being the holder",
        "base named before the generation is won",
        "a taken slot taken for one's own",
        "same record again in the next slot",
    ],
)
def test_a_broken_rule_is_found(broken: Protocol, invariant: str) -> None:
    found = explore(2, Spent(starts=3, commits=3, crashes=1, lost=1, rollbacks=1), broken)
    assert found.violation is not None, f"{found.states} states and nothing found"
    assert found.violation.startswith(invariant), "\n".join((found.violation, *found.trace))
