"""The fence: no step of an optimizer begins while a copy reads what it writes, however the step is written."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from states import model
from torch import nn

from ckpt.adapt import Fence, Versions, collect_state
from ckpt.adapt.fence import is_fenced

MAKERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "for-loop": lambda p: torch.optim.AdamW(p, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=2),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


def stepped(optimizer: torch.optim.Optimizer, net: nn.Module) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(3, 4)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_waits_for_the_copy(name: str) -> None:
    """The wait sees every parameter and all optimizer state as they were."""
    net = model(0)
    optimizer = MAKERS[name](list(net.parameters()))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer) if name != "lbfgs" else None
    stepped(optimizer, net)
    before, seen = [p.detach().clone() for p in net.parameters()], list[bool]()

    def wait() -> None:
        seen.append(all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)))

    fence = Fence()
    fence.guard([optimizer], wait)
    stepped(optimizer, net)
    assert seen == [True]
    assert not all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    stepped(optimizer, net)
    assert seen == [True]  # once
    fence.guard([optimizer], wait)
    fence.close()
    stepped(optimizer, net)
    assert seen == [True]
    assert scheduler is None or is_fenced(optimizer)


def test_a_compiled_step_waits_each_time_it_has_to() -> None:
    """The compiler leaves the hook as it is: it neither runs it while it traces nor takes its answer for all steps."""
    net = model(0)
    optimizer, fence, waited = torch.optim.AdamW(net.parameters()), Fence(), list[int]()
    stepped(optimizer, net)
    compiled = torch.compile(optimizer.step, backend="eager")
    for save in range(3):
        fence.guard([optimizer], lambda save=save: waited.append(save))
        compiled()
        compiled()
    assert waited == [0, 1, 2]


def test_two_saves_without_a_step_are_both_waited_for() -> None:
    net = model(0)
    optimizer, seen, fence = MAKERS["sgd"](list(net.parameters())), list[int](), Fence()
    for number in range(12):
        fence.guard([optimizer], lambda number=number: seen.append(number))  # type: ignore[misc]
    assert seen == [0, 1, 2, 3]  # a bounded number is kept
    stepped(optimizer, net)
    assert seen == list(range(12))


def test_copies_and_pickles_of_a_guarded_optimizer_do_not_wait() -> None:
    net = model(0)
    optimizer, fence = MAKERS["sgd"](list(net.parameters())), Fence()
    never = threading.Event()
    fence.guard([optimizer], lambda: pytest.fail("a copy waited") if not never.is_set() else None)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin.step()
    never.set()
    optimizer.step()


class ByHand(torch.optim.Optimizer):
    """A user's own optimizer."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(1)


class NotAnOptimizer:
    """Quacks like one, and has no hooks."""

    def __init__(self, parameters: Any) -> None:
        self.parameters = list(parameters)

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def keys(state: dict[str, Any]) -> frozenset[str]:
    return collect_state(state, 0, 1).overlappable()


def test_only_what_a_fenced_optimizer_writes_is_overlapped() -> None:
    net = model(0)
    net.register_buffer("count", torch.zeros(2))
    assert keys({"model": net, "t": torch.zeros(3)}) == frozenset()
    assert keys({"model": net, "optim": NotAnOptimizer(net.parameters())}) == frozenset()
    assert keys({"model": net, "optim": ByHand(net.parameters())}) == {f"model/{n}" for n, _ in net.named_parameters()}
    optimizer = torch.optim.AdamW([net[0].weight])
    net[0].weight.grad = torch.ones_like(net[0].weight)
    optimizer.step()
    overlapped = keys({"model": net, "optim": optimizer, "t": torch.zeros(3)})
    assert "model/0.weight" in overlapped
    assert "model/0.bias" not in overlapped  # no optimizer of the state writes it
    assert "model/count" not in overlapped
    assert any("exp_avg" in key for key in overlapped)


def test_a_captured_graph_is_not_overlapped() -> None:
    """Its replay calls no hooks."""
    net = model(0)
    optimizer = torch.optim.AdamW(net.parameters())
    optimizer.param_groups[0]["capturable"] = True
    assert not is_fenced(optimizer)
    assert keys({"model": net, "optim": optimizer}) == frozenset()


def test_a_storage_that_somebody_else_writes_too_is_not_overlapped() -> None:
    """A buffer that shares memory with a parameter changes without a step."""
    net = model(0)
    state = {"model": net, "optim": ByHand(net.parameters())}
    assert "model/0.weight" in keys(state)
    net.register_buffer("view", net[0].weight.detach()[:2])
    assert "model/0.weight" not in keys(state)


def test_version_counters_see_plain_writes_only() -> None:
    net = model(0)
    versions = Versions.of(dict(net.named_parameters()))
    assert versions.changed() == []
    with torch.no_grad():
        net[0].weight.add_(1)
    assert versions.changed() == ["0.weight"]
