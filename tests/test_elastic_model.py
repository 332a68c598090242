"""Schedules of faults in a made-up world (`elastic_sim`), with the real agents; and rules broken on purpose.

A failure prints its seed: `elastic_sim.play(seed)` runs it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import elastic_sim
import pytest
from elastic_sim import World, play

from ckpt.log import decide_start
from elastic import leading
from elastic.agent import Agent
from elastic.decide import Limits, Verdict
from elastic.leading import EXIT_FRUITLESS
from elastic.membership import of_start

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


def counting(nodes: int, **more: Any) -> World:
    """A world without accidents whose job counts failures, once it works."""
    world = World(0, nodes, Limits(1, nodes), replace(elastic_sim.TIMING, quarantine_window_s=300, **more))
    world.run(8)
    assert world.settled()
    return world


def leader_of(world: World) -> str:
    membership = of_start(world.view.holder)
    assert membership is not None
    return membership.leader


def fail_and_restart(world: World, name: str) -> None:
    before = world.view.generation
    world.fail_workers(name)
    world.run(15)
    assert world.view.generation == before + 1, "one failure, one restart"


@pytest.mark.parametrize("lost", ["the leader at rest", "the leader that has just counted"])
def test_the_next_leader_goes_on_counting_failures(lost: str) -> None:
    world = counting(3, fruitless_limit=4, quarantine_failures=0)
    for _ in range(2):
        fail_and_restart(world, leader_of(world))
    if lost == "the leader at rest":
        fail_and_restart(world, leader_of(world))
    else:
        world.fail_workers(leader_of(world))
        world.run(0.2)
    world.kill(leader_of(world))
    world.run(15)
    world.fail_workers(leader_of(world))
    world.run(5)
    assert [node.done for node in world.nodes.values() if node.alive] == [EXIT_FRUITLESS] * 2


def test_the_next_leader_knows_which_node_failed() -> None:
    world = counting(3)
    first = of_start(world.view.holder)
    assert first is not None
    bad = first.nodes[-1]  # the others come before it when a leader is sought
    assert bad != first.leader
    fail_and_restart(world, bad)
    world.kill(leader_of(world))
    world.run(15)
    assert leader_of(world) != bad
    fail_and_restart(world, bad)
    membership = of_start(world.view.holder)
    assert membership is not None
    assert bad not in membership.nodes


def test_a_leader_that_fails_again_and_again_hands_over_and_is_left_out() -> None:
    world = counting(3)
    bad = leader_of(world)
    fail_and_restart(world, bad)
    assert leader_of(world) == bad, "once is no pattern"
    fail_and_restart(world, bad)
    membership = of_start(world.view.holder)
    assert membership is not None
    assert (len(membership.nodes), membership.leader == bad, bad in membership.nodes) == (2, False, False)
    for name in membership.nodes:
        world.kill(name)
    world.run(40)
    assert leader_of(world) == bad, "better than nobody"


def test_a_leader_that_fails_again_and_again_stays_if_there_are_too_few_without_it() -> None:
    world = counting(2, fruitless_limit=0)
    world.limits = Limits(2, 2)
    for node in world.nodes.values():
        node.agent.limits = Limits(2, 2)
    bad = leader_of(world)
    for _ in range(3):
        fail_and_restart(world, bad)
    assert leader_of(world) == bad


def test_nodes_that_die_one_after_the_other_without_a_new_step_end_the_job() -> None:
    world = counting(3, fruitless_limit=4)
    for lost in range(4):
        membership = of_start(world.view.holder)
        assert membership is not None
        world.kill(membership.nodes[-1] if lost % 2 else membership.leader)
        if lost < 3:
            world.add()
        world.run(20)
    assert [node.done for node in world.nodes.values() if node.alive] == [EXIT_FRUITLESS] * 2


def test_nodes_that_die_with_steps_in_between_do_not() -> None:
    world = counting(3, fruitless_limit=4)
    for _ in range(6):
        world.commit()
        world.kill(leader_of(world))
        world.add()
        world.run(20)
    assert world.settled()


def test_a_job_that_is_started_again_counts_anew() -> None:
    world = counting(2, fruitless_limit=3, quarantine_failures=0)
    for _ in range(2):
        fail_and_restart(world, leader_of(world))
    world.fail_workers(leader_of(world))
    world.run(5)
    assert [node.done for node in world.nodes.values()] == [EXIT_FRUITLESS] * 2
    for name in list(world.nodes):
        world.kill(name)
    world.add()
    world.run(15)
    for _ in range(2):
        fail_and_restart(world, leader_of(world))
