"""How a leader takes failures that come again and again: each restart waits longer, until something is committed."""

from __future__ import annotations

import pytest

from elastic.actions import Exit, Note, Propose, Seen
from elastic.agent import Agent
from elastic.decide import Limits, Timing
from elastic.failures import NO_FAILURES, Failures, backoff_s
from elastic.membership import Member, Membership
from elastic.messages import Hello, Job, Refused

ME = Member("a", "host-a", ("10.0.0.1",), 7)


def membership(generation: int, failures: Failures = NO_FAILURES) -> Membership:
    return Membership(generation, f"n{generation}", (ME,), "a", 9, f"n{generation}", failures=failures)


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
            if proposals := [action for action in done if isinstance(action, Propose)]:
                break
            now += 0.5
        waited.append(now - began)
        agent.proposed(membership(generation + 1, proposals[0].failures), now)
    assert waited == [0.0, 0.0, 1.0, 2.0, 0.0]
    assert notes == ["3 failures without a new step: waiting for 1 s"], "said once"


def test_of_two_jobs_that_begin_at_once_one_stays() -> None:
    """Each refuses the other: the one that comes first in order goes on, and a job that works always does."""
    agents = {}
    for node in ("a", "b"):
        me = Member(node, f"host-{node}", ("127.0.0.1",), 1)
        agents[node] = Agent(me, Job("job", f"command of {node}", "", ""), Limits(1, 1), Timing())
    for node, other in (("a", "b"), ("b", "a")):
        answer = agents[other].hello(Hello(agents[node].me, agents[node].job))
        assert isinstance(answer, Refused)
        agents[node].sought({other: answer}, 0.0)
    assert not any(isinstance(action, Exit) for action in agents["a"].actions())
    (ended,) = [action for action in agents["b"].actions() if isinstance(action, Exit)]
    assert "another job than host-a" in ended.reason
    working = Refused("the job of b works", works=True)
    agents["a"].sought({"b": working}, 1.0)
    assert any(isinstance(action, Exit) for action in agents["a"].actions())
