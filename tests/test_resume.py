"""`ckpt resume`: from where, how often, and what the command is told. Real commands, real kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from keepers import forget, until

import ckpt
from ckpt.errors import Corrupt, NotFound
from ckpt.resume import TRIES, Supervisor, Verdict, judge
from ckpt.run import RunDirectory

ROOT = Path(__file__).parent.parent

# Counts to TOTAL, a step saved after each; dies as told in the file DIE: "<step> <how>", once.
TRAIN = """
import os, signal, sys
from pathlib import Path
import ckpt
here = Path(__file__).parent
state = {"n": 0}
with (here / "starts").open("a") as file:
    file.write(os.environ.get("CKPT_RESUME_FROM", "-") + "\\n")
with ckpt.Checkpointer(every=ckpt.Every(steps=1)) as checkpointer:
    for step in checkpointer.steps(int(sys.argv[1]), state):
        state["n"] = step + 1
        die = (here / "die").read_text().split() if (here / "die").exists() else ["-1", ""]
        if step == int(die[0]):
            checkpointer.wait_until_finished()
            if die[1] != "always":
                (here / "die").unlink()
            if die[1] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if die[1] == "wait":
                (here / "ready").write_text("")
                signal.pause() if not checkpointer._stop_asked else None
            else:
                sys.exit(int(die[2]) if len(die) > 2 else 1)
sys.exit(143 if checkpointer.stopped else 0)
"""


@pytest.fixture
def train(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path / "train.py"


def resume(train: Path, *words: str, total: int = 6, background: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ckpt.cli", "resume", *words, str(train.parent / "run"), "--"]
    process = subprocess.Popen(
        [*command, sys.executable, str(train), str(total)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if not background:
        process.said = process.communicate(timeout=120)[1]  # type: ignore[attr-defined]
    return process


def starts(train: Path) -> list[str]:
    return (train.parent / "starts").read_text().split()


def steps(train: Path) -> list[int]:
    return [commit.step for commit in RunDirectory.open(train.parent / "run").log.read().lineage()]


def test_starts_from_nothing_and_says_so(train: Path) -> None:
    done = resume(train, total=2)
    assert done.returncode == 0
    assert "there is no run yet: it starts from nothing" in done.said  # type: ignore[attr-defined]
    assert "it ended well" in done.said  # type: ignore[attr-defined]
    assert steps(train) == [1, 2]


def test_a_command_that_saves_elsewhere_is_found_out(train: Path) -> None:
    train.write_text(
        TRAIN.replace("ckpt.Checkpointer(every", f"ckpt.Checkpointer({str(train.parent / 'other')!r}, every")
    )
    done = resume(train, total=2)
    assert done.returncode == 0
    assert "but nothing was saved in" in done.said  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_a_command_that_fails_is_started_again(train: Path, how: str) -> None:
    (train.parent / "die").write_text(f"3 {how}")
    done = resume(train)
    assert done.returncode == 0, done.said  # type: ignore[attr-defined]
    assert len(starts(train)) == 2
    assert steps(train) == [1, 2, 3, 4, 5, 6]
    code = 137 if how == "kill" else 1
    assert f"it failed (exit {code}) after new steps; it is started again" in done.said  # type: ignore[attr-defined]
    assert "going on from step 3 (the newest that was committed)" in done.said  # type: ignore[attr-defined]


def supervise(tmp_path: Path, code: int, **options: Any) -> tuple[int, int, str]:
    """The exit code of a command that always fails with `code`, how often it was started, and what was said."""
    said: list[str] = []
    command = ["sh", "-c", f"echo started >> {tmp_path}/starts; exit {code}"]
    supervisor = Supervisor(command, lambda failed: {}, lambda: 0, said.append, **{"restarts": 100, **options})
    return supervisor.run(), len((tmp_path / "starts").read_text().split()), "\n".join(said)


def test_a_failure_that_does_not_go_away_ends_it(tmp_path: Path) -> None:
    code, starts, said = supervise(tmp_path, 7)
    assert (code, starts) == (7, TRIES)
    assert f"it failed {TRIES} times in a row (exit 7)" in said


def test_the_budget_ends_it(tmp_path: Path) -> None:
    code, starts, said = supervise(tmp_path, 7, restarts=1)
    assert (code, starts) == (7, 2)
    assert "the budget of restarts is used up" in said


def test_what_cannot_help_is_not_tried(tmp_path: Path) -> None:
    code, starts, said = supervise(tmp_path, 11)
    assert (code, starts) == (11, 1)
    assert "a newer job has taken the run (exit 11)" in said


def test_a_signal_goes_on_to_the_command(train: Path) -> None:
    (train.parent / "die").write_text("2 wait")
    process = resume(train, background=True)
    until("the command trains", (train.parent / "ready").exists, 60)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert "it was asked to stop" in said
    assert len(starts(train)) == 1
    assert steps(train)[-1] >= 3  # it stopped at an agreed step, saved


def test_going_back_happens_once(train: Path) -> None:
    assert resume(train, total=4).returncode == 0
    (train.parent / "die").write_text("2 kill")
    done = resume(train, "--before", "2")
    assert done.returncode == 0, done.said  # type: ignore[attr-defined]
    asked = starts(train)
    assert asked[0] == asked[2] == "-"  # at first, and after the kill: on from the newest
    assert asked[1].startswith("000000001.")
    assert steps(train) == [1, 2, 3, 4, 5, 6]
    view = RunDirectory.open(train.parent / "run").log.read()
    assert sorted(commit.step for commit in view.outside()) == [2, 3, 4]
    assert "going on from step 1 (as asked; newer steps are left behind)" in done.said  # type: ignore[attr-defined]
    assert "3 steps behind the newest attempt" in done.said  # type: ignore[attr-defined]


def damage(train: Path, step: int, name: str) -> None:
    run = RunDirectory.open(train.parent / "run")
    commit = next(c for c in run.log.read().lineage() if c.step == step)
    (train.parent / "run" / run.attempt_path(commit.attempt, name)).write_bytes(b"damaged")


def test_a_damaged_step_is_not_started_from(train: Path) -> None:
    assert resume(train, total=3).returncode == 0
    forget()  # nothing of it is left in RAM
    damage(train, 3, "r00000.part")
    done = resume(train)
    assert done.returncode == 12
    assert len(starts(train)) == 1
    assert "step 3 is damaged" in done.said  # type: ignore[attr-defined]
    done = resume(train, "--allow-older", total=5)
    assert done.returncode == 0, done.said  # type: ignore[attr-defined]
    assert "going on from step 2 (the newest that is whole: step 3 is damaged)" in done.said  # type: ignore[attr-defined]
    assert steps(train) == [1, 2, 3, 4, 5]
    assert ckpt.load(train.parent / "run") == {"n": 5}


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, "-m", "ckpt.cli", "resume", *words], {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_dry_run_and_wrong_usage(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with ckpt.Checkpointer(url) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"n": step}, blocking=True)
    done = cli("--dry-run", "--json", "--step", "2", url, "--", "never-started")
    found = json.loads(done.stdout)
    names = ("step", "back", "world", "newest_attempt", "behind")
    assert [found[name] for name in names] == [2, True, 1, 3, 1]
    assert found["environment"]["CKPT_RESUME_FROM"] == f"{found['attempt']}@1"
    assert ckpt.load(url) == {"n": 3}
    assert cli("--step", "9", url, "--", "never-started").returncode == NotFound.exit_code
    done = cli(url, "--", "no-such-command")
    assert done.returncode == 2
    assert "no-such-command: No such file or directory" in done.stderr


def test_verdicts() -> None:
    again = [
        judge(1, stopped=False, progressed=True, failures=9),
        judge(137, stopped=False, progressed=False, failures=TRIES - 2),
        judge(Corrupt.exit_code, stopped=False, progressed=False, failures=0, allow_older=True),
    ]
    assert [verdict.code for verdict in again] == [None] * 3
    ends = [
        judge(0, stopped=True, progressed=False, failures=0),
        judge(143, stopped=False, progressed=False, failures=0),
        judge(1, stopped=True, progressed=False, failures=0),
        judge(1, stopped=False, progressed=False, failures=TRIES - 1),
        judge(Corrupt.exit_code, stopped=False, progressed=True, failures=0),
    ]
    assert [verdict.code for verdict in ends] == [0, 143, 1, 1, Corrupt.exit_code]
    assert judge(0, stopped=False, progressed=True, failures=0) == Verdict(0, "it ended well")


def test_going_back_can_be_undone(tmp_path: Path) -> None:
    """A mistyped number costs nothing: what was left behind can be asked for by its step."""
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"n": step}, blocking=True)
        checkpointer.restore({"n": 0}, step=1)
    script = tmp_path.with_name("again.py")
    script.write_text(
        "import ckpt, sys\n"
        "with ckpt.Checkpointer() as checkpointer:\n"
        "    state = {'n': 0}\n"
        "    assert checkpointer.restore(state) == 3, state\n"
        "    checkpointer.save(4, {'n': 4}, blocking=True)\n"
    )
    command = [
        sys.executable,
        "-m",
        "ckpt.cli",
        "resume",
        "--step",
        "3",
        str(tmp_path),
        "--",
        sys.executable,
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.all_steps() == [1, 2, 3, 4]
