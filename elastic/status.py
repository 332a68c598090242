"""What a run's directory tells of its membership, for people. Reads only; asks no agent."""

from __future__ import annotations

import time
from typing import Any

from ckpt.log import View
from elastic.membership import Membership, of_start
from elastic.registry import open_run
from elastic.roster import Pulse, read_cordons, read_pulse

WATCH_S = 2.5  # the counter moves every second


def status(url: str, run_id: str | None = None, *, watch_s: float = WATCH_S) -> dict[str, Any]:
    """Generation, members, spares, quarantined nodes, slow ranks, whether there is a leader, last steps, and history.

    Takes `watch_s`, to see the counter move. Raises NotFound if there is no run at `url`.
    """
    run = open_run(url, run_id)
    view, before = run.log.read(), read_pulse(run)
    membership = of_start(view.holder)
    if membership is not None and not (before is not None and before.over):
        time.sleep(watch_s)
    cordoned = sorted(cordon.name for cordon in read_cordons(run))
    return describe(run.url, view, membership, before, read_pulse(run), cordoned)


def describe(
    url: str,
    view: View,
    membership: Membership | None,
    before: Pulse | None,
    after: Pulse | None,
    cordoned: list[str],
) -> dict[str, Any]:
    """`status` from what was read: the log, and the leader's counter twice."""
    own = after if after is not None and membership is not None and after.node == membership.leader else None
    commits = dict.fromkeys((start.generation for start in view.starts), 0)
    for commit in view.commits.values():
        commits[commit.generation] = commits.get(commit.generation, 0) + 1
    return {
        "url": url,
        "generation": view.generation,
        "state": _state(membership, before, own),
        "reason": view.holder.reason if view.holder else "",
        "unix_s": view.holder.unix_s if view.holder else 0.0,
        "members": [
            {
                "rank": rank,
                "name": member.name,
                "node": member.node,
                "addresses": [f"{address}:{member.port}" for address in member.addresses],
                "leads": member.node == membership.leader,
            }
            for rank, member in enumerate(membership.members)
        ]
        if membership is not None
        else [],
        "spares": list(own.waiting) if own else [],
        "quarantined": list(own.avoided) if own else [],
        "slow": list(own.slow) if own else [],
        "cordoned": cordoned,
        "steps": [commit.step for commit in view.lineage()][-5:],
        "generations": [
            {
                "generation": start.generation,
                "unix_s": start.unix_s,
                "nodes": len(start.members),
                "reason": start.reason,
                "commits": commits[start.generation],
            }
            for start in view.starts
        ],
    }


def _state(membership: Membership | None, before: Pulse | None, own: Pulse | None) -> str:
    if membership is None:
        return "not elastic"
    if own is not None and own.over:
        return "done" if own.done else "over"
    return "led" if own is not None and own != before else "no leader"
