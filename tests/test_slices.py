"""Boxes against brute force: numpy counts what the arithmetic claims."""

from __future__ import annotations

from time import monotonic

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ckpt.slices import Slice, cover_fault, flat_boxes, flat_span, is_flat, whole

Box = tuple[tuple[int, ...], tuple[int, ...]]


@st.composite
def shapes(draw: st.DrawFn, least: int = 0) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(least, 6), max_size=3)))


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...], least: int = 0) -> Slice:
    starts = tuple(draw(st.integers(0, n - least)) for n in shape)
    return Slice(starts, tuple(draw(st.integers(least, n - o)) for o, n in zip(starts, shape, strict=True)))


def view(array: np.ndarray, box: Slice) -> np.ndarray:
    return array[(..., *(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True)))]


def counted(shape: tuple[int, ...], parts: list[Slice]) -> np.ndarray:
    counts = np.zeros(shape, dtype=int)
    for part in parts:
        view(counts, part)[...] += 1
    return counts


@st.composite
def cut_up(draw: st.DrawFn, box: Slice, depth: int = 4) -> list[Slice]:
    """A tiling of `box` by guillotine cuts: seldom a grid."""
    dims = [d for d, n in enumerate(box.shape) if n > 1]
    if not depth or not dims or not draw(st.booleans()):
        return [box]
    dim = draw(st.sampled_from(dims))
    at = draw(st.integers(1, box.shape[dim] - 1))
    halves = []
    for start, length in ((0, at), (at, box.shape[dim] - at)):
        offset = tuple(o + (start if d == dim else 0) for d, o in enumerate(box.offset))
        shape = tuple(length if d == dim else n for d, n in enumerate(box.shape))
        halves += draw(cut_up(Slice(offset, shape), depth - 1))
    return halves


@st.composite
def arrangements(draw: st.DrawFn) -> tuple[Slice, list[Slice]]:
    """A box in a tensor, and parts that tile it, or do with one of them left out, doubled, moved or resized."""
    shape = draw(shapes())
    box = draw(boxes_in(shape))
    parts = draw(st.permutations(draw(cut_up(box))))
    if damage := draw(st.sampled_from(["", "lose", "double", "resize", "empty"])):
        index = draw(st.integers(0, len(parts) - 1))
        if damage == "lose":
            parts.pop(index)
        elif damage == "double":
            parts.append(parts[index])
        elif damage == "resize":
            parts[index] = draw(boxes_in(box.shape)).moved_by(box.offset)
        else:
            parts.append(Slice(box.offset, (0,) * len(box.shape)))
    return box, parts


@given(st.data())
def test_intersect_is_the_common_elements(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    left, right = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    common = counted(shape, [left, right]) == 2
    meet = left.intersect(right)
    assert meet == right.intersect(left)
    if meet is None:
        assert not common.any()
    else:
        assert meet.numel == common.sum() == view(common, meet).sum()
        assert meet.within(left)
        assert meet.within(right)


def test_boxes_of_another_rank_do_not_meet_in_silence() -> None:
    with pytest.raises(ValueError, match="zip"):
        whole((2, 2, 2)).intersect(whole((2, 2)))


@pytest.mark.parametrize(("offset", "shape"), [((0,), (1, 1)), ((-1,), (1,)), ((0,), (-1,))])
def test_a_slice_is_valid_once_constructed(offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"differ in rank|negative"):
        Slice(offset, shape)


@given(arrangements())
def test_cover_fault_agrees_with_counting(case: tuple[Slice, list[Slice]]) -> None:
    box, parts = case
    counts = counted(tuple(o + n for o, n in zip(box.offset, box.shape, strict=True)), parts)
    exact = bool((view(counts, box) == 1).all()) and counts.sum() == box.numel
    fault = cover_fault(box, parts)
    assert (fault is None) == exact, fault
    if fault and "gap" in fault:
        assert (view(counts, box) == 0).any()
    if fault and "overlap" in fault:
        assert (counts > 1).any()


@given(st.data())
def test_cover_fault_of_any_heap_of_boxes(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    parts = data.draw(st.lists(boxes_in(shape), max_size=5))
    assert (cover_fault(whole(shape), parts) is None) == bool((counted(shape, parts) == 1).all())


def test_a_pinwheel_is_a_cover_though_no_cut_goes_through() -> None:
    parts = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    assert cover_fault(whole((3, 3)), [Slice(*part) for part in parts]) is None
    assert "gap" in (cover_fault(whole((3, 3)), [Slice(*part) for part in parts[:-1]]) or "")


@pytest.mark.parametrize(
    ("parts", "fault"),
    [
        ([((0,), (4,)), ((4,), (7,))], "outside"),
        ([((0, 0), (4, 1))], "number of dimensions"),
        ([((0,), (4,))], "gap"),
        ([((1,), (9,))], "gap"),
        ([((0,), (6,)), ((5,), (5,))], "overlap"),
        ([], "gap"),
    ],
)
def test_the_fault_is_named(parts: list[Box], fault: str) -> None:
    assert fault in (cover_fault(whole((10,)), [Slice(*part) for part in parts]) or "")


def test_zero_dimensions_and_zero_sizes() -> None:
    assert cover_fault(whole(()), [whole(())]) is None
    assert "gap" in (cover_fault(whole(()), []) or "")
    assert "overlap" in (cover_fault(whole(()), [whole(()), whole(())]) or "")
    assert cover_fault(whole((0, 3)), []) is None
    assert cover_fault(whole((3, 0)), [Slice((1, 0), (2, 0))]) is None


def test_columns_cut_at_other_heights_are_checked_up_to_a_number_of_steps() -> None:
    def columns(n: int) -> list[Slice]:
        tops = [Slice((0, i), (i + 1, 1)) for i in range(n)]
        return tops + [Slice((i + 1, i), (n - i, 1)) for i in range(n)]

    assert cover_fault(whole((101, 100)), columns(100)) is None
    assert "overlap" in (cover_fault(whole((101, 100)), [*columns(100), Slice((7, 7), (1, 1))]) or "")
    began = monotonic()
    assert "is not checked" in (cover_fault(whole((4001, 4000)), columns(4000)) or "")
    assert monotonic() - began < 10


@pytest.mark.parametrize("kind", ["nested", "staggered", "equal"])
def test_hostile_arrangements_end_quickly(kind: str) -> None:
    count = 20_000
    parts = {
        "nested": [Slice((0, 0), (i + 1, 1)) for i in range(count)],
        "staggered": [Slice((i, 0), (count, 1)) for i in range(count)],
        "equal": [Slice((0, 0), (2 * count, 1))] * count,
    }[kind]
    began = monotonic()
    assert "overlap" in (cover_fault(whole((2 * count, 1)), parts) or "")
    assert monotonic() - began < 5


@given(st.data())
@example(None)
def test_flat_boxes_are_the_elements_in_order(data: st.DataObject | None) -> None:
    shape = data.draw(shapes(1)) if data else (3, 4)
    total = int(np.prod(shape))
    start = data.draw(st.integers(0, total)) if data else 1
    stop = data.draw(st.integers(start, total)) if data else 9
    found = list(flat_boxes(shape, start, stop))
    index = np.arange(total).reshape(shape)
    elements = [int(i) for box in found for i in view(index, box).flatten()]
    assert elements == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)
    assert all(is_flat(shape, box) for box in found)


@given(st.data())
def test_flat_span_and_is_flat_agree_with_ravelled_indices(data: st.DataObject) -> None:
    shape = data.draw(shapes(1))
    box = data.draw(boxes_in(shape, least=1))
    corners = (box.offset, tuple(box.stop(d) - 1 for d in range(len(shape))))
    first, last = (int(np.ravel_multi_index(corner, shape)) if shape else 0 for corner in corners)
    assert flat_span(shape, box) == (first, last + 1)
    elements = view(np.arange(int(np.prod(shape))).reshape(shape), box).flatten()
    assert is_flat(shape, box) == (list(elements) == list(range(first, last + 1)))


@given(st.data())
def test_moving_there_and_back(data: st.DataObject) -> None:
    box = data.draw(boxes_in(data.draw(shapes())))
    assert box.relative_to(box.offset).moved_by(box.offset) == box
