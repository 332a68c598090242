"""The n-th file operation of a save fails, for n = 1, 2, ... until none is left to fail; as SQLite tests itself.

Each time the save succeeds all the same or says what went wrong; every step before it is whole; the next save succeeds.
A write that was lost in silence is never restored as something else.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import io_faults
import pytest
import torch
from keepers import forget

import ckpt
from ckpt.errors import CkptError, Corrupt
from ckpt.run import RunDirectory

LIMIT = 200  # operations of one save: far more than there are


def state(step: int) -> dict[str, Any]:
    return {"a": torch.full((50_000,), float(step)), "b": torch.full((300,), float(step)), "n": step}


def is_whole(path: Path, step: int) -> bool:
    found = ckpt.load(path, step=step)
    return found["n"] == step and all(bool((found[name] == step).all()) for name in "ab")


@pytest.fixture
def armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that says what fails; for the run in `tmp_path / "run"`."""
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here / 'keeper_site'}:{here}")
    monkeypatch.setenv(io_faults.VARIABLE, f"{tmp_path / 'run'}|{tmp_path / 'plan'}")
    return tmp_path / "plan"


def arm(plan: Path, n: int, fault: int | str, sticky: bool) -> None:
    plan.with_suffix(".new").write_text(json.dumps({"n": n, "fault": fault, "sticky": sticky}))
    plan.with_suffix(".new").rename(plan)


def disarm(plan: Path) -> bool:
    """Whether the operation was reached."""
    met = Path(f"{plan}.met")
    reached = met.exists()
    met.unlink(missing_ok=True)
    plan.unlink(missing_ok=True)
    return reached


KINDS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR, "short")
FAULTS = [(fault, sticky) for fault in KINDS for sticky in (False, True)]
FIRST = [(errno.EIO, False), (errno.ENOSPC, True)]  # the others are tried when a full proof is asked for


MORE = [pytest.param(*each, marks=pytest.mark.prove) for each in FAULTS if each not in FIRST]


@pytest.mark.parametrize(("fault", "sticky"), [*FIRST, *MORE])
def test_the_nth_operation_fails(tmp_path: Path, armed: Path, fault: int | str, sticky: bool) -> None:
    path, step, failed = tmp_path / "run", 1, 0
    with ckpt.Checkpointer(path, keep=ckpt.Keep(last=2)) as checkpointer:
        checkpointer.save(step, state(step), blocking=True)
        for n in range(1, LIMIT):
            arm(armed, n, fault, sticky)
            before, step = step, step + 1
            error = saved(checkpointer, step)
            failed += error is not None
            assert is_whole(path, before if error else step), f"operation {n} failed: {error}"
            reached = disarm(armed)
            step += 1
            checkpointer.save(step, state(step), blocking=True)
            assert is_whole(path, step), f"after operation {n} failed"
            if not reached:
                break
        else:
            raise AssertionError("there is no end to it")
    print(f"{fault}, sticky {sticky}: {n - 1} operations, {failed} saves failed")
    assert n > 15
    assert failed > 0 or fault == "short"


def saved(checkpointer: ckpt.Checkpointer, step: int) -> CkptError | None:
    """What a save of `step` failed of."""
    try:
        checkpointer.save(step, state(step), blocking=True)
    except CkptError as error:
        return error
    return None


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.prove)])
def test_a_lost_write_is_never_taken_for_something_else(tmp_path: Path, armed: Path, stride: int) -> None:
    """What a disk acknowledged and did not write is found by the readers, in a file of its own run each time."""
    found = 0
    for n in range(1, LIMIT, stride):
        path = tmp_path / "run" / str(n)
        with ckpt.Checkpointer(path) as checkpointer:
            checkpointer.save(1, state(1), blocking=True)
            arm(armed, n, "lost", False)
            saved(checkpointer, 2)
            reached = disarm(armed)
        forget()
        try:
            step = RunDirectory.open(path).log.read().standing()[-1].step
            assert is_whole(path, step)
        except Corrupt:
            found += 1
        if not reached:
            break
    print(f"lost: {n - 1} operations, {found} found by readers")
    assert found >= 3 // stride  # data, part or MANIFEST, record
