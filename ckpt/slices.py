"""Geometry of half-open boxes of a tensor's elements: intersect, cover, and flat ranges of bytes.

Owns `Slice`. Knows nothing of ranks, files or torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple, Self

SLABS_LIMIT, SLABS_PER_PART = 200_000, 64  # steps of one check: hostile boxes would take the square of their number


class _Box(NamedTuple):  # a plan makes and compares thousands: as a tuple that takes a fifth of the time
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Slice(_Box):
    """A box of elements: starts at `offset`, spans `shape`, half-open in every dimension."""

    __slots__ = ()

    def __new__(cls, offset: tuple[int, ...], shape: tuple[int, ...]) -> Self:
        if len(offset) != len(shape):
            raise ValueError(f"offset {offset} and shape {shape} differ in rank")
        if offset and (min(offset) < 0 or min(shape) < 0):
            raise ValueError(f"negative offset or size in {offset} + {shape}")
        return tuple.__new__(cls, (offset, shape))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def stop(self, dim: int) -> int:
        return self.offset[dim] + self.shape[dim]

    def intersect(self, other: Slice) -> Slice | None:
        """The common box, or None where no element is common. ValueError if the boxes differ in rank."""
        low: list[int] = []
        shape: list[int] = []
        for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            start, stop = max(a, b), min(a + n, b + m)
            if start >= stop:
                return None
            low.append(start)
            shape.append(stop - start)
        return tuple.__new__(Slice, (tuple(low), tuple(shape)))

    def within(self, other: Slice) -> bool:
        return all(other.offset[d] <= self.offset[d] and self.stop(d) <= other.stop(d) for d in range(len(self.offset)))

    def relative_to(self, origin: Sequence[int]) -> Slice:
        return Slice(tuple(o - p for o, p in zip(self.offset, origin, strict=True)), self.shape)

    def moved_by(self, by: Sequence[int]) -> Slice:
        return Slice(tuple(o + p for o, p in zip(self.offset, by, strict=True)), self.shape)


def whole(shape: Sequence[int]) -> Slice:
    """The box that covers a tensor of `shape`."""
    return Slice((0,) * len(shape), tuple(shape))


def cover_fault(box: Slice, parts: Iterable[Slice]) -> str | None:
    """Why `parts` do not tile `box` exactly once (gap, overlap or stray element), or None if they do.

    Empty parts are ignored. Exact for any arrangement of boxes, not only grids: the box is cut at the
    borders of the parts along one dimension, and each slab is checked along the next.
    """
    live = [part for part in parts if part.numel]
    for part in live:
        if len(part.shape) != len(box.shape):
            return f"{part} has another number of dimensions than {box}"
        if not part.within(box):
            return f"{part} reaches outside {box}"
    if not box.numel:
        return None
    steps = SLABS_LIMIT + SLABS_PER_PART * len(live)
    try:
        return _slab_fault(box, live, 0, iter(range(steps)))
    except _TooIntricate:
        return f"{len(live)} boxes in {box} are cut so irregularly that this is not checked"


class _TooIntricate(Exception):
    pass


def _slab_fault(box: Slice, parts: list[Slice], dim: int, steps: Iterator[int]) -> str | None:
    for _ in parts:
        if next(steps, None) is None:
            raise _TooIntricate
    if dim == len(box.shape):
        return None if len(parts) == 1 else f"{'overlap' if parts else 'gap'} in {box}"
    if len(parts) == 1 and parts[0] == box:
        return None
    at = box.offset[dim]
    for start, stop, group in _slabs(parts, dim):
        if start != at:
            return f"gap in {_slab(box, dim, at, start)}"
        if fault := _slab_fault(_slab(box, dim, start, stop), group, dim + 1, steps):
            return fault
        at = stop
    return None if at == box.stop(dim) else f"gap in {_slab(box, dim, at, box.stop(dim))}"


def _slabs(parts: list[Slice], dim: int) -> Iterator[tuple[int, int, list[Slice]]]:
    """Ranges of `dim` in ascending order, each with the parts that span it; ranges that none spans are left out.

    Lazy, so that the first fault ends the work: hostile arrangements would make it quadratic.
    """
    spans: dict[tuple[int, int], list[Slice]] = {}
    for part in parts:
        spans.setdefault((part.offset[dim], part.stop(dim)), []).append(part)
    ordered = sorted(spans)
    if all(left[1] <= right[0] for left, right in pairwise(ordered)):
        yield from ((start, stop, spans[start, stop]) for start, stop in ordered)
        return
    waiting = iter([*ordered, None])
    following = next(waiting)
    live: list[tuple[int, int]] = []
    for start, stop in pairwise(sorted({edge for span in ordered for edge in span})):
        live = [span for span in live if span[1] > start]
        while following is not None and following[0] <= start:
            live.append(following)
            following = next(waiting)
        if live:
            yield start, stop, [part for span in live for part in spans[span]]


def _slab(box: Slice, dim: int, start: int, stop: int) -> Slice:
    offset = (*box.offset[:dim], start, *box.offset[dim + 1 :])
    return Slice(offset, (*box.shape[:dim], stop - start, *box.shape[dim + 1 :]))


def bands(shape: tuple[int, ...], itemsize: int, limit_bytes: int) -> Iterator[Slice]:
    """Boxes that tile `shape`, each of at most `limit_bytes` where a row of the first dimensions allows it."""
    if 0 in shape:
        return
    for dim, length in enumerate(shape):
        inner = itemsize * prod(shape[dim + 1 :])
        rows = max(1, limit_bytes // inner)
        if rows > 1 or dim == len(shape) - 1:
            for outer in _points(shape[:dim]):
                for first in range(0, length, rows):
                    size = min(rows, length - first)
                    rest = shape[dim + 1 :]
                    yield Slice((*outer, first, *(0 for _ in rest)), (*(1 for _ in outer), size, *rest))
            return
    yield Slice((), ())


def _points(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if not shape:
        yield ()
        return
    for first in range(shape[0]):
        for rest in _points(shape[1:]):
            yield (first, *rest)


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Slice]:
    """The boxes, in row-major order, that make up elements [start, stop) of a tensor of `shape`.

    At most 2 * rank - 1 boxes. [1, 9) of (3, 4) is row 0 from column 1, row 1, and column 0 of row 2.
    """
    if start >= stop:
        return
    if not shape:
        yield Slice((), ())
        return
    row = prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last or len(shape) == 1:
        if len(shape) == 1:
            yield Slice((start,), (stop - start,))
        else:
            yield from _within_row(shape, first, start - first * row, stop - first * row)
        return
    whole_first, whole_last = first, last + 1
    if start > first * row:
        yield from _within_row(shape, first, start - first * row, row)
        whole_first += 1
    if stop < (last + 1) * row:
        whole_last -= 1
    if whole_first < whole_last:
        yield Slice((whole_first, *(0 for _ in shape[1:])), (whole_last - whole_first, *shape[1:]))
    if stop < (last + 1) * row:
        yield from _within_row(shape, last, 0, stop - last * row)


def _within_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Slice]:
    if (start, stop) == (0, prod(shape[1:])):
        yield Slice((row, *(0 for _ in shape[1:])), (1, *shape[1:]))
        return
    for box in flat_boxes(shape[1:], start, stop):
        yield Slice((row, *box.offset), (1, *box.shape))


def flat_span(shape: Sequence[int], box: Slice) -> tuple[int, int]:
    """First and one-past-last flat element of `box` in a row-major tensor of `shape`; box is not empty."""
    first = last = 0
    for size, offset, length in zip(shape, box.offset, box.shape, strict=True):
        first = first * size + offset
        last = last * size + offset + length - 1
    return first, last + 1


def is_flat(shape: Sequence[int], box: Slice) -> bool:
    """Whether `box` is one contiguous run of elements in a row-major tensor of `shape`."""
    start, stop = flat_span(shape, box)
    return stop - start == box.numel
