"""The run's log: its records, their encoding, what they add up to, and what may be appended next.

Pure: no file, clock, thread or random number here. `ckpt.run.RunLog` reads and appends.

    bytes of slot n  -- decode_record -->  Record         a hostile or torn record is Corrupt, never half believed
    records in order -- replay -------->   View           generation, holder, head, lineage
    View             -- decide_* ------>   Record         or Fenced, Incompatible, NotFound: nothing is appended then

The rules, all of them:

- Slots are numbered from 0 without a gap. A slot holds one record, or is void (a crash on a store without hard links).
- A `start` counts if its generation is the current one + 1 and its base is None or a commit that counted.
- A `commit` counts if it is of the current generation, its parent is the head and its step is above the head's, and
  the attempts in whose files some of its tensors lie (`sources`) are commits that were not retired.
- `retire` counts if it is of the current generation; a `request` always does.
- A `pin` counts if its attempt is a commit that was not retired, `unpin` if there is such a pin; both of any writer.
- Whatever does not count is kept in `View.ignored`, with the reason: also kinds that a later minor version adds.
- Head: the newest generation's last commit, else the commit its start is based on. Lineage: the head's parents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from ckpt.errors import Fenced, Incompatible, NotFound
from ckpt.records import Commit, Entry, Pin, Request, Retire, Start, Unknown, Unpin

DELETE: Final = "delete"  # the verb of a request
HEAD: Final = "head"  # `decide_start(base=HEAD)`: go on from where the log ends; no attempt can have this name


@dataclass(frozen=True)
class Ignored:
    """A slot without effect, and why."""

    slot: int
    entry: Entry
    reason: str


@dataclass(frozen=True)
class View:
    """What the first `next_slot` slots of the log say. Immutable; `after` and `extend` return a new one."""

    next_slot: int = 0
    generation: int = 0  # 0: nobody has started yet
    holder: Start | None = None  # the last start that counted
    head: Commit | None = None
    commits: Mapping[str, Commit] = field(default_factory=dict)  # every commit that counted, by attempt, in slot order
    starts: tuple[Start, ...] = ()  # every start that counted, in slot order
    pins: Mapping[str, Pin] = field(default_factory=dict)  # by pin name
    retired: frozenset[str] = frozenset()
    requests: tuple[tuple[int, Request], ...] = ()  # (slot, request)
    ignored: tuple[Ignored, ...] = ()

    @property
    def without_effect(self) -> tuple[Ignored, ...]:
        """Records that no writer of this version appends; a void slot (a crash on a store without hard links) and kinds
        of a later minor version are as they should be.
        """
        return tuple(each for each in self.ignored if each.entry is not None and not isinstance(each.entry, Unknown))

    def after(self, entry: Entry) -> View:
        """The view once `entry` stands in slot `next_slot`."""
        return self.extend((entry,))

    def extend(self, entries: Iterable[Entry]) -> View:
        """The view once `entries` stand in the slots from `next_slot` on."""
        return _Fold(self).apply(entries).view()

    def lineage(self) -> tuple[Commit, ...]:
        """The head and its parents, oldest first, the retired ones too: ask `standing` for what can be restored."""
        return self.lineage_of(self.head.attempt) if self.head else ()

    def standing(self) -> list[Commit]:
        """The steps that can be restored, oldest first: the lineage but for what was retired."""
        return self._not_retired(self.lineage())

    def lineage_of(self, attempt: str) -> tuple[Commit, ...]:
        """The commit of `attempt` and its parents, oldest first; raises KeyError if it never counted."""
        chain: list[Commit] = []
        following: str | None = attempt
        while following is not None:
            chain.append(self.commits[following])
            following = chain[-1].parent
        return tuple(reversed(chain))

    def outside(self) -> tuple[Commit, ...]:
        """The commits that counted and are not in the lineage (left behind by going back), in slot order."""
        inside = {commit.attempt for commit in self.lineage()}
        return tuple(commit for attempt, commit in self.commits.items() if attempt not in inside)

    def standing_outside(self) -> list[Commit]:
        """Those of them that were not retired: going back to one of them is still possible."""
        return self._not_retired(self.outside())

    def asked_to_delete(self) -> frozenset[str]:
        """The commits that requests name and that still stand."""
        asked = (request.arguments.get("attempt", "") for _, request in self.requests if request.verb == DELETE)
        return frozenset(attempt for attempt in asked if attempt in self.commits and attempt not in self.retired)

    def _not_retired(self, commits: Iterable[Commit]) -> list[Commit]:
        return [commit for commit in commits if commit.attempt not in self.retired]


def replay(entries: Iterable[Entry]) -> View:
    """The view of a whole log; `entries` are the contents of slots 0, 1, 2, ..., None for a void slot."""
    return View().extend(entries)


class _Fold:
    """A View being extended: copied once, not once per record."""

    def __init__(self, view: View) -> None:
        self.next_slot, self.generation = view.next_slot, view.generation
        self.holder, self.head = view.holder, view.head
        self.commits, self.pins, self.retired = dict(view.commits), dict(view.pins), set(view.retired)
        self.starts, self.requests, self.ignored = list(view.starts), list(view.requests), list(view.ignored)

    def view(self) -> View:
        return View(
            self.next_slot, self.generation, self.holder, self.head, MappingProxyType(self.commits), tuple(self.starts),
            MappingProxyType(self.pins), frozenset(self.retired), tuple(self.requests), tuple(self.ignored)
        )  # fmt: skip

    def apply(self, entries: Iterable[Entry]) -> _Fold:
        for entry in entries:
            if reason := self._why_not(entry):
                self.ignored.append(Ignored(self.next_slot, entry, reason))
            else:
                self._count(entry)
            self.next_slot += 1
        return self

    def _why_not(self, entry: Entry) -> str | None:
        if entry is None:
            return "void: its writer stopped half-way"
        if isinstance(entry, Unknown):
            return f"of a kind this version does not know: {entry.kind:.100}"
        if isinstance(entry, Request):
            return None
        if isinstance(entry, Start):
            return self._why_not_start(entry)
        if isinstance(entry, Pin):
            return None if self._stands(entry.attempt) else f"pins {entry.attempt}, which is not there"
        if isinstance(entry, Unpin):
            return None if entry.name in self.pins else f"lets go of {entry.name}, which is no pin"
        if entry.generation != self.generation:
            return f"of generation {entry.generation} while {self.generation} was current"
        return self._why_not_commit(entry) if isinstance(entry, Commit) else None

    def _stands(self, attempt: str) -> bool:
        return attempt in self.commits and attempt not in self.retired

    def _why_not_start(self, start: Start) -> str | None:
        if start.generation != self.generation + 1:
            return f"starts generation {start.generation} after {self.generation}"
        if start.base is not None and start.base not in self.commits:
            return f"based on {start.base}, which was never committed"
        return None

    def _why_not_commit(self, commit: Commit) -> str | None:
        head = self.head.attempt if self.head else None
        if commit.parent != head:
            return f"its parent is {commit.parent} while {head} was the head"
        if self.head is not None and commit.step <= self.head.step:
            return f"step {commit.step} is not above the head's, {self.head.step}"
        if commit.attempt in self.commits:
            return f"{commit.attempt} was committed before"
        gone = [source for source in commit.sources if not self._stands(source)]
        return f"some of its tensors lie in {gone[0]}, which is not there" if gone else None

    def _count(self, record: Entry) -> None:
        if isinstance(record, Start):
            self.generation, self.holder = record.generation, record
            self.head = self.commits[record.base] if record.base is not None else None
            self.starts.append(record)
        elif isinstance(record, Commit):
            self.head = record
            self.commits[record.attempt] = record
        elif isinstance(record, Pin):
            self.pins[record.name] = record
        elif isinstance(record, Unpin):
            del self.pins[record.name]
        elif isinstance(record, Retire):
            self.retired.update(record.attempts)
        elif isinstance(record, Request):
            self.requests.append((self.next_slot, record))


def decide_start(
    view: View,
    *,
    nonce: str,
    run_id: str | None,
    reason: str,
    base: str | None = HEAD,
    takeover: bool = False,
    holder_gone: bool = False,
    expected_generation: int | None = None,
    host: str = "",
    pid: int = 0,
    boot_id: str = "",
    unix_s: float = 0.0,
    addresses: Iterable[str] = (),
    members: Iterable[Any] = (),
) -> Start:
    """The start that takes the next generation, going on from the head, from an older attempt, or (None) from nothing.

    `expected_generation`: the generation the caller knows as current; pass it to go back to an older step as the
    holder, or so that the loser of a race between two starts gives up instead of fencing the winner.

    Raises Fenced if a newer generation than expected has started, or if a holder with another explicit run id is not
    known to be gone and `takeover` is False (a run id of None never conflicts); NotFound if `base` is not a commit of
    this run or its bytes were retired.
    """
    if expected_generation is not None:
        check_fence(view, expected_generation, None)
    _check_holder(view, run_id, takeover or holder_gone)
    if base == HEAD:
        base = view.head.attempt if view.head else None
    elif base is not None:
        _check_base(view, base)
    return Start(
        generation=view.generation + 1, nonce=nonce, run_id=run_id, reason=reason, base=base, host=host, pid=pid,
        boot_id=boot_id, unix_s=unix_s, addresses=tuple(addresses), members=tuple(members)
    )  # fmt: skip


def decide_commit(
    view: View,
    *,
    generation: int,
    holder_nonce: str,
    nonce: str,
    step: int,
    attempt: str,
    manifest_digest: str,
    manifest_bytes: int,
    content_digest: str,
    metrics: Mapping[str, float],
    world: int,
    unix_s: float,
    nbytes: int,
    sources: tuple[str, ...] = (),
) -> Commit:
    """The commit of `attempt` on top of the head, for the holder of `generation` (whose start has `holder_nonce`).

    Raises Fenced if that holder is no longer the current one; Incompatible if `step` is not above the head's, if the
    attempt was committed before, or if one of its `sources` is gone.
    """
    check_fence(view, generation, holder_nonce)
    head = view.head
    if head is not None and step <= head.step:
        raise Incompatible(
            f"step {step} has already been passed: the head of this run is step {head.step}. Steps only grow within a "
            f"lineage; to train step {step} again, first go back with restore(state, step=N) for some N below {step}"
        )
    if attempt in view.commits:
        raise Incompatible(f"attempt {attempt} was committed before; restore(state, step=...) can go back to it")
    for source in sources:
        if source not in view.commits or source in view.retired:
            raise Incompatible(f"attempt {attempt} refers to tensors in {source}, which was deleted meanwhile")
    return Commit(
        generation=generation, nonce=nonce, step=step, attempt=attempt, parent=head.attempt if head else None,
        manifest_digest=manifest_digest, manifest_bytes=manifest_bytes, content_digest=content_digest,
        metrics=dict(metrics), world=world, unix_s=unix_s, nbytes=nbytes, sources=sources
    )  # fmt: skip


def check_fence(view: View, generation: int, holder_nonce: str | None) -> None:
    """Raise Fenced unless `generation` is current and, where a nonce is given, its start is the one with that nonce."""
    holder = view.holder
    if view.generation == generation and (holder_nonce is None or (holder and holder.nonce == holder_nonce)):
        return
    started = f", started by {_who(holder)}: {holder.reason}" if holder else ""
    raise Fenced(
        f"this process works for generation {generation}, but the current one is {view.generation}{started}. Nothing "
        "was appended and every committed step is as it was; stop this process, the newer one has the run"
    )


def decide_pin(view: View, *, nonce: str, attempt: str, name: str) -> Pin:
    """The pin of a committed attempt under `name`, by anyone. Raises NotFound if it is no commit or was retired."""
    _check_base(view, attempt)
    return Pin(nonce=nonce, attempt=attempt, name=name)


def decide_unpin(view: View, *, nonce: str, name: str) -> Unpin:
    """The end of the pin `name`, by anyone. Raises NotFound if there is none."""
    if name not in view.pins:
        known = ", ".join(sorted(view.pins)[:8]) or "none"
        raise NotFound(f"no step is pinned as {name!r:.200}. Pins of this run: {known}; `ckpt ls` shows them")
    return Unpin(nonce=nonce, name=name)


def decide_retire(view: View, *, generation: int, holder_nonce: str, nonce: str, attempts: Iterable[str]) -> Retire:
    """The record that must stand before the bytes of `attempts` are deleted.

    Raises Fenced; Incompatible if the head, a pinned attempt, or the source of one that stays is among them.
    """
    check_fence(view, generation, holder_nonce)
    leaving = tuple(sorted(set(attempts)))
    gone = view.retired.union(leaving)
    stay = [commit for commit in view.commits.values() if commit.attempt not in gone]
    kept = {source: f"where tensors of step {commit.step} lie" for commit in stay for source in commit.sources}
    kept |= {pin.attempt: f"pinned as {pin.name!r}" for pin in view.pins.values()}
    if view.head is not None:
        kept[view.head.attempt] = "the newest step of this run"
    for attempt in leaving:
        if attempt in kept:
            raise Incompatible(f"{attempt} cannot be deleted: it is {kept[attempt]}. Nothing was deleted")
    return Retire(generation=generation, nonce=nonce, attempts=leaving)


def _check_holder(view: View, run_id: str | None, may_take: bool) -> None:
    holder = view.holder
    if holder is None or may_take or run_id is None or holder.run_id is None or holder.run_id == run_id:
        return
    raise Fenced(
        f"this run is held by run id {holder.run_id!r} (generation {holder.generation}, {_who(holder)}), yours is "
        f"{run_id!r}. Nothing was changed. Stop that job first, or take the run from it with takeover=True"
    )


def _check_base(view: View, attempt: str) -> None:
    if attempt not in view.commits:
        raise NotFound(f"{attempt} is not a commit of this run; `ckpt ls` lists what there is")
    if attempt in view.retired:
        raise NotFound(f"{attempt} was deleted by retention; `ckpt ls` lists what there is")


def _who(start: Start) -> str:
    return f"pid {start.pid} on host {start.host!r}"
