"""`Checkpointer.steps`: restores, counts, saves when due, on SIGTERM and at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from keepers import until
from states import model, train

import ckpt
from ckpt import Checkpointer, Every, Incompatible
from ckpt import checkpointer as checkpointer_module
from ckpt.board import Board


def run(path: Path, total: int, every: Every, stop_at: int | None = None) -> tuple[list[int], list[int]]:
    """(indices of the steps that ran, steps that exist afterwards)"""
    state, ran = {"n": 0}, []
    with Checkpointer(path, every=every) as checkpointer:
        for step in checkpointer.steps(total, state):
            assert state["n"] == step
            state["n"] += 1
            ran.append(step)
            if step == stop_at:
                break
    return ran, checkpointer.all_steps()


def test_saves_when_due_and_at_the_end(tmp_path: Path) -> None:
    assert run(tmp_path, 7, Every(steps=3)) == ([0, 1, 2, 3, 4, 5, 6], [3, 6, 7])


def test_saves_once_where_due_and_end_meet(tmp_path: Path) -> None:
    assert run(tmp_path, 6, Every(steps=3))[1] == [3, 6]


def test_resumes_at_the_next_index(tmp_path: Path) -> None:
    run(tmp_path, 4, Every(steps=2))
    assert run(tmp_path, 7, Every(steps=2)) == ([4, 5, 6], [2, 4, 6, 7])
    assert run(tmp_path, 7, Every(steps=2)) == ([], [2, 4, 6, 7])


def test_break_does_not_save(tmp_path: Path) -> None:
    assert run(tmp_path, 9, Every(steps=2), stop_at=4) == ([0, 1, 2, 3, 4], [2, 4])
    assert run(tmp_path, 9, Every(steps=2))[0] == [4, 5, 6, 7, 8]


def test_an_exception_passes_through_and_does_not_save(tmp_path: Path) -> None:
    def job() -> None:
        with Checkpointer(tmp_path, every=Every(steps=2)) as checkpointer:
            for step in checkpointer.steps(9, {"n": 0}):
                1 / (3 - step)

    with pytest.raises(ZeroDivisionError):
        job()
    looking = Checkpointer(tmp_path)
    until("the keeper stored step 2", lambda: looking.all_steps() == [2])


def test_every_second(tmp_path: Path) -> None:
    assert run(tmp_path / "often", 4, Every(seconds=1e-9))[1] == [
        2,
        3,
        4,
    ]  # asked after a step, answered after the next
    assert run(tmp_path / "rarely", 4, Every(seconds=1e9))[1] == [4]


@pytest.mark.parametrize("arguments", [{}, {"steps": 1, "seconds": 1}, {"steps": 0}, {"seconds": -1}])
def test_every_takes_one_positive_interval(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Every"):
        Every(**arguments)


def test_sigterm_saves_and_ends_early(tmp_path: Path) -> None:
    before, ran, state = signal.getsignal(signal.SIGTERM), [], {"n": 0}
    checkpointer = Checkpointer(tmp_path)
    for step in checkpointer.steps(100, state):
        state["n"] += 1
        ran.append(step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    assert checkpointer.stopped
    assert ran == [0, 1, 2, 3, 4]  # the step in which it came, and the one that all ranks agree on
    assert checkpointer.all_steps() == [5]
    assert ckpt.load(tmp_path)["n"] == 5
    assert signal.getsignal(signal.SIGTERM) == before
    assert not Checkpointer(tmp_path).stopped


def test_due_by_hand(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, every=Every(steps=4))
    assert [step for step in range(9) if checkpointer.due(step)] == [4, 8]
    assert not checkpointer.stop_requested(3)


def test_a_run_that_is_interrupted_equals_one_that_is_not(tmp_path: Path) -> None:
    def go(path: Path, total: int, seed: int) -> list[float]:
        net = model(seed)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=50)
        drop = torch.nn.Sequential(net, torch.nn.Dropout(0.3))
        state = {"model": net, "optim": optimizer, "sched": scheduler, "rng": ckpt.Rng()}
        losses = []
        with Checkpointer(path, every=Every(steps=3)) as checkpointer:
            for step in checkpointer.steps(total, state):
                losses += train(drop, optimizer, 1, skip=step, after=scheduler.step)
        return losses

    whole = go(tmp_path / "whole", 14, seed=0)
    first = go(tmp_path / "cut", 8, seed=0)
    assert first + go(tmp_path / "cut", 14, seed=1) == whole


# Under a launcher


def test_a_loop_that_its_launcher_pauses_saves_and_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board, ran = Board(), []
    monkeypatch.setenv("CKPT_BOARD", board.path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(checkpointer_module, "_unfinished", False)  # the exit code of these tests is their own

    def job() -> None:
        with Checkpointer(tmp_path, every=Every(steps=100)) as checkpointer:
            for step in checkpointer.steps(9, {"n": 0}):
                ran.append(step)
                (worker,) = board.workers()
                assert (worker.heeds, worker.paused, worker.step) == (True, False, step)
                if step == 2:
                    board.ask()

    with pytest.raises(SystemExit) as ended:
        job()
    monkeypatch.delenv("CKPT_BOARD")
    assert ended.value.code == 143
    assert ran == [0, 1, 2, 3], "the step after the one in which it was asked"
    assert board.workers()[0].paused
    assert Checkpointer(tmp_path).all_steps() == [4]
    board.close()


@pytest.mark.parametrize(("asked", "code"), [(True, 143), (False, 0)])
def test_a_script_that_was_asked_to_stop_has_not_done_its_job(tmp_path: Path, asked: bool, code: int) -> None:
    """It ends with 0 by itself, which would be the end of the job for all."""
    text = """
import ckpt
with ckpt.Checkpointer("run") as checkpointer:
    for step in range(1, 4):
        if checkpointer.stop_requested(step):
            checkpointer.save(step, {"n": step})
            break
"""
    (tmp_path / "script.py").write_text(text)
    board = Board()
    if asked:
        board.ask()
    more = {"CKPT_BOARD": board.path, "LOCAL_RANK": "0", "PYTHONPATH": str(Path(ckpt.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "script.py"], env={**os.environ, **more}, cwd=tmp_path, timeout=60)
    assert done.returncode == code
    assert Checkpointer(tmp_path / "run").all_steps() == ([1] if asked else [])
    board.close()


def test_what_cannot_be_saved_is_said_before_the_first_step(tmp_path: Path) -> None:
    data, done = torch.utils.data.DataLoader(range(4)), list[int]()
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(Incompatible, match="StatefulDataLoader"):
        done += checkpointer.steps(5, {"w": torch.ones(2), "data": data})  # type: ignore[dict-item]
    assert done == []
