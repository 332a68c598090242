"""Which sample is computed when, and by whom: the order of a run's data, and its cut among ranks.

Pure. The order follows from (samples, seed, number of the pass) and never from the world size; what a rank computes in
a step follows from the order, the number of the step's batch, rank and world. So one number is the whole cursor, and
whoever holds it goes on exactly, on any number of ranks. Positions and cuts are half-open ranges.

    pass         once through all samples, in an order of its own
    global batch what all ranks compute in one step, together; batches are numbered through all passes
    share        the part of a global batch that one rank computes
    micro-batch  the part of a share that is computed at once; gradients are added up over those of a step
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import isqrt

import xxhash

ALGORITHM = "feistel-xxh3/1"  # stands in every checkpoint: another order is another name
_ROUNDS = 8


@dataclass(frozen=True)
class Permutation:
    """A seeded bijection of range(size) that is computed, not stored: the same on every rank, for any size.

    A Feistel network on a grid of rows x columns, just large enough; what it sends outside is sent on until it is
    inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Shuffles data; hides nothing.
    """

    size: int
    seed: str

    @cached_property
    def _keys(self) -> tuple[int, ...]:
        return tuple(xxhash.xxh3_64_intdigest(f"{self.seed}/{i}".encode()) for i in range(_ROUNDS))

    @cached_property
    def _grid(self) -> tuple[int, int]:
        rows = isqrt(self.size - 1) + 1
        return rows, -(-self.size // rows)

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} of {self.size}")
        found = self._move(position)
        while found >= self.size:  # ends: the cycle that began inside comes back there
            found = self._move(found)
        return found

    def _move(self, cell: int) -> int:
        rows, columns = self._grid
        row, column = divmod(cell, columns)
        for i in range(0, _ROUNDS, 2):
            row = (row + _mix(column, self._keys[i])) % rows
            column = (column + _mix(row, self._keys[i + 1])) % columns
        return row * columns + column


def _mix(number: int, key: int) -> int:
    return xxhash.xxh3_64_intdigest(number.to_bytes(8, "little"), key)


@dataclass(frozen=True)
class Order:
    """The global order of a run's data. The last batch of a pass is shorter where `global_batch` does not divide
    `samples`, or with `drop_last` left out: other samples in every pass."""

    samples: int
    global_batch: int
    seed: int
    drop_last: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "global_batch"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**63:
                raise ValueError(f"{name} is a positive int, not {value!r:.100}")
        if type(self.seed) is not int:
            raise ValueError(f"seed is an int, not {self.seed!r:.100}")
        if self.drop_last and self.samples < self.global_batch:
            raise ValueError(
                f"drop_last leaves nothing of {self.samples} samples in global batches of {self.global_batch}"
            )

    @property
    def batches_per_pass(self) -> int:
        return (self.samples if self.drop_last else self.samples + self.global_batch - 1) // self.global_batch

    def batch(self, number: int) -> GlobalBatch:
        pass_number, nth = divmod(number, self.batches_per_pass)
        first = nth * self.global_batch
        size = min(self.global_batch, self.samples - first)
        return GlobalBatch(Permutation(self.samples, f"{self.seed}/{pass_number}"), first, size)


@dataclass(frozen=True)
class GlobalBatch:
    """`size` samples from position `first` of a pass on."""

    permutation: Permutation
    first: int
    size: int

    def samples(self, start: int, stop: int) -> tuple[int, ...]:
        """The indices of samples [start, stop) of this batch. What is not asked for is not computed."""
        return tuple(self.permutation[self.first + i] for i in range(start, stop))


@dataclass(frozen=True)
class MicroBatch:
    """What a rank computes at once. `indices`: its samples; none where there are fewer than ranks.

    `load`: what to load, `indices` or else one sample of the batch, so that every rank runs its model equally often.
    `weight`: by what to multiply the mean loss over `load`, so that the gradients, added up over the step's
    micro-batches and then averaged over the ranks, are those of the mean loss over the global batch.
    """

    indices: tuple[int, ...]
    load: tuple[int, ...]
    weight: float
    last: bool


def plan_step(batch: GlobalBatch, rank: int, world: int, micro_batch: int | None = None) -> tuple[MicroBatch, ...]:
    """The micro-batches of one rank, of at most `micro_batch` samples each: as many on every rank.

    Shares are runs of the batch in order of rank and differ by one sample at most; so do a share's micro-batches.
    """
    start, stop = cut(batch.size, world, rank)
    largest_share = -(-batch.size // world)
    count = -(-largest_share // (micro_batch or largest_share))
    return tuple(_micro_batch(batch, start, stop, world, i, count) for i in range(count))


def _micro_batch(batch: GlobalBatch, start: int, stop: int, world: int, i: int, count: int) -> MicroBatch:
    first, end = cut(stop - start, count, i)
    indices = batch.samples(start + first, start + end)
    weight = world * len(indices) / batch.size
    return MicroBatch(indices, indices or batch.samples(0, 1), weight, last=i == count - 1)


def cut(size: int, parts: int, i: int) -> tuple[int, int]:
    """The i-th of `parts` runs of range(size), as equal as can be."""
    return size * i // parts, size * (i + 1) // parts
