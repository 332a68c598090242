"""Which rank holds what: one rank's Layout, and the World of all of them, deduplicated.

Owns replica groups and the ownership rule (who writes which bytes of what several ranks hold alike).
Everything here is computed from values that every rank has, so plans are never gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ckpt.sharding import ITEMSIZE, Held, OnMesh, Piece, Sharding, TensorSpec, holders, pieces_of, replica_ranks
from ckpt.slices import Slice, cover_fault, whole

OWNERSHIP = "even-bytes/1"
"""Name of the ownership rule below. A reader that meets another name opens the parts of all holders."""

Role = Literal["parameter", "buffer", "tensor"]
"""Parameter (also its optimizer state): replicas stay equal, so several ranks may each write a part of it.
Buffer: replicas may differ, the lowest rank's counts. Tensor: replicas are equal, the lowest rank writes it."""

_ATOM_BYTES = 256 * 1024  # a held piece up to this size has one writer: cutting it would only add chunks


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as one rank holds it."""

    key: str
    spec: TensorSpec
    sharding: Sharding
    role: Role = "parameter"


@dataclass(frozen=True)
class Layout:
    """All that one rank holds: tensors by key (ascending), ties, and the names of its values."""

    entries: tuple[Entry, ...]
    aliases: tuple[tuple[str, str], ...] = ()  # (other name, key under which the tensor is stored)
    values: tuple[str, ...] = ()  # equal on every rank that names them
    rank_values: tuple[str, ...] = ()  # each rank has its own

    @cached_property
    def by_key(self) -> dict[str, Entry]:
        return {entry.key: entry for entry in self.entries}


@dataclass(frozen=True, slots=True)
class Owned:
    """A box of a tensor that one rank writes, and where it starts in that rank's local tensor."""

    key: str
    box: Slice
    at: tuple[int, ...]


@dataclass(frozen=True)
class World:
    """Every distinct Layout once, and the index of each rank's."""

    layouts: tuple[Layout, ...]
    layout_of: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.layout_of)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Spec of every stored tensor, ties resolved away."""
        return {entry.key: entry.spec for layout in self.layouts for entry in layout.entries}

    @cached_property
    def aliases(self) -> dict[str, str]:
        return {alias: key for layout in self.layouts for alias, key in layout.aliases}

    @cached_property
    def ranks_of(self) -> tuple[tuple[int, ...], ...]:
        """Ranks of each layout, ascending."""
        ranks: list[list[int]] = [[] for _ in self.layouts]
        for rank, index in enumerate(self.layout_of):
            ranks[index].append(rank)
        return tuple(map(tuple, ranks))

    @cached_property
    def instances(self) -> dict[str, dict[Sharding, tuple[int, ...]]]:
        """For each key its distinct shardings, each with the layouts that hold it so."""
        found: dict[str, dict[Sharding, list[int]]] = {}
        for index, layout in enumerate(self.layouts):
            for entry in layout.entries:
                found.setdefault(entry.key, {}).setdefault(entry.sharding, []).append(index)
        return {key: {s: tuple(i) for s, i in by.items()} for key, by in found.items()}

    @cached_property
    def value_owner(self) -> dict[str, int]:
        """Lowest rank that names each shared value; it writes it."""
        owner: dict[str, int] = {}
        for rank, layout in self._first_ranks():
            for name in layout.values:
                owner[name] = min(rank, owner.get(name, rank))
        return owner

    @cached_property
    def buffers(self) -> frozenset[str]:
        return frozenset(e.key for layout in self.layouts for e in layout.entries if e.role == "buffer")

    @cached_property
    def unshared(self) -> frozenset[str]:
        return frozenset(e.key for layout in self.layouts for e in layout.entries if e.role != "parameter")

    def layout(self, rank: int) -> Layout:
        return self.layouts[self.layout_of[rank]]

    def _first_ranks(self) -> Iterator[tuple[int, Layout]]:
        seen: set[int] = set()
        for rank, index in enumerate(self.layout_of):
            if index not in seen:
                seen.add(index)
                yield rank, self.layouts[index]

    @cached_property
    def _memo(self) -> dict[object, object]:
        return {}

    def ranks_holding(self, layouts: tuple[int, ...]) -> tuple[int, ...]:
        memo = self._memo
        if layouts not in memo:
            memo[layouts] = tuple(sorted(rank for index in layouts for rank in self.ranks_of[index]))
        return memo[layouts]  # type: ignore[return-value]


def held(world: World, key: str, box: Slice) -> list[Held]:
    """The replica groups of tensor `key` whose pieces meet `box`; equal pieces from several meshes are one group."""
    shape = world.specs[key].shape
    groups: dict[tuple[Piece, ...], tuple[int, ...]] = {}
    for sharding, layouts in world.instances[key].items():
        for group in _instance_groups(world, sharding, layouts, shape, box):
            if group.pieces in groups:
                groups[group.pieces] = tuple(sorted({*groups[group.pieces], *group.ranks}))
            else:
                groups[group.pieces] = group.ranks
    return [Held(pieces, ranks) for pieces, ranks in groups.items()]


def _instance_groups(
    world: World, sharding: Sharding, layouts: tuple[int, ...], shape: tuple[int, ...], box: Slice
) -> Iterable[Held]:
    if isinstance(sharding, OnMesh):
        return holders(sharding, shape, box)
    pieces = pieces_of(sharding, shape, 0)
    if not any(piece.box.intersect(box) for piece in pieces):
        return ()
    return (Held(pieces, world.ranks_holding(layouts)),)


def cover_faults(world: World) -> list[str]:
    """Every way in which the ranks together do not hold each tensor exactly once; empty when they do.

    The proof is symbolic: each distinct combination of shardings and shape is checked once, whatever the
    number of tensors or of saves.
    """
    faults: list[str] = []
    proved: dict[object, str | None] = {}
    for key, instances in world.instances.items():
        specs = {layout.by_key[key].spec for by in instances.values() for layout in (world.layouts[i] for i in by)}
        if len(specs) > 1:
            faults.append(f"{key}: ranks hold it as {sorted(map(str, specs))}")
            continue
        question = (world.specs[key].shape, tuple(instances.items()))
        if question not in proved:
            proved[question] = _key_fault(world, key)
        if fault := proved[question]:
            faults.append(f"{key}: {fault}")
    return faults


def _key_fault(world: World, key: str) -> str | None:
    box = whole(world.specs[key].shape)
    for sharding, layouts in world.instances[key].items():
        if isinstance(sharding, OnMesh):
            missing = set(sharding.mesh.ranks) - set(world.ranks_holding(layouts))
            if missing:
                return f"its mesh names ranks {sorted(missing)[:8]}, which do not hold it so"
    return cover_fault(box, (piece.box for group in held(world, key, box) for piece in group.pieces))


# Ownership "even-bytes/1": the pieces that exactly the same R ranks hold, in order of key, are laid end to end;
# the i-th of these ranks writes the i-th of R equal runs of bytes, borders moved to whole rows.
# What is not a parameter is written by the lowest of its ranks.


def owned_by(world: World, rank: int) -> list[Owned]:
    """What `rank` writes, ordered by key. Linear in what this rank holds."""
    found: list[Owned] = []
    for ranks, items in _groups_of(world, rank).items():
        found.extend(_share(world, ranks, items)[ranks.index(rank)])
    for entry in world.layout(rank).entries:
        if entry.key in world.unshared:
            for pieces, ranks in _own_groups(world, entry, rank):
                if ranks[0] == rank:
                    found.extend(Owned(entry.key, piece.box, piece.at) for piece in pieces)
    return sorted(found, key=lambda owned: (owned.key, owned.box))


def writers(world: World, key: str, box: Slice) -> list[int]:
    """The ranks that wrote the elements of `box`, by the ownership rule."""
    found: set[int] = set()
    for group in held(world, key, box):
        if key in world.unshared or len(group.ranks) == 1:
            found.add(group.ranks[0])
            continue
        shares = _share(world, group.ranks, _groups_of(world, group.ranks[0])[group.ranks])
        for rank, share in zip(group.ranks, shares, strict=True):
            if any(owned.key == key and owned.box.intersect(box) for owned in share):
                found.add(rank)
    return sorted(found)


_Item = tuple[str, Piece, int]  # key, piece, bytes of an element


def _groups_of(world: World, rank: int) -> dict[tuple[int, ...], list[_Item]]:
    """The shared pieces that `rank` holds, by the exact set of ranks that hold them, in order of key."""
    memo = world._memo
    if ("groups", rank) not in memo:
        groups: dict[tuple[int, ...], list[_Item]] = {}
        for entry in world.layout(rank).entries:
            if entry.key not in world.unshared:
                for pieces, ranks in _own_groups(world, entry, rank):
                    items = groups.setdefault(ranks, [])
                    items.extend((entry.key, piece, ITEMSIZE[entry.spec.dtype]) for piece in pieces)
        memo["groups", rank] = groups
    return memo["groups", rank]  # type: ignore[return-value]


def _own_groups(world: World, entry: Entry, rank: int) -> Iterator[tuple[tuple[Piece, ...], tuple[int, ...]]]:
    mine = pieces_of(entry.sharding, entry.spec.shape, rank)
    if not mine:
        return
    instances = world.instances[entry.key]
    if len(instances) == 1:
        yield mine, _ranks_alike(world, entry.sharding, instances[entry.sharding], rank)
        return
    for group in held(world, entry.key, mine[0].box):
        if group.pieces == mine:
            yield group.pieces, group.ranks


def _ranks_alike(world: World, sharding: Sharding, layouts: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return replica_ranks(sharding, rank) if isinstance(sharding, OnMesh) else world.ranks_holding(layouts)


def _share(world: World, ranks: tuple[int, ...], items: list[_Item]) -> tuple[list[Owned], ...]:
    memo = world._memo
    if ("share", ranks) not in memo:
        memo["share", ranks] = _even_bytes(items, len(ranks))
    return memo["share", ranks]  # type: ignore[return-value]


def _even_bytes(items: list[_Item], writers: int) -> tuple[list[Owned], ...]:
    total = sum(piece.box.numel * itemsize for _, piece, itemsize in items)
    shares: tuple[list[Owned], ...] = tuple([] for _ in range(writers))
    start = 0
    for key, piece, itemsize in items:
        nbytes = piece.box.numel * itemsize
        cut_dim, rows = _rows(piece.box, nbytes)
        first, last = start * writers // total, (start + nbytes) * writers // total
        for i in range(max(0, first - 1), min(writers, last + 2)):
            low, high = (_border(total * edge // writers - start, nbytes, rows) for edge in (i, i + 1))
            if low < high:
                shares[i].append(_rows_of(key, piece, cut_dim, rows, low, high))
        start += nbytes
    return shares


def _rows(box: Slice, nbytes: int) -> tuple[int, int]:
    """Dimension along which a piece may be cut, and into how many rows; one row where it stays whole."""
    if nbytes <= _ATOM_BYTES:
        return 0, 1
    dim = next((d for d, n in enumerate(box.shape) if n > 1), 0)
    return dim, box.shape[dim]


def _border(byte: int, nbytes: int, rows: int) -> int:
    return min(max((2 * byte * rows + nbytes) // (2 * nbytes), 0), rows)


def _rows_of(key: str, piece: Piece, dim: int, rows: int, start: int, stop: int) -> Owned:
    if stop - start == rows:
        return Owned(key, piece.box, piece.at)
    move = tuple(start if d == dim else 0 for d in range(len(piece.box.shape)))
    shape = tuple(stop - start if d == dim else n for d, n in enumerate(piece.box.shape))
    box = Slice(tuple(o + m for o, m in zip(piece.box.offset, move, strict=True)), shape)
    return Owned(key, box, tuple(a + m for a, m in zip(piece.at, move, strict=True)))
