"""Tensors under placements that are hard to get right, each counted through so that every element is known.

The oracle is torch itself: an `arange` laid out by torch on the target's mesh must equal, local tensor by local
tensor, what was restored there.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import Pool
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ckpt

SHAPES = {"block": (5, 7, 3), "row": (3,), "thin": (1, 4), "tall": (9, 1), "even": (8, 4), "none": (0, 4), "one": ()}
PLACEMENTS: list[list[Any]] = [
    [Shard(0)],
    [Shard(1)],
    [Replicate(), Shard(0)],
    [Shard(0), Replicate()],
    [Shard(1), Shard(0)],
    [Shard(0), Shard(0)],
    [Shard(0), Shard(1), Shard(0)],
    [Shard(1), Shard(1), Replicate()],
    [Replicate(), Replicate(), Shard(0)],
    [Shard(0), Replicate(), Shard(0)],
]


def counted(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (1 + torch.arange(math.prod(shape), dtype=dtype)).reshape(shape)


def on_meshes(meshes: list[tuple[int, ...]], *, zero: bool) -> dict[str, torch.Tensor]:
    """Every shape under every placement that fits each mesh. `zero` keeps the layout and forgets the values."""
    found: dict[str, torch.Tensor] = {}
    made = {shape: init_device_mesh("cpu", shape) for shape in meshes}
    for name, shape in SHAPES.items():
        for p, placements in enumerate(PLACEMENTS):
            for mesh in made.values():
                if mesh.ndim == len(placements) and all(_has(item, shape) for item in placements):
                    value = distribute_tensor(counted(shape), mesh, placements, src_data_rank=None)
                    value = value if p % 2 else nn.Parameter(value)
                    found[f"{name}.{p}"] = torch.zeros_like(value) if zero else value
    return found


def _has(placement: Any, shape: tuple[int, ...]) -> bool:
    return not isinstance(placement, Shard) or placement.dim < len(shape)


def save_meshes(rank: int, world: int, url: str, meshes: list[tuple[int, ...]]) -> None:
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(1, {"t": on_meshes(meshes, zero=False)}, blocking=True)


def restore_meshes(rank: int, world: int, url: str, meshes: list[tuple[int, ...]], names: list[str]) -> int:
    """How many tensors came back as torch lays them out; any other raises."""
    expected, target = on_meshes(meshes, zero=False), on_meshes(meshes, zero=True)
    if world == 1:
        expected = {name: counted(SHAPES[name.split(".")[0]]) for name in names}
        target = {name: torch.zeros_like(value) for name, value in expected.items()}
    ckpt.restore(url, {"t": target}, only=[f"t/{name}" for name in target])
    for name, value in target.items():
        mine, oracle = (v._local_tensor if isinstance(v, DTensor) else v for v in (value, expected[name]))
        assert torch.equal(mine, oracle), (name, rank, mine, oracle)
    return len(target)


CUBES = [(4,), (2, 2), (2, 2, 1)]


@pytest.mark.parametrize("meshes", [CUBES, [(4,), (4, 1), (1, 2, 2)], [(4,), (1, 4), (2, 1, 2)]])
def test_meshes_of_up_to_three_dimensions(pool: Pool, tmp_path: Path, meshes: list[tuple[int, ...]]) -> None:
    pool.results(save_meshes, 4, str(tmp_path), meshes)
    loaded = {name.removeprefix("t/"): value for name, value in ckpt.load(tmp_path).items()}
    assert all(torch.equal(value, counted(SHAPES[name.split(".")[0]])) for name, value in loaded.items())
    bare = list(loaded)
    assert len(bare) >= 50
    for world, target in [(4, CUBES), (4, [(4,), (2, 2), (1, 2, 2)]), (3, [(3,), (3, 1), (1, 3, 1)]), (2, [(2,)])]:
        assert min(pool.results(restore_meshes, world, str(tmp_path), target, bare)) >= 10
    assert pool.results(restore_meshes, 1, str(tmp_path), [], bare) == [len(bare)]


# Strided shards: FSDP2 over a dimension that tensor parallelism has already split


class Pair(nn.Module):
    def __init__(self, hidden: int, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        for parameter in self.parameters():
            parameter.data = counted(tuple(parameter.shape))


def strided(mesh_shape: tuple[int, int], sizes: tuple[int, int], *, zero: bool) -> Pair:
    pair = Pair(*sizes)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "tp"))
    parallelize_module(pair, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(pair, mesh=mesh["dp"])
    if zero:
        with torch.no_grad():
            for parameter in pair.parameters():
                parameter._local_tensor.zero_()
    return pair


def save_strided(rank: int, world: int, url: str, mesh: tuple[int, int], sizes: tuple[int, int]) -> list[str]:
    pair = strided(mesh, sizes, zero=False)
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(1, {"m": pair}, blocking=True)
    return [str(parameter.placements) for parameter in pair.parameters()]


def restore_strided(rank: int, world: int, url: str, mesh: tuple[int, int], sizes: tuple[int, int]) -> None:
    expected, target = strided(mesh, sizes, zero=False), strided(mesh, sizes, zero=True)
    ckpt.restore(url, {"m": target})
    for (name, found), oracle in zip(target.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(found._local_tensor, oracle._local_tensor), (name, rank)


@pytest.mark.parametrize("sizes", [(8, 6), (12, 5)])
def test_strided_shards(pool: Pool, tmp_path: Path, sizes: tuple[int, int]) -> None:
    placements = pool.results(save_strided, 4, str(tmp_path), (2, 2), sizes)
    assert "_StridedShard" in placements[0][0]
    whole = ckpt.load(tmp_path)
    expected = {f"m/{name}": parameter.detach() for name, parameter in Pair(*sizes).named_parameters()}
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[name], value) for name, value in expected.items())
    for world, mesh in [(4, (2, 2)), (4, (1, 4)), (4, (4, 1)), (3, (3, 1)), (2, (1, 2)), (2, (2, 1))]:
        pool.results(restore_strided, world, str(tmp_path), mesh, sizes)


# Experts: plain local tensors that the user declares

EXPERTS = (5, 4, 3)


def entries(optim: torch.optim.Optimizer, parameter: torch.Tensor) -> list[torch.Tensor]:
    return [optim.state[parameter][name] for name in ("step", "exp_avg", "exp_avg_sq")]


def experts(first: int, count: int) -> tuple[dict[str, Any], nn.Parameter]:
    """Experts [first, first + count) after one AdamW step with known gradients; `count` may be 0."""
    weight = nn.Parameter(counted(EXPERTS)[first : first + count].clone())
    optim = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = weight.detach() * 0.01
    optim.step()
    return {"experts": {"weight": ckpt.Shard(weight, EXPERTS, (first, 0, 0))}, "optim": optim}, weight


def save_experts(rank: int, world: int, url: str, held: list[tuple[int, int]]) -> None:
    state, _ = experts(*held[rank])
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(1, state, blocking=True)


def restore_experts(rank: int, world: int, url: str, held: list[tuple[int, int]]) -> None:
    first, count = held[rank]
    state, weight = experts(first, count)
    oracle = [weight.detach().clone()] + [value.clone() for value in entries(state["optim"], weight)]
    with torch.no_grad():
        weight.zero_()
    fresh = {"experts": state["experts"], "optim": torch.optim.AdamW([weight], lr=0.5)}
    ckpt.restore(url, fresh)
    found = [weight.detach(), *entries(fresh["optim"], weight)]
    assert all(torch.equal(a, b) for a, b in zip(found, oracle, strict=True)), (rank, found, oracle)
    assert fresh["optim"].param_groups[0]["lr"] == 0.1


def test_experts_declared_by_each_rank(pool: Pool, tmp_path: Path) -> None:
    """Two data-parallel replicas of uneven expert groups, restored by other groups, by more, and as a whole."""
    pool.results(save_experts, 4, str(tmp_path), [(0, 3), (3, 2), (0, 3), (3, 2)])
    state, weight = experts(0, 5)
    loaded = ckpt.load(tmp_path)
    assert torch.equal(loaded["experts/weight"], weight.detach())
    for entry, value in state["optim"].state[weight].items():
        assert torch.equal(loaded[f"optim/state/experts/weight/{entry}"], value)
    pool.results(restore_experts, 3, str(tmp_path), [(0, 2), (2, 2), (4, 1)])
    pool.results(restore_experts, 4, str(tmp_path), [(0, 2), (2, 2), (4, 1), (0, 5)])
    target = nn.Parameter(torch.zeros(EXPERTS))
    optim = torch.optim.AdamW([target])
    ckpt.restore(tmp_path, {"experts": {"weight": target}, "optim": optim})
    assert torch.equal(target.detach(), weight.detach())
    assert torch.equal(optim.state[target]["exp_avg"], state["optim"].state[weight]["exp_avg"])


def test_a_whole_model_restores_into_experts(pool: Pool, tmp_path: Path) -> None:
    pool.results(save_experts, 1, str(tmp_path), [(0, 5)])
    pool.results(restore_experts, 3, str(tmp_path), [(0, 2), (2, 2), (4, 1)])


def save_bad_experts(rank: int, world: int, url: str, held: list[tuple[int, int]]) -> str:
    try:
        save_experts(rank, world, url, held)
    except ckpt.Incompatible as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("held", [[(0, 3), (2, 3)], [(0, 2), (3, 2)]])
def test_experts_that_overlap_or_leave_a_gap_are_refused(
    pool: Pool, tmp_path: Path, held: list[tuple[int, int]]
) -> None:
    said = pool.results(save_bad_experts, 2, str(tmp_path), held)
    assert all("experts/weight" in message for message in said)


# FSDP2 with fewer rows than ranks, with its optimizer; and offloaded to the CPU


def tiny(seed: int, *, offload: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
    for layer in model[:1]:
        fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), **policy)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optim = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(4, 3)).sum().backward()
    optim.step()
    return model, optim


def save_tiny(rank: int, world: int, url: str, offload: bool) -> list[Any]:
    model, optim = tiny(1, offload=offload)
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(1, {"m": model, "o": optim}, blocking=True)
    return _tensors(model, optim)


def restore_tiny(rank: int, world: int, url: str, offload: bool) -> list[Any]:
    model, optim = tiny(2, offload=offload)
    ckpt.restore(url, {"m": model, "o": optim})
    return _tensors(model, optim)


def _tensors(model: nn.Module, optim: torch.optim.Optimizer) -> list[Any]:
    values = [(p, *entries(optim, p)) for p in model.parameters()]
    return [v.full_tensor().tolist() if isinstance(v, DTensor) else v.tolist() for row in values for v in row]


@pytest.mark.parametrize("offload", [False, True])
def test_fewer_rows_than_ranks_and_offload(pool: Pool, tmp_path: Path, offload: bool) -> None:
    outcomes = pool.run(save_tiny, 4, str(tmp_path), offload)
    if offload and any(outcome.error for outcome in outcomes):
        pytest.skip(f"this torch cannot offload without a GPU: {outcomes[0].error}")
    saved = outcomes[0].result
    for world in (4, 3, 2):
        assert pool.results(restore_tiny, world, str(tmp_path), offload) == [saved] * world


# FSDP2 with parameters that a forward or backward pass left unsharded


def unsharded(seed: int, how: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """After it, `model.parameters()` are not those of the optimizer."""
    model, optim = tiny(seed)
    if how == "evaluated":
        with torch.no_grad():
            model(torch.ones(4, 3))
    else:
        model.set_reshard_after_backward(False)
        model(torch.ones(4, 3)).sum().backward()
    held = {id(parameter) for parameter in optim.param_groups[0]["params"]}
    assert any(id(parameter) not in held for parameter in model.parameters())
    return model, optim


def save_unsharded(rank: int, world: int, url: str, how: str) -> list[Any]:
    model, optim = unsharded(1, how)
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(1, {"m": model, "o": optim}, blocking=True)
    return _tensors_held(optim)


def restore_unsharded(rank: int, world: int, url: str, how: str) -> list[Any]:
    model, optim = tiny(2) if how == "fresh" else unsharded(2, how)
    ckpt.restore(url, {"m": model, "o": optim})
    return _tensors_held(optim)


def _tensors_held(optim: torch.optim.Optimizer) -> list[Any]:
    values = [(p, *entries(optim, p)) for p in optim.param_groups[0]["params"]]
    return [v.full_tensor().tolist() if isinstance(v, DTensor) else v.tolist() for row in values for v in row]


@pytest.mark.parametrize("how", ["evaluated", "not resharded"])
def test_unsharded_parameters_keep_their_names(pool: Pool, tmp_path: Path, how: str) -> None:
    saved = pool.results(save_unsharded, 2, str(tmp_path), how)
    assert {"o/state/m/0.weight/exp_avg", "o/state/m/1.weight/exp_avg"} <= ckpt.load(tmp_path).keys()
    for target in ("fresh", "evaluated", "not resharded"):
        assert pool.results(restore_unsharded, 2, str(tmp_path), target) == saved


# A mesh of some of the ranks


def save_on_one(rank: int, world: int, url: str) -> str:
    mesh = DeviceMesh("cpu", [0])
    tensor = DTensor.from_local(torch.ones(2), mesh, [Shard(0)])
    with ckpt.Checkpointer(url) as checkpointer:
        try:
            checkpointer.save(1, {"t": tensor}, blocking=True)
        except ckpt.Incompatible as error:
            checkpointer.save(1, {"t": tensor} if rank == 0 else {}, blocking=True)
            return str(error)
    return "saved"


def test_a_rank_outside_of_the_mesh_is_told(pool: Pool, tmp_path: Path) -> None:
    for said in pool.results(save_on_one, 2, str(tmp_path)):
        assert "t: rank 1 is not in the mesh of this DTensor (ranks [0]). Leave the key out" in said
    assert ckpt.load(tmp_path)["t"].tolist() == [1.0, 1.0]
