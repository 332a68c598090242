"""Checkpointers under a launcher that has begun the generation for them (CKPT_START)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.log import View, decide_start
from ckpt.records import Start
from ckpt.run import RunDirectory


def launch(url: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """What a launcher does before it starts workers."""
    run = RunDirectory.open(url, create=True)
    count = run.log.read().generation

    def start(view: View) -> Start:
        nonce = f"launch-{count}"
        return decide_start(view, nonce=nonce, run_id=None, reason="launch", members=({"node": "a", "began": nonce},))

    made = run.log.append(start)
    monkeypatch.setenv("CKPT_START", f"{run.nonce}/{made.generation}/{made.nonce}")
    return made


def starts(url: Path) -> tuple[Start, ...]:
    return RunDirectory.open(url).log.read().starts


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((10,), float(step))}


def test_the_workers_save_under_the_start_that_their_launcher_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = launch(tmp_path, monkeypatch)
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(state_of(0)) is None
        commit = checkpointer.save(1, state_of(1), blocking=True).wait()
    assert starts(tmp_path) == (made,)
    assert commit.generation == made.generation


def test_a_newer_start_of_the_launcher_fences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(tmp_path, monkeypatch)
    old = ckpt.Checkpointer(tmp_path)
    old.save(1, state_of(1), blocking=True)
    launch(tmp_path, monkeypatch)
    with pytest.raises(ckpt.Fenced):
        old.save(2, state_of(2), blocking=True)
    with ckpt.Checkpointer(tmp_path) as new:
        assert new.restore(state_of(0)) == 1, "what a fenced writer brought is never adopted"
    assert [start.generation for start in starts(tmp_path)] == [1, 2]


def test_workers_of_an_older_generation_begin_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(tmp_path, monkeypatch)
    late = ckpt.Checkpointer(tmp_path)  # its generation is the first one
    launch(tmp_path, monkeypatch)
    with pytest.raises(ckpt.Fenced, match="for generation 1, but the current one is 2"):
        late.restore(state_of(0))
    assert len(starts(tmp_path)) == 2


def test_going_back_names_the_same_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(tmp_path, monkeypatch)
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state_of(step), blocking=True)
        assert checkpointer.restore(state_of(0), step=1) == 1
        checkpointer.save(2, state_of(7), blocking=True)
    made, again = starts(tmp_path)
    assert made.members == again.members


def test_a_second_checkpointer_of_the_process_begins_a_generation_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(tmp_path, monkeypatch)
    first = ckpt.Checkpointer(tmp_path)
    first.save(1, state_of(1), blocking=True)
    with ckpt.Checkpointer(tmp_path) as second:
        assert second.restore(state_of(0)) == 1
        second.save(2, state_of(2), blocking=True)
        with pytest.raises(ckpt.Fenced):
            first.save(3, state_of(3), blocking=True)
    made, again = starts(tmp_path)
    assert made.members == again.members


def test_the_start_of_another_run_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(tmp_path / "one", monkeypatch)
    with ckpt.Checkpointer(tmp_path / "two") as checkpointer:
        checkpointer.save(1, state_of(1), blocking=True)
    (made,) = starts(tmp_path / "two")
    assert made.reason == "first save"
    assert made.members == ()


@pytest.mark.parametrize("text", ["x", "run/one/nonce", "run/1"])
def test_a_start_that_makes_no_sense_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CKPT_START", text)
    with pytest.raises(ckpt.Incompatible, match="CKPT_START"):
        ckpt.Checkpointer(tmp_path)


def test_what_was_left_complete_is_adopted_across_generations_that_committed_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(tmp_path, monkeypatch)
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state_of(1), blocking=True)
    slot = max((tmp_path / "log").iterdir())
    slot.unlink()  # the commit of step 1: as if the keeper had died before it
    for _ in range(3):
        launch(tmp_path, monkeypatch)
    state = state_of(0)
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(state) == 1
    assert torch.equal(state["w"], state_of(1)["w"])
