"""Who works, in which order, and who may begin a generation: the pure rules, on whatever hypothesis thinks of."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec import structs

from ckpt.errors import Corrupt
from ckpt.log import View, decide_start
from ckpt.records import decode_record, encode_record
from elastic.decide import Limits, arrange, may_take, would_grow
from elastic.failures import Failures
from elastic.membership import Member, Membership, of_start, to_record

NAMES = [f"n{i}" for i in range(9)]


def member(name: str) -> Member:
    return Member(name, f"host-{name}", ("10.0.0.1",), 7)


names = st.lists(st.sampled_from(NAMES), unique=True, max_size=9)
some_names = st.lists(st.sampled_from(NAMES), unique=True, min_size=1, max_size=9)


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    unit = draw(st.integers(1, 4))
    low = draw(st.integers(1, 8))
    high = draw(st.integers(low, 9))
    assume(high // unit * unit >= low)
    return Limits(low, high, unit)


@given(limits(), st.integers(0, 20))
def test_a_size_that_fits_is_the_largest_valid_one(found: Limits, nodes: int) -> None:
    valid = [n for n in range(1, nodes + 1) if found.minimum <= n <= found.maximum and n % found.unit == 0]
    assert found.fit(nodes) == max(valid, default=0)


@pytest.mark.parametrize("wrong", [(0, 1, 1), (2, 1, 1), (1, 3, 4), (5, 7, 4), (1, 1, 0)])
def test_limits_that_no_number_of_nodes_meets_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no number of nodes"):
        Limits(*wrong)


@given(names, some_names, limits(), names)
def test_an_arrangement_is_as_large_as_it_can_be_and_keeps_ranks(
    before: list[str], ready: list[str], found: Limits, avoid: list[str]
) -> None:
    proposer = ready[0]
    chosen = arrange([member(n) for n in before], [member(n) for n in ready], found, proposer=proposer, avoid=avoid)
    nodes = [m.node for m in chosen]
    assert len(set(nodes)) == len(nodes)
    assert set(nodes) <= set(ready)
    well = [n for n in ready if n not in avoid or n == proposer]
    assert len(nodes) == (found.fit(len(well)) or found.fit(len(ready)))
    if not nodes:
        return
    assert proposer in nodes
    staying = [n for n in before if n in nodes]
    assert [n for n in nodes if n in staying] == staying, "who stays keeps its place among those that stay"
    if len(nodes) >= len(before):
        assert all(nodes.index(n) == before.index(n) for n in staying), "no rank changes where nobody is missing"
    if found.fit(len(well)):
        assert not {n for n in nodes if n in avoid and n != proposer}
    old_left_out = [n for n in before if n in well and n not in nodes]
    newcomers = [n for n in nodes if n not in before and n != proposer]
    assert not (old_left_out and newcomers), "nobody who works makes room for a newcomer"


@given(some_names, names, limits())
def test_growing_means_more_nodes(members: list[str], waiting: list[str], found: Limits) -> None:
    new = [n for n in waiting if n not in members]
    grows = would_grow([member(n) for n in members], [member(n) for n in new], found, proposer=members[0])
    assert grows == (found.fit(len(members) + len(new)) > len(members))


@given(some_names, st.data())
def test_no_two_groups_that_share_nobody_may_both_go_on_at_once(nodes: list[str], data: st.DataObject) -> None:
    """As long as the leader's counter moves: the leader with half of its members, or more than half without it."""
    previous = Membership(3, "s", tuple(member(n) for n in nodes), data.draw(st.sampled_from(nodes)), 9, "s")
    one = set(data.draw(names)) | {data.draw(st.sampled_from(NAMES))}
    other = set(NAMES) - one
    assume(other)

    def may(group: set[str]) -> bool:
        me = data.draw(st.sampled_from(sorted(group)))
        return may_take(previous, me, group, quiet_s=9.9, known_gone=False, node_timeout_s=10).may

    assert not (may(one) and may(other))


def test_a_smaller_group_waits_until_the_counter_stood_still() -> None:
    previous = Membership(3, "s", tuple(member(n) for n in "abcd"), "a", 9, "s")
    for group, me in (({"c", "d"}, "c"), ({"a"}, "a"), ({"x"}, "x"), ({"c"}, "c")):
        assert not may_take(previous, me, group, quiet_s=9.9, known_gone=False, node_timeout_s=10).may
        assert may_take(previous, me, group, quiet_s=10, known_gone=False, node_timeout_s=10).leader_gone
        assert may_take(previous, me, group, quiet_s=0, known_gone=True, node_timeout_s=10).leader_gone
    assert may_take(previous, "a", {"a", "b"}, quiet_s=0, known_gone=False, node_timeout_s=10).may
    assert may_take(previous, "b", {"b", "c", "d"}, quiet_s=0, known_gone=False, node_timeout_s=10).leader_gone
    assert may_take(None, "x", {"x"}, quiet_s=0, known_gone=False, node_timeout_s=10).may


def test_a_node_is_quarantined_only_if_it_alone_fails_again_and_again() -> None:
    found = Failures().blame("a", 0.0).blame("b", 5.0)
    assert found.quarantined(6.0, failures=2, window_s=100) == frozenset()
    assert found.blame("a", 7.0).quarantined(8.0, failures=2, window_s=100) == {"a"}
    assert found.blame("a", 7.0).quarantined(8.0, failures=0, window_s=100) == frozenset()
    assert found.blame("a", 107.0).quarantined(108.0, failures=2, window_s=100) == frozenset()
    both = found.blame("a", 7.0).blame("b", 8.0)
    assert both.quarantined(9.0, failures=2, window_s=100) == frozenset(), "where all fail it is not the node"


# In the log


@given(some_names, st.data())
def test_a_membership_comes_back_from_its_record(nodes: list[str], data: st.DataObject) -> None:
    leader = data.draw(st.sampled_from(nodes))
    members = tuple(member(n) for n in nodes)
    failures = data.draw(st.builds(Failures))
    record = to_record(members, leader, 29500, "s1", failures)
    read = decode_record(encode_record(decide_start(View(), nonce="s1", run_id=None, reason="test", members=record)))
    assert of_start(read) == Membership(1, "s1", members, leader, 29500, "s1", "test", failures)  # type: ignore[arg-type]


def test_a_start_without_members_begins_no_membership() -> None:
    assert of_start(None) is None
    assert of_start(decide_start(View(), nonce="s1", run_id=None, reason="test")) is None


@pytest.mark.parametrize(
    "members",
    [
        ("a",),
        ({"node": "a"},),
        ({"node": "a", "name": "a", "addresses": [1], "port": 1, "store_port": 1},),
        to_record((member("a"), member("b")), "c", 1, "s1"),
        (*to_record((member("a"),), "a", 1, "s1"), *to_record((member("b"),), "b", 1, "s1")),
        to_record((member("a"), member("a")), "a", 1, "s1"),
    ],
    ids=["text", "missing", "address", "no leader", "two leaders", "twice"],
)
def test_members_that_make_no_sense_are_refused(members: tuple[object, ...]) -> None:
    start = decide_start(View(), nonce="s1", run_id=None, reason="test")
    with pytest.raises(Corrupt, match="generation 1"):
        of_start(structs.replace(start, members=members))


def test_going_back_to_an_older_step_continues_a_membership() -> None:
    one = Membership(3, "s", (member("a"), member("b")), "a", 9, "s")
    assert one.is_continued_by(replace(one, generation=4, nonce="t", reason="back to step 7"))
    assert not one.is_continued_by(replace(one, generation=4, nonce="t", began="t")), "the same nodes began again"
