"""The symbolic part of a MANIFEST: layouts and worlds as plain values for msgpack, and back.

Meshes and shardings stand once in a list and are named by their numbers. Input is untrusted: every number is checked
before anything is made of it; what is wrong is a ValueError, KeyError, IndexError or TypeError, for the caller to name
the file.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Annotated

import msgspec

from ckpt.errors import Incompatible
from ckpt.layout import Entry, Layout, Role, World
from ckpt.sharding import ITEMSIZE, Declared, Mesh, OnMesh, Placement, Replicate, Sharding, Split, TensorSpec, Whole
from ckpt.slices import Slice

MAX_DIMS = 64
MAX_WORLD = 1 << 22
MAX_SPLIT_FACTOR = 256  # also of all placements of a sharding together: so many runs a rank may hold
MAX_BYTES = 1 << 62


class _Mesh(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    shape: tuple[int, ...]
    ranks: tuple[int, ...]


class _Sharding(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """{} is whole; mesh and placements a DTensor; offset and shape a declared box."""

    mesh: int | None = None
    placements: tuple[str, ...] | None = None
    offset: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None


class _Tensor(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    key: str
    dtype: str
    shape: tuple[int, ...]
    sharding: int
    role: Role


class _Layout(msgspec.Struct, forbid_unknown_fields=True):
    tensors: tuple[_Tensor, ...]
    aliases: tuple[tuple[str, str], ...]
    values: tuple[str, ...]
    rank_values: tuple[str, ...]


class WireWorld(msgspec.Struct, forbid_unknown_fields=True):
    meshes: tuple[_Mesh, ...]
    shardings: Annotated[tuple[_Sharding, ...], msgspec.Meta(max_length=MAX_WORLD)]
    layouts: tuple[_Layout, ...]
    layout_of: tuple[int, ...]


def encode_layout(layout: Layout) -> bytes:
    """One rank's layout as it travels to the other ranks; equal layouts give equal bytes."""
    return msgspec.msgpack.encode(world_to_wire(World((layout,), (0,))))


def decode_layout(data: bytes) -> Layout:
    return world_from_wire(msgspec.msgpack.decode(data, type=WireWorld), check_ranks=False).layouts[0]


def encode_world(world: World) -> bytes:
    """All layouts of a world and who has which, as they travel to a keeper."""
    return msgspec.msgpack.encode(world_to_wire(world))


def decode_world(data: bytes) -> World:
    return world_from_wire(msgspec.msgpack.decode(data, type=WireWorld))


def placement_code(placement: Placement) -> str:
    """R, S<dim>, or S<dim>/<split factor>. `Incompatible` if it is beyond the format."""
    match placement:
        case Replicate():
            return "R"
        case Split(dim, 1):
            return f"S{dim}"
        case Split(dim, factor):
            if factor > MAX_SPLIT_FACTOR:
                raise Incompatible(f"a strided shard of factor {factor}; the format's limit is {MAX_SPLIT_FACTOR}")
            return f"S{dim}/{factor}"


def _placement(code: str, dims: int) -> Placement:
    if code == "R":
        return Replicate()
    dim, _, factor = code[1:].partition("/")
    if len(code) > 32 or code[:1] != "S" or not dim.isdecimal() or (factor and not factor.isdecimal()):
        raise ValueError(f"unknown placement {code[:32]!r}")
    split = Split(int(dim), int(factor or 1))
    if split.dim >= dims or not 1 <= split.split_factor <= MAX_SPLIT_FACTOR or placement_code(split) != code:
        raise ValueError(f"placement {code!r} does not fit a tensor of {dims} dimensions")
    return split


def world_to_wire(world: World) -> WireWorld:
    meshes: dict[Mesh, int] = {}
    shardings: dict[Sharding, int] = {}
    for layout in world.layouts:
        for entry in layout.entries:
            if isinstance(entry.sharding, OnMesh):
                meshes.setdefault(entry.sharding.mesh, len(meshes))
            shardings.setdefault(entry.sharding, len(shardings))
    return WireWorld(
        meshes=tuple(_Mesh(mesh.shape, mesh.ranks) for mesh in meshes),
        shardings=tuple(_sharding_to_wire(sharding, meshes) for sharding in shardings),
        layouts=tuple(_layout_to_wire(layout, shardings) for layout in world.layouts),
        layout_of=world.layout_of,
    )


def _sharding_to_wire(sharding: Sharding, meshes: dict[Mesh, int]) -> _Sharding:
    match sharding:
        case Whole():
            return _Sharding()
        case Declared(box):
            return _Sharding(offset=box.offset, shape=box.shape)
        case OnMesh(mesh, placements):
            return _Sharding(mesh=meshes[mesh], placements=tuple(map(placement_code, placements)))


def _layout_to_wire(layout: Layout, shardings: dict[Sharding, int]) -> _Layout:
    tensors = tuple(
        _Tensor(entry.key, entry.spec.dtype, entry.spec.shape, shardings[entry.sharding], entry.role)
        for entry in layout.entries
    )
    return _Layout(tensors, layout.aliases, layout.values, layout.rank_values)


def world_from_wire(wire: WireWorld, *, check_ranks: bool = True) -> World:
    size = len(wire.layout_of)
    if not 0 < size <= MAX_WORLD or any(not 0 <= i < len(wire.layouts) for i in wire.layout_of):
        raise ValueError(f"a world of {size} ranks with {len(wire.layouts)} layouts")
    if len(set(wire.layout_of)) != len(wire.layouts):
        raise ValueError("a layout belongs to no rank")
    if any(len(mesh.shape) > MAX_DIMS for mesh in wire.meshes):
        raise ValueError(f"a mesh has more than {MAX_DIMS} dimensions")
    meshes = [_shared_mesh(Mesh(mesh.shape, mesh.ranks)) for mesh in wire.meshes]
    for mesh in meshes:
        if check_ranks and (min(mesh.ranks, default=-1) < 0 or max(mesh.ranks) >= size):
            raise ValueError(f"a mesh names ranks outside a world of {size}")
    return World(tuple(_layout_from_wire(wire, layout, meshes) for layout in wire.layouts), wire.layout_of)


@lru_cache(maxsize=256)
def _shared_mesh(mesh: Mesh) -> Mesh:
    """One object for equal meshes: to compare two of 100,000 ranks for every tensor takes long."""
    return mesh


def _layout_from_wire(wire: WireWorld, layout: _Layout, meshes: list[Mesh]) -> Layout:
    made: dict[tuple[int, int], Sharding] = {}
    entries: list[Entry] = []
    for tensor in layout.tensors:
        spec = spec_of(tensor.dtype, tensor.shape)
        which = (tensor.sharding, len(spec.shape))
        if which not in made:
            if tensor.sharding < 0:
                raise ValueError(f"{tensor.key}: sharding {tensor.sharding}")
            made[which] = _sharding(wire.shardings[tensor.sharding], meshes, len(spec.shape))
        sharding = made[which]
        if isinstance(sharding, Declared) and (
            len(sharding.box.shape) != len(spec.shape)
            or not sharding.box.within(Slice((0,) * len(spec.shape), spec.shape))
        ):
            raise ValueError(f"{tensor.key}: declared {sharding.box} reaches outside {spec.shape}")
        entries.append(Entry(tensor.key, spec, sharding, tensor.role))
    keys = [entry.key for entry in entries]
    if keys != sorted(set(keys)):
        raise ValueError("tensor keys are not distinct and ascending")
    known = set(keys)
    if any(key not in known or alias in known for alias, key in layout.aliases):
        raise ValueError("a tie names a tensor that is not there")
    for names in ([alias for alias, _ in layout.aliases], layout.values, layout.rank_values):
        if len(set(names)) != len(names):
            raise ValueError("two ties or two values have one name")
    return Layout(tuple(entries), layout.aliases, layout.values, layout.rank_values)


def _sharding(wire: _Sharding, meshes: list[Mesh], dims: int) -> Sharding:
    match wire:
        case _Sharding(mesh=None, placements=None, offset=None, shape=None):
            return Whole()
        case _Sharding(mesh=None, placements=None, offset=tuple(offset), shape=tuple(shape)):
            return Declared(Slice(offset, shape))
        case _Sharding(mesh=int(index), placements=tuple(codes), offset=None, shape=None):
            if not 0 <= index < len(meshes) or len(meshes[index].shape) != len(codes):
                raise ValueError(f"{len(codes)} placements on mesh {index}")
            placements = tuple(_placement(code, dims) for code in codes)
            runs = prod(placement.split_factor for placement in placements if isinstance(placement, Split))
            if runs > MAX_SPLIT_FACTOR:
                raise ValueError(f"a sharding of {runs} runs; the limit is {MAX_SPLIT_FACTOR}")
            return OnMesh(meshes[index], placements)
    raise ValueError("a sharding is whole, on a mesh, or declared; not a mixture")


def spec_of(dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    if dtype not in ITEMSIZE:
        raise ValueError(f"unknown dtype {dtype!r}")
    if len(shape) > MAX_DIMS:
        raise ValueError(f"a shape of {len(shape)} dimensions; the limit is {MAX_DIMS}")
    if any(not 0 <= n <= MAX_BYTES for n in shape) or prod(shape) > MAX_BYTES // 16:
        raise ValueError(f"shape {shape} is out of range")
    return TensorSpec(dtype, shape)
