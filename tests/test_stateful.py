"""Objects with state dicts: schedulers, scalers, averages, loaders, random generators; and wrapped modules."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from states import Box, bits, keys, model, round_trip, stored_chunks, train
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import ckpt

# Schedulers


class _Decay:
    """A callable with state, which LambdaLR stores."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 0.9**epoch + self.calls / 1000


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "multistep": lambda o: lrs.MultiStepLR(o, milestones=[3, 3, 9, 14], gamma=0.5),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1, cooldown=1),
    "onecycle": lambda o: lrs.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=40),
    "sequential": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o), lrs.ExponentialLR(o, 0.9)], milestones=[7]),
    "lambda": lambda o: lrs.LambdaLR(o, [_Decay(), lambda epoch: 1 / (1 + epoch)]),
    "warm-restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=4, T_mult=2),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, T_max=12),
    "cyclic": lambda o: lrs.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=4, mode="exp_range", gamma=0.9),
    "polynomial": lambda o: lrs.PolynomialLR(o, total_iters=20, power=2),
    "chained": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o), lrs.StepLR(o, 3)], optimizer=o),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, [lambda e: 0.9, lambda e: 0.95]),
    "swa": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=7),
}


def _advance(scheduler: Any, optimizer: torch.optim.Optimizer, first: int, count: int) -> list[Any]:
    found = []
    for i in range(first, first + count):
        optimizer.step()
        scheduler.step(*([abs(math_wave(i))] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))
        found.append([(group["lr"], group.get("momentum")) for group in optimizer.param_groups])
    return found


def math_wave(i: int) -> float:
    return (7 * i % 5) / 3


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_alike(tmp_path: Path, name: str) -> None:
    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        net = model(seed)
        groups = [{"params": list(net[i].parameters()), "lr": 0.1 * (1 + seed) * (1 + i)} for i in (0, 3)]
        optimizer = torch.optim.SGD(groups, momentum=0.5)
        return net, optimizer, SCHEDULERS[name](optimizer)

    (net, optimizer, scheduler), (net2, optimizer2, scheduler2) = build(0), build(1)
    _advance(scheduler, optimizer, 0, 5)
    round_trip(
        tmp_path,
        {"model": net, "optim": optimizer, "sched": scheduler},
        {"model": net2, "optim": optimizer2, "sched": scheduler2},
    )
    expected = _advance(scheduler, optimizer, 5, 20)
    assert _advance(scheduler2, optimizer2, 5, 20) == expected
    assert len({repr(rates) for rates in expected}) > 1


def test_multistep_keeps_integer_keys(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(model(0).parameters(), lr=1.0)
    scheduler = lrs.MultiStepLR(optimizer, milestones=[2, 2, 5])
    target = Box()
    round_trip(tmp_path, {"s": scheduler}, {"s": target})
    assert target.value["milestones"] == Counter({2: 2, 5: 1})
    assert type(target.value["milestones"]) is Counter


def test_grad_scaler(tmp_path: Path) -> None:
    scaler, other = torch.amp.GradScaler("cpu", init_scale=8.0), torch.amp.GradScaler("cpu")
    net = model(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler.scale(net(torch.ones(2, 4)).sum()).backward()
    scaler.step(optimizer)
    scaler.update(16.0)
    round_trip(tmp_path, {"scaler": scaler}, {"scaler": other})
    assert other.state_dict() == scaler.state_dict()
    assert other.get_scale() == 16.0


def test_a_disabled_grad_scaler(tmp_path: Path) -> None:
    states = [{"s": torch.amp.GradScaler("cpu", enabled=False)} for _ in range(2)]
    round_trip(tmp_path, *states)


# Averages


def test_averaged_model(tmp_path: Path) -> None:
    def build(seed: int) -> tuple[nn.Module, AveragedModel, torch.optim.Optimizer]:
        net = model(seed)
        averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        return net, averaged, torch.optim.AdamW(net.parameters(), lr=1e-2)

    (net, ema, optimizer), (net2, ema2, optimizer2) = build(0), build(1)
    train(net, optimizer, 3, after=lambda: ema.update_parameters(net))
    saved, target = (
        {"model": m, "ema": e, "optim": o} for m, e, o in ((net, ema, optimizer), (net2, ema2, optimizer2))
    )
    round_trip(tmp_path, saved, target)
    assert bits(ema2.state_dict()) == bits(ema.state_dict())
    train(net, optimizer, 5, skip=3, after=lambda: ema.update_parameters(net))
    train(net2, optimizer2, 5, skip=3, after=lambda: ema2.update_parameters(net2))
    assert bits(ema2.state_dict()) == bits(ema.state_dict())


class Ema:
    """An average as many projects write it: a dict of tensors."""

    def __init__(self, net: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in net.named_parameters()}
        self.updates = 0

    def update(self, net: nn.Module) -> None:
        self.updates += 1
        for name, parameter in net.named_parameters():
            self.shadow[name].lerp_(parameter.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.updates = state["shadow"], state["updates"]


def test_an_average_of_one_s_own_is_stored_as_tensors(tmp_path: Path) -> None:
    net, other = model(0, width=300), model(1, width=300)
    ema, restored = Ema(net), Ema(other)
    ema.update(model(2, width=300))
    round_trip(tmp_path, {"ema": ema}, {"ema": restored})
    assert "ema/shadow/0.weight" in stored_chunks(tmp_path)
    assert bits(restored.state_dict()) == bits(ema.state_dict())
    whole = ckpt.load(tmp_path, keys=["ema"])
    assert bits(whole["ema/shadow/0.weight"]) == bits(ema.shadow["0.weight"])
    assert bits(whole["ema"]["shadow"]) == bits(ema.shadow)


# Each rank's own


class Loader:
    """A loader in the manner of torchdata's StatefulDataLoader."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        while True:
            self.at += 1
            yield self.at

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def test_loaders_belong_to_their_rank(tmp_path: Path) -> None:
    loader, other = Loader(), Loader()
    stream = iter(loader)
    [next(stream) for _ in range(5)]
    round_trip(tmp_path, {"loader": loader}, {"loader": other})
    assert next(iter(other)) == next(stream)
    assert keys(tmp_path) == set()  # `ckpt.load` gives what the ranks share


def test_per_rank_members(tmp_path: Path) -> None:
    net, other = model(0), model(1)

    def build(value: Any, box: Any, m: nn.Module, t: torch.Tensor) -> dict[str, Any]:
        kinds = {"value": value, "box": box, "module": m, "tensor": t}
        return {name: ckpt.PerRank(obj) for name, obj in kinds.items()}

    target = build(0, Box(), other, torch.zeros(2))
    round_trip(tmp_path, build((1, {2: 3}), Box([4]), net, torch.ones(2)), target)
    assert target["value"].obj == (1, {2: 3})
    assert target["box"].obj.value == [4]
    assert bits(other.state_dict()) == bits(net.state_dict())
    assert target["tensor"].obj.tolist() == [1.0, 1.0]
    assert {"tensor/#0of1", "module/#0of1/0.weight"} <= keys(tmp_path)


def _draw() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), *torch.randn(3).tolist()]


def test_random_sequences_go_on(tmp_path: Path) -> None:
    _draw()
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"rng": ckpt.Rng()}, blocking=True)
    expected = [_draw() for _ in range(3)]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    ckpt.restore(tmp_path, {"rng": ckpt.Rng()})
    assert [_draw() for _ in range(3)] == expected


class Disturber(Box):
    def load_state_dict(self, value: Any) -> None:
        super().load_state_dict(value)
        _draw()


@pytest.mark.parametrize("rng", [ckpt.Rng(), ckpt.PerRank(ckpt.Rng())], ids=["rng", "per-rank-rng"])
def test_random_state_is_restored_last(tmp_path: Path, rng: object) -> None:
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": rng, "z": Box(1)}, blocking=True)
    expected = _draw()
    ckpt.restore(tmp_path, {"a": rng, "z": Disturber()})
    assert _draw() == expected


def test_numpy_and_torch_generators_as_values(tmp_path: Path) -> None:
    class Generators(Box):
        def state_dict(self) -> Any:
            return {"np": self.value[0].bit_generator.state, "torch": self.value[1].get_state()}

        def load_state_dict(self, state: Any) -> None:
            self.value[0].bit_generator.state = state["np"]
            self.value[1].set_state(state["torch"])

    source, target = (Generators((np.random.default_rng(n), torch.Generator().manual_seed(n))) for n in (1, 2))
    source.value[0].normal(size=3)
    round_trip(tmp_path, {"g": source}, {"g": target})
    draws = [
        (g.value[0].normal(size=4).tolist(), torch.randn(3, generator=g.value[1]).tolist()) for g in (source, target)
    ]
    assert draws[0] == draws[1]


# Wrapped modules have the names of the bare one


class WithExtra(nn.Linear):
    extra: Any = None

    def get_extra_state(self) -> Any:
        return {"extra": self.extra}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state["extra"]


def bare(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Sequential(WithExtra(4, 6), nn.ReLU()), WithExtra(6, 3))
    net[0][0].extra, net[1].extra = seed, -seed
    return net


def _inside(net: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    net[0][0], net[1] = wrap(net[0][0]), wrap(net[1])
    return net


class DistributedDataParallel(nn.Module):
    """Named and built as torch's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": torch.compile,
    "ddp": DistributedDataParallel,
    "averaged": AveragedModel,
    "ddp of compiled": lambda net: DistributedDataParallel(torch.compile(net)),
    "compiled inside": lambda net: _inside(net, torch.compile),
    "checkpointed": checkpoint_wrapper,
    "checkpointed inside": lambda net: _inside(net, checkpoint_wrapper),
    "compiled checkpointed inside": lambda net: _inside(net, lambda m: torch.compile(checkpoint_wrapper(m))),
    "checkpointed compiled inside": lambda net: _inside(net, lambda m: checkpoint_wrapper(torch.compile(m))),
    "all": lambda net: DistributedDataParallel(checkpoint_wrapper(torch.compile(_inside(net, checkpoint_wrapper)))),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_leave_no_trace(tmp_path: Path, name: str) -> None:
    wrap = WRAPPED[name]
    net, plain, wrapped_inner = bare(1), bare(2), bare(3)
    wrapped = wrap(wrapped_inner)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (net, plain, wrapped)]
    train(net, optimizers[0], 2)
    lenient = {"strict": False} if name == "averaged" else {}  # it has a counter of its own

    round_trip(tmp_path / "a", {"m": net, "o": optimizers[0]}, {"m": wrapped, "o": optimizers[2]}, **lenient)
    assert bits(_values(wrapped)) == bits(_values(net))
    round_trip(tmp_path / "b", {"m": wrapped, "o": optimizers[2]}, {"m": plain, "o": optimizers[1]}, **lenient)
    assert keys(tmp_path / "b") - {"m/n_averaged"} == keys(tmp_path / "a")
    assert bits(plain.state_dict()) == bits(net.state_dict())
    assert train(plain, optimizers[1], 5, skip=2) == train(net, optimizers[0], 5, skip=2)


def _values(module: nn.Module) -> list[Any]:
    values = [value for value in module.state_dict().values() if not isinstance(value, torch.Tensor) or value.dim()]
    return copy.deepcopy(values)


def test_a_module_that_is_called_like_a_wrapper_s_attribute(tmp_path: Path) -> None:
    net = nn.Module()
    net.module = nn.Linear(2, 2)
    round_trip(tmp_path, {"m": DistributedDataParallel(net)}, {"m": net})
    assert keys(tmp_path) == {"m/module.weight", "m/module.bias"}


# Containers of values


def test_containers_are_filled_where_they_are(tmp_path: Path) -> None:
    def made(n: int) -> dict[str, Any]:
        return {"seen": n, "hist": Counter({n: n}), "list": [n, {"deep": n}], "array": np.full(3, n), "set": {n}}

    with ckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"stats": made(7), "top": [1, 2, 3]}, blocking=True)
    stats, top = made(0), [0]
    held = [stats["hist"], stats["list"], stats["list"][1], stats["array"], stats["set"]]
    state = {"stats": stats, "top": top}
    ckpt.restore(tmp_path, state)
    assert state["stats"] is stats
    assert repr(stats) == repr(made(7))
    assert top == [1, 2, 3]
    assert [id(item) for item in held] == [
        id(item) for item in (stats["hist"], stats["list"], stats["list"][1], stats["array"], stats["set"])
    ]
