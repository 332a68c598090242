"""Optimizers: every kind goes on bit for bit, by the names of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from states import bits, model, round_trip, train
from torch import nn
from torch.optim import Optimizer

import ckpt
from ckpt import Incompatible

Make = Callable[..., Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-2, foreach=False),
    "adamw-foreach": partial(torch.optim.AdamW, lr=1e-2, foreach=True),
    "adamw-fused": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "adam-amsgrad": partial(torch.optim.Adam, lr=1e-2, amsgrad=True),
    "nadam": partial(torch.optim.NAdam, lr=1e-2),
    "radam": partial(torch.optim.RAdam, lr=1e-2),
    "adamax": partial(torch.optim.Adamax, lr=1e-2),
    "adadelta": torch.optim.Adadelta,
    "adagrad": partial(torch.optim.Adagrad, lr=1e-2),
    "adagrad-fused": partial(torch.optim.Adagrad, lr=1e-2, fused=True),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-2),
    "asgd": partial(torch.optim.ASGD, lr=1e-2),
    "rprop": torch.optim.Rprop,
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-2, momentum=0.9, centered=True),
    "sgd": partial(torch.optim.SGD, lr=1e-2),
    "sgd-momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "lbfgs": partial(torch.optim.LBFGS, lr=0.5, max_iter=3, history_size=4),
}


@pytest.mark.parametrize("steps_before", [0, 2], ids=["fresh-target", "used-target"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_goes_on_bit_for_bit(tmp_path: Path, name: str, steps_before: int) -> None:
    make = OPTIMIZERS[name]
    net, other = model(0), model(1)
    optimizer, restored = make(net.parameters()), make(other.parameters())
    train(net, optimizer, 3)
    train(other, restored, steps_before, skip=50)

    round_trip(tmp_path, {"model": net, "optim": optimizer}, {"model": other, "optim": restored})

    assert bits(other.state_dict()) == bits(net.state_dict())
    assert bits(_sorted_state(restored)) == bits(_sorted_state(optimizer))
    assert train(other, restored, 10, skip=3) == train(net, optimizer, 10, skip=3)
    assert bits(other.state_dict()) == bits(net.state_dict())


def _sorted_state(optimizer: Optimizer) -> object:
    found = optimizer.state_dict()
    groups = [dict(sorted(group.items())) for group in found["param_groups"]]
    return {key: dict(sorted(entries.items())) for key, entries in sorted(found["state"].items())}, groups


def _entries(optimizer: Optimizer, parameter: torch.Tensor) -> object:
    return bits(dict(sorted(optimizer.state[parameter].items())))


def test_state_that_is_there_is_filled_in_place(tmp_path: Path) -> None:
    net, other = model(0), model(1)
    optimizer, restored = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (net, other))
    train(net, optimizer, 3)
    train(other, restored, 1)
    before = [entry for state in restored.state.values() for entry in state.values()]
    round_trip(tmp_path, {"model": net, "optim": optimizer}, {"model": other, "optim": restored})
    after = [entry for state in restored.state.values() for entry in state.values()]
    assert sorted(map(id, before)) == sorted(map(id, after))


def test_lbfgs_with_a_history_of_large_tensors(tmp_path: Path) -> None:
    net, other = model(0, width=300), model(1, width=300)  # more elements than a value keeps inline
    make = OPTIMIZERS["lbfgs"]
    optimizer, restored = make(net.parameters()), make(other.parameters())
    train(net, optimizer, 3)
    round_trip(tmp_path, {"model": net, "optim": optimizer}, {"model": other, "optim": restored})
    assert any("/old_dirs/" in key for key in ckpt.load(tmp_path))
    assert train(other, restored, 5, skip=3) == train(net, optimizer, 5, skip=3)


def test_groups_keep_all_hyperparameters(tmp_path: Path) -> None:
    """pytorch/pytorch#143828: groups lose their lr or betas."""

    def build(seed: int, scale: float) -> tuple[nn.Module, Optimizer]:
        net = model(seed)
        groups = [
            {"params": list(net[0].parameters()), "lr": 0.1 * scale, "betas": (0.8, 0.9), "name": "first", "depth": 1},
            {"params": list(net[1].parameters()), "lr": 0.2 * scale, "weight_decay": 0.0, "tags": ("norm", {3})},
            {"params": list(net[3].parameters()), "lr": 0.3 * scale, "eps": 1e-6},
        ]
        return net, torch.optim.AdamW(groups, lr=scale)

    (net, optimizer), (other, restored) = build(0, 1.0), build(1, 5.0)
    optimizer.param_groups[2]["added_later"] = None
    restored.param_groups[0]["not_in_the_checkpoint"] = 1
    train(net, optimizer, 2)
    round_trip(tmp_path, {"model": net, "optim": optimizer}, {"model": other, "optim": restored})
    assert _sorted_state(restored)[1] == _sorted_state(optimizer)[1]
    assert restored.param_groups[0]["betas"] == (0.8, 0.9)
    assert restored.param_groups[1]["tags"] == ("norm", {3})
    assert train(other, restored, 10, skip=2) == train(net, optimizer, 10, skip=2)


def test_groups_may_be_reordered(tmp_path: Path) -> None:
    net, other = model(0), model(1)
    a, b = ({"params": list(net[i].parameters()), "lr": lr} for i, lr in ((0, 0.1), (3, 0.2)))
    optimizer = torch.optim.SGD([a, b], momentum=0.9)
    turned = [{"params": list(other[i].parameters()), "lr": 9.0} for i in (3, 0)]
    restored = torch.optim.SGD(turned, momentum=0.9)
    train(net, optimizer, 2)
    round_trip(tmp_path, {"model": net, "optim": optimizer}, {"model": other, "optim": restored})
    assert [group["lr"] for group in restored.param_groups] == [0.2, 0.1]
    assert train(other, restored, 5, skip=2) == train(net, optimizer, 5, skip=2)


def _two_groups(net: nn.Module, lrs: tuple[float, float]) -> Optimizer:
    groups = [{"params": list(net[i].parameters()), "lr": lr} for i, lr in zip((0, 3), lrs, strict=True)]
    return torch.optim.SGD(groups, momentum=0.9)


def test_groups_of_equal_hyperparameters_may_be_joined(tmp_path: Path) -> None:
    net, other = model(0), model(1)
    optimizer = _two_groups(net, (0.1, 0.1))
    restored = torch.optim.SGD([*other[0].parameters(), *other[3].parameters()], lr=9.0)
    train(net, optimizer, 2)
    round_trip(tmp_path, {"model": net, "optim": optimizer}, {"model": other, "optim": restored})
    assert train(other, restored, 5, skip=2) == train(net, optimizer, 5, skip=2)


def test_groups_of_other_hyperparameters_are_not_joined(tmp_path: Path) -> None:
    net, other = model(0), model(1)
    optimizer = _two_groups(net, (0.1, 0.2))
    restored = torch.optim.SGD([*other[0].parameters(), *other[3].parameters()], lr=9.0)
    train(net, optimizer, 2)
    before = bits([other.state_dict(), restored.state_dict()])
    with pytest.raises(Incompatible, match=r"optim: group 0 .*groups \[0, 1\] of other hyperparameters") as caught:
        round_trip(tmp_path, {"model": net, "optim": optimizer}, {"model": other, "optim": restored})
    assert "Nothing was touched" in str(caught.value)
    assert bits([other.state_dict(), restored.state_dict()]) == before


def test_frozen_unused_and_outside_parameters(tmp_path: Path) -> None:
    def build(seed: int) -> tuple[nn.Module, nn.Parameter, Optimizer]:
        net = model(seed)
        net.unused = nn.Linear(2, 2)
        net[0].weight.requires_grad_(False)
        outside = nn.Parameter(torch.randn(3) + seed)
        return net, outside, torch.optim.AdamW([*net.parameters(), outside], lr=1e-2)

    def run(net: nn.Module, outside: nn.Parameter, optimizer: Optimizer, steps: int, skip: int = 0) -> list[float]:
        head = nn.Module()
        head.forward = lambda x: net[3](net[:3](x)) * outside
        return train(head, optimizer, steps, skip)

    (net, outside, optimizer), (other, outer, restored) = build(0), build(1)
    run(net, outside, optimizer, 3)
    frozen, unused = net[0].weight, net.unused.weight
    assert frozen not in optimizer.state
    assert unused not in optimizer.state
    state, target = (
        {"model": m, "outside": p, "optim": o} for m, p, o in ((net, outside, optimizer), (other, outer, restored))
    )
    round_trip(tmp_path, state, target)
    assert other[0].weight not in restored.state
    assert bits(_sorted_state(restored)) == bits(_sorted_state(optimizer))
    assert not other[0].weight.requires_grad
    assert run(other, outer, restored, 10, 3) == run(net, outside, optimizer, 10, 3)


def test_parameters_that_no_member_holds_go_by_their_place(tmp_path: Path) -> None:
    outside, outer = nn.Parameter(torch.randn(3)), nn.Parameter(torch.zeros(3))
    optimizer, restored = torch.optim.AdamW([outside], lr=1e-2), torch.optim.AdamW([outer], lr=1e-1)
    outside.square().sum().backward()
    optimizer.step()
    round_trip(tmp_path, {"optim": optimizer}, {"optim": restored})
    assert bits(_sorted_state(restored)) == bits(_sorted_state(optimizer))


def test_state_that_the_checkpoint_lacks_is_dropped(tmp_path: Path) -> None:
    net, other = model(0), model(1)
    optimizer, restored = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (net, other))
    train(other, restored, 2)
    round_trip(tmp_path, {"model": net, "optim": optimizer}, {"model": other, "optim": restored})
    assert not any(restored.state.values())
    assert train(other, restored, 5) == train(net, optimizer, 5)


def test_a_parameter_new_to_the_state_keeps_its_optimizer_state(tmp_path: Path) -> None:
    net, other = model(0), model(1)
    other.added = nn.Linear(3, 3)
    optimizer, restored = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (net, other))
    train(net, optimizer, 2)
    train(nn.Sequential(*other[:4], other.added), restored, 1)
    before = _entries(restored, other.added.weight)
    round_trip(tmp_path, {"model": net, "optim": optimizer}, {"model": other, "optim": restored}, strict=False)
    assert _entries(restored, other.added.weight) == before
    assert _entries(restored, other[0].weight) == _entries(optimizer, net[0].weight)


def test_one_optimizer_over_two_modules(tmp_path: Path) -> None:
    def build(seed: int) -> tuple[nn.Module, nn.Module, Optimizer]:
        body, head = model(seed), nn.Linear(3, 3)
        return body, head, torch.optim.AdamW([*head.parameters(), *body.parameters()], lr=1e-2)

    (body, head, optimizer), (body2, head2, restored) = build(0), build(1)
    train(nn.Sequential(body, head), optimizer, 2)
    saved = {"a": {"body": body}, "head": head, "optim": optimizer}
    round_trip(tmp_path, saved, {"a": {"body": body2}, "head": head2, "optim": restored})
    both = (nn.Sequential(body2, head2), restored), (nn.Sequential(body, head), optimizer)
    assert train(*both[0], 10, skip=2) == train(*both[1], 10, skip=2)


def test_no_hook_fires_and_nothing_steps(tmp_path: Path) -> None:
    net, other = model(0), model(1)
    optimizer, restored = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (net, other))
    train(net, optimizer, 1)
    fired: list[str] = []
    restored.register_step_pre_hook(lambda *_: fired.append("step"))
    restored.register_state_dict_pre_hook(lambda *_: fired.append("state_dict"))
    round_trip(tmp_path, {"model": net, "optim": optimizer}, {"model": other, "optim": restored})
    assert fired == []


def test_the_choice_of_kernels_stays_the_target_s(tmp_path: Path) -> None:
    net, other = model(0), model(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.25), foreach=False)
    restored = torch.optim.AdamW(other.parameters(), lr=9.0, foreach=True)
    train(net, optimizer, 1)
    round_trip(tmp_path, {"model": net, "optim": optimizer}, {"model": other, "optim": restored})
    assert restored.param_groups[0]["foreach"] is True
    assert restored.param_groups[0]["lr"] == 0.25
    train(other, restored, 1)  # a tensor lr with foreach would be refused by torch


def test_a_tensor_lr_keeps_its_object(tmp_path: Path) -> None:
    net, other = model(0), model(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.25), foreach=False)
    restored = torch.optim.AdamW(other.parameters(), lr=torch.tensor(9.0), foreach=False)
    lr = restored.param_groups[0]["lr"]
    round_trip(tmp_path, {"model": net, "optim": optimizer}, {"model": other, "optim": restored})
    assert restored.param_groups[0]["lr"] is lr  # captured graphs hold it
    assert float(lr) == 0.25


def test_state_of_a_parameter_in_no_group_is_refused(tmp_path: Path) -> None:
    net = model(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.state["stray"] = {"x": 1}
    with pytest.raises(Incompatible, match="optim: optimizer state for 'stray', which is in none of its groups"):
        ckpt.Checkpointer(tmp_path).save(1, {"model": net, "optim": optimizer}, blocking=True)


class _Own(torch.optim.SGD):
    """An optimizer with state dicts of its own, which are taken as they are."""

    def state_dict(self) -> dict[str, object]:
        return {"inner": super().state_dict(), "note": ("kept", 1)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        assert state["note"] == ("kept", 1)
        super().load_state_dict(state["inner"])


def test_an_optimizer_with_its_own_state_dict(tmp_path: Path) -> None:
    net, other = model(0, width=300), model(1, width=300)
    optimizer, restored = (_Own(m.parameters(), lr=1e-2, momentum=0.9) for m in (net, other))
    train(net, optimizer, 2)
    round_trip(tmp_path, {"model": net, "optim": optimizer}, {"model": other, "optim": restored})
    assert train(other, restored, 5, skip=2) == train(net, optimizer, 5, skip=2)
