"""A torch tensor as the values that plans are made of: spec, sharding, and the local memory behind it."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor.placement_types import Shard as TorchShard
from torch.distributed.tensor.placement_types import _StridedShard

from ckpt.adapt.values import dtype_name
from ckpt.adapt.wrappers import Shard
from ckpt.errors import Incompatible
from ckpt.layout import Role
from ckpt.sharding import Declared, Mesh, OnMesh, Placement, Replicate, Sharding, Split, TensorSpec, Whole, pieces_of
from ckpt.slices import Slice


@dataclass(frozen=True)
class Local:
    """One tensor of the state on this rank. `make` returns the local memory; it may allocate it only then."""

    key: str
    spec: TensorSpec
    sharding: Sharding
    role: Role
    make: Callable[[], torch.Tensor]
    identity: object  # equal for two names of one tensor
    owner: object = None  # kept alive, so that the identity stays its own


def local_of(key: str, tensor: torch.Tensor | Shard, role: Role) -> Local:
    """Describe `tensor`. `Incompatible` for what cannot be stored: Partial placements, meta, sparse, quantized."""
    outer = tensor.tensor if isinstance(tensor, Shard) else tensor
    inner = outer._local_tensor if isinstance(outer, DTensor) else outer
    spec = TensorSpec(_dtype(key, inner), tuple(tensor.global_shape if isinstance(tensor, Shard) else outer.shape))
    _refuse_unstorable(key, inner)
    sharding = _sharding(key, tensor, inner)
    identity: object = (
        inner.data_ptr() or id(outer),
        tuple(inner.shape),
        inner.stride(),
        inner.dtype,
        str(inner.device),
    )
    if isinstance(outer, DTensor):
        identity = (id(outer),)  # empty shards have no address, and ties must be seen alike on every rank
    return Local(key, spec, sharding, role, inner.detach, identity, outer)


def _dtype(key: str, tensor: torch.Tensor) -> str:
    try:
        return dtype_name(tensor.dtype)
    except Incompatible as error:
        raise Incompatible(f"{key}: {error}") from None


def _refuse_unstorable(key: str, tensor: torch.Tensor) -> None:
    if tensor.device.type == "meta":
        raise Incompatible(
            f"{key}: a meta tensor has no memory to save from or restore into. "
            "Call module.to_empty(device=...) first, then restore."
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise Incompatible(f"{key}: only dense tensors can be stored, not {tensor.layout}. Convert it first.")


def _sharding(key: str, tensor: torch.Tensor | Shard, inner: torch.Tensor) -> Sharding:
    if isinstance(tensor, Shard):
        if isinstance(tensor.tensor, DTensor):
            raise Incompatible(f"{key}: ckpt.Shard declares plain tensors; a DTensor carries its sharding itself.")
        return Declared(Slice(tensor.offset, tuple(inner.shape)))
    if not isinstance(tensor, DTensor):
        return Whole()
    mesh = tensor.device_mesh
    if mesh.get_coordinate() is None:
        raise Incompatible(
            f"{key}: rank {mesh.get_rank()} is not in the mesh of this DTensor (ranks {mesh.mesh.flatten().tolist()}). "
            "Leave the key out of the state on ranks outside of the mesh."
        )
    try:
        sharding, expected = _on_mesh(mesh, tensor.placements, tuple(tensor.shape))
    except Incompatible as error:
        raise Incompatible(f"{key}: {error}") from None
    if expected != inner.numel():
        raise Incompatible(
            f"{key}: {sharding.placements} of {tuple(tensor.shape)} gives this rank {expected} elements, "
            f"its local tensor has {inner.numel()}. Please report how this DTensor was made."
        )
    return sharding


@lru_cache(maxsize=4096)
def _on_mesh(mesh: Any, placements: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[OnMesh, int]:
    """The sharding, and how many elements it gives this rank."""
    sharding = OnMesh(_mesh(mesh), tuple(map(_placement, placements)))
    return sharding, sum(piece.box.numel for piece in pieces_of(sharding, shape, mesh.get_rank()))


_meshes: dict[int, tuple[weakref.ref[Any], Mesh]] = {}  # torch works out a mesh's ranks anew at each look


def _mesh(mesh: Any) -> Mesh:
    known = _meshes.get(id(mesh))
    if known is None or known[0]() is not mesh:
        ranks = mesh.mesh
        known = weakref.ref(mesh), _interned_mesh(tuple(ranks.shape), tuple(ranks.flatten().tolist()))
        _meshes[id(mesh)] = known
    return known[1]


@lru_cache(maxsize=64)
def _interned_mesh(shape: tuple[int, ...], ranks: tuple[int, ...]) -> Mesh:
    return Mesh(shape, ranks)


def _placement(placement: Any) -> Placement:
    if isinstance(placement, _StridedShard):
        return Split(placement.dim, int(placement.split_factor))
    if isinstance(placement, TorchShard):
        return Split(placement.dim)
    if isinstance(placement, TorchReplicate):
        return Replicate()
    if isinstance(placement, Partial):
        raise Incompatible(
            "a Partial placement is a sum that has not been taken yet. "
            "redistribute() it to Replicate or Shard before it is saved or restored."
        )
    raise Incompatible(f"unknown placement {placement!r}")


def empty_like(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Fresh memory of the same layout (a DTensor stays one), zero-filled."""
    with torch.no_grad():
        return torch.zeros_like(tensor, dtype=dtype, device=device, requires_grad=False)


def storage_of(tensor: torch.Tensor) -> tuple[torch.device, int]:
    """What two tensors that share memory have in common."""
    return tensor.device, tensor.untyped_storage().data_ptr()


def bytes_view(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a contiguous CPU tensor, without a copy. The view keeps the tensor's memory alive."""
    nbytes = tensor.numel() * tensor.element_size()
    if not nbytes:
        return memoryview(b"")
    memory = (ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")
