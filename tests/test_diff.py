"""`ckpt diff`: what changed between two steps, however they were sharded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import Pool
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ckpt
from ckpt.diff import Differences, compare_steps
from ckpt.holder import find_commit
from ckpt.restorer import StepReader
from ckpt.run import RunDirectory
from ckpt.slices import bands

ROOT = Path(__file__).parent.parent


def saved(path: Path, *states: dict[str, Any]) -> Path:
    with ckpt.Checkpointer(path) as checkpointer:
        for step, state in enumerate(states, 1):
            checkpointer.save(step, state, blocking=True)
    return path


def compared(left: Path, right: Path, *steps: int | None) -> Differences:
    sides = []
    for path, step in zip((left, right), steps or (None, None), strict=True):
        run = RunDirectory.open(path)
        sides.append(StepReader(run, find_commit(run.log.read(), step)))
    return compare_steps(*sides)


def test_what_changed_and_by_how_much(tmp_path: Path) -> None:
    big = torch.arange(200_000, dtype=torch.float32)
    first = {"frozen": torch.ones(5), "big": big, "half": torch.ones(4, dtype=torch.bfloat16), "n": 1, "lr": [0.1]}
    changed = big.clone()
    changed[[3, 199_999]] += torch.tensor([1.0, 3.0])
    second = {**first, "big": changed, "half": torch.tensor([1, 1, float("nan"), 2]).bfloat16(), "n": 2}
    path = saved(tmp_path / "run", first, second)
    found = compared(path, path, 1, 2)
    by_key = {each.key: each for each in found.tensors}
    assert {key: each.status for key, each in by_key.items()} == {"big": "changed", "frozen": "same", "half": "changed"}
    assert (by_key["big"].share, by_key["big"].largest, by_key["big"].mean) == (2 / 200_000, 3.0, 4 / 200_000)
    assert (by_key["half"].share, by_key["half"].largest, by_key["half"].not_finite) == (0.5, 1.0, 1)
    assert by_key["half"].mean == pytest.approx(1 / 3)
    assert found.values == ("n",)
    assert not found.equal


def test_equal_numbers_of_other_bits_are_a_change(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", {"a": torch.tensor([0.0, 1.0])}, {"a": torch.tensor([-0.0, 1.0])})
    (found,) = compared(path, path, 1, 2).tensors
    assert (found.status, found.share, found.largest) == ("changed", 0.5, 0.0)


def test_other_keys_shapes_and_types(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "run",
        {"gone": torch.ones(1), "cast": torch.ones(2), "grown": torch.ones(3), "empty": torch.ones(0, 4)},
        {"new": torch.ones(1), "cast": torch.ones(2).double(), "grown": torch.ones(4), "empty": torch.ones(0, 4)},
    )
    found = {each.key: each.status for each in compared(path, path, 1, 2).tensors}
    assert found == {"gone": "left", "new": "right", "cast": "kind", "grown": "kind", "empty": "same"}


def save_sharded(rank: int, world: int, url: str, bump: float) -> None:
    torch.manual_seed(5)
    whole = torch.randn(37, 11)
    whole[36, 10] += bump
    mesh = init_device_mesh("cpu", (world,))
    with ckpt.Checkpointer(url) as checkpointer:
        state = {"w": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None), "flag": torch.tensor(True)}
        checkpointer.save(1, state, blocking=True)


def test_layouts_do_not_matter(tmp_path: Path, pool: Pool) -> None:
    for name, world, bump in (("two", 2, 0.0), ("three", 3, 0.0), ("other", 3, 2.0)):
        pool.results(save_sharded, world, str(tmp_path / name), bump)
    assert compared(tmp_path / "two", tmp_path / "three").equal
    found = {each.key: each for each in compared(tmp_path / "two", tmp_path / "other").tensors}
    assert found["flag"].status == "same"
    assert (found["w"].share, found["w"].largest) == (1 / (37 * 11), pytest.approx(2.0))


@given(
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
    st.sampled_from([1, 2, 8]),
    st.integers(1, 300),
)
def test_bands_tile_and_are_bounded(shape: tuple[int, ...], itemsize: int, limit_bytes: int) -> None:
    seen = torch.zeros(shape, dtype=torch.int64)
    for box in bands(shape, itemsize, limit_bytes):
        view = seen
        for dim, (offset, length) in enumerate(zip(box.offset, box.shape, strict=True)):
            view = view.narrow(dim, offset, length)
        view += 1
        assert prod(box.shape) * itemsize <= max(limit_bytes, itemsize)
    assert bool((seen == 1).all())


def _diff(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckpt.cli", "diff", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_the_command(tmp_path: Path) -> None:
    one = {"layer": {"weight": torch.ones(4), "bias": torch.ones(2)}}
    two = {"layer": {"weight": torch.full((4,), 1.5), "bias": torch.ones(2)}}
    path = saved(tmp_path / "run", one, two, two)
    done = _diff(f"{path}@1", f"{path}@2")
    assert done.returncode == 1
    assert "layer/weight  changed    100.0%      0.5   0.5" in done.stdout
    assert "1 of 2 tensors bit for bit the same" in done.stdout
    assert "layer/bias" not in done.stdout
    done = _diff(f"{path}@2", path)
    assert done.returncode == 0
    assert "If training went on, it saved old weights" in done.stdout
    found = json.loads(_diff(f"{path}@1", path, "--json").stdout)
    assert (found["left"]["step"], found["right"]["step"], found["equal"], found["same"]) == (1, 3, False, 1)
    assert _diff(f"{path}@9", path).returncode == 10
