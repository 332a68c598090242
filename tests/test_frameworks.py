"""Each framework: its example changes at most five lines, trains, dies by SIGKILL, and goes on to the same losses."""

from __future__ import annotations

import difflib
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Pool
from programs import EXAMPLES, committed, killed_and_resumed, killed_often, running

import ckpt

FRAMEWORKS = sorted(path.parent.name for path in EXAMPLES.glob("*/before.py"))


def _changes(name: str) -> list[str]:
    """What `after.py` has in place of lines of `before.py`, as `diff -u` prints it, around blank lines."""
    texts = ((EXAMPLES / name / file).read_text() for file in ("before.py", "after.py"))
    before, after = ([line.replace("before.py", "after.py") for line in t.splitlines() if line] for t in texts)
    return [line for line in difflib.unified_diff(before, after, n=0) if not line.startswith(("---", "+++", "@@"))]


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_example_changes_at_most_five_lines_and_the_page_shows_them(name: str) -> None:
    changes = _changes(name)
    assert 0 < sum(line.startswith("+") for line in changes) <= 5
    shown = (EXAMPLES.parent / "docs" / "frameworks.md").read_text().partition(f"(../examples/{name}/after.py)")[2]
    assert shown.partition("```diff\n")[2].partition("\n```")[0].splitlines() == changes


def test_a_plain_loop(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "plain")


def test_data_parallel_in_epochs(tmp_path: Path) -> None:
    killed_often(tmp_path, "ddp", random.randrange(1 << 32), kills=2, ranks=2)


@pytest.mark.prove
@pytest.mark.parametrize(("name", "ranks"), [("plain", 1), ("ddp", 2), ("transformers", 1)])
def test_ten_kills_at_random_steps(tmp_path: Path, name: str, ranks: int) -> None:
    killed_often(tmp_path, name, random.randrange(1 << 32), kills=10, ranks=ranks)


@pytest.mark.prove
def test_a_plain_loop_on_two_ranks(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "plain", ranks=2)


def test_accelerate(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "accelerate")  # 25 updates in an epoch of 49 batches


@pytest.mark.prove
def test_accelerate_on_two_ranks(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "accelerate", ranks=2, steps=195)  # 13 updates in an epoch of 25 batches


def test_epochs_refuses_what_it_could_not_go_on_with(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration
    from torch.utils.data import DataLoader

    from ckpt.integrations.accelerate import epochs

    def loader(batch: int, *, seedable: bool) -> Any:
        config = DataLoaderConfiguration(use_seedable_sampler=seedable)
        return Accelerator(cpu=True, dataloader_config=config).prepare(DataLoader(range(12), batch, shuffle=True))

    with ckpt.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ckpt.Incompatible, match="use_seedable_sampler=True"):
            next(epochs(checkpointer, loader(2, seedable=False), 1, {}))
        for _, batches in epochs(checkpointer, loader(2, seedable=True), 1, {}):
            assert len(list(batches)) == 6
        with pytest.raises(ckpt.Incompatible, match="an epoch had 6 steps when this run was saved, and has 4 now"):
            next(epochs(checkpointer, loader(3, seedable=True), 2, {}))
    with ckpt.Checkpointer(tmp_path / "other") as checkpointer:
        passes = epochs(checkpointer, loader(2, seedable=True), 2, {})
        _, batches = next(passes)
        assert [next(batches)[0], next(batches)[0]] == [0, 1]
        batches.close()  # as `break` in a loop over them
        with pytest.raises(ckpt.Incompatible, match="epoch 0 was left after 1 of 6 steps"):
            next(passes)


@pytest.mark.parametrize("framework", ["accelerate", "fabric"])
def test_what_a_framework_puts_around_an_object_leaves_no_trace(tmp_path: Path, framework: str) -> None:
    import lightning
    from accelerate import Accelerator

    def made(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        net = torch.nn.Linear(3, 2)
        return net, torch.optim.AdamW(net.parameters())

    prepare = {
        "accelerate": Accelerator(cpu=True).prepare,
        "fabric": lightning.Fabric(accelerator="cpu", devices=1).setup,
    }[framework]
    model, optimizer = prepare(*made(1))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model, "optim": optimizer}, blocking=True)
    plain, its_optimizer = made(2)
    ckpt.restore(tmp_path, {"model": plain, "optim": its_optimizer})
    assert torch.equal(plain.weight, model.weight)
    assert torch.equal(its_optimizer.state[plain.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert "optim/state/model/weight/exp_avg" in ckpt.load(tmp_path)


def test_the_trainer(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "transformers")  # 49 steps of two batches in an epoch


@pytest.mark.prove
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


@pytest.mark.prove
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


@pytest.mark.parametrize("name", [pytest.param("fabric", marks=pytest.mark.prove), "lightning"])
def test_lightning(tmp_path: Path, name: str) -> None:
    killed_and_resumed(tmp_path, name)


@pytest.mark.parametrize("name", ["lightning", pytest.param("transformers", marks=pytest.mark.prove)])
def test_sigterm_saves_and_stops(tmp_path: Path, name: str) -> None:
    url = tmp_path / "run"
    with running(EXAMPLES / name / "after.py", str(url), "250") as program:
        program.read(45)
        program.process.send_signal(signal.SIGTERM)
        steps = program.end()
    assert 45 <= committed(url) < 250
    assert max(steps) == committed(url)
