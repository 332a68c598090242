"""Recorded faults of a cluster, compressed into minutes. Pure.

Reads the format of the InfiniteHBD trace (arXiv 2502.03885): a list of events {node_id, event_time in days, event_type
`fault_start` or `fault_end`, fault_type {Level, Class, Desc}}.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt.errors import Incompatible
from elastic.chaos.scenario import DRAWN_NODES, MEAN_GAP_S, Planned, Scenario, Trigger, limit_of

HEAL_S = (2.0, 12.0)  # no fault is shorter or longer, whatever the scale
LASTS = ("link-cut", "slow-link", "node-loss", "maintenance")
KINDS = {
    "Parameter Plane Cable": "link-cut",
    "NIC": "link-cut",
    "GPU": "worker-kill",
    "Power Supply": "node-loss",
    "Motherboard": "node-loss",
    "CPU": "node-loss",
    "Operating System": "node-loss",
    "System Crash": "node-loss",
}
"""What the class of a recorded fault does to a run; all others take the host out of it, as maintenance does."""


@dataclass(frozen=True)
class Recorded:
    """A fault of a trace, in days."""

    node: str
    start: float
    stop: float | None
    kind: str


def recorded(events: Any) -> list[Recorded]:
    """The faults of a trace, by their start. Raises Incompatible for what is none."""
    ends: dict[str, list[float]] = {}
    found: list[Recorded] = []
    try:
        for event in reversed(events):
            node, at = str(event["node_id"]), float(event["event_time"])
            if event["event_type"] == "fault_end":
                ends.setdefault(node, []).append(at)
            else:
                stop = ends[node].pop() if ends.get(node) else None
                found.append(Recorded(node, at, stop, kind_of(event["fault_type"])))
    except (TypeError, KeyError, ValueError) as error:
        raise Incompatible(
            f"not a fault trace: {type(error).__name__} {error}. Expected the InfiniteHBD format"
        ) from None
    return sorted(found, key=lambda one: one.start)


def kind_of(fault: Mapping[str, str]) -> str:
    """The fault that does what the recorded one did."""
    if "Speed low" in fault["Desc"] or "Width low" in fault["Desc"]:
        return "slow-link"
    return KINDS.get(fault["Class"], "maintenance")


def replay(
    name: str, faults: Sequence[Recorded], minutes: float, can: Collection[str], uniform: Callable[[], float]
) -> Scenario:
    """A stretch of the trace, drawn by `uniform`, with as many faults as fit into `minutes`, in their rhythm.

    Kinds that are not in `can` take the whole node, as their repair did. Raises Incompatible for an empty trace.
    """
    if not faults:
        raise Incompatible(f"{name}: there is no fault in this trace")
    count = max(1, min(len(faults), int(minutes * 60 / MEAN_GAP_S)))
    first = int(uniform() * (len(faults) - count + 1))
    chosen = faults[first : first + count]
    scale = minutes * 60 / max(chosen[-1].start - chosen[0].start, 1e-9)
    planned = []
    for one in chosen:
        kind = one.kind if one.kind in can else "node-loss"
        lasted = (one.stop - one.start) * scale if one.stop is not None else HEAL_S[1]
        heal_s = min(max(lasted, HEAL_S[0]), HEAL_S[1]) if kind in LASTS else None
        planned.append(Planned(kind, Trigger(seconds=(one.start - chosen[0].start) * scale), heal_s=heal_s))
    days = chosen[-1].start - chosen[0].start
    return Scenario(
        name=name,
        title=f"{count} faults of {days:.1f} recorded days in {minutes:g} minutes",
        faults=tuple(planned),
        nodes=DRAWN_NODES,
        maximum=DRAWN_NODES,
        limit_s=limit_of(minutes, count),
        environment={"ELASTIC_QUARANTINE_FAILURES": "0"},
    )
