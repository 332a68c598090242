"""Scenarios: which faults happen when, and what a run promises all the same. Pure: text in, values out."""

from __future__ import annotations

import tomllib
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from math import log
from typing import Any, TypeVar

from ckpt.errors import Incompatible

T = TypeVar("T")
TIMING = {
    "ELASTIC_NODE_TIMEOUT_S": "3",
    "ELASTIC_JOIN_WINDOW_S": "60",  # MAX nodes start at once
    "ELASTIC_MIN_INTERVAL_S": "1",
    "ELASTIC_SETTLE_S": "5",
    "CKPT_KEEPER_GRACE_S": "30",
}
"""What every scenario sets in the environment of its agents, unless it says otherwise: minutes become seconds."""
LAUNCHERS = ("elastic", TORCHRUN := "torchrun")
STORES = ("directory", S3 := "s3")
MEAN_GAP_S = 15.0
DRAWN_NODES = 3


@dataclass(frozen=True)
class Trigger:
    """When a fault is injected: the first of these that is given holds.

    `step`: once a rank has completed it. `mark`: when a process of the node is there, which is held until the fault is
    injected; of save marks, the first of a step above `after_step`. `seconds` after the first step of the run.
    """

    step: int | None = None
    mark: str | None = None
    after_step: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Planned:
    """One fault of a scenario. `node`: a name, or `leader`, `follower`, `any` (drawn with the seed).

    `heal_s`: seconds until it is healed; None is never. `during_recovery`: armed at once, while the run still recovers
    from the fault before; otherwise once it has. `amount`: how much, in the unit of the kind.
    """

    kind: str
    trigger: Trigger = field(default_factory=Trigger)
    node: str = "any"
    heal_s: float | None = None
    during_recovery: bool = False
    amount: float | None = None


@dataclass(frozen=True)
class Promise:
    """What holds whatever is injected.

    `exit_code` of every agent that was not taken away; `saves_lost`: how many begun saves a fault may cost beyond
    those that were committed, none of which is lost; `recovery_s` from a fault to the next new step.
    """

    exit_code: int = 0
    saves_lost: int = 2
    recovery_s: float = 60.0
    damage: bool = False  # stored bytes are damaged on purpose: to be found, and not restored
    spoilt: bool = False  # the live state is damaged on purpose: to be noticed


@dataclass(frozen=True)
class Scenario:
    """A run and what befalls it. `nodes` are started, `minimum` to `maximum` of them work together.

    `launcher`: "elastic", or "torchrun" for stock torchrun, with its rendezvous on the first node, to compare.
    `store`: "directory", or "s3": a bucket on a server of its own. `store_mb`: size of the disk
    that the run lies on, where it must have one of its own; 0: the machine's.
    """

    name: str
    title: str
    faults: tuple[Planned, ...]
    nodes: int = 3
    minimum: int = 1
    maximum: int = 3
    workers: int = 1
    limit_s: float = 180.0
    launcher: str = "elastic"
    store: str = "directory"
    store_mb: int = 0
    promise: Promise = field(default_factory=Promise)
    environment: Mapping[str, str] = field(default_factory=dict)

    def with_nodes(self, nodes: int) -> Scenario:
        """The same with so many nodes; those beyond the maximum were spares and stay as many."""
        spares = max(self.nodes - self.maximum, 0)
        maximum = max(nodes - spares, 1)
        return replace(self, nodes=nodes, maximum=maximum, minimum=min(self.minimum, maximum))


def parse(text: str, name: str) -> Scenario:
    """The scenario in a TOML text. Raises Incompatible, which names what is wrong."""
    try:
        table = tomllib.loads(text)
        faults = tuple(_planned(one) for one in table.pop("fault", []))
        promise = _made(Promise, table.pop("promise", {}))
        environment = {key: str(value) for key, value in table.pop("environment", {}).items()}
        table.setdefault("maximum", table.get("nodes", Scenario.nodes))
        found = _made(
            Scenario, {"name": name, "faults": faults, "promise": promise, "environment": environment, **table}
        )
    except (tomllib.TOMLDecodeError, TypeError, ValueError) as error:
        raise Incompatible(f"scenario {name}: {error}. `elastic chaos --list` shows what there is") from error
    if found.store not in STORES or (found.store == S3 and found.store_mb):
        raise Incompatible(f'scenario {name}: store is "directory" or "s3", and store_mb is for a directory')
    if found.launcher not in LAUNCHERS:
        raise Incompatible(f'scenario {name}: launcher is "elastic" or "torchrun"')
    if not 1 <= found.minimum <= found.maximum or found.nodes < found.minimum:
        raise Incompatible(f"scenario {name}: 1 <= minimum <= maximum and minimum <= nodes does not hold")
    return found


def _planned(table: dict[str, Any]) -> Planned:
    at = _made(Trigger, table.pop("at", {}))
    return _made(Planned, {**table, "trigger": at})


def _made(kind: type[T], table: Mapping[str, Any]) -> T:
    names = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(table) - names):
        raise ValueError(f"unknown {', '.join(unknown)} in {kind.__name__.lower()}; known: {', '.join(sorted(names))}")
    return kind(**table)


def draw(
    name: str, minutes: float, shares: Mapping[str, float], heal_s: Mapping[str, float], uniform: Callable[[], float]
) -> Scenario:
    """Faults of `minutes`, kinds by their published shares, with gaps that are exponential with a mean of 15 s.

    `uniform` gives random numbers in [0, 1): the same numbers and kinds give the same faults. `heal_s`: kinds that must
    heal, and after how long.
    """
    kinds, faults, spent = sorted(shares), list[Planned](), 0.0
    totals = list(accumulate(shares[kind] for kind in kinds))
    while (spent := spent - MEAN_GAP_S * log(1.0 - uniform())) <= minutes * 60:
        kind = kinds[bisect_right(totals, uniform() * totals[-1])]
        faults.append(Planned(kind, Trigger(seconds=spent), heal_s=heal_s.get(kind)))
    return Scenario(
        name=name,
        title=f"{len(faults)} faults in {minutes:g} minutes, drawn by their published frequencies",
        faults=tuple(faults),
        nodes=DRAWN_NODES,
        maximum=DRAWN_NODES,
        limit_s=limit_of(minutes, len(faults)),
        environment={"ELASTIC_QUARANTINE_FAILURES": "0"},
    )


def limit_of(minutes: float, faults: int) -> float:
    """Seconds within which a run of so many drawn faults is over."""
    return minutes * 60 + 60.0 + 40.0 * faults
