"""How a leader takes failures that come again and again: each restart waits longer, until something is committed."""

from __future__ import annotations

import pytest

from elastic.actions import Note, Propose, Seen
from elastic.agent import Agent
from elastic.decide import Limits, Timing
from elastic.failures import backoff_s
from elastic.membership import Member, Membership
from elastic.messages import Job

ME = Member("a", "host-a", ("10.0.0.1",), 7)


def membership(generation: int) -> Membership:
    return Membership(generation, f"n{generation}", (ME,), "a", 9, f"n{generation}")


@pytest.mark.parametrize(("failures", "seconds"), [(0, 0), (2, 0), (3, 1), (4, 2), (7, 16), (8, 30), (99, 30)])
def test_the_wait_doubles_from_the_third_failure_on(failures: int, seconds: float) -> None:
    assert backoff_s(failures) == seconds


def test_a_restart_waits_after_failures_without_a_step_and_not_after_one_with() -> None:
    agent = Agent(ME, Job("job", "", "", ""), Limits(1, 1), Timing(fruitless_limit=0))
    agent.looked(Seen(1, membership(1), head="x"), 0.0)
    now, waited, notes = 0.0, [], []
    for generation in range(1, 6):
        head = "x" if generation < 5 else "y"
        agent.mine = membership(generation)
        agent.looked(Seen(generation, membership(generation), head=head), now)
        agent.stopped(now, failed=True, step=3)
        agent.wait()
        began = now
        while True:
            agent.tick(now)
            agent.looked(Seen(generation, membership(generation), head=head), now)
            done = agent.actions()
            notes += [action.text for action in done if isinstance(action, Note) and "waiting for" in action.text]
            if any(isinstance(action, Propose) for action in done):
                break
            now += 0.5
        waited.append(now - began)
        agent.proposed(membership(generation + 1), now)
    assert waited == [0.0, 0.0, 1.0, 2.0, 0.0]
    assert notes == ["3 failures without a new step: waiting for 1 s"], "said once"
