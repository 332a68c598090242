"""What changed between two steps, of one run or of two: tensor by tensor, in bounded memory, without a process group.

Tensors that were stored in the same pieces with the same digests are equal without being read. Others are read in
bands of at most BAND_BYTES of each side, whatever their layouts were, every block verified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Final, Literal

import torch

from ckpt.adapt.values import dtype_from_name
from ckpt.loader import read_box
from ckpt.restorer import StepReader
from ckpt.sharding import TensorSpec
from ckpt.slices import Slice, bands

BAND_BYTES: Final = 64 << 20

Status = Literal["same", "changed", "kind", "left", "right"]


@dataclass(frozen=True)
class Difference:
    """One key: `same` bit for bit, `changed` in value, of another `kind` (dtype or shape), or on one side alone.

    `largest` and `mean` are of the absolute difference over all elements where both are finite, `share` is the part of
    the elements whose bits differ, `not_finite` counts those that are NaN or infinite on one side at least.
    """

    key: str
    status: Status
    left: TensorSpec | None = None
    right: TensorSpec | None = None
    share: float = 0.0
    largest: float = 0.0
    mean: float = 0.0
    not_finite: int = 0


@dataclass(frozen=True)
class Differences:
    """All tensors by key, and the names of the values that differ or stand on one side alone."""

    tensors: tuple[Difference, ...]
    values: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return not self.values and all(each.status == "same" for each in self.tensors)


def compare_steps(
    left: StepReader, right: StepReader, on_tensor: Callable[[int, int], None] | None = None
) -> Differences:
    """What differs between two steps. `on_tensor(done, total)` hears of the progress. Raises as restoring does."""
    sides = _Side(left), _Side(right)
    keys = sorted({*sides[0].specs, *sides[1].specs})
    found = []
    for number, key in enumerate(keys):
        found.append(_compare(key, *sides))
        if on_tensor is not None:
            on_tensor(number + 1, len(keys))
    names = sorted({*sides[0].values, *sides[1].values})
    return Differences(tuple(found), tuple(n for n in names if sides[0].values.get(n) != sides[1].values.get(n)))


class _Side:
    """A step, and where its tensors and values are stored."""

    def __init__(self, reader: StepReader) -> None:
        self.reader, self.world = reader, reader.manifest.world
        self.specs = {key: self.world.specs[self.world.aliases.get(key, key)]
                      for key in (*self.world.specs, *self.world.aliases)}  # fmt: skip
        self._chunks: dict[str, list[tuple[tuple[int, ...], tuple[int, ...], bytes]]] = {}
        self.values: dict[str, bytes] = {}
        for rank in range(self.world.size):
            part = reader.part(rank)
            for chunk in part.chunks:
                self._chunks.setdefault(chunk.key, []).append((chunk.offset, chunk.shape, chunk.digests))
            self.values.update(part.values)
            self.values.update({f"{name} of rank {rank}": data for name, data in part.rank_values.items()})

    def digests(self, key: str) -> list[tuple[tuple[int, ...], tuple[int, ...], bytes]]:
        return sorted(self._chunks.get(self.stored(key), ()))

    def stored(self, key: str) -> str:
        return self.world.aliases.get(key, key)

    def read(self, key: str, box: Slice) -> torch.Tensor:
        return read_box(self.reader, self.stored(key), box)


def _compare(key: str, left: _Side, right: _Side) -> Difference:
    specs = left.specs.get(key), right.specs.get(key)
    if specs[0] is None or specs[1] is None:
        return Difference(key, "left" if specs[0] else "right", *specs)
    if specs[0] != specs[1]:
        return Difference(key, "kind", *specs)
    if left.digests(key) == right.digests(key):
        return Difference(key, "same", *specs)
    return _of_values(key, specs[0], left, right)


def _of_values(key: str, spec: TensorSpec, left: _Side, right: _Side) -> Difference:
    count, differing, not_finite, finite = prod(spec.shape), 0, 0, 0
    largest = total = 0.0
    for box in bands(spec.shape, dtype_from_name(spec.dtype).itemsize, BAND_BYTES):
        one, other = left.read(key, box), right.read(key, box)
        differing += int((_bits(one) != _bits(other)).any(-1).sum())
        gap = (_wide(one) - _wide(other)).abs()
        known = gap[torch.isfinite(gap)]
        not_finite += gap.numel() - known.numel()
        finite += known.numel()
        if known.numel():
            largest, total = max(largest, float(known.max())), total + float(known.sum())
    if not differing:
        return Difference(key, "same", spec, spec)
    mean = total / finite if finite else 0.0
    return Difference(key, "changed", spec, spec, differing / count, largest, mean, not_finite)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """One row of bytes for each element."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).reshape(tensor.numel(), -1)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.to(torch.float64)
