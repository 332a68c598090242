"""Which rank holds what: one rank's Layout, and the World of all of them, deduplicated.

Owns replica groups and the ownership rule (who writes which bytes of what several ranks hold alike).
Everything here is computed from values that every rank has, so plans are never gathered.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

from ckpt.sharding import (
    ITEMSIZE,
    Declared,
    Held,
    Mesh,
    OnMesh,
    Piece,
    Sharding,
    TensorSpec,
    grid_of,
    holders,
    pieces_of,
    replica_ranks,
)
from ckpt.slices import Slice, cover_fault, whole

OWNERSHIP = "even-bytes/1"
"""Name of the ownership rule below. A reader that meets another name opens the parts of all holders."""

Role = Literal["parameter", "buffer", "tensor"]
"""Parameter (also its optimizer state): replicas stay equal, so several ranks may each write a part of it.
Buffer: replicas may differ, the lowest rank's counts. Tensor: replicas are equal, the lowest rank writes it."""

FAULTS_LIMIT, COMPARED_LIMIT = 100, 500_000
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
    """All that one rank holds: tensors by key (ascending), ties, and the names of its values, as collected."""

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

    def ranks_holding(self, layouts: tuple[int, ...]) -> tuple[int, ...]:
        """Ranks that have one of these layouts, ascending."""
        if layouts not in self._ranks_holding:
            ranks = tuple(sorted(rank for index in layouts for rank in self.ranks_of[index]))
            self._ranks_holding[layouts] = ranks
        return self._ranks_holding[layouts]

    @cached_property
    def _ranks_holding(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        return {}

    @cached_property
    def _groups(self) -> dict[int, dict[tuple[int, ...], _Group]]:
        return {}


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
    """Ways in which the ranks together do not hold each tensor exactly once, `FAULTS_LIMIT` at most; empty if they do.

    The proof is symbolic: each distinct combination of shardings and shape is checked once, whatever the
    number of tensors or of saves, and pieces are compared only where ranks declared them or grids differ: of meshes
    `COMPARED_LIMIT` in all, since a few bytes of a hostile world would name very many.
    """
    faults = _tie_faults(world)
    misfits: dict[tuple[Mesh, tuple[int, ...]], str | None] = {}
    proved: dict[object, str | None] = {}
    compared = 0
    for key, instances in world.instances.items():
        if len(faults) >= FAULTS_LIMIT:
            break
        specs = {layout.by_key[key].spec for by in instances.values() for layout in (world.layouts[i] for i in by)}
        if misfit := _mesh_misfit(world, instances, misfits):
            faults.append(f"{key}: {misfit}")
            continue
        if len(specs) > 1:
            faults.append(f"{key}: ranks hold it as {sorted(map(str, specs))}")
            continue
        question = (world.specs[key].shape, tuple(instances.items()))
        if question not in proved and _is_one_grid(world, key):
            proved[question] = None
        if question not in proved:
            compared += sum(len(sharding.mesh.ranks) for sharding in instances if isinstance(sharding, OnMesh))
            if compared > COMPARED_LIMIT:
                faults.append(f"{key}: too many pieces of meshes that are cut differently to be compared")
                break
            proved[question] = _cover_fault(world, key)
        if fault := proved[question]:
            faults.append(f"{key}: {fault}")
    return faults


def _tie_faults(world: World) -> list[str]:
    """Ties that not all ranks see alike: one of the tensors would not be stored."""
    found = {(alias, key) for layout in world.layouts for alias, key in layout.aliases}
    return [
        f"{alias}: some ranks hold it tied to {key}, others as another tensor"
        for alias, key in sorted(found)
        if alias in world.specs or world.aliases[alias] != key
    ]


def _mesh_misfit(
    world: World,
    instances: dict[Sharding, tuple[int, ...]],
    known: dict[tuple[Mesh, tuple[int, ...]], str | None],
) -> str | None:
    """Where the ranks of a mesh are not just the ranks that hold the tensor on it."""
    for sharding, layouts in instances.items():
        if isinstance(sharding, OnMesh):
            if (sharding.mesh, layouts) not in known:
                named, holding = set(sharding.mesh.ranks), set(world.ranks_holding(layouts))
                known[sharding.mesh, layouts] = (
                    f"its mesh names ranks {sorted(named - holding)[:8]}, which do not hold it so"
                    if named - holding
                    else f"ranks {sorted(holding - named)[:8]} hold it on a mesh that does not name them"
                    if holding - named
                    else None
                )
            if misfit := known[sharding.mesh, layouts]:
                return misfit
    return None


def _is_one_grid(world: World, key: str) -> bool:
    """Whether all ranks that hold the tensor cut it alike, on meshes: then nothing is to be compared."""
    dims = len(world.specs[key].shape)
    grids = {None if isinstance(s, Declared) else grid_of(s, dims) for s in world.instances[key]}
    return len(grids) == 1 and None not in grids


def _cover_fault(world: World, key: str) -> str | None:
    box = whole(world.specs[key].shape)
    return cover_fault(box, (piece.box for group in held(world, key, box) for piece in group.pieces))


# Ownership "even-bytes/1": the pieces that exactly the same R ranks hold, in order of key, are laid end to end;
# the i-th of these ranks writes the i-th of R equal runs of bytes, borders moved to whole rows.
# What is not a parameter is written by the lowest of its ranks.


def owned_by(world: World, rank: int) -> list[Owned]:
    """What `rank` writes, ordered by key. Linear in what this rank holds."""
    found: list[Owned] = []
    for ranks, group in _groups_of(world, rank).items():
        found.extend(group.share(ranks.index(rank)))
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
        else:
            shared = _groups_of(world, group.ranks[0])[group.ranks]
            found.update(group.ranks[i] for i in shared.writers(key, box))
    return sorted(found)


@dataclass(slots=True)
class _Item:
    """A piece in the line of a group's bytes, where it starts, and the rows into which it may be cut."""

    key: str
    piece: Piece
    start: int
    nbytes: int
    dim: int
    rows: int

    def row_at(self, byte: int) -> int:
        """The border between rows that is nearest to `byte` of the line."""
        nearest = (2 * (byte - self.start) * self.rows + self.nbytes) // (2 * self.nbytes)
        return min(max(nearest, 0), self.rows)

    def rows_meeting(self, box: Slice) -> tuple[int, int] | None:
        meet = self.piece.box.intersect(box)
        if meet is None:
            return None
        if self.rows == 1:
            return 0, 1
        first = meet.offset[self.dim] - self.piece.box.offset[self.dim]
        return first, first + meet.shape[self.dim]


@dataclass(slots=True)
class _Group:
    """The pieces that exactly these ranks hold, laid end to end in order of key."""

    ranks: tuple[int, ...]
    items: list[_Item] = field(default_factory=list)
    nbytes: int = 0
    _at: dict[str, list[int]] = field(default_factory=dict)

    def add(self, key: str, piece: Piece, itemsize: int) -> None:
        nbytes = piece.box.numel * itemsize
        self._at.setdefault(key, []).append(len(self.items))
        self.items.append(_Item(key, piece, self.nbytes, nbytes, *_rows(piece.box, nbytes)))
        self.nbytes += nbytes

    def _edge(self, writer: int) -> int:
        return self.nbytes * writer // len(self.ranks)

    def _row_at_edge(self, item: _Item, writer: int) -> int:
        return item.row_at(self._edge(writer))

    def share(self, writer: int) -> Iterator[Owned]:
        """What the writer at index `writer` writes."""
        low, high = self._edge(writer), self._edge(writer + 1)
        first = bisect_right(self.items, low, key=lambda item: item.start + item.nbytes)
        for item in self.items[first:]:
            if item.start >= high:
                return
            start, stop = self._row_at_edge(item, writer), self._row_at_edge(item, writer + 1)
            if start < stop:
                yield _rows_of(item, start, stop)

    def writers(self, key: str, box: Slice) -> Iterator[int]:
        """Indices of the writers of what `box` has in common with the pieces of `key`."""
        edges = range(len(self.ranks) + 1)
        for item in (self.items[i] for i in self._at.get(key, ())):
            if rows := item.rows_meeting(box):
                row, stop = rows
                while row < stop:
                    border = bisect_right(edges, row, key=partial(self._row_at_edge, item))
                    yield border - 1
                    row = self._row_at_edge(item, border)


def _groups_of(world: World, rank: int) -> dict[tuple[int, ...], _Group]:
    """The shared pieces that `rank` holds, by the exact set of ranks that hold them, in order of key."""
    if rank not in world._groups:
        world._groups[rank] = _make_groups(world, rank)
    return world._groups[rank]


def _make_groups(world: World, rank: int) -> dict[tuple[int, ...], _Group]:
    groups: dict[tuple[int, ...], _Group] = {}
    seen: dict[int, tuple[tuple[int, ...], _Group]] = {}  # by id: a tuple of 100,000 ranks is slow to hash
    for entry in world.layout(rank).entries:
        if entry.key in world.unshared:
            continue
        for pieces, ranks in _own_groups(world, entry, rank):
            if id(ranks) not in seen:
                seen[id(ranks)] = ranks, groups.setdefault(ranks, _Group(ranks))
            for piece in pieces:
                seen[id(ranks)][1].add(entry.key, piece, ITEMSIZE[entry.spec.dtype])
    return groups


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


def replicas(world: World, rank: int) -> Iterator[tuple[tuple[int, ...], str]]:
    """(ranks, key) of what `rank` holds like others by nothing but its name: to be compared, not believed.

    Left out are the replicas of a DTensor on one mesh, which torch made equal. Tensors of the same name on several
    meshes may be those of pipeline stages that know nothing of each other.
    """
    for entry in world.layout(rank).entries:
        if isinstance(entry.sharding, OnMesh) and len(world.instances[entry.key]) == 1:
            continue
        for _, ranks in _own_groups(world, entry, rank):
            if len(ranks) > 1:
                yield ranks, entry.key


def _ranks_alike(world: World, sharding: Sharding, layouts: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return replica_ranks(sharding, rank) if isinstance(sharding, OnMesh) else world.ranks_holding(layouts)


def _rows(box: Slice, nbytes: int) -> tuple[int, int]:
    """Dimension along which a piece may be cut, and into how many rows; one row where it stays whole."""
    if nbytes <= _ATOM_BYTES:
        return 0, 1
    dim = next((d for d, n in enumerate(box.shape) if n > 1), 0)
    return dim, box.shape[dim]


def _rows_of(item: _Item, start: int, stop: int) -> Owned:
    piece, dim = item.piece, item.dim
    if stop - start == item.rows:
        return Owned(item.key, piece.box, piece.at)
    move = tuple(start if d == dim else 0 for d in range(len(piece.box.shape)))
    shape = tuple(stop - start if d == dim else n for d, n in enumerate(piece.box.shape))
    box = Slice(tuple(o + m for o, m in zip(piece.box.offset, move, strict=True)), shape)
    return Owned(item.key, box, tuple(a + m for a, m in zip(piece.at, move, strict=True)))
