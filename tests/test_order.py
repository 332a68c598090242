"""The order of the data: every sample once in a pass, in shares that make up the mean, whatever the ranks do."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.order import ALGORITHM, MicroBatch, Order, Permutation, cut, plan_step

worlds = st.integers(1, 9)


@given(st.integers(1, 700), st.text(max_size=8))
def test_a_permutation_holds_every_index_once(size: int, seed: str) -> None:
    permutation = Permutation(size, seed)
    assert sorted(permutation[i] for i in range(size)) == list(range(size))


@given(st.integers(2, 2**63 - 1), st.integers(0, 1000))
def test_a_permutation_of_any_size_needs_no_memory(size: int, seed: int) -> None:
    permutation = Permutation(size, str(seed))
    positions = {0, 1, size // 2, size - 1}
    found = {permutation[i] for i in positions}
    assert len(found) == len(positions)
    assert all(0 <= i < size for i in found)


def test_all_orders_come_up_equally_often() -> None:
    found = Counter(tuple(Permutation(4, str(seed))[i] for i in range(4)) for seed in range(24 * 200))
    assert len(found) == 24
    assert all(abs(n - 200) < 90 for n in found.values()), found  # six deviations; the seeds are the same every time


def test_the_order_is_part_of_every_checkpoint() -> None:
    """If this fails, running jobs would go on in another order: give that a new name instead."""
    assert ALGORITHM == "feistel-xxh3/1"
    assert Order(10, 4, 7).batch(0).samples(0, 4) == (8, 9, 7, 6)
    assert Order(10, 4, 7).batch(3).samples(0, 4) == (7, 9, 3, 0)
    assert [Permutation(10**10, "7/0")[i] for i in (0, 10**10 - 1)] == [1461100963, 1242786222]


@given(st.data(), st.integers(1, 60), st.integers(1, 25), st.integers(), st.booleans())
def test_resized_at_any_step_each_index_comes_once_in_a_pass(
    data: st.DataObject, samples: int, global_batch: int, seed: int, drop_last: bool
) -> None:
    order = Order(samples, global_batch, seed, drop_last and global_batch <= samples)
    taken: list[list[int]] = []
    while len(taken) < 2 * order.batches_per_pass:
        world, micro_batch = data.draw(worlds), data.draw(st.none() | st.integers(1, 5))
        for _ in range(data.draw(st.integers(1, 8))):
            batch = order.batch(len(taken))
            plans = [plan_step(batch, rank, world, micro_batch) for rank in range(world)]
            check_plans(plans, batch.size, micro_batch)
            taken.append([i for plan in plans for micro in plan for i in micro.indices])
    for first in (0, order.batches_per_pass):
        sizes = [len(batch) for batch in taken[first : first + order.batches_per_pass]]
        of_pass = list(itertools.chain(*taken[first : first + order.batches_per_pass]))
        assert sizes[:-1] == [global_batch] * (len(sizes) - 1)
        assert len(set(of_pass)) == len(of_pass)
        assert set(of_pass) <= set(range(samples))
        assert len(of_pass) == (samples // global_batch * global_batch if order.drop_last else samples)


def check_plans(plans: list[tuple[MicroBatch, ...]], size: int, micro_batch: int | None) -> None:
    """As many micro-batches everywhere, none empty or too large; equal shares; weights that give the mean."""
    world = len(plans)
    assert len({len(plan) for plan in plans}) == 1
    shares = [sum(len(micro.indices) for micro in plan) for plan in plans]
    assert sum(shares) == size
    assert max(shares) - min(shares) <= 1
    for micro in itertools.chain(*plans):
        assert micro.load == micro.indices or (not micro.indices and len(micro.load) == 1)
        assert len(micro.load) <= (micro_batch or size)
        # what each of its samples counts in the average over the ranks
        assert micro.weight == pytest.approx(float(Fraction(world * len(micro.indices), size)), rel=1e-15)
    assert [[micro.last for micro in plan] for plan in plans] == [[False] * (len(plans[0]) - 1) + [True]] * world


def test_passes_differ_and_so_do_seeds() -> None:
    one = Order(100, 100, 0)
    assert one.batch(0).samples(0, 100) != one.batch(1).samples(0, 100)
    assert one.batch(0).samples(0, 100) != Order(100, 100, 1).batch(0).samples(0, 100)


def test_only_the_own_share_is_computed() -> None:
    """A rank's work does not grow with the global batch: it asks for its own samples and, without any, for one."""
    asked: list[int] = []

    class Counting(Permutation):
        def __getitem__(self, position: int) -> int:
            asked.append(position)
            return super().__getitem__(position)

    batch = Order(100, 12, 0).batch(1)
    object.__setattr__(batch, "permutation", Counting(100, "0/0"))
    plan_step(batch, 2, 4)
    assert asked == [18, 19, 20]
    asked.clear()
    plan_step(batch, 0, 13)
    assert asked == [12]


@given(st.integers(0, 100), st.integers(1, 20))
def test_cut(size: int, parts: int) -> None:
    runs = [cut(size, parts, i) for i in range(parts)]
    assert [i for start, stop in runs for i in range(start, stop)] == list(range(size))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0, 4, 0), "samples"),
        ((10, 0, 0), "global_batch"),
        ((10, 2.5, 0), "global_batch"),
        ((10, True, 0), "global_batch"),
        ((10, 4, "x"), "seed"),
        ((3, 4, 0, True), "drop_last"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Order(*arguments)
