"""One small model under every parallel layout: built, trained for real, and gathered whole for comparison.

The model has uneven sizes (13, 7, 30), LayerNorm, BatchNorm with its buffers, a frozen parameter and, where asked
for, an output layer tied to the embedding. It starts from the same values whatever the layout. Data depends on the
step and the data-parallel rank alone, so that losses can be compared bit by bit; dropout draws from torch's generator.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import ckpt

VOCABULARY, DIM, HIDDEN = 30, 13, 12  # torch's tensor parallelism wants HIDDEN to divide by 1, 2, 3 and 4
MESHES = {
    "fsdp_tp": {1: (1, 1), 2: (1, 2), 3: (3, 1), 4: (2, 2)},
    "fsdp_tp_wide": {2: (2, 1), 3: (1, 3), 4: (1, 4)},
    "hsdp": {2: (2, 1), 3: (1, 3), 4: (2, 2)},
}


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.scale = nn.Parameter(torch.rand(DIM) + 0.5, requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embed(tokens) * self.scale


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.up = nn.Linear(DIM, HIDDEN)
        self.down = nn.Linear(HIDDEN, DIM)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(DIM, 7)
        self.norm = nn.BatchNorm1d(7)
        self.widen = nn.Linear(7, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.widen(self.norm(self.narrow(x).flatten(0, 1)).unflatten(0, x.shape[:2]))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))


UNITS: tuple[Callable[[float], nn.Module], ...] = (
    lambda dropout: Embed(),
    Block,
    Block,
    lambda dropout: Mix(),
    Block,
    lambda dropout: Head(),
)


class Net(nn.Module):
    """Some or all of the layers, under their global names."""

    def __init__(self, seed: int, layers: Iterable[int], dropout: float, tied: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for index in layers:
            torch.manual_seed(100 * seed + index)
            self.layers[str(index)] = UNITS[index](dropout)
        if tied:
            tie(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def tie(net: Net) -> None:
    net.layers["5"].head.weight = net.layers["0"].embed.weight


@dataclass
class Training:
    """A model under some layout with its optimizer and scheduler, and how far it came."""

    kind: str
    model: nn.Module
    data_rank: int
    optim: torch.optim.Optimizer = field(init=False)
    sched: torch.optim.lr_scheduler.LRScheduler = field(init=False)
    state: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        named = dict(self.model.named_parameters())
        wide = [p for name, p in named.items() if name.endswith(("down.weight", "head.weight", "narrow.weight"))]
        rest = [p for p in named.values() if not any(p is q for q in wide)]
        groups = [{"params": wide, "weight_decay": 0.1}, {"params": rest, "lr": 0.02, "weight_decay": 0.0}]
        self.optim = torch.optim.AdamW(groups, lr=0.01)
        self.sched = torch.optim.lr_scheduler.MultiStepLR(self.optim, [1, 2, 5, 9], gamma=0.5)
        members = {"model": self.model, "optim": self.optim, "sched": self.sched}
        self.state = {**members, "extra": {"tokens": 0, "seen": {3, 4}}, "rng": ckpt.Rng()}

    def train(self, steps: int) -> list[str]:
        """The losses of so many optimizer steps, exactly; those of pipeline ranks that see none are "-"."""
        return [self.step() for _ in range(steps)]

    def step(self) -> str:
        generator = torch.Generator().manual_seed(1000 * self.state["extra"]["tokens"] + self.data_rank)
        batch, target = torch.randint(VOCABULARY, (2, 4, 5), generator=generator)
        self.state["extra"]["tokens"] += batch.numel()
        self.optim.zero_grad()
        loss = _piped_step(self.model, batch, target) if self.kind == "pipeline" else _step(self.model, batch, target)
        self.optim.step()
        self.sched.step()
        return loss

    def begin_again(self) -> None:
        """As after a restart: DDP sums gradients in another order from its second step on, so it is made anew."""
        if isinstance(self.model, DistributedDataParallel):
            self.model = self.state["model"] = DistributedDataParallel(self.model.module)


def _loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.flatten(0, 1), target.flatten())


def _step(model: nn.Module, batch: torch.Tensor, target: torch.Tensor) -> str:
    loss = _loss(model(batch), target)
    loss.backward()
    return loss.item().hex()


def _piped_step(stage: nn.Module, batch: torch.Tensor, target: torch.Tensor) -> str:
    """Activations go forward from rank to rank, gradients come back."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    x = batch
    if rank:
        x = torch.empty(*batch.shape, DIM)
        dist.recv(x, rank - 1)
        x.requires_grad_()
    out = stage(x)
    if rank == last:
        loss = _loss(out, target)
        loss.backward()
    else:
        dist.send(out.detach(), rank + 1)
        gradient = torch.empty_like(out)
        dist.recv(gradient, rank + 1)
        out.backward(gradient)
    if rank:
        dist.send(x.grad, rank - 1)
    return loss.item().hex() if rank == last else "-"


def build(kind: str, rank: int, world: int, *, seed: int, tied: bool = True, dropout: float | None = None) -> Training:
    """The model under layout `kind` on this rank; afterwards the generators of every rank are seeded apart."""
    tensor_parallel = kind.startswith(("tp", "fsdp_tp"))
    net = Net(seed, _layers(kind, rank, world), 0.0 if tensor_parallel else 0.1, tied and kind != "pipeline")
    training = Training(kind, *_laid_out(kind, net, rank, world, tied))
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(10 * seed + rank)
    return training


def _layers(kind: str, rank: int, world: int) -> range:
    if kind != "pipeline":
        return range(len(UNITS))
    return range(len(UNITS) * rank // world, len(UNITS) * (rank + 1) // world)


def _laid_out(kind: str, net: Net, rank: int, world: int, tied: bool) -> tuple[nn.Module, int]:
    """The wrapped model, and the number of the data this rank trains on."""
    if kind in ("plain", "pipeline"):
        return net, 0
    if kind == "ddp":
        return DistributedDataParallel(net), rank
    if kind == "fsdp1":
        mesh = init_device_mesh("cpu", (world,))
        return FullyShardedDataParallel(
            net, device_mesh=mesh, device_id=torch.device("cpu"), use_orig_params=True
        ), rank
    if kind == "fsdp2":
        return _shard(net, init_device_mesh("cpu", (world,))), rank
    if kind == "hsdp":
        return _shard(net, init_device_mesh("cpu", MESHES[kind][world], mesh_dim_names=("replicate", "shard"))), rank
    if kind == "tp":
        return _split(net, init_device_mesh("cpu", (world,)), tied), 0
    mesh = init_device_mesh("cpu", MESHES[kind][world], mesh_dim_names=("dp", "tp"))
    return _shard(_split(net, mesh["tp"], tied), mesh["dp"]), mesh.get_local_rank("dp")


def _split(net: Net, mesh: DeviceMesh, tied: bool) -> Net:
    plan: dict[str, Any] = {
        "layers.0.embed": RowwiseParallel(input_layouts=Replicate()),
        "layers.5.head": ColwiseParallel(output_layouts=Replicate()),
    }
    for layer in ("1", "2", "4"):
        plan |= {f"layers.{layer}.up": ColwiseParallel(), f"layers.{layer}.down": RowwiseParallel()}
    parallelize_module(net, mesh, plan)
    if tied:
        tie(net)
    return net


def _shard(net: Net, mesh: DeviceMesh) -> Net:
    for layer in ("1", "2", "3", "4"):  # the rest stays together in the root: the embedding may be tied
        fully_shard(net.layers[layer], mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


Full = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Tensors by name: dtype, shape, bytes."""


def full_state(model: nn.Module, optim: torch.optim.Optimizer) -> Full:
    """Every tensor of model and optimizer whole, under names that no layout changes. Collective."""
    if isinstance(model, FullyShardedDataParallel):
        return _full_state_fsdp1(model, optim)
    found = {f"model/{_plain(name)}": whole(value) for name, value in model.state_dict().items()}
    names = {id(parameter): _plain(name) for name, parameter in model.named_parameters()}
    for parameter, entries in optim.state.items():
        for entry, value in entries.items():
            found[f"optim/{names[id(parameter)]}/{entry}"] = whole(value)
    return found


def _full_state_fsdp1(model: FullyShardedDataParallel, optim: torch.optim.Optimizer) -> Full:
    """Flat local pieces laid end to end: FSDP1's own full optimizer state mixes its entries up on CPU (torch 2.13)."""
    mine: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        mine[f"model/{_plain(name)}"] = parameter.detach()
        for entry, value in optim.state.get(parameter, {}).items():
            mine[f"optim/{_plain(name)}/{entry}"] = value
    everyone: list[dict[str, torch.Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    shapes = {name: value.shape for name, value in Net(0, range(len(UNITS)), 0.0, True).state_dict().items()}
    found = {f"model/{_plain(name)}": whole(value) for name, value in model.named_buffers()}
    for name in dict.fromkeys(name for pieces in everyone for name in pieces):
        pieces = [pieces[name] for pieces in everyone if name in pieces]
        full = torch.cat(pieces).reshape(shapes[name.split("/")[1]]) if pieces[0].dim() else pieces[0]
        found[name] = whole(full)
    found["model/layers.5.head.weight"] = found["model/layers.0.embed.weight"]
    return found


def _plain(name: str) -> str:
    return name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")


def whole(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    full = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().contiguous()
    return str(full.dtype), tuple(full.shape), full.reshape(-1).view(torch.uint8).numpy().tobytes()


def draws() -> tuple[float, float, float]:
    """The next numbers of every generator of this process."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def assert_same_state(saved: list[dict[str, Any]], restored: list[dict[str, Any]]) -> None:
    """Every rank holds what was saved, bit by bit; of saved copies that differ (buffers) the lowest rank's counts."""
    expected: dict[str, Any] = {}
    for found in saved:
        expected = found | expected
    assert set().union(*restored) == set(expected)
    wrong = {(rank, n) for rank, found in enumerate(restored) for n, tensor in found.items() if tensor != expected[n]}
    assert not wrong
