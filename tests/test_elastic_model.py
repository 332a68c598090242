"""Schedules of faults in a made-up world (`elastic_sim`), with the real agents; and rules broken on purpose.

A failure prints its seed: `elastic_sim.play(seed)` runs it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import elastic_sim
import pytest
from elastic_sim import play

from ckpt.log import decide_start
from elastic import leading
from elastic.agent import Agent
from elastic.decide import Verdict

SEEDS = 200


def run(first: int, last: int) -> None:
    for seed in range(first, last):
        try:
            play(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("part", range(2))
def test_no_schedule_breaks_a_rule(part: int) -> None:
    run(part * SEEDS // 2, (part + 1) * SEEDS // 2)


@pytest.mark.prove
@pytest.mark.parametrize("part", range(10))
def test_no_schedule_of_ten_thousand_breaks_a_rule(part: int) -> None:
    run(1000 + part * 1000, 2000 + part * 1000)


def play_all(seeds: int) -> None:
    for seed in range(seeds):
        play(seed)


def always(*args: Any, **kwargs: Any) -> Verdict:
    return Verdict(True, "broken", True)


def unfenced(view: Any, *, expected_generation: int, **more: Any) -> Any:
    return decide_start(view, **more)


def deaf(self: Agent, reason: str) -> None:
    return None


def never(*args: Any, **kwargs: Any) -> bool:
    return False


@pytest.mark.parametrize(
    ("where", "name", "broken"),
    [
        (leading, "may_take", always),
        (elastic_sim, "decide_start", unfenced),
        (Agent, "_kill", deaf),
        (Agent, "_superseded", lambda self: None),
        (Agent, "_drop_silent", lambda self, now: None),
        (leading, "would_grow", never),
        (Agent, "_abdicate", lambda self: None),
        (Agent, "_why_pause", lambda self, now: ""),
        (Agent, "_dismiss", lambda self, unwanted: None),
    ],
    ids=[
        "anybody may",
        "no fence",
        "workers live on",
        "ignores newer",
        "never silent",
        "never grows",
        "clings",
        "nobody leaves",
        "no cordon",
    ],
)
def test_a_broken_rule_is_found(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, broken: Callable[..., Any]
) -> None:
    monkeypatch.setattr(where, name, broken)
    with pytest.raises((AssertionError, StopIteration)):
        play_all(5 * SEEDS)
