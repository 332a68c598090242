"""Who works in the next generation, and who may begin it.

Pure: clocks and what was seen come in as arguments, every answer carries its reason. That two generations never both
work does not rest on these rules: the log's exclusive create decides. They say who should try, and when.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import median_low

from elastic.membership import Member, Membership

SLOW_FACTOR, SLOW_SHARE = 1.5, 0.1
LEAST_HANG_S, HANG_FACTOR, MOVES_TO_LEARN = 300.0, 10, 10


@dataclass(frozen=True)
class Limits:
    """How many nodes may work together: a multiple of `unit` in [minimum, maximum]."""

    minimum: int
    maximum: int
    unit: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.maximum or self.unit < 1 or self.fit(self.maximum) == 0:
            raise ValueError(
                f"no number of nodes is at least {self.minimum}, at most {self.maximum} and a multiple of {self.unit}"
            )

    def fit(self, nodes: int) -> int:
        """The largest valid number of nodes out of `nodes`; 0 if there is none."""
        found = min(nodes, self.maximum) // self.unit * self.unit
        return found if found >= self.minimum else 0


@dataclass(frozen=True)
class Timing:
    """Seconds and counts that the rules go by; `elastic.options` says what each means."""

    node_timeout_s: float = 10.0
    join_window_s: float = 3.0
    gather_s: float = 0.5
    min_interval_s: float = 30.0
    grow_wait_s: float = 300.0
    min_wait_s: float = 1800.0
    stop_limit_s: float = 60.0
    pause_limit_s: float = 300.0
    hang_limit_s: float = 0.0  # 0: learned
    trace_limit_s: float = 10.0
    seek_s: float = 0.25
    quarantine_failures: int = 2
    quarantine_window_s: float = 600.0
    fruitless_limit: int = 10
    fruitless_s: float = 600.0


@dataclass(frozen=True)
class Verdict:
    """Whether a group may begin the next generation. `leader_gone`: the one before is known, or taken, to be over."""

    may: bool
    reason: str
    leader_gone: bool = False


def may_take(
    previous: Membership | None,
    me: str,
    group: Collection[str],
    *,
    quiet_s: float,
    known_gone: bool,
    node_timeout_s: float,
) -> Verdict:
    """Whether `me`, with the nodes of `group` in direct contact and ready (`me` among them), may begin a generation.

    The leader goes on with at least half of its members; more than half go on without it at once. Anybody else waits
    until the leader's counter in storage has stood still for `node_timeout_s` (`quiet_s`, by the caller's own clock),
    or until its end is certain (`known_gone`).
    """
    if previous is None:
        return Verdict(True, "nobody has begun before", True)
    here = [node for node in previous.nodes if node in group]
    half = len(previous.members) / 2
    if me == previous.leader and len(here) >= half:
        return Verdict(True, f"the leader has {len(here)} of {len(previous.members)} members")
    if previous.leader not in group and len(here) > half:
        return Verdict(True, f"{len(here)} of {len(previous.members)} members go on without the leader", True)
    if known_gone:
        return Verdict(True, "the leader is gone", True)
    if quiet_s >= node_timeout_s:
        return Verdict(True, f"the leader's counter stood still for {quiet_s:.1f} s", True)
    return Verdict(
        False,
        f"only {len(here)} of {len(previous.members)} members of generation {previous.generation} are here, and its "
        f"leader's counter stood still for {quiet_s:.1f} s; {node_timeout_s:g} s are needed",
    )


def arrange(
    before: Sequence[Member], ready: Iterable[Member], limits: Limits, *, proposer: str, avoid: Collection[str] = ()
) -> tuple[Member, ...]:
    """The next members in order of rank; empty if there are too few. `ready`: in order of arrival.

    Who stays keeps its rank as far as the size allows, newcomers fill the places of those that left, and the surplus
    waits as spares. Nodes to `avoid` work only if there are too few without them. `proposer` is always among them.
    """
    available = {member.node: member for member in ready}
    if proposer not in available:
        raise ValueError(f"{proposer} proposes a membership and is not ready itself")
    old = [member.node for member in before if member.node in available]
    order = [proposer, *(node for node in old if node != proposer)]
    order += [node for node in available if node not in order]
    well = [node for node in order if node not in avoid or node == proposer]
    size = limits.fit(len(well)) or limits.fit(len(order))
    chosen = (well + [node for node in order if node not in well])[:size]
    newcomers = [node for node in chosen if node not in old]
    places: list[str | None] = [member.node if member.node in chosen else None for member in before]
    filled = [node or (newcomers.pop(0) if newcomers else None) for node in places]
    return tuple(available[node] for node in [*filled, *newcomers] if node is not None)


def would_grow(
    members: Sequence[Member], waiting: Iterable[Member], limits: Limits, *, proposer: str, avoid: Collection[str] = ()
) -> bool:
    """Whether the nodes that wait would make the membership larger."""
    waiting = [node for node in waiting if node.node not in avoid]
    return len(arrange(members, [*members, *waiting], limits, proposer=proposer)) > len(members)


def hang_limit_s(stated_s: float, said_s: float, moves: int, longest_s: float) -> float | None:
    """How long a worker in its loop of steps may make none; None: that is not known yet.

    What it said of what it does now (`said_s`) counts most, then what the operator stated, then what was seen of this
    run: ten times its longest step, after ten, and never less than five minutes.
    """
    if said_s or stated_s:
        return said_s or stated_s
    return max(LEAST_HANG_S, HANG_FACTOR * longest_s) if moves >= MOVES_TO_LEARN else None


@dataclass(frozen=True)
class Pace:
    """How long a rank took for a step of late, and how much of that it did not wait for others."""

    rank: int
    own_s: float
    step_s: float


def stragglers(paces: Collection[Pace]) -> dict[int, float]:
    """Ranks whose own time is 1.5 times the median of all ranks' or more, and by how much.

    Only where that is a tenth of a step at least. All ranks' steps are equally long: the others wait for the slow one.
    """
    if len(paces) < 2:
        return {}
    usual_s = median_low(pace.own_s for pace in paces)
    return {
        pace.rank: pace.own_s / max(usual_s, 1e-3)
        for pace in sorted(paces, key=lambda pace: pace.rank)
        if pace.own_s >= SLOW_FACTOR * usual_s and pace.own_s - usual_s >= SLOW_SHARE * pace.step_s
    }
