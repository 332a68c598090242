"""Pins and requests to delete: they fence nobody, and a pin that was acknowledged is never deleted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Pool
from keepers import keepers, until

import ckpt
from ckpt import Checkpointer, CkptError, Incompatible, Keep, NotFound
from ckpt.holder import Holder, carry_out
from ckpt.pins import ask_to_delete, pin, unpin
from ckpt.retention import plan_retention
from ckpt.run import RunDirectory


def state(step: int) -> dict[str, Any]:
    return {"t": torch.full((8,), float(step)), "step": step}


def save(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        checkpointer.save(step, state(step), blocking=True)


def settled() -> None:
    until("the keeper has deleted, and ended", lambda: not keepers(os.environ["CKPT_RAM_DIR"]))


def on_disk(path: Path) -> list[int]:
    return sorted(int(attempt.name.partition(".")[0]) for attempt in (path / "steps").iterdir())


def generation(path: Path) -> int:
    return RunDirectory.open(path).log.read().generation


def command(*words: object, code: int = 0) -> dict[str, Any]:
    line = [sys.executable, "-m", "ckpt.cli", *map(str, words), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout) if code == 0 else {"error": done.stderr}
    return found


def test_a_pinned_step_stays_until_it_is_let_go(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=Keep(last=1)) as checkpointer:
        save(checkpointer, 1)
        checkpointer.pin(1)
        checkpointer.pin(1, "paper")
        save(checkpointer, 2, 3)
        checkpointer.unpin("paper")
        save(checkpointer, 4)
    settled()
    assert on_disk(tmp_path) == [1, 4]
    with Checkpointer(tmp_path, keep=Keep(last=1)) as checkpointer:
        assert checkpointer.restore(state(0)) == 4
        checkpointer.unpin("step-1")
        save(checkpointer, 5)
    settled()
    assert on_disk(tmp_path) == [4, 5]  # it went on from step 4


def test_a_pin_asked_for_from_outside_counts_for_the_job_that_runs(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=Keep(last=1)) as checkpointer:
        save(checkpointer, 1)
        made = command("pin", tmp_path, 1, "--name", "paper")
        assert (made["step"], made["name"]) == (1, "paper")
        save(checkpointer, 2, 3)  # not fenced
        (first, *_) = command("ls", tmp_path)["steps"]
        assert (first["step"], first["pins"]) == (1, ["paper"])
    settled()
    assert (on_disk(tmp_path), generation(tmp_path)) == ([1, 3], 1)
    assert "pin:paper" in subprocess.run(
        [sys.executable, "-m", "ckpt.cli", "ls", tmp_path], capture_output=True, text=True, check=True
    ).stdout.replace("\n", " ")
    assert command("unpin", tmp_path, "paper")["name"] == "paper"
    assert "paper" in command("unpin", tmp_path, "paper", code=10)["error"]
    assert "no step 2" in command("pin", tmp_path, 2, code=10)["error"]
    assert "a-z0-9" in command("pin", tmp_path, 1, "--name", "A/b", code=2)["error"]


def test_a_pin_that_was_acknowledged_survives_a_retention_that_raced_with_it(tmp_path: Path) -> None:
    save(Checkpointer(tmp_path), 1, 2, 3)
    holder = Holder(RunDirectory.open(tmp_path), run_id=None, takeover=True)
    start = holder.take("test")
    plan = plan_retention(holder.view, Keep(last=1))
    assert [commit.step for commit in plan.leaving] == [1, 2]
    pin(RunDirectory.open(tmp_path), 2)  # after the plan, before its record
    with pytest.raises(Incompatible, match=r"pinned as 'step-2'\. Nothing was deleted"):
        carry_out(holder.run, plan, start.generation, start.nonce)
    assert on_disk(tmp_path) == [1, 2, 3]
    carry_out(holder.run, plan_retention(holder.view, Keep(last=1)), start.generation, start.nonce)
    assert on_disk(tmp_path) == [2, 3]


def test_a_pin_that_comes_too_late_is_refused(tmp_path: Path) -> None:
    save(Checkpointer(tmp_path), 1, 2)
    reader = RunDirectory.open(tmp_path)
    stale = reader.log.read()
    holder = Holder(RunDirectory.open(tmp_path), run_id=None, takeover=True)
    start = holder.take("test")
    carry_out(holder.run, plan_retention(holder.view, Keep(last=1)), start.generation, start.nonce)
    assert stale.standing()[0].step == 1
    with pytest.raises(NotFound, match="no step 1"):
        pin(reader, 1)


def test_a_step_is_deleted_after_the_next_save_and_no_other(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, 2, 3)
        checkpointer.delete(1)
        assert on_disk(tmp_path) == [1, 2, 3]
        assert command("delete", tmp_path, 2, "--dry-run")["done"] is False
        assert command("delete", tmp_path, 2)["done"] is False
        save(checkpointer, 4)
        assert generation(tmp_path) == 1
    settled()
    assert on_disk(tmp_path) == [3, 4]


def test_what_a_job_was_asked_for_is_done_by_the_next_one(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, 2, 3)
        checkpointer.delete(1)
    settled()
    assert on_disk(tmp_path) == [1, 2, 3]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore(state(0))
        save(checkpointer, 4)
    settled()
    assert on_disk(tmp_path) == [2, 3, 4]


def test_what_must_stay_is_not_deleted(tmp_path: Path) -> None:
    save(Checkpointer(tmp_path), 1, 2, 3)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.restore(state(0))
    checkpointer.pin(1, "good")
    save(checkpointer, 4)
    records = sorted((tmp_path / "log").iterdir())
    for step, says in ((1, "pinned as good"), (3, "went on from"), (4, "the newest step")):
        with pytest.raises(Incompatible, match=rf"cannot be deleted: .*{says}.*Nothing was asked for"):
            checkpointer.delete(step)
    with pytest.raises(NotFound, match="no step 9"):
        checkpointer.delete(9)
    assert sorted((tmp_path / "log").iterdir()) == records


def test_a_step_pinned_after_it_was_asked_to_leave_stays(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, 2)
        checkpointer.delete(1)
        checkpointer.pin(1)
        save(checkpointer, 3)
    settled()
    assert on_disk(tmp_path) == [1, 2, 3]


def test_a_run_that_no_job_holds_deletes_at_once(tmp_path: Path) -> None:
    code = f"import test_pins as t, pathlib; t.save(t.Checkpointer({str(tmp_path)!r}), 1, 2, 3)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, timeout=120)
    settled()
    (tmp_path / "steps" / "000000001.dead").mkdir()
    assert command("delete", tmp_path, 2, "--dry-run")["done"] is True
    assert on_disk(tmp_path) == [1, 1, 2, 3]
    assert command("delete", tmp_path, 2)["done"] is True
    assert on_disk(tmp_path) == [1, 1, 3]  # no rule was given: what was never committed stays
    assert "no step 2" in command("delete", tmp_path, 2, code=10)["error"]
    target = state(0)
    assert ckpt.restore(tmp_path, target) == 3


def test_two_that_pin_at_once_both_hold(tmp_path: Path) -> None:
    save(Checkpointer(tmp_path), 1, 2)
    one, other = RunDirectory.open(tmp_path), RunDirectory.open(tmp_path)
    for run in (one, other):
        run.log.read()
    pin(one, 1, "a")
    pin(other, 1, "b")  # its slot was taken meanwhile
    assert set(other.log.view.pins) == {"a", "b"}
    unpin(one, "b")
    with pytest.raises(Incompatible, match="pinned as a"):
        ask_to_delete(other, other.log.read().standing()[0])


def _pin_on_all(rank: int, world: int, path: str) -> str:
    checkpointer = Checkpointer(path)
    checkpointer.save(1, {"t": torch.ones(4)}, blocking=True)
    checkpointer.save(2, {"t": torch.ones(4)}, blocking=True)
    checkpointer.pin(1, "all")
    try:
        checkpointer.pin(7)
    except CkptError as error:
        return str(error)
    finally:
        checkpointer.close()
    return ""


def test_ranks_pin_together_and_fail_together(pool: Pool, tmp_path: Path) -> None:
    said = pool.results(_pin_on_all, 2, str(tmp_path))
    assert len(said) == 2
    assert all("no step 7" in text for text in said)
    assert list(RunDirectory.open(tmp_path).log.read().pins) == ["all"]
