"""Who keeps the others waiting is known by its own time: a step without the waiting for other ranks."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from keepers import until

from ckpt.board import Place
from ckpt.owntime import Watch
from elastic.actions import Look, Note, Seen, Send
from elastic.agent import Agent
from elastic.crew import Crew
from elastic.decide import Limits, Pace, Timing, stragglers
from elastic.membership import Member, Membership
from elastic.messages import Job, Join, Paces


@pytest.mark.parametrize(
    ("own", "step", "slow"),
    [
        ([], 1.0, {}),
        ([0.5], 1.0, {}),
        ([0.1, 0.1, 0.1, 0.18], 0.2, {3: 1.8}),
        ([0.1, 0.1, 0.1, 0.14], 0.2, {}),  # not by half
        ([0.001, 0.001, 0.01], 0.2, {}),  # of no matter
        ([0.3, 0.1], 0.4, {0: 3.0}),
        ([0.3, 0.3, 0.1, 0.1, 0.1], 0.4, {0: 3.0, 1: 3.0}),
        ([0.0, 0.0, 0.1], 0.1, {2: 100.0}),
    ],
)
def test_own_times_that_stand_out_and_matter(own: Sequence[float], step: float, slow: dict[int, float]) -> None:
    found = stragglers([Pace(rank, own_s, step) for rank, own_s in enumerate(own)])
    assert found == pytest.approx(slow)


def place_on(crew: Crew) -> Place:
    place = Place.of({"CKPT_BOARD": crew.begin(), "LOCAL_RANK": "0", "RANK": "5"})
    assert place is not None
    return place


def in_a_collective(go_on: threading.Event) -> None:
    """As it looks in torch: a frame of that file."""
    code = compile("def broadcast(): go_on.wait()", "/lib/torch/distributed/distributed_c10d.py", "exec")
    names = {"go_on": go_on}
    exec(code, names)
    names["broadcast"]()  # type: ignore[operator]


def test_waiting_for_other_ranks_is_not_ones_own_time() -> None:
    crew = Crew(0)
    place, go_on = place_on(crew), threading.Event()

    def train() -> None:
        with place.watched():
            until("it is seen at work", lambda: crew.workers()[0].own_s > 0.1)
            in_a_collective(go_on)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    until("it is seen at work", lambda: crew.workers()[0].own_s > 0.1)
    until("it waits", lambda: crew.workers()[0].seen_s - crew.workers()[0].own_s > 0.5)
    own_s = crew.workers()[0].own_s
    until("it still waits", lambda: crew.workers()[0].seen_s - crew.workers()[0].own_s > 0.7)
    assert crew.workers()[0].own_s == own_s
    go_on.set()
    thread.join(60)
    assert not thread.is_alive()


def test_a_phase_counts_for_nothing() -> None:
    crew = Crew(0)
    place = place_on(crew)
    looks = threading.Semaphore(0)
    other = Watch(lambda ns, own: looks.release())

    def stands_still() -> bool:
        before = crew.workers()[0].seen_s
        for _ in range(5):
            assert looks.acquire(timeout=30)
        return crew.workers()[0].seen_s == before

    with place.watched():
        until("it is seen", lambda: crew.workers()[0].seen_s > 0)
        with place.phase(100):
            until("nothing is counted any more", stands_still)
        before = crew.workers()[0].seen_s
        until("it is again", lambda: crew.workers()[0].seen_s > before)
    other.close()


def test_a_crew_says_how_fast_each_rank_was_since_the_last_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic.crew.PACE_S", 0.2)
    crew = Crew(0)
    place = place_on(crew)
    assert crew.look(1).paces == ()
    with place.watched():
        for step in range(4):
            place.moved(step)
        until("a while has passed", lambda: crew.workers()[0].seen_s > 0.2)
        (pace,) = crew.look(1).paces
        worker = crew.workers()[0]
        assert (pace.rank, 0 < pace.own_s <= worker.own_s / 4) == (5, True)
        assert crew.look(1).paces == (), "said once"


def test_the_leader_names_a_rank_that_is_slow_again_and_again_and_forgets_it_when_it_is_not() -> None:
    members = tuple(Member(name, f"host-{name}", ("10.0.0.1",), 7) for name in "ab")
    agent = Agent(members[0], Job("job", "", "", ""), Limits(2, 2), Timing())
    membership = Membership(1, "n", members, "a", 9, "n")
    agent.looked(Seen(1, membership), 0.0)
    agent.joined(Join(members[1], ready=False, finished=False), 0.0)
    agent.paces((Pace(0, 0.1, 0.3),))
    notes = []
    for now, own_s in enumerate((0.3, 0.3, 0.3, 0.1)):
        agent.heard("b", Paces((Pace(1, own_s, 0.3),)), 2.0 * now)
        agent.tick(2.0 * now)
        done = agent.actions()
        notes += [action.text for action in done if isinstance(action, Note) and "median" in action.text]
        looks = [action.slow for action in done if isinstance(action, Look)]
        agent.looked(Seen(1, membership), 2.0 * now)
        assert [bool(slow) for slow in looks] == [0 < now < 3]
    assert notes == [
        "rank 1 on host-b is 3.0 x the median of its own time: 0.3 s of a step of 0.3 s; the others wait for it"
    ]
    follower = Agent(members[1], Job("job", "", "", ""), Limits(2, 2), Timing())
    follower.upstream = "a"
    follower.paces((Pace(1, 0.3, 0.3),))
    assert follower.actions() == [Send(None, Paces((Pace(1, 0.3, 0.3),)))]
