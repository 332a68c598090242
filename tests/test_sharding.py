"""Who holds which elements. The oracle is torch itself: an arange, split by torch's own placements."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from jobs import Pool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from ckpt.adapt.tensors import local_of
from ckpt.sharding import (
    ITEMSIZE,
    Declared,
    Held,
    Mesh,
    OnMesh,
    Piece,
    Placement,
    Replicate,
    Sharding,
    Split,
    TensorSpec,
    Whole,
    all_holders,
    grid_of,
    holders,
    pieces_of,
    replica_ranks,
)
from ckpt.slices import Slice, cover_fault, whole


def filled(pieces: Sequence[Piece], shape: tuple[int, ...]) -> np.ndarray:
    """The local tensor of an arange of `shape` that these pieces say a rank holds."""
    index = np.arange(prod(shape)).reshape(shape)
    local_shape = tuple(max((p.at[d] + p.box.shape[d] for p in pieces), default=0) for d in range(len(shape)))
    local = np.full(local_shape, -1)
    for piece in pieces:
        into = tuple(slice(a, a + n) for a, n in zip(piece.at, piece.box.shape, strict=True))
        assert (local[into] == -1).all(), "two pieces share local elements"
        local[into] = index[tuple(slice(piece.box.offset[d], piece.box.stop(d)) for d in range(len(shape)))]
    return local


def torch_local(shape: tuple[int, ...], sharding: OnMesh, rank: int) -> np.ndarray:
    """What torch gives to `rank`: its own splitting, applied from left to right."""
    local = torch.arange(prod(shape)).reshape(shape)
    coordinate = sharding.mesh.coordinate(rank)
    for placement, size, at in zip(sharding.placements, sharding.mesh.shape, coordinate, strict=True):
        if isinstance(placement, Split):
            kind = (
                _StridedShard(placement.dim, split_factor=placement.split_factor)
                if placement.split_factor > 1
                else TorchShard(placement.dim)
            )
            local = kind._split_tensor(local, size, with_padding=False)[0][at]
    return local.numpy()


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    ranks = list(range(prod(shape)))
    if draw(st.booleans()):
        ranks = [3 * rank + 1 for rank in draw(st.permutations(ranks))]
    return Mesh(shape, tuple(ranks))


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], OnMesh]:
    """A shape, and a sharding of it: uneven, empty, nested, strided, replicated."""
    shape = tuple(draw(st.lists(st.integers(0, 13), min_size=1, max_size=3)))
    mesh = draw(meshes())
    split = st.builds(Split, st.integers(0, len(shape) - 1), st.sampled_from([1, 1, 1, 2, 3]))
    placements = tuple(draw(st.one_of(st.just(Replicate()), split)) for _ in mesh.shape)
    return shape, OnMesh(mesh, placements)


FSDP_TP = (Split(0, 2), Split(0))


@given(cases())
@example(((8, 8), OnMesh(Mesh((2, 2), (0, 1, 2, 3)), FSDP_TP)))
@example(((6,), OnMesh(Mesh((2,), (0, 1)), (Split(0, 3),))))
def test_a_rank_holds_what_torch_gives_it(case: tuple[tuple[int, ...], OnMesh]) -> None:
    shape, sharding = case
    for rank in sharding.mesh.ranks:
        expected = torch_local(shape, sharding, rank)
        pieces = pieces_of(sharding, shape, rank)
        assert all(piece.box.numel for piece in pieces)
        if expected.size:
            np.testing.assert_array_equal(filled(pieces, shape), expected)
        else:
            assert pieces == ()


def brute_groups(shape: tuple[int, ...], sharding: OnMesh, box: Slice) -> dict[tuple[Piece, ...], tuple[int, ...]]:
    groups: dict[tuple[Piece, ...], list[int]] = {}
    for rank in sorted(sharding.mesh.ranks):
        pieces = pieces_of(sharding, shape, rank)
        if any(piece.box.intersect(box) for piece in pieces):
            groups.setdefault(pieces, []).append(rank)
    return {pieces: tuple(ranks) for pieces, ranks in groups.items()}


@given(cases(), st.data())
def test_holders_are_found_by_arithmetic_as_by_looking_at_every_rank(
    case: tuple[tuple[int, ...], OnMesh], data: st.DataObject
) -> None:
    shape, sharding = case
    start = tuple(data.draw(st.integers(0, n)) for n in shape)
    box = Slice(start, tuple(data.draw(st.integers(0, n - o)) for o, n in zip(start, shape, strict=True)))
    found = list(holders(sharding, shape, box))
    assert {held.pieces: held.ranks for held in found} == brute_groups(shape, sharding, box)
    assert len({held.pieces for held in found}) == len(found)


@given(cases())
def test_replicas_are_the_ranks_with_the_same_coordinates_in_every_split(case: tuple[tuple[int, ...], OnMesh]) -> None:
    _, sharding = case
    splits = [isinstance(p, Split) for p in sharding.placements]

    def split_coordinate(rank: int) -> list[int]:
        return [c for c, split in zip(sharding.mesh.coordinate(rank), splits, strict=True) if split]

    for rank in sharding.mesh.ranks:
        alike = [r for r in sharding.mesh.ranks if split_coordinate(r) == split_coordinate(rank)]
        assert replica_ranks(sharding, rank) == tuple(sorted(alike))


@given(cases())
def test_the_pieces_of_one_grid_tile_the_tensor(case: tuple[tuple[int, ...], OnMesh]) -> None:
    """What `grid_of` promises, and what the symbolic cover proof rests on."""
    shape, sharding = case
    groups = list(all_holders(sharding, shape))
    assert cover_fault(whole(shape), (piece.box for held in groups for piece in held.pieces)) is None
    held_by = sorted(rank for held in groups for rank in held.ranks)
    assert held_by == sorted(r for r in sharding.mesh.ranks if pieces_of(sharding, shape, r))


@given(cases(), st.data())
def test_equal_grids_give_equal_pieces(case: tuple[tuple[int, ...], OnMesh], data: st.DataObject) -> None:
    shape, sharding = case
    index = data.draw(st.integers(0, len(sharding.placements)))
    sizes, placements = list(sharding.mesh.shape), list(sharding.placements)
    size, placement = data.draw(st.sampled_from([(3, Replicate()), (1, Split(0)), (1, Split(0, 2))]))
    sizes.insert(index, size)
    placements.insert(index, placement)
    other = OnMesh(Mesh(tuple(sizes), tuple(range(prod(sizes)))), tuple(placements))
    assert grid_of(other, len(shape)) == grid_of(sharding, len(shape))
    assert {held.pieces for held in all_holders(other, shape)} == {held.pieces for held in all_holders(sharding, shape)}


def test_whole_declared_and_scalar_tensors() -> None:
    assert pieces_of(Whole(), (2, 3), 7) == (Piece(whole((2, 3)), (0, 0)),)
    assert pieces_of(Whole(), (), 0) == (Piece(whole(()), ()),)
    assert pieces_of(Whole(), (2, 0), 0) == ()
    box = Slice((1, 2), (1, 1))
    assert pieces_of(Declared(box), (4, 4), 3) == (Piece(box, (0, 0)),)
    assert pieces_of(Declared(Slice((1, 2), (0, 1))), (4, 4), 3) == ()
    replicated = OnMesh(Mesh((2,), (0, 1)), (Replicate(),))
    assert pieces_of(replicated, (), 1) == (Piece(whole(()), ()),)
    assert list(holders(replicated, (), whole(()))) == [Held((Piece(whole(()), ()),), (0, 1))]


def test_a_mesh_knows_its_ranks() -> None:
    mesh = Mesh((2, 3), (5, 4, 3, 2, 1, 0))
    assert [mesh.rank_at(mesh.coordinate(rank)) for rank in range(6)] == list(range(6))
    assert mesh == Mesh((2, 3), (5, 4, 3, 2, 1, 0))
    assert mesh != Mesh((3, 2), (5, 4, 3, 2, 1, 0))
    assert mesh != "mesh"
    assert len({mesh, Mesh((2, 3), (5, 4, 3, 2, 1, 0))}) == 1
    with pytest.raises(ValueError, match="rank 6 is not in the mesh"):
        mesh.coordinate(6)


@pytest.mark.parametrize(("shape", "ranks"), [((2,), (0,)), ((2,), (1, 1)), ((-1, -1), (0,)), ((0,), ()), ((0, 2), ())])
def test_a_mesh_is_valid_once_constructed(shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a mesh of shape"):
        Mesh(shape, ranks)


def test_item_sizes_are_those_of_torch() -> None:
    assert {name: getattr(torch, name).itemsize for name in ITEMSIZE} == ITEMSIZE
    assert TensorSpec("bfloat16", (3, 5)).nbytes == 30
    assert TensorSpec("bool", ()).nbytes == 1


def test_one_shard_among_many_ranks_is_found_without_a_look_at_them() -> None:
    """FSDP2 x TP on 2**20 ranks: the strided dimension too is found by arithmetic."""
    mesh = Mesh((1 << 17, 8), tuple(range(1 << 20)))
    sharding = OnMesh(mesh, (Split(0, 8), Split(0)))
    shape = (1 << 23, 4)
    box = pieces_of(sharding, shape, 123_457)[0].box
    found = list(holders(sharding, shape, box))
    assert [held.ranks for held in found] == [(123_457,)]


# Real ranks


def _distribute(rank: int, world: int, cases: list[tuple[tuple[int, ...], tuple[int, ...], list[Any]]]) -> list[Any]:
    found = []
    for shape, mesh_shape, placements in cases:
        mesh = init_device_mesh("cpu", mesh_shape)
        tensor = distribute_tensor(torch.arange(prod(shape)).reshape(shape), mesh, placements)
        found.append((local_of("t", tensor, "tensor").sharding, tensor.to_local().numpy()))
    return found


REAL: list[tuple[tuple[int, ...], tuple[int, ...], list[Any]]] = [
    ((10, 3), (4,), [TorchShard(0)]),
    ((3, 5), (4,), [TorchShard(0)]),
    ((5, 6), (4,), [TorchShard(1)]),
    ((7, 3), (2, 2), [TorchShard(0), TorchShard(0)]),
    ((7, 5), (2, 2), [TorchShard(0), TorchShard(1)]),
    ((7, 5), (2, 2), [TorchReplicate(), TorchShard(1)]),
    ((9,), (2, 2), [TorchShard(0), TorchReplicate()]),
    ((0, 4), (4,), [TorchShard(1)]),
]


def test_real_ranks_hold_what_is_predicted(pool: Pool) -> None:
    answers = pool.results(_distribute, 4, REAL)
    for case, (shape, _, _) in enumerate(REAL):
        for rank, answer in enumerate(answers):
            sharding, local = answer[case]
            _check_local(sharding, shape, rank, local)


def _check_local(sharding: Sharding, shape: tuple[int, ...], rank: int, local: np.ndarray) -> None:
    pieces = pieces_of(sharding, shape, rank)
    if local.size:
        np.testing.assert_array_equal(filled(pieces, shape), local)
    else:
        assert pieces == ()


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 11), nn.Linear(11, 6), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(self.up(x)))


def _number(net: nn.Module) -> None:
    """Each parameter becomes an arange of its whole shape."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape))


def _two_dimensional(rank: int, world: int) -> dict[str, tuple[Sharding, tuple[int, ...], np.ndarray]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    net = _Net()
    _number(net)
    parallelize_module(net, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(net, mesh=mesh["data"])
    found = {}
    for name, parameter in net.named_parameters():
        assert isinstance(parameter, DTensor)
        sharding = local_of(name, parameter, "parameter").sharding
        found[name] = sharding, tuple(parameter.shape), parameter.to_local().detach().long().numpy()
    return found


def test_fsdp2_with_tensor_parallelism_on_real_ranks(pool: Pool) -> None:
    answers = pool.results(_two_dimensional, 4)
    seen: list[tuple[Placement, ...]] = []
    for rank, answer in enumerate(answers):
        assert len(answer) == 6
        for sharding, shape, local in answer.values():
            _check_local(sharding, shape, rank, local)
            if isinstance(sharding, OnMesh):
                seen.append(sharding.placements)
    assert (Split(0, 2), Split(0)) in seen, "a strided shard was to be among them"
    for name, (sharding, shape, _) in answers[0].items():
        held = [pieces_of(answer[name][0], shape, rank) for rank, answer in enumerate(answers)]
        boxes = {piece.box for pieces in held for piece in pieces}
        assert cover_fault(whole(shape), boxes) is None, (name, sharding)


def _strided(rank: int, world: int, shapes: list[tuple[int, ...]]) -> list[tuple[Sharding, np.ndarray]]:
    """Strided shards of several boxes, which FSDP2 alone does not make; torch splits each by its own code."""
    mesh = init_device_mesh("cpu", (4,))
    found = []
    for shape, factor in product(shapes, (2, 3)):
        whole_tensor = torch.arange(prod(shape)).reshape(shape)
        placement = _StridedShard(0, split_factor=factor)
        local = placement._split_tensor(whole_tensor, 4, with_padding=False)[0][rank]
        tensor = DTensor.from_local(
            local, mesh, [placement], run_check=False, shape=whole_tensor.shape, stride=whole_tensor.stride()
        )
        found.append((local_of("t", tensor, "tensor").sharding, tensor.to_local().numpy()))
    return found


def test_strided_shards_of_several_boxes_on_real_ranks(pool: Pool) -> None:
    shapes: list[tuple[int, ...]] = [(24, 2), (17,), (5, 3)]
    several = 0
    for rank, answer in enumerate(pool.results(_strided, 4, shapes)):
        for (shape, _), (sharding, local) in zip(product(shapes, (2, 3)), answer, strict=True):
            _check_local(sharding, shape, rank, local)
            several += len(pieces_of(sharding, shape, rank)) > 1
    assert several
