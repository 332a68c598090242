"""Who holds which elements: specs, meshes, placements and shardings as plain values.

Owns the symbolic description of a layout and the arithmetic of torch's chunking. A rank holds a *list* of
Slices of a key, because a strided shard is not one box. Knows nothing of torch, files or who writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from math import prod

from ckpt.slices import Slice, whole

ITEMSIZE = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
    "uint16": 2,
    "float32": 4,
    "int32": 4,
    "uint32": 4,
    "complex32": 4,
    "float64": 8,
    "int64": 8,
    "uint64": 8,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes of one element, by torch dtype name: every dtype that a checkpoint may hold."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype (torch's name) and global shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return ITEMSIZE[self.dtype] * prod(self.shape)


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks in a row-major grid, as a DeviceMesh holds them."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if min(self.shape, default=1) < 1:
            raise ValueError(f"a mesh of shape {self.shape} has no rank")
        if prod(self.shape) != len(self.ranks) or len(set(self.ranks)) != len(self.ranks):
            raise ValueError(f"a mesh of shape {self.shape} needs as many distinct ranks, got {len(self.ranks)}")
        object.__setattr__(self, "_hash", hash((self.shape, self.ranks)))

    def __hash__(self) -> int:  # computed once: a mesh of 100,000 ranks is looked up for every tensor
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Mesh):
            return NotImplemented
        return self._hash == other._hash and (self.shape, self.ranks) == (other.shape, other.ranks)

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Where `rank` stands in the grid. ValueError if it does not."""
        at = _positions(self).get(rank)
        if at is None:
            raise ValueError(f"rank {rank} is not in the mesh of {len(self.ranks)} ranks")
        coordinate = []
        for size in reversed(self.shape):
            coordinate.append(at % size)
            at //= size
        return tuple(reversed(coordinate))

    def rank_at(self, coordinate: tuple[int, ...]) -> int:
        at = 0
        for size, c in zip(self.shape, coordinate, strict=True):
            at = at * size + c
        return self.ranks[at]


@lru_cache(maxsize=256)
def _positions(mesh: Mesh) -> dict[int, int]:
    return {rank: at for at, rank in enumerate(mesh.ranks)}


@dataclass(frozen=True, slots=True)
class Replicate:
    """This mesh dimension holds equal copies."""


@dataclass(frozen=True, slots=True)
class Split:
    """This mesh dimension splits tensor dimension `dim`, as torch.chunk does: ceil-sized, the last ones short.

    With `split_factor` f > 1 (torch's `_StridedShard`) the dimension is first cut into f runs, each run is
    split among the mesh dimension, and coordinate i holds the i-th piece of every run.
    """

    dim: int
    split_factor: int = 1


Placement = Replicate | Split


@dataclass(frozen=True, slots=True)
class Whole:
    """Each holder has the whole tensor."""


@dataclass(frozen=True, slots=True)
class OnMesh:
    """A DTensor's layout: one placement for each mesh dimension, applied left to right."""

    mesh: Mesh
    placements: tuple[Placement, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.mesh, self.placements)))

    def __hash__(self) -> int:  # computed once: what a mesh cuts is looked up for every tensor
        return self._hash


@dataclass(frozen=True, slots=True)
class Declared:
    """One box that the user declared this rank to hold (`ckpt.Shard`)."""

    box: Slice


Sharding = Whole | OnMesh | Declared


@dataclass(frozen=True, slots=True)
class Piece:
    """One box of a rank's elements: `box` in the global tensor, starting at `at` in the local one."""

    box: Slice
    at: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """The pieces that the ranks at `ranks` all hold alike: one replica group of one tensor."""

    pieces: tuple[Piece, ...]
    ranks: tuple[int, ...]


def pieces_of(sharding: Sharding, shape: tuple[int, ...], rank: int) -> tuple[Piece, ...]:
    """The non-empty pieces of a tensor of `shape` that `rank` holds, in the order of its local tensor."""
    match sharding:
        case Whole():
            box = whole(shape)
            return (Piece(box, box.offset),) if box.numel else ()
        case Declared(box):
            return (Piece(box, (0,) * len(shape)),) if box.numel else ()
        case OnMesh(mesh, placements):
            return _mesh_pieces(placements, mesh.shape, shape, _split_coordinate(sharding, rank))


def replica_ranks(sharding: OnMesh, rank: int) -> tuple[int, ...]:
    """The ranks of the mesh that hold the same elements as `rank`, itself included, ascending."""
    return _replicas_at(sharding, _split_coordinate(sharding, rank))


def holders(sharding: OnMesh, shape: tuple[int, ...], box: Slice) -> Iterator[Held]:
    """The replica groups whose pieces meet `box`: found by arithmetic, not by a look at every rank."""
    mesh, placements = sharding.mesh, sharding.placements
    splits: list[list[int]] = [[] for _ in shape]
    for mesh_dim, placement in enumerate(placements):
        if isinstance(placement, Split):
            splits[placement.dim].append(mesh_dim)
    per_dim = [
        list(_meeting(placements, mesh.shape, tuple(dims), shape[d], box.offset[d], box.stop(d)))
        for d, dims in enumerate(splits)
    ]
    for choice in product(*per_dim):
        coordinate = [0] * len(placements)
        for dims, at in zip(splits, choice, strict=True):
            for mesh_dim, c in zip(dims, at, strict=True):
                coordinate[mesh_dim] = c
        where = tuple(coordinate)
        pieces = _mesh_pieces(placements, mesh.shape, shape, where)
        if any(piece.box.intersect(box) for piece in pieces):
            yield Held(pieces, _replicas_at(sharding, where))


def all_holders(sharding: OnMesh, shape: tuple[int, ...]) -> Iterator[Held]:
    """Every replica group of the mesh with a non-empty share."""
    return holders(sharding, shape, whole(shape))


def grid_of(sharding: Whole | OnMesh, dims: int) -> tuple[tuple[tuple[Split, int], ...], ...]:
    """How each of `dims` tensor dimensions is split, as (placement, mesh size) from left to right.

    Shardings with equal grids cut a tensor into the same pieces. The pieces of one grid tile the tensor exactly
    once, whatever its shape: each split cuts what the one before it left, and no two dimensions share a split.
    """
    splits: list[list[tuple[Split, int]]] = [[] for _ in range(dims)]
    if isinstance(sharding, OnMesh):
        for placement, size in zip(sharding.placements, sharding.mesh.shape, strict=True):
            if isinstance(placement, Split) and size > 1:
                splits[placement.dim].append((placement, size))
    return tuple(map(tuple, splits))


# Intervals: a dimension's local index space is a list of global runs (start, stop).

Runs = tuple[tuple[int, int], ...]


def _chunk(length: int, chunks: int, index: int) -> tuple[int, int]:
    size = -(-length // chunks)
    return min(length, size * index), min(length, size * (index + 1))


def _select(runs: Runs, start: int, stop: int) -> Runs:
    """Local indices [start, stop) of the space that `runs` make up, as global runs."""
    found, at = [], 0
    for low, high in runs:
        a, b = max(start, at), min(stop, at + high - low)
        if a < b:
            found.append((low + a - at, low + b - at))
        at += high - low
    return tuple(found)


def _split_runs(runs: Runs, placement: Split, chunks: int, index: int) -> Runs:
    length = sum(high - low for low, high in runs)
    found: list[tuple[int, int]] = []
    for run in range(min(placement.split_factor, length)):
        low, high = _chunk(length, placement.split_factor, run)
        start, stop = _chunk(high - low, chunks, index)
        found.extend(_select(runs, low + start, low + stop))
    return _merge(found)


def _merge(runs: list[tuple[int, int]]) -> Runs:
    merged: list[tuple[int, int]] = []
    for low, high in runs:
        if merged and merged[-1][1] == low:
            merged[-1] = (merged[-1][0], high)
        else:
            merged.append((low, high))
    return tuple(merged)


@lru_cache(maxsize=1 << 16)
def _dim_runs(splits: tuple[tuple[Split, int, int], ...], length: int) -> Runs:
    """Global runs of one tensor dimension after `splits`: (placement, mesh size, coordinate), left to right."""
    runs: Runs = ((0, length),) if length else ()
    for placement, chunks, index in splits:
        runs = _split_runs(runs, placement, chunks, index)
    return runs


@lru_cache(maxsize=1 << 16)
def _split_coordinate(sharding: OnMesh, rank: int) -> tuple[int, ...]:
    """Where `rank` stands in the grid, 0 in the dimensions that do not split: equal for all that hold the same."""
    coordinate = sharding.mesh.coordinate(rank)
    return tuple(c if isinstance(p, Split) else 0 for p, c in zip(sharding.placements, coordinate, strict=True))


@lru_cache(maxsize=1 << 16)
def _mesh_pieces(
    placements: tuple[Placement, ...], sizes: tuple[int, ...], shape: tuple[int, ...], coordinate: tuple[int, ...]
) -> tuple[Piece, ...]:
    per_dim: list[list[tuple[int, int, int]]] = []  # (global start, length, local start) for each tensor dimension
    for d, length in enumerate(shape):
        splits = tuple(
            (p, sizes[m], coordinate[m]) for m, p in enumerate(placements) if isinstance(p, Split) and p.dim == d
        )
        at, found = 0, []
        for low, high in _dim_runs(splits, length):
            found.append((low, high - low, at))
            at += high - low
        per_dim.append(found)
    return tuple(
        Piece(Slice(tuple(c[0] for c in choice), tuple(c[1] for c in choice)), tuple(c[2] for c in choice))
        for choice in product(*per_dim)
    )


def _replicas_at(sharding: OnMesh, split_coordinate: tuple[int, ...]) -> tuple[int, ...]:
    return _cached_replicas(sharding.mesh, sharding.placements, split_coordinate)


@lru_cache(maxsize=1 << 16)
def _cached_replicas(mesh: Mesh, placements: tuple[Placement, ...], at: tuple[int, ...]) -> tuple[int, ...]:
    axes = [
        (c,) if isinstance(p, Split) else range(size) for p, c, size in zip(placements, at, mesh.shape, strict=True)
    ]
    return tuple(sorted(mesh.rank_at(coordinate) for coordinate in product(*axes)))


def _meeting(
    placements: tuple[Placement, ...], sizes: tuple[int, ...], dims: tuple[int, ...], length: int, start: int, stop: int
) -> Iterator[tuple[int, ...]]:
    """Coordinates on mesh dimensions `dims` whose share of a tensor dimension meets [start, stop)."""

    def descend(runs: Runs, left: tuple[int, ...], chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if not left:
            yield chosen
            return
        placement, chunks = placements[left[0]], sizes[left[0]]
        assert isinstance(placement, Split)
        for index in _indices_meeting(runs, placement, chunks, start, stop):
            yield from descend(_split_runs(runs, placement, chunks, index), left[1:], (*chosen, index))

    if start < stop and length:
        yield from descend(((0, length),), dims, ())


def _indices_meeting(runs: Runs, placement: Split, chunks: int, start: int, stop: int) -> Iterable[int]:
    """Coordinates whose share of the space that `runs` make up meets [start, stop), ascending; by arithmetic."""
    length = sum(high - low for low, high in runs)
    cut = -(-length // placement.split_factor)
    found: set[int] = set()
    at = 0
    for low, high in runs:
        first, last = at + max(start, low) - low, at + min(stop, high) - low  # in local indices
        at += high - low
        for begin in range(first // cut * cut, last, cut) if first < last else ():
            size = -(-(min(begin + cut, length) - begin) // chunks)
            found.update(range((max(first, begin) - begin) // size, (min(last, begin + cut) - 1 - begin) // size + 1))
        if len(found) == chunks:
            break
    return sorted(found)
