"""Which steps stay and which leave: a plan from the log and a rule. Pure; no clock has a say in it.

What leaves is named by a `retire` record first and deleted after that, by the holder of the newest generation alone
(`ckpt.holder.apply_retention`). A crash in between leaves directories that the next time finds retired.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import msgspec

from ckpt.errors import Incompatible, NotFound
from ckpt.log import DELETE, View
from ckpt.records import MAINTENANCE, Commit, Request, parse_attempt

NUMBERS_END = 1 << 63  # of the steps of a run, and so of what counts them


class Best(msgspec.Struct, frozen=True):
    """The `keep` steps with the lowest ("min") or highest ("max") value of a metric; of equal ones the newest."""

    metric: str
    mode: Literal["min", "max"] = "min"
    keep: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric or self.mode not in ("min", "max"):
            raise ValueError(f'Best takes the name of a metric and mode "min" or "max", not {self!r:.200}')
        _positive("Best(keep=...)", self.keep)


class Keep(msgspec.Struct, frozen=True, kw_only=True):
    """Keep the newest `last` steps, the first of each `every` steps, and the best; everything else leaves.

    Pinned steps stay, and so does the step that the last job went on from: it is the newest that was read back. Steps
    that were left behind by going back stay until the run has come past them again. `ValueError` for numbers below 1.
    """

    last: int = 1
    every: int | None = None
    best: Best | None = None

    def __post_init__(self) -> None:
        _positive("Keep(last=...)", self.last)
        if self.every is not None:
            _positive("Keep(every=...)", self.every)
        if self.best is not None and not isinstance(self.best, Best):
            raise ValueError(f"Keep(best=...) takes a ckpt.Best, not {self.best!r:.100}")


def _positive(what: str, number: object) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < NUMBERS_END:
        raise ValueError(f"{what} is a whole number of at least 1 and below 2**63, not {number!r:.100}")


@dataclass(frozen=True)
class Plan:
    """What a rule makes of a run: why each committed attempt stays, and which attempts leave, by step."""

    kept: dict[str, str]
    leaving: tuple[Commit, ...]
    abandoned: tuple[str, ...]  # never committed, and passed since

    @property
    def attempts(self) -> tuple[str, ...]:
        return (*(commit.attempt for commit in self.leaving), *self.abandoned)

    def within(self, earlier: Plan) -> Plan:
        """This plan without what did not leave in an `earlier` one, which somebody has seen."""
        said = set(earlier.attempts)
        spared = {each.attempt: "for now: a step was adopted" for each in self.leaving if each.attempt not in said}
        return Plan(
            self.kept | spared,
            tuple(each for each in self.leaving if each.attempt in said),
            tuple(name for name in self.abandoned if name in said),
        )


def plan_retention(view: View, keep: Keep | None, present: Iterable[str] = (), in_flight: Collection[str] = ()) -> Plan:
    """What leaves under `keep` (None: nothing), and what was asked to be deleted.

    `present`: attempts that have a directory; those `in_flight`, and those that these refer to, are left alone.
    """
    lineage = view.standing()
    if not lineage:
        return Plan({}, (), ())
    head, kept = lineage[-1], kept_for_itself(view, keep)
    for name in in_flight:
        kept.setdefault(name, "a step that is being saved refers to it")
    _keep_sources(view, kept)
    standing = [*lineage, *view.standing_outside()]
    leaving = [commit for commit in standing if commit.attempt not in kept]
    abandoned = [
        name
        for name in present
        if name not in view.commits and name not in view.retired and name not in in_flight
        if keep is not None and (parsed := parse_attempt(name)) is not None and parsed[0] <= head.step
    ]
    names = {commit.attempt for commit in standing}
    return Plan(
        {name: why for name, why in kept.items() if name in names},
        tuple(sorted(leaving, key=lambda commit: (commit.step, commit.attempt))),
        tuple(sorted(abandoned)),
    )


def kept_for_itself(view: View, keep: Keep | None) -> dict[str, str]:
    """Why each attempt that stays does, but for those that stay because others refer to them. There is a head."""
    lineage, asked = view.standing(), view.asked_to_delete()
    kept = {name: reason for name, reason in _kept_by_rule(view, lineage, keep).items() if name not in asked}
    kept.setdefault(lineage[-1].attempt, "the newest step")
    for base in _gone_on_from(view):
        kept.setdefault(base, "the step that the last job went on from")
    return kept | {pin.attempt: f"pinned as {name}" for name, pin in view.pins.items()}


def _gone_on_from(view: View) -> Iterator[str]:
    """Where the last job that committed anything, and those after it, went on from: the newest that was read back.

    A start of `ckpt gc` and the like reads nothing back.
    """
    committed = {commit.generation for commit in view.commits.values()}
    for start in reversed(view.starts):
        if start.reason in MAINTENANCE:
            continue
        if start.base is not None and start.base not in view.retired:
            yield start.base
        if start.generation in committed:
            return


def _keep_sources(view: View, kept: dict[str, str]) -> None:
    """What stays needs the attempts in whose files its tensors lie, and these theirs, so that each can be restored."""
    waiting = [name for name in kept if name in view.commits]
    while waiting:
        commit = view.commits[waiting.pop()]
        for source in commit.sources:
            if source not in kept:
                kept[source] = f"tensors of step {commit.step} lie in it"
                waiting.append(source)


def decide_delete(view: View, *, nonce: str, attempt: str) -> Request:
    """The request to delete a committed attempt. Raises NotFound if it is not there, Incompatible if it has to stay."""
    request = Request(nonce=nonce, verb=DELETE, arguments={"attempt": attempt})
    following = view.after(request)
    if attempt not in following.asked_to_delete():
        raise NotFound(f"{attempt} is not there (any more); `ckpt ls` lists what there is. Nothing was asked for")
    if reason := plan_retention(following, None).kept.get(attempt):
        raise Incompatible(f"{attempt} cannot be deleted: {reason}. Nothing was asked for")
    return request


def _kept_by_rule(view: View, lineage: list[Commit], keep: Keep | None) -> dict[str, str]:
    """Why the attempts that stay do, but for what stays whatever the rule is."""
    outside, head = view.standing_outside(), lineage[-1]
    if keep is None:
        return {commit.attempt: "there is no rule" for commit in (*lineage, *outside)}
    kept = {commit.attempt: reason for commit, reason in _reasons(lineage, keep)}
    back = "left behind by going back, and not passed again"
    return kept | {commit.attempt: back for commit in outside if commit.step > head.step}


def rated(lineage: Iterable[Commit], best: Best) -> list[Commit]:
    """The commits that have a finite value of the metric, the best one first; of equal ones the newest."""
    sign = 1 if best.mode == "min" else -1
    found = [commit for commit in lineage if isfinite(commit.metrics.get(best.metric, float("nan")))]
    return sorted(found, key=lambda commit: (sign * commit.metrics[best.metric], -commit.step))


def _reasons(lineage: list[Commit], keep: Keep) -> Iterable[tuple[Commit, str]]:
    """Each commit that the rule keeps, with the reason; a later reason counts more."""
    if keep.every is not None:
        first: dict[int, Commit] = {}
        for commit in lineage:
            first.setdefault(commit.step // keep.every, commit)
        yield from ((commit, f"the first of its {keep.every} steps") for commit in first.values())
    if (best := keep.best) is not None:
        yield from (
            (commit, f"among the best {best.keep} by {best.metric}") for commit in rated(lineage, best)[: best.keep]
        )
    yield from ((commit, f"among the last {keep.last}") for commit in lineage[-keep.last :])
