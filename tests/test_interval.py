"""When a save is due: `Every` as given, and the interval that loses the least time, against brute force."""

from __future__ import annotations

import random
from math import exp, sqrt
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ckpt.interval import ASSUMED_COST_S, SAVES_KEPT, Every, Interval, daly_s, expected_loss

COSTS = st.floats(0.001, 1000)
MTBFS = st.floats(60, 1e7)


def measured(mtbf_s: float, *, blocked_s: float = 0.1, durable_s: float = 1.0, step_s: float = 0.5) -> Interval:
    """An interval that has seen its fill of equal steps and equal saves that disturb none of them."""
    interval = Interval(mtbf_s)
    for _ in range(SAVES_KEPT):
        interval.stepped(step_s, saving=False)
        interval.saved(blocked_s, durable_s)
    return interval


# What a user asks for


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of steps, seconds and mtbf_s, not none of them"),
        (
            {"steps": 1, "seconds": 1},
            r"not steps and seconds: pass Every\(steps=200\), Every\(seconds=60\), Every.auto",
        ),
        ({"seconds": 1, "mtbf_s": 1}, "not seconds and mtbf_s"),
        ({"steps": 0}, r"positive and finite, such as Every\(steps=200\), not 0"),
        ({"steps": -3}, "positive"),
        ({"steps": 2.5}, r"steps is a whole number, such as Every\(steps=200\), not 2.5"),
        ({"steps": True}, "whole number"),
        ({"steps": "9"}, "whole number"),
        ({"seconds": -1}, r"positive and finite, such as Every\(seconds=60\), not -1"),
        ({"seconds": float("nan")}, "positive and finite"),
        ({"seconds": float("inf")}, "positive and finite"),
        ({"seconds": 10**400}, "a number of seconds"),
        ({"seconds": "60"}, "a number of seconds"),
        ({"mtbf_s": 0}, r"positive and finite, such as Every.auto\(mtbf_s="),
        ({"mtbf_s": [1]}, "a number of seconds"),
    ],
)
def test_every_takes_exactly_one_positive_interval(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Every(**arguments)


def test_equal_settings_have_one_repr() -> None:
    assert repr(Every(seconds=60)) == repr(Every(seconds=60.0)) != repr(Every(seconds=61))
    assert repr(Every.auto(3600)) == repr(Every.auto(mtbf_s=3600.0)) == "Every(steps=None, seconds=None, mtbf_s=3600.0)"
    assert Every(steps=5) == Every(steps=5) != Every(seconds=5)


def test_every_so_many_steps_or_seconds() -> None:
    assert [n for n in range(10) if Every(steps=3).due(n, 1e9)] == [3, 6, 9]
    assert [Every(seconds=60).due(n, s) for n, s in [(0, 99), (1, 59.9), (1, 60), (7, 61)]] == [
        False,
        False,
        True,
        True,
    ]
    assert Every(steps=3).interval() is None
    assert Every(seconds=3).interval() is None


def test_auto_before_anything_is_measured() -> None:
    every = Every.auto(mtbf_s=7200)
    interval = every.interval()
    assert interval is not None
    assert (interval.mtbf_s, interval.cost_s, interval.seconds) == (7200, ASSUMED_COST_S, daly_s(ASSUMED_COST_S, 7200))
    assert 120 < interval.seconds < 121
    assert "nothing is measured yet" in interval.reason
    for decide in (every, interval):
        assert [decide.due(n, s) for n, s in [(0, 1e9), (5, 119), (5, 121)]] == [False, False, True]


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_a_duration_that_is_none_is_refused(wrong: float) -> None:
    interval = Interval(3600)
    with pytest.raises(ValueError, match="duration in seconds"):
        interval.stepped(wrong, saving=True)
    with pytest.raises(ValueError, match="blocked_s is a duration"):
        interval.saved(wrong, 1)
    with pytest.raises(ValueError, match="durable_s is a duration"):
        interval.saved(1, wrong)
    assert interval.cost_s == ASSUMED_COST_S


# The optimum


@pytest.mark.parametrize(("mtbf_min", "optimum_min"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_the_figures_of_dalys_paper(mtbf_min: float, optimum_min: float) -> None:
    """Captions of figures 3 to 5: computing between two dumps of 5 minutes."""
    assert (
        float(f"{daly_s(5, mtbf_min) - 5:.2g}" if mtbf_min == 15 else f"{daly_s(5, mtbf_min) - 5:.0f}") == optimum_min
    )


def complete_model(period_s: float, cost_s: float, mtbf_s: float) -> float:
    """Wall time per unit of work, failures exponential (Daly 2006)."""
    return mtbf_s * (exp(period_s / mtbf_s) - 1) / (period_s - cost_s)


@given(COSTS, MTBFS)
@example(100.0, 60.0)
@example(1000.0, 1000.0)
def test_no_interval_in_the_allowed_range_is_better(cost_s: float, mtbf_s: float) -> None:
    """Brute force over a grid, 0.5 % apart, from little more than the cost to the MTBF."""
    ours = daly_s(cost_s, mtbf_s)
    assert ours <= mtbf_s
    if cost_s >= mtbf_s / 2:
        return  # saving is then half of the work or more: only the bound counts
    grid = [cost_s * 1.001 * 1.005**k for k in range(4700)]
    best = min(complete_model(t, cost_s, mtbf_s) for t in grid if t <= mtbf_s)
    assert complete_model(ours, cost_s, mtbf_s) <= best * 1.002


def simulated_loss(rng: random.Random, period_s: float, cost_s: float, durable_s: float, mtbf_s: float) -> float:
    """Share of the time lost, event by event: work is kept from the start of the last save that became durable."""
    clock = work = 0.0  # of finished periods
    while clock < 30_000 * mtbf_s:
        fails_after = rng.expovariate(1 / mtbf_s)
        # Saves start at the end of each period; one counts once it is durable, which it becomes in the next period.
        kept = max(0, int((fails_after - durable_s) // period_s))
        clock += fails_after
        work += kept * (period_s - cost_s)
    return 1 - work / clock


@pytest.mark.parametrize(
    ("cost_s", "durable_s", "mtbf_s"), [(5, 5, 900), (30, 60, 3600), (0.05, 1, 600), (0.2, 40, 20000)]
)
def test_the_loss_told_is_the_loss_of_a_simulated_run(cost_s: float, durable_s: float, mtbf_s: float) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    period_s = max(daly_s(cost_s, mtbf_s), durable_s)
    told = expected_loss(period_s, cost_s=cost_s, durable_s=durable_s, mtbf_s=mtbf_s)
    # The loss per failure deviates by less than its mean, the mean of 30,000 by less than 0.6 %: eight times that.
    assert simulated_loss(random.Random(seed), period_s, cost_s, durable_s, mtbf_s) == pytest.approx(told, rel=0.05)


@given(st.lists(COSTS, min_size=2, max_size=2).map(sorted), MTBFS)
def test_dearer_saves_are_rarer(costs: list[float], mtbf_s: float) -> None:
    assert daly_s(costs[0], mtbf_s) <= daly_s(costs[1], mtbf_s)
    cheap, dear = (measured(mtbf_s, blocked_s=cost) for cost in costs)
    assert cheap.seconds <= dear.seconds


@given(COSTS, st.lists(MTBFS, min_size=2, max_size=2).map(sorted))
def test_safer_machines_save_less_often(cost_s: float, mtbfs: list[float]) -> None:
    low, high = (daly_s(cost_s, mtbf_s) for mtbf_s in mtbfs)
    assert low <= high * (1 + 1e-12)
    assert expected_loss(high, cost_s=cost_s, durable_s=0, mtbf_s=mtbfs[1]) <= 1e-9 + expected_loss(
        low, cost_s=cost_s, durable_s=0, mtbf_s=mtbfs[0]
    )


@given(COSTS, st.floats(0, 1e5), st.floats(0, 100), MTBFS)
@example(1.0, 500.0, 1.0, 60.0)
def test_the_bounds(cost_s: float, durable_s: float, step_s: float, mtbf_s: float) -> None:
    interval = measured(mtbf_s, blocked_s=cost_s, durable_s=durable_s, step_s=step_s)
    assert interval.durable_s == durable_s
    assert interval.seconds >= durable_s
    assert interval.seconds <= max(mtbf_s, durable_s + step_s)
    assert 0 <= interval.expected_loss <= 1


@given(st.floats(0.01, 10), st.floats(1, 300), st.floats(1000, 1e6))
def test_due_at_the_best_step(cost_s: float, step_s: float, mtbf_s: float) -> None:
    """The first step at which a save is due is the one, of all steps, that loses the least to first order."""
    interval = measured(mtbf_s, blocked_s=cost_s, durable_s=0, step_s=step_s)
    due = next(n for n in range(1, 10_000) if interval.due(n, n * step_s))

    def loss(n: int) -> float:
        return interval.seconds**2 / (n * step_s) + n * step_s

    best = min(loss(n) for n in range(1, due + 50))
    assert loss(due) <= best * (1 + 1e-9)


def test_not_due_before_the_save_in_flight_is_durable() -> None:
    interval = measured(3600, blocked_s=0.0, durable_s=7.0, step_s=1.0)
    assert interval.seconds == 8
    assert [n for n in range(12) if interval.due(n, n)] == [8, 9, 10, 11]  # the step from 7 to 8 is undisturbed
    assert not interval.due(9, 7.9)  # nearer to 8 than the end of the next step is, but a part of it was disturbed


# What a save costs


def test_the_cost_is_the_block_and_what_steps_in_flight_took_longer() -> None:
    interval = Interval(3600)
    for seconds in (9.0, 0.5, 0.4, 0.6, 0.5):  # the first one compiles
        interval.stepped(seconds, saving=False)
    for seconds in (0.8, 0.7, 0.5):
        interval.stepped(seconds, saving=True)
    interval.saved(0.02, 1.6)
    assert interval.step_s == 0.5
    assert interval.cost_s == pytest.approx(0.02 + 0.3 + 0.2)
    assert interval.durable_s == 1.6
    interval.stepped(0.5, saving=True)
    interval.saved(0.02, 0.5)  # the steps of the first are not counted again
    assert interval.cost_s == pytest.approx((0.52 + 0.02) / 2)


def test_steps_in_flight_that_are_no_longer_cost_nothing() -> None:
    interval = Interval(3600)
    interval.stepped(0.5, saving=False)
    for seconds in (0.3, 0.6, 0.4):
        interval.stepped(seconds, saving=True)
    interval.saved(0.02, 1)
    assert interval.cost_s == pytest.approx(0.02)


def test_without_an_undisturbed_step_only_the_block_counts() -> None:
    interval = Interval(3600)
    interval.stepped(5.0, saving=True)
    interval.saved(0.3, 1)
    assert (interval.cost_s, interval.step_s) == (0.3, 0)


@given(st.randoms(use_true_random=False), st.lists(st.floats(0, 1e4), min_size=2, max_size=2))
def test_two_saves_out_of_the_ordinary_change_nothing(rng: random.Random, strange: list[float]) -> None:
    saves = [0.1] * (SAVES_KEPT - 2) + strange
    rng.shuffle(saves)
    interval = Interval(3600)
    for cost in saves:
        interval.saved(cost, 10 * cost)
    assert interval.cost_s == pytest.approx(0.1)
    assert interval.durable_s == pytest.approx(1.0)


@pytest.mark.parametrize("factor", [10, 0.1])
@pytest.mark.parametrize("by_steps", [False, True])
def test_a_change_of_cost_is_followed_within_six_saves(factor: float, by_steps: bool) -> None:
    interval = measured(36000, blocked_s=0.2, durable_s=1)
    before, found = interval.seconds, []
    for _ in range(6):
        interval.stepped(0.5, saving=False)
        if by_steps:
            interval.stepped(0.5 + 0.2 * factor, saving=True)
        interval.saved(0.0 if by_steps else 0.2 * factor, 1)
        found.append(interval.seconds)
    assert found == sorted(found, reverse=factor < 1)  # straight there, without overshooting
    assert found[:2] == pytest.approx([before] * 2)
    assert found[-1] == pytest.approx(daly_s(0.2 * factor, 36000))


def test_the_interval_does_not_swing() -> None:
    """A training run that saves when it is told to, with steps and saves that vary, and every other save dear."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    interval, since, flying, durable_s, found, alone = Interval(7200), 0.0, 0.0, 0.0, [], []
    for done in range(1, 60_000):
        slow = 0.15 if flying > 0 else 0.0
        step = rng.gauss(0.5, 0.02) + slow
        interval.stepped(step, saving=flying > 0)
        since, before, flying = since + step, flying, flying - step
        if before > 0 >= flying:
            interval.saved(0.02 + 0.2 * (len(found) % 2), durable_s)
            found.append(interval.seconds)
        if interval.due(done, since):
            alone.append(flying <= 0)
            since, flying = 0.0, rng.uniform(1.5, 2.5)
            durable_s = flying
    settled = found[SAVES_KEPT:]
    assert len(settled) > 200
    assert all(alone)
    # 3 or 4 steps in flight, each longer by 0.15 s, and 0.02 or 0.22 s blocked in turn.
    expected = sqrt(2 * 7200 * (3.5 * 0.15 + 0.12))
    assert expected * 0.85 < min(settled) < max(settled) < expected * 1.15


def test_saves_that_are_cheap_and_dear_in_turn_give_a_steady_interval() -> None:
    interval = Interval(3600)
    found = []
    for save in range(40):
        interval.saved(0.1 if save % 2 else 1.0, 2.0)
        found.append(interval.seconds)
    assert found[SAVES_KEPT - 1 :] == pytest.approx([daly_s(0.55, 3600)] * (41 - SAVES_KEPT))


def test_memory_is_bounded() -> None:
    interval = Interval(3600)
    for step in range(10_000):
        interval.stepped(0.5, saving=step % 3 == 0)
        interval.saved(0.1, 1)
    kept = sum(len(value) for value in vars(interval).values() if hasattr(value, "__len__"))
    assert kept <= 200


def test_the_reason_says_what_it_rests_on() -> None:
    interval = Interval(14400)
    for _ in range(5):
        interval.stepped(0.5, saving=False)
    interval.stepped(0.523, saving=True)
    interval.saved(0.012, 0.93)
    assert interval.reason == (
        "a save every 31.8 s: it costs 0.035 s (blocked 0.012 s) and is durable after 0.93 s; "
        "at an MTBF of 14400 s saves and failures lose 0.23 % of the time"
    )
    assert "as soon as the one before is durable" in measured(3600, blocked_s=0, durable_s=70).reason
