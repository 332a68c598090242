"""dcp.save and dcp.load onto a run: sharded, killed, resumed on other ranks; and what it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from jobs import ROOT
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

import ckpt
from ckpt.check import check_step
from ckpt.holder import Holder, find_commit
from ckpt.interop.dcp import HoldfastReader, HoldfastWriter, newest_step, world_of
from ckpt.layout import held
from ckpt.run import RunDirectory
from ckpt.slices import Slice, whole

WORKER = Path(__file__).parent / "dcp_worker.py"


def _train(ranks: int, *arguments: str) -> tuple[int, dict[tuple[str, int], str]]:
    """Run the worker on `ranks` ranks; its exit code, and the digests that it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=240)
    found = re.findall(r"^(saved|loaded) (\d+) (\w+)$", done.stdout, flags=re.MULTILINE)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    assert done.returncode or not arguments[2:], "it was not killed"
    return done.returncode, {(what, int(step)): digest for what, step, digest in found}


@pytest.mark.prove
def test_a_run_killed_in_mid_save_goes_on_from_the_step_before_on_other_ranks(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    _, first = _train(2, url, "9", "part", "3")  # rank 1 dies with half of its part of step 3 written
    assert set(first) == {("saved", 1), ("saved", 2)}
    assert newest_step(url) == 2
    _, second = _train(3, url, "9", "commit", "4")  # rank 0 dies with all parts of step 4 durable
    assert set(second) == {("loaded", 2), ("saved", 3)}
    assert second["loaded", 2] == first["saved", 2]
    assert newest_step(url) == 3
    code, third = _train(1, url, "5")
    assert (code, third["loaded", 3]) == (0, second["saved", 3])
    assert newest_step(url) == 5
    run = RunDirectory.open(url)
    for commit in run.log.read().standing():
        assert check_step(run, commit).ok
    loaded = ckpt.load(url, step=3, keys=["model", "note"])
    assert loaded["model/0.weight"].shape == (301, 16)
    assert (loaded["note/seen"], loaded["note/pair"]) == (3, (1, 2.5))


def _state(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "model": nn.Linear(300, 500).state_dict(),
        "columns": torch.randn(64, 128).t(),
        "half": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(seed),
        "empty": torch.empty(0, 3),
        "sched": {"last": seed, "rates": [1e-3, float("inf")]},
    }


def _flat(state: dict[str, Any]) -> list[torch.Tensor]:
    return [*state["model"].values(), state["columns"], state["half"], state["scalar"], state["empty"]]


def test_what_dcp_saves_is_a_step_like_any_other(tmp_path: Path) -> None:
    saved, target = _state(1), _state(2)
    writer = HoldfastWriter(tmp_path, step=7)
    dcp.save(saved, storage_writer=writer)
    dcp.load(target, storage_reader=HoldfastReader(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(_flat(saved), _flat(target), strict=True))
    assert target["sched"] == saved["sched"]
    restored: dict[str, Any] = {"model": nn.Linear(300, 500)}
    ckpt.restore(tmp_path, restored, only=["model"])
    assert all(torch.equal(a, saved["model"][n]) for n, a in restored["model"].state_dict().items())
    assert writer.commit is not None
    assert check_step(RunDirectory.open(tmp_path), writer.commit).ok


def test_what_a_checkpointer_saved_is_loaded_by_dcp(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, {"model": model, "n": 5}, blocking=True)
    target: dict[str, Any] = {"model": nn.Linear(4, 3).state_dict(), "n": 0}
    dcp.load(target, storage_reader=HoldfastReader(tmp_path))
    assert torch.equal(target["model"]["weight"], model.weight)
    assert target["n"] == 5


class Opaque:
    pass


def test_refusals_say_what_and_commit_nothing(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(2)}, storage_writer=HoldfastWriter(tmp_path, step=3))
    for state, step, what in (
        ({"a": torch.ones(2)}, 3, "steps only grow"),
        ({"a": torch.ones(2), "b": Opaque()}, 4, "no pickle is stored"),
    ):
        with pytest.raises(CheckpointException, match=what):
            dcp.save(state, storage_writer=HoldfastWriter(tmp_path, step=step))
    Holder(RunDirectory.open(tmp_path), run_id=None, takeover=True).take("another job")
    with pytest.raises(CheckpointException, match="Fenced"):
        dcp.save({"a": torch.ones(2)}, storage_writer=HoldfastWriter(tmp_path, step=4))
    assert newest_step(tmp_path) == 3
    with pytest.raises(CheckpointException, match="cannot hold it"):
        dcp.load({"a": torch.ones(2, dtype=torch.int8)}, storage_reader=HoldfastReader(tmp_path))
    with pytest.raises(ckpt.Incompatible, match="Leave checkpoint_id out"):
        dcp.load({"a": torch.ones(2)}, checkpoint_id="x", storage_reader=HoldfastReader(tmp_path))


def test_a_damaged_block_is_not_loaded(tmp_path: Path) -> None:
    writer = HoldfastWriter(tmp_path, step=1)
    dcp.save({"a": torch.ones(100_000)}, storage_writer=writer)
    assert writer.commit is not None
    (data,) = (tmp_path / "steps" / writer.commit.attempt).glob("*.safetensors")
    damaged = bytearray(data.read_bytes())
    damaged[200_000] ^= 1
    data.write_bytes(damaged)
    with pytest.raises(CheckpointException, match="Corrupt"):
        dcp.load({"a": torch.ones(100_000)}, storage_reader=HoldfastReader(tmp_path))


def _item(box: Slice, shape: tuple[int, ...]) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))
    data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size(shape))
    return WriteItem(MetadataIndex("a", chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def test_plans_that_leave_a_hole_are_refused_and_several_boxes_of_a_rank_are_not() -> None:
    left, right = Slice((0,), (2,)), Slice((2,), (3,))
    world = world_of([SavePlan([_item(left, (5,))]), SavePlan([_item(right, (5,))])])
    assert {group.ranks for group in held(world, "a", right)} == {(1,)}
    both = world_of([SavePlan([_item(left, (5,)), _item(right, (5,))]), SavePlan([])])
    assert {group.ranks for group in held(both, "a", whole((5,)))} == {(0,)}
    with pytest.raises(ckpt.Incompatible, match="gap"):
        world_of([SavePlan([_item(left, (5,))]), SavePlan([_item(Slice((3,), (2,)), (5,))])])
    with pytest.raises(ckpt.Incompatible, match="overlap"):
        world_of([SavePlan([_item(left, (5,))]), SavePlan([_item(Slice((1,), (4,)), (5,))])])


def test_the_example_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    example = str(ROOT / "examples" / "with_dcp.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, example, str(tmp_path), "10"], env=environment, capture_output=True, text=True, timeout=240
    )  # its exit code says little: torch's threads sometimes abort a process as it ends, without us, too
    assert "step 10 loss" in run.stdout, run.stderr[-3000:]
    assert newest_step(tmp_path) == 10
    assert find_commit(RunDirectory.open(tmp_path).log.read(), 10).world == 2
