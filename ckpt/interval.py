"""When a save is due: every so many steps or seconds, or as often as pays, from what a save is seen to cost.

Owns the arithmetic; the clock, the measuring and the agreement of the ranks belong to the caller, and every duration
comes in as an argument. `Interval` is fed on the rank that decides for all (rank 0) and asked there.

The interval is a trade: saving often costs training, saving rarely loses more of it at each failure. The optimum is
J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974, to higher order in
J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import expm1, inf, isfinite, sqrt
from operator import index
from statistics import fmean, median
from typing import Any

ASSUMED_COST_S = 1.0
"""What a save is taken to cost as long as none was measured."""

SAVES_KEPT = 8
"""Saves that count. Even, so that saves which are cheap and dear in turn give a steady estimate."""

STEPS_KEPT = 64
"""Undisturbed steps whose median is the length of a step."""


@dataclass(frozen=True, kw_only=True)
class Every:
    """When a save is due: `Every(steps=200)`, `Every(seconds=60)` or `Every.auto(mtbf_s=...)`.

    `steps` counts completed steps, `seconds` the time since the last save was asked for; rank 0's clock decides for
    all ranks. `mtbf_s` is the mean time between failures of the whole run, in seconds (of one node, divided by the
    number of nodes): the interval is then the one that loses the least time, see `Interval`. Equal settings have
    equal `repr`. `ValueError` unless exactly one is given, positive and finite.
    """

    steps: int | None = None
    seconds: float | None = None
    mtbf_s: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("steps", "seconds", "mtbf_s") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"Every takes exactly one of steps, seconds and mtbf_s, not {' and '.join(given) or 'none of them'}: "
                f"pass {', '.join(_ADVICE.values())}"
            )
        (name,) = given
        object.__setattr__(self, name, _positive(name, getattr(self, name)))

    @classmethod
    def auto(cls, mtbf_s: float) -> Every:
        """As often as pays for a run that fails every `mtbf_s` seconds on average, from what its saves cost."""
        return cls(mtbf_s=mtbf_s)

    def interval(self) -> Interval | None:
        """What measures and decides under `auto`; else None, and `due` of this object decides."""
        return None if self.mtbf_s is None else Interval(self.mtbf_s)

    def due(self, done_steps: int, since_save_s: float) -> bool:
        """Whether to save after `done_steps` completed steps, `since_save_s` seconds after the last save was asked for.

        Under `auto`: as long as nothing is measured.
        """
        if done_steps <= 0:
            return False
        if self.steps is not None:
            return done_steps % self.steps == 0
        if self.seconds is not None:
            return since_save_s >= self.seconds
        assert self.mtbf_s is not None
        return Interval(self.mtbf_s).due(done_steps, since_save_s)


def daly_s(cost_s: float, mtbf_s: float) -> float:
    """Seconds from the start of one save to the start of the next that lose the least time, at most `mtbf_s`.

    Daly's formula gives the computing between two saves; the save's cost, which he subtracts, is part of the period.
    """
    half = cost_s / (2 * mtbf_s)
    if half >= 1:
        return mtbf_s
    return min(mtbf_s, sqrt(2 * cost_s * mtbf_s) * (1 + sqrt(half) / 3 + half / 9))


def expected_loss(period_s: float, *, cost_s: float, durable_s: float, mtbf_s: float) -> float:
    """Share of the time, 0 to 1, that is lost to saves and to work done again, restarts themselves left out.

    Daly's complete cost function, for failures that come at random (exponential). A failure also loses `durable_s`
    of work on average, as it goes back one save further where the last one was still on its way.
    """
    if cost_s >= period_s:
        return 1.0
    periods = min(period_s / mtbf_s, 700.0)  # beyond that expm1 overflows, and nothing gets done anyway
    useful = (period_s - cost_s) / (mtbf_s * expm1(periods))
    return min(1.0, 1 - useful + durable_s / mtbf_s)


class Interval:
    """The interval that `Every.auto` asks for: fed with what steps and saves took, asked what is due.

    A save costs what `save` blocked, plus what the steps during it took longer than the median undisturbed step. The
    middle half of the last 8 saves counts: two that were out of the ordinary change nothing, a lasting change is
    fully followed after 6 saves. Takes bounded memory. Not for several threads at once.
    """

    def __init__(self, mtbf_s: float) -> None:
        self.mtbf_s = float(_positive("mtbf_s", mtbf_s))
        self._undisturbed: deque[float] = deque(maxlen=STEPS_KEPT)
        self._disturbed = 0
        self._disturbed_s = 0.0  # of the steps since the last save became durable
        self._blocked: deque[float] = deque(maxlen=SAVES_KEPT)
        self._costs: deque[float] = deque(maxlen=SAVES_KEPT)
        self._durable: deque[float] = deque(maxlen=SAVES_KEPT)

    def stepped(self, seconds: float, *, saving: bool) -> None:
        """A training step took `seconds`, without the time that `save` blocked; `saving`: a save was in flight."""
        _duration(seconds, "seconds")
        if saving:
            self._disturbed += 1
            self._disturbed_s += seconds
        else:
            self._undisturbed.append(seconds)

    def saved(self, blocked_s: float, durable_s: float) -> None:
        """A save became durable `durable_s` after it was asked for, which blocked training for `blocked_s`.

        The steps in flight since the last call are its own. To be called after the last of them was told.
        """
        _duration(blocked_s, "blocked_s")
        _duration(durable_s, "durable_s")
        # Single steps vary in both directions: only their sum is cut at zero, or noise would count as cost.
        longer_s = self._disturbed_s - self._disturbed * self.step_s if self._undisturbed else 0.0
        self._disturbed, self._disturbed_s = 0, 0.0
        self._blocked.append(blocked_s)
        self._costs.append(blocked_s + max(longer_s, 0.0))
        self._durable.append(durable_s)

    @property
    def step_s(self) -> float:
        """The median undisturbed step, in seconds; 0 as long as there was none."""
        return median(self._undisturbed) if self._undisturbed else 0.0

    @property
    def cost_s(self) -> float:
        """Training time that one save takes, in seconds; before the first, what is assumed of it."""
        return fmean(_middle(self._costs)) if self._costs else ASSUMED_COST_S

    @property
    def durable_s(self) -> float:
        """Seconds until a save is durable: the slower of the usual ones; 0 before the first."""
        return _middle(self._durable)[-1] if self._durable else 0.0

    @property
    def seconds(self) -> float:
        """Seconds from the start of one save to the start of the next.

        Never above `mtbf_s`, but in any case long enough for the save to become durable and for one step beyond that,
        undisturbed: without such steps nobody would see any more what a save costs.
        """
        return max(daly_s(self.cost_s, self.mtbf_s), self._least_s)

    @property
    def _least_s(self) -> float:
        return self.durable_s + self.step_s if self._durable else 0.0

    def due(self, done_steps: int, since_save_s: float) -> bool:
        """Whether to save now, after `done_steps` completed steps, or at the end of a later one.

        `since_save_s` counts from when the last save was asked for (before the first: from the start of training).
        """
        if done_steps <= 0 or since_save_s < self._least_s:
            return False
        # The loss a/t + b*t is equal at two times whose product is the optimum's square: there, now and one step
        # later are equally good. Waiting for the optimum itself would be late by half a step.
        return since_save_s * (since_save_s + self.step_s) >= self.seconds**2

    @property
    def expected_loss(self) -> float:
        """Share of the time, 0 to 1, lost to saves and failures at this interval; see the function of this name."""
        return expected_loss(self.seconds, cost_s=self.cost_s, durable_s=self.durable_s, mtbf_s=self.mtbf_s)

    @property
    def reason(self) -> str:
        """The decision and what it rests on, for the log."""
        if not self._costs:
            return (
                f"first save after {self.seconds:.3g} s: nothing is measured yet, a save is taken to cost "
                f"{ASSUMED_COST_S:g} s at an MTBF of {self.mtbf_s:.6g} s"
            )
        held = ", as soon as the one before is durable" if self.seconds == self._least_s else ""
        return (
            f"a save every {self.seconds:.3g} s{held}: it costs {self.cost_s:.3g} s (blocked "
            f"{fmean(_middle(self._blocked)):.3g} s) and is durable after {self.durable_s:.3g} s; at an MTBF of "
            f"{self.mtbf_s:.6g} s saves and failures lose {100 * self.expected_loss:.2g} % of the time"
        )


def _middle(values: Collection[float]) -> list[float]:
    """The values without the lowest and the highest quarter, ascending; all of them where there are less than 4."""
    cut = len(values) // 4
    return sorted(values)[cut : len(values) - cut]


_ADVICE = {"steps": "Every(steps=200)", "seconds": "Every(seconds=60)", "mtbf_s": "Every.auto(mtbf_s=4 * 3600)"}


def _positive(name: str, value: float) -> float:
    """`value` as a plain int (`steps`) or float; `ValueError` unless it is positive and finite."""
    advice = _ADVICE[name]
    kind: Callable[[Any], float] = index if name == "steps" else float
    try:
        if isinstance(value, bool | str):
            raise TypeError
        plain = kind(value)
    except (TypeError, ValueError, OverflowError):
        wanted = "a whole number" if kind is index else "a number of seconds"
        raise ValueError(f"{name} is {wanted}, such as {advice}, not {value!r:.100}") from None
    if not 0 < plain < inf:
        raise ValueError(f"{name} must be positive and finite, such as {advice}, not {value!r:.100}")
    return plain


def _duration(value: float, name: str) -> None:
    if not (isfinite(value) and value >= 0):
        raise ValueError(f"{name} is a duration in seconds, not {value!r}: take it from a monotonic clock")
