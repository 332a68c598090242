"""Which step a run goes on from: going back, adoption, and the readers beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from keepers import forget

import ckpt
from ckpt import Checkpointer, Fenced, Incompatible, NotFound


def state(value: float) -> dict[str, Any]:
    return {"t": torch.full((3,), value), "n": int(value)}


def value_of(path: Path, **options: Any) -> int:
    target = state(-1)
    ckpt.restore(path, target, **options)
    assert target["t"].tolist() == [float(target["n"])] * 3
    return target["n"]


def saved(path: Path, *steps: int) -> Checkpointer:
    checkpointer = Checkpointer(path)
    for step in steps:
        checkpointer.save(step, state(step), blocking=True)
    return checkpointer


def test_an_empty_run(tmp_path: Path) -> None:
    checkpointer, target = Checkpointer(tmp_path), state(7)
    assert checkpointer.restore(target) is None
    assert target["t"].tolist() == [7.0] * 3
    assert (checkpointer.latest_step(), checkpointer.all_steps()) == (None, [])
    with pytest.raises(NotFound, match="no checkpoint"):
        checkpointer.restore(target, required=True)


def test_the_newest_step_or_the_one_asked_for(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 5).close()
    assert value_of(tmp_path) == 5
    assert value_of(tmp_path, step=2) == 2
    assert Checkpointer(tmp_path).restore(state(0)) == 5


def test_a_step_that_is_not_above_the_head_is_refused(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path, 1, 5)
    for step in (5, 3):
        with pytest.raises(Incompatible, match=rf"step {step} has already been passed: .* step 5.*restore"):
            checkpointer.save(step, state(9), blocking=True)
    checkpointer.save(6, state(6), blocking=True)
    assert checkpointer.all_steps() == [1, 5, 6]


def test_going_back_continues_from_there(tmp_path: Path) -> None:
    checkpointer, target = saved(tmp_path, 1, 2, 3), state(0)
    assert checkpointer.restore(target, step=1) == 1
    assert checkpointer.latest_step() == 1
    checkpointer.save(3, state(30), blocking=True)
    assert checkpointer.all_steps() == [1, 3]
    assert value_of(tmp_path) == 30
    with pytest.raises(NotFound, match="step 2"):
        value_of(tmp_path, step=2)


def test_going_back_holds_before_the_first_save(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3).restore(state(0), step=2)  # and here the job dies
    target = state(0)
    assert Checkpointer(tmp_path).restore(target) == 2
    assert target["n"] == 2


def test_reading_an_older_step_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    records = sorted((tmp_path / "log").iterdir())
    assert value_of(tmp_path, step=1) == 1
    assert ckpt.load(tmp_path, step=1)["n"] == 1
    assert sorted((tmp_path / "log").iterdir()) == records
    assert value_of(tmp_path) == 2


def test_a_lost_commit_record_is_adopted(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2).close()
    max((tmp_path / "log").iterdir()).unlink()
    assert value_of(tmp_path) == 1
    assert Checkpointer(tmp_path).restore(state(0)) == 2
    assert value_of(tmp_path) == 2


@pytest.mark.parametrize("damage", ["MANIFEST", "r00000.part", "r00000.safetensors"])
def test_an_incomplete_attempt_is_not_adopted(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 1, 2).close()
    max((tmp_path / "log").iterdir()).unlink()
    file = max((tmp_path / "steps").iterdir()) / damage
    file.write_bytes(file.read_bytes()[:-1])
    assert Checkpointer(tmp_path).restore(state(0)) == 1


def test_nothing_is_adopted_when_going_back(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3).close()
    max((tmp_path / "log").iterdir()).unlink()
    resumed = Checkpointer(tmp_path)
    assert resumed.restore(state(0), step=1) == 1
    assert resumed.latest_step() == 1


def test_load_takes_keys_at_a_path_or_below(tmp_path: Path) -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "ab": torch.nn.Linear(2, 2)})
    Checkpointer(tmp_path).save(1, {"model": module, "other": {"t": torch.ones(2)}, "n": 3}, blocking=True)
    assert set(ckpt.load(tmp_path, keys=["model/a"])) == {"model/a.weight", "model/a.bias"}
    assert set(ckpt.load(tmp_path, keys=["other", "n"])) == {"other/t", "n"}
    assert len(ckpt.load(tmp_path)) == 6
    with pytest.raises(NotFound, match="holds none of"):
        ckpt.load(tmp_path, keys=["mod"])


def test_metrics_stand_in_the_commit(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.report(loss=0.5)
    commit = checkpointer.save(1, state(1), metrics={"acc": float("nan")}).wait()
    assert commit.metrics["loss"] == 0.5
    assert commit.metrics["acc"] != commit.metrics["acc"]
    assert checkpointer.save(2, state(2)).wait().metrics == {}


def test_follow_yields_new_steps_only(tmp_path: Path) -> None:
    stream = ckpt.follow(tmp_path, timeout_s=0.2, poll_s=0.01)
    checkpointer = saved(tmp_path, 1)
    assert next(stream).step == 1
    checkpointer.save(2, state(2), blocking=True)
    checkpointer.save(3, state(3), blocking=True)
    assert next(stream).step == 3
    with pytest.raises(ckpt.DeadlineExceeded, match="no new step"):
        next(stream)
    assert next(ckpt.follow(tmp_path, after=2)).step == 3


def test_a_newer_start_fences_the_older_writer(tmp_path: Path) -> None:
    first = saved(tmp_path, 1)
    second = Checkpointer(tmp_path, takeover=True)
    assert second.restore(state(0)) == 1
    with pytest.raises(Fenced, match="generation 1, but the current one is 2"):
        first.save(2, state(2), blocking=True)
    second.save(2, state(20), blocking=True)
    assert value_of(tmp_path) == 20


def test_what_a_stale_writer_wrote_is_never_adopted(tmp_path: Path) -> None:
    """Generation 2 commits nothing; generation 3 looks for what generation 1 left complete before that."""
    first, second, third = (
        saved(tmp_path, 1),
        Checkpointer(tmp_path, takeover=True),
        Checkpointer(tmp_path, takeover=True),
    )
    assert second.restore(state(0)) == 1
    with pytest.raises(Fenced):
        first.save(2, state(99), blocking=True)
    assert third.restore(state(0)) == 1


def test_another_run_id_is_refused_until_it_takes_over(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path, run_id="job-a")
    first.save(1, state(1), blocking=True)
    with pytest.raises(Fenced, match=r"held by run id 'job-a'.*takeover=True"):
        Checkpointer(tmp_path, run_id="job-b").restore(state(0))
    first.save(2, state(2), blocking=True)  # untouched by the attempt
    assert Checkpointer(tmp_path, run_id="job-a").restore(state(0)) == 2
    assert Checkpointer(tmp_path, run_id="job-b", takeover=True).restore(state(0)) == 2


def test_going_back_that_fails_leaves_the_run_where_it_was(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2).close()
    forget()
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(Incompatible, match="shape"):
        checkpointer.restore({"t": torch.zeros(4), "n": 0}, step=1)
    assert checkpointer.all_steps() == [1, 2]
    damage = next(tmp_path.glob("steps/000000001.*/r00000.safetensors"))
    damage.write_bytes(damage.read_bytes()[:-4096] + b"\xff" * 4096)
    with pytest.raises(ckpt.Corrupt):
        checkpointer.restore(state(0), step=1)
    assert Checkpointer(tmp_path).restore(state(0)) == 2


def test_a_run_that_was_replaced_under_its_writer_fences_it(tmp_path: Path) -> None:
    old = saved(tmp_path / "run", 1)
    (tmp_path / "run").rename(tmp_path / "away")
    with pytest.raises(Fenced, match="removed since"):
        old.save(2, state(2), blocking=True)
    saved(tmp_path / "run", 10, 11, 12).close()
    with pytest.raises(Fenced, match="replaced by another run"):
        old.save(20, state(20), blocking=True)
    assert value_of(tmp_path / "run") == 12


def test_a_relative_address_survives_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpointer = saved(Path("run"), 1)
    monkeypatch.chdir("/")
    checkpointer.save(2, state(2), blocking=True)
    assert checkpointer.all_steps() == [1, 2]
