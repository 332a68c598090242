"""`elastic.batches` with real loaders, real process groups and real checkpoints: exact sums, exact resumes."""

from __future__ import annotations

import contextlib
import copy
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from jobs import Pool
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, IterableDataset

import ckpt
import elastic

SAMPLES, GLOBAL_BATCH = 23, 6  # the last batch of a pass has 5 samples


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Sample i is a function of i."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.sin(torch.arange(1.0, 6.0) * (index + 1))
        return x, x.sum().square()[None]


def batches(**more: Any) -> elastic.Batches:
    return elastic.batches(Points(), **({"global_batch": GLOBAL_BATCH, "seed": 3} | more))


def taken(data: elastic.Batches, steps: int) -> list[list[int]]:
    """The samples of each of the next `steps`, after a look at what was loaded for them."""
    found = []
    for _ in range(steps):
        micro = list(data.step())
        for batch in micro:
            expected = [Points()[i] for i in batch.indices]
            assert not expected or torch.equal(batch.data[0], torch.stack([x for x, _ in expected]))
        found.append([i for batch in micro for i in batch.indices])
    return found


# The cursor


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cursor_is_what_training_consumed(workers: int) -> None:
    """Whatever the loader has fetched, and whichever micro-batch training is at."""
    whole = taken(batches(), 9)
    loader = {"num_workers": workers, "prefetch_factor": 4} if workers else {}
    for at in (0, 3, 5):
        data = batches(micro_batch=2, **loader)
        assert taken(data, at) == whole[:at]
        assert data.done == at
        next(data.step())
        assert data.done == at, "a step that was begun is not done"
        again = batches(**loader)
        again.load_state_dict(copy.deepcopy(data.state_dict()))
        assert taken(again, 9 - at) == whole[at:]
        assert taken(data, 9 - at) == whole[at:], "a step that was left is begun again"


def test_each_pass_has_every_sample_once() -> None:
    data = batches()
    assert data.batches_per_pass == 4
    first, second = (list(chain(*taken(data, 4))) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(SAMPLES))
    assert first != second


def test_going_back_loads_again() -> None:
    data = batches(num_workers=1)
    state = data.state_dict()
    first = taken(data, 3)
    data.load_state_dict(state)
    assert taken(data, 3) == first


def test_a_step_that_was_overtaken_says_so() -> None:
    data = batches(micro_batch=2)
    begun = data.step()
    next(begun)
    taken(data, 1)
    with pytest.raises(RuntimeError, match="overtaken"):
        next(begun)
    assert data.done == 1


def test_the_loader_draws_nothing_from_the_generators_of_training() -> None:
    before = torch.get_rng_state()
    taken(batches(), 3)
    taken(batches(num_workers=1), 3)
    assert torch.equal(torch.get_rng_state(), before)


class Failing(Points):
    def __init__(self, bad: int) -> None:
        self.bad = bad

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.bad:
            raise OSError(f"sample {index} cannot be read")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_an_error_and_not_left_out(workers: int) -> None:
    whole = taken(batches(), 3)
    dataset = Failing(whole[1][2])
    data = elastic.batches(dataset, global_batch=GLOBAL_BATCH, seed=3, num_workers=workers)
    assert taken(data, 1) == whole[:1]
    with pytest.raises(OSError, match="cannot be read"):
        taken(data, 1)
    assert data.done == 1
    if not workers:  # where a loader died by an exception, its processes linger for 5 s
        dataset.bad = -1
        assert taken(data, 2) == whole[1:]


# Gradients


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1))


def wrapped(kind: str) -> nn.Module:
    net = model()
    if kind == "fsdp2":
        fully_shard(net[0])
        fully_shard(net)
        return net
    return DistributedDataParallel(net) if kind == "ddp" else net


def sync_at_last(net: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    if isinstance(net, DistributedDataParallel) and not last:
        return net.no_sync()
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def one_step(net: nn.Module, data: elastic.Batches) -> Tensor:
    """Add up the gradients of a step; the loss of the global batch, if averaged over the ranks."""
    total = torch.zeros(())
    for batch in data.step():
        x, y = batch.data
        with sync_at_last(net, batch.last):
            loss = F.mse_loss(net(x), y) * batch.weight
            loss.backward()
        total += loss.detach()
    return total


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(rank: int, world: int, kind: str, arguments: dict[str, Any], steps: int) -> list[tuple[Tensor, ...]]:
    """For each step: the loss of the global batch and the gradient of each parameter, the model as it began."""
    net, data, found = wrapped(kind), batches(**arguments), []
    for _ in range(steps):
        loss = one_step(net, data)
        if world > 1:
            dist.all_reduce(loss)
        found.append((loss / world, *(full(p.grad).clone() for p in net.parameters() if p.grad is not None)))
        net.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("world", "arguments"), [(4, {"micro_batch": 1}), (4, {"global_batch": 3}), (3, {})])
def test_uneven_shares_give_the_gradient_of_the_whole(
    pool: Pool, kind: str, world: int, arguments: dict[str, Any]
) -> None:
    """6 samples on 4 ranks, one at a time; 3 on 4, so that one has none; and 5 on 3 at the end of a pass."""
    alone = arguments | {"micro_batch": None}
    whole = gradients(0, 1, "plain", alone, 4)
    for found in pool.results(gradients, world, kind, arguments, 4):
        for mine, expected in zip(found, whole, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


# Checkpoints


def train(rank: int, world: int, url: str, total: int) -> tuple[list[tuple[int, list[int]]], list[Tensor]]:
    """[(step, samples of this rank)] of the steps that were made, and the parameters at the end."""
    net = wrapped("ddp" if world > 1 else "plain")
    optim = torch.optim.AdamW(net.parameters(), lr=1e-2)
    data = batches(num_workers=1)
    state, ledger = {"model": net, "optim": optim, "data": data}, []
    with ckpt.Checkpointer(url, every=ckpt.Every(steps=3)) as checkpointer:
        for step in checkpointer.steps(total, state):
            assert data.done == step
            for batch in data.step():
                ledger.append((step, list(batch.indices)))
                (F.mse_loss(net(batch.data[0]), batch.data[1]) * batch.weight).backward()
            optim.step()
            optim.zero_grad()
    return ledger, [p.detach().clone() for p in net.parameters()]


def test_resumed_in_mid_pass_at_other_world_sizes(pool: Pool, tmp_path: Path) -> None:
    whole, expected = train(0, 1, str(tmp_path / "whole"), 10)
    found: dict[int, list[int]] = {}
    for world, total in [(4, 2), (3, 5), (2, 10)]:
        results = pool.results(train, world, str(tmp_path / "resized"), total)
        for step, indices in chain(*(ledger for ledger, _ in results)):
            found.setdefault(step, []).extend(indices)
    assert found == dict(whole)
    for _, parameters in results:
        torch.testing.assert_close(parameters, expected, rtol=1e-5, atol=1e-6)


def test_the_loop_of_the_docs_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "elastic.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "batches(" in block]
    net = nn.Linear(5, 3)
    names = {"elastic": elastic, "F": F, "model": net, "optim": torch.optim.SGD(net.parameters()), "total": 7}
    names["dataset"] = [(x, int(y) % 3) for x, y in (Points()[i] for i in range(SAMPLES))]
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        exec(block.replace("num_workers=4", "num_workers=1"), names | {"checkpointer": checkpointer})
        assert checkpointer.all_steps() == [7]
    assert ckpt.load(tmp_path)["data"]["done"] == 7


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"global_batch": 7}, r"global_batch 6 \(here 7\)"),
        ({"seed": 4}, r"seed 3 \(here 4\)"),
        ({"drop_last": True}, r"drop_last False \(here True\)"),
    ],
)
def test_a_checkpoint_of_another_order_is_refused(tmp_path: Path, other: dict[str, Any], says: str) -> None:
    data, fresh = batches(), batches(**other)
    taken(data, 2)
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, {"n": 1, "data": data}, blocking=True)
        with pytest.raises(ckpt.Incompatible, match=says):
            checkpointer.restore({"n": 0, "data": fresh})
        assert checkpointer.restore({"n": 0, "data2": fresh}, strict=False) == 2, "as the message says"
    assert fresh.done == 0
    assert taken(fresh, 1) == taken(batches(**other), 1)


def test_a_dataset_that_grew_is_refused() -> None:
    shorter = elastic.batches([torch.zeros(1)] * 22, global_batch=GLOBAL_BATCH, seed=3)  # type: ignore[arg-type]
    with pytest.raises(ckpt.Incompatible, match=r"samples 23 \(here 22\)"):
        shorter.load_state_dict(batches().state_dict())


@pytest.mark.parametrize("state", [{}, {"done": -1}, {"done": True}, {"_num_yielded": 3}])
def test_what_is_no_cursor_is_refused(state: dict[str, Any]) -> None:
    data = batches()
    with pytest.raises(ckpt.Incompatible, match="not a state"):
        data.load_state_dict({**data.state_dict(), **state} if "done" in state else state)


# Misuse


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(9))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"shuffle": True}, "shuffle"),
        ({"batch_size": 4, "sampler": None}, "batch_size, sampler"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"global_batch": 0}, "global_batch"),
        ({"rank": 2}, "together"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
    ],
)
def test_arguments_that_cannot_be(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        batches(**more)


def test_a_stream_has_no_order() -> None:
    with pytest.raises(ckpt.Incompatible, match="__getitem__"):
        elastic.batches(Stream(), global_batch=4)


def test_ranks_that_do_not_know_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ckpt.Incompatible, match="init_process_group"):
        batches()
    assert taken(batches(rank=1, world=4), 1) == [taken(batches(rank=0, world=1), 1)[0][1:3]]
