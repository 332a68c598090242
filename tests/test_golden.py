"""A checkpoint written by the first version, in the repository: every later version reads it, to the last bit.

`python tests/test_golden.py` makes it anew; do that only when the format's major version changes.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Pool, run_job
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ckpt
from ckpt.sharding import ITEMSIZE

GOLDEN = Path(__file__).parent / "golden" / "v1"
VALUE = {
    "numbers": [0, -1, 2**70, -(2**70), 0.1, float("inf"), complex(1, -2), True, None],
    "text": ("é\n", b"\x00\xff", bytearray(b"x")),
    "containers": [{1: "one", (2, 3): "pair"}, {"a", "b"}, frozenset({1}), Counter("aab"), OrderedDict(z=1, a=2)],
    "torch": [torch.float8_e4m3fn, torch.device("cuda:1"), torch.Size([2, 3])],
    "numpy": [np.arange(6, dtype=np.int16).reshape(2, 3), np.float32(0.5)],
}


def _all_dtypes() -> dict[str, torch.Tensor]:
    return {name: torch.arange(48, dtype=torch.uint8).view(getattr(torch, name)) for name in ITEMSIZE if name != "bool"}


def _state(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 5, bias=False))
    optim = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}])
    with torch.no_grad():
        for n, tensor in enumerate(model.state_dict().values()):
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 100 * n)
        for n, parameter in enumerate(p for group in optim.param_groups for p in group["params"]):
            moments = {
                name: torch.full_like(parameter, n + 0.25 * m) for m, name in enumerate(("exp_avg", "exp_avg_sq"))
            }
            optim.state[parameter] = {"step": torch.tensor(float(n)), **moments}
    tied = torch.nn.Parameter(torch.arange(6.0))
    return {
        "model": model,
        "optim": optim,
        "uneven": distribute_tensor(torch.arange(35.0).view(7, 5), mesh, [Shard(0)]),
        "columns": distribute_tensor(torch.arange(35.0).view(5, 7), mesh, [Shard(1)]),
        "declared": ckpt.Shard(torch.arange(4) + 4 * rank, (8,), (4 * rank,)),
        "tied": {"a": tied, "b": tied},
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([[True, False], [False, True]]),
        "dtypes": _all_dtypes(),
        "value": VALUE,
        "mine": ckpt.PerRank(f"rank {rank}"),
        "odd / name": {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}},
    }


def write(rank: int, world: int, url: str) -> None:
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(1, {"later": torch.tensor(0)}, blocking=True)
        checkpointer.save(7, _state(rank), metrics={"loss": 0.5, "best": float("inf")}, blocking=True)


def wiped_and_restored(rank: int, world: int, url: str) -> tuple[str, str]:
    """What this rank holds after a restore into memory of other content, and what it should hold."""
    expected, state = _state(rank), _state(rank)
    with torch.no_grad():
        for tensor in (*state["model"].state_dict().values(), *state["dtypes"].values()):
            tensor.view(torch.uint8).zero_() if tensor.dim() else tensor.zero_()
        for name in ("uneven", "columns"):
            state[name].zero_()
        state["tied"]["a"].zero_()
        state["declared"].tensor.zero_()
    state["value"], state["mine"].obj = None, ""
    ckpt.restore(url, state)
    return _described(state), _described(expected)


def _described(state: dict[str, Any]) -> str:
    torch.set_printoptions(threshold=10_000)
    model, optim = state["model"], state["optim"]
    shown = {**state, "model": model.state_dict(), "optim": optim.state_dict()}
    shown["declared"], shown["mine"] = state["declared"].tensor, state["mine"].obj
    shown["dtypes"] = {name: tensor.view(torch.uint8) for name, tensor in state["dtypes"].items()}
    for name in ("uneven", "columns"):
        shown[name] = state[name].to_local()
    return repr(shown)


def test_the_golden_checkpoint_restores_on_the_ranks_that_wrote_it(pool: Pool) -> None:
    for got, expected in pool.results(wiped_and_restored, 2, str(GOLDEN)):
        assert got == expected


def test_the_golden_checkpoint_loads_whole() -> None:
    loaded = ckpt.load(GOLDEN)
    assert torch.equal(loaded["uneven"], torch.arange(35.0).view(7, 5))
    assert torch.equal(loaded["columns"], torch.arange(35.0).view(5, 7))
    assert torch.equal(loaded["declared"], torch.arange(8))
    assert loaded["tied/a"] is loaded["tied/b"]
    for name, tensor in _all_dtypes().items():
        assert loaded[f"dtypes/{name}"].dtype == tensor.dtype
        assert torch.equal(loaded[f"dtypes/{name}"].view(torch.uint8), tensor.view(torch.uint8))
    assert repr(loaded["value"]) == repr(VALUE)
    assert (loaded["odd%20%2F%20name/a.b"], loaded["odd%20%2F%20name/a/b"]) == (1, 2)
    assert ckpt.load(GOLDEN, step=1)["later"] == 0


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("steps/*/*.safetensors")), ids=lambda p: "/".join(p.parts[-2:]))
def test_safetensors_reads_every_data_file(path: Path) -> None:
    with safe_open(path, "pt") as file:
        assert all(file.get_tensor(name).numel() >= 0 for name in file.keys())  # noqa: SIM118


if __name__ == "__main__":
    import test_golden  # the ranks look `write` up by the name of its module

    shutil.rmtree(GOLDEN, ignore_errors=True)
    for outcome in run_job(test_golden.write, 2, str(GOLDEN)):
        sys.exit(outcome.output) if outcome.error else None
