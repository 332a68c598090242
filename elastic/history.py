"""A production run as its ledger and its log tell it, in the form that a fault-injection run has. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from ckpt.records import Commit
from elastic.evidence import Evidence, Injection, Life, Mark
from elastic.ledger import Batch, Happening
from elastic.report import figures

MARKS = {"begun": "join", "restoring": "restoring", "restored": "restore", "step": "step"}
DECIDED = ("failed", "killed")  # from here on nobody waits to notice


def history(url: str, batches: Sequence[Batch], commits: Iterable[Commit]) -> Evidence:
    """What the agents saw, on one time line that begins with the first of them.

    Nodes are placed by their wall clocks; within a node, order and durations are of its monotonic clock.
    """
    zero = min((batch.unix_s for batch in batches), default=0.0)
    scenario = {"name": url, "title": "as the ledger of its agents tells", "nodes": len({b.name for b in batches})}
    evidence = Evidence(scenario, [], 0, "production")
    for _, of_agent in groupby(batches, key=lambda batch: batch.node):
        agent = list(of_agent)
        _take(evidence, agent[0].name, agent[0].unix_s - zero, [h for batch in agent for h in batch.happenings])
    evidence.marks.sort(key=lambda mark: mark.at)
    evidence.faults.sort(key=lambda fault: fault.at)
    for fault in evidence.faults:
        after = (m.at for m in evidence.named("step") if m.generation > fault.generation and m.at > fault.at)
        fault.recovered_at = next(after, None)
    evidence.seconds = max((mark.at for mark in evidence.marks), default=0.0)
    evidence.seconds = max(evidence.seconds, *(life.ended or 0.0 for life in evidence.lives), 0.0)
    for commit in commits:
        at = commit.unix_s - zero
        evidence.marks.append(Mark(at, "commit", "", 0, commit.generation, {"step": commit.step}))
    return evidence


def _take(evidence: Evidence, node: str, shift: float, seen: Sequence[Happening]) -> None:
    life = Life(node, shift)
    evidence.lives.append(life)
    for one in seen:
        at = shift + one.at

        def mark(name: str, at: float = at, one: Happening = one, **facts: Any) -> None:
            facts = {"step": one.step, "rank": one.rank, **facts}
            evidence.marks.append(Mark(at, name, node, 0, one.generation, facts))

        if one.what == "step":
            mark("saved", blocked_s=one.blocked_s)
        if one.what in MARKS:
            mark(MARKS[one.what])
        if one.what in DECIDED:
            mark("decide", rank=-1, reason=one.text)
        if one.what == "failed":
            what = f"worker of rank {one.rank} on {node} {one.text}"
            evidence.faults.append(Injection("worker failed", [node], at, what, one.generation, one.step, True))
        if one.what == "left":
            life.ended, life.code = at, one.code


def figures_of(evidence: Evidence) -> dict[str, Any]:
    """The figures of a chaos run; steps are counted by their numbers, as only samples of them are in a ledger."""
    by_generation: dict[int, list[int]] = {}
    for mark in evidence.named("restore", "step"):
        if mark.rank == 0:
            by_generation.setdefault(mark.generation, []).append(mark.step)
    highest, again = 0, 0
    for _, steps in sorted(by_generation.items()):
        again += max(min(highest, max(steps)) - steps[0], 0)
        highest = max(highest, *steps)
    return {**figures(evidence), "steps": highest, "steps_computed_again": again}
