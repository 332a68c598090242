"""Each framework: its example changes at most five lines, trains, dies by SIGKILL, and goes on to the same losses."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Pool
from programs import EXAMPLES, killed_and_resumed

import ckpt

FRAMEWORKS = sorted(path.parent.name for path in EXAMPLES.glob("*/before.py"))


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_example_changes_at_most_five_lines(name: str) -> None:
    texts = ((EXAMPLES / name / file).read_text() for file in ("before.py", "after.py"))
    before, after = ([line.replace("before.py", "after.py") for line in t.splitlines() if line] for t in texts)
    spans = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    changed = [max(b - a, d - c) for kind, a, b, c, d in spans if kind != "equal"]
    assert 0 < sum(changed) <= 5


def test_a_plain_loop(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "plain")


def test_a_plain_loop_on_two_ranks(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "plain", ranks=2)


def test_accelerate(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "accelerate")  # 25 updates in an epoch of 49 batches


def test_accelerate_on_two_ranks(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "accelerate", ranks=2, steps=195)  # 13 updates in an epoch of 25 batches


def test_the_trainer(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "transformers")  # 49 steps of two batches in an epoch


def test_the_trainer_on_two_ranks(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "transformers", ranks=2)  # 25 steps in an epoch of 49 batches


def test_torchdata(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "torchdata")  # two worker processes, 49 steps in an epoch


def _stateful_loader(rank: int, world: int, url: str, save: bool) -> int | None:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    data = list(range(24))
    sampler = StatefulDistributedSampler(data, world, rank)
    state = {"loader": StatefulDataLoader(data, batch_size=2, sampler=sampler)}
    with ckpt.Checkpointer(url) as checkpointer:
        if save:
            next(iter(state["loader"]))
            checkpointer.save(1, state, blocking=True)
        return checkpointer.restore(state)


def test_a_loader_at_another_world_size(tmp_path: Path, pool: Pool) -> None:
    """Equal counts on all ranks are no place in the data that another number of ranks could go on from."""
    assert pool.results(_stateful_loader, 2, str(tmp_path), True) == [1, 1]
    (outcome,) = pool.run(_stateful_loader, 1, str(tmp_path), False)
    assert isinstance(outcome.error, ckpt.Incompatible)
    assert "a DataLoader, which counts what its own rank has taken" in str(outcome.error)
    assert "begin the epoch anew" in str(outcome.error)


def test_peft(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "peft")


def _lora(seed: int) -> tuple[Any, torch.optim.Optimizer, dict[str, torch.nn.Parameter]]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"]))
    adapters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return model, optimizer, adapters


def test_peft_saved_with_its_base_or_without(tmp_path: Path) -> None:
    (model, optimizer, adapters), inputs = _lora(1), torch.randn(3, 64)
    for name, state in {
        "whole": {"model": model, "optim": optimizer},
        "adapters": {"adapters": adapters, "optim": optimizer},
    }.items():
        with ckpt.Checkpointer(tmp_path / name) as checkpointer:
            checkpointer.save(1, state, blocking=True)
    assert any("base_layer" in key for key in ckpt.load(tmp_path / "whole"))
    assert not any("base_layer" in key for key in ckpt.load(tmp_path / "adapters"))

    other, other_optimizer, _ = _lora(2)
    ckpt.restore(tmp_path / "whole", {"model": other, "optim": other_optimizer})
    assert torch.equal(other(inputs), model(inputs))

    same, same_optimizer, same_adapters = _lora(1)
    for parameter in same_adapters.values():
        torch.nn.init.zeros_(parameter)
    ckpt.restore(tmp_path / "adapters", {"adapters": same_adapters, "optim": same_optimizer})
    assert torch.equal(same(inputs), model(inputs))
    for one, two in zip(adapters.values(), same_adapters.values(), strict=True):
        assert torch.equal(optimizer.state[one]["exp_avg"], same_optimizer.state[two]["exp_avg"])
