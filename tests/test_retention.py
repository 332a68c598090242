"""What stays and what leaves: the rule on logs that are written out here, and real runs that delete real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from keepers import forget, keepers, until

import ckpt
from ckpt import Best, Keep
from ckpt import holder as holder_module
from ckpt.cli import change, cli
from ckpt.holder import Holder, apply_retention, find_commit
from ckpt.log import View, decide_retire, replay
from ckpt.readers import restore_or_fall_back
from ckpt.records import Commit, Entry, Pin, Retire, Start
from ckpt.restorer import Relaxed, StepReader
from ckpt.retention import plan_retention
from ckpt.run import RunDirectory
from ckpt.stores.posix import PosixStore


def start(generation: int, base: int | None = None) -> Start:
    attempt = None if base is None else name(base)
    facts: dict[str, Any] = {"host": "h", "pid": 1, "boot_id": "b", "unix_s": 0.0}
    return Start(generation=generation, nonce=f"s{generation}", run_id=None, reason="", base=attempt, **facts)


def name(step: int, of: str = "a") -> str:
    return f"{step:09d}.{of}"


def commit(generation: int, step: int, parent: int | None, of: str = "a", **metrics: float) -> Commit:
    attempt, before = name(step, of), None if parent is None else name(parent)
    facts: dict[str, Any] = {"manifest_digest": "00", "content_digest": "00", "manifest_bytes": 1, "nbytes": 1}
    return Commit(
        generation=generation, nonce=f"c{generation}.{step}{of}", step=step, attempt=attempt, parent=before,
        metrics=metrics, world=1, unix_s=0.0, **facts
    )  # fmt: skip


def line(*steps: int, **metrics: list[float]) -> list[Entry]:
    """One generation that committed these steps."""
    parents = [None, *steps[:-1]]
    rows = [{key: values[i] for key, values in metrics.items()} for i in range(len(steps))]
    return [start(1), *(commit(1, s, p, **row) for s, p, row in zip(steps, parents, rows, strict=True))]


def kept(view: View, keep: Keep, **more: Any) -> list[int]:
    plan = plan_retention(view, keep, **more)
    assert set(plan.kept) | {found.attempt for found in plan.leaving} == set(view.commits) - view.retired
    assert not set(plan.kept) & set(plan.attempts)
    return sorted(view.commits[attempt].step for attempt in plan.kept)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (Keep(), [900]),
        (Keep(last=3), [700, 800, 900]),
        (Keep(last=99), [100, 200, 300, 400, 500, 600, 700, 800, 900]),
        (Keep(last=1, every=400), [100, 400, 800, 900]),
        (Keep(last=1, best=Best("loss")), [400, 900]),
        (Keep(last=1, best=Best("loss", keep=2)), [300, 400, 900]),
        (Keep(last=1, best=Best("loss", "max", 2)), [500, 600, 900]),
        (Keep(last=1, best=Best("other")), [900]),
    ],
)
def test_the_rule(keep: Keep, expected: list[int]) -> None:
    nan = float("nan")
    view = replay(line(*range(100, 1000, 100), loss=[5, 4, 1, 1, 9, 8, nan, float("-inf"), 3]))
    assert kept(view, keep) == expected


def test_pins_and_the_step_this_generation_went_on_from_stay() -> None:
    records = [*line(1, 2, 3), Pin(nonce="p", attempt=name(1), name="good"), start(2, base=2)]
    view = replay([*records, commit(2, 5, 2), commit(2, 6, 5)])
    assert kept(view, Keep()) == [1, 2, 6]  # step 3 was left behind, and passed since


def test_what_was_left_behind_stays_until_the_run_has_passed_it() -> None:
    view = replay([*line(1, 5), start(2, base=1), commit(2, 3, 1)])
    assert kept(view, Keep()) == [1, 3, 5]
    assert kept(view.after(commit(2, 6, 3)), Keep()) == [1, 6]


def test_attempts_that_were_never_committed_leave_once_they_are_passed() -> None:
    view = replay(line(1, 5))
    present = [name(1), name(5), name(4, "dead"), name(5, "dead"), name(6, "new"), name(3, "busy")]
    plan = plan_retention(view, Keep(), present, in_flight={name(3, "busy")})
    assert plan.abandoned == (name(4, "dead"), name(5, "dead"))


def test_a_run_without_a_step_keeps_everything() -> None:
    assert plan_retention(replay([start(1)]), Keep(), [name(3)]).attempts == ()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Keep(last=0),
        lambda: Keep(last=10**30),
        lambda: Keep(last=True),
        lambda: Keep(every=-1),
        lambda: Keep(best="loss"),  # type: ignore[arg-type]
        lambda: Best("loss", "least"),  # type: ignore[arg-type]
        lambda: Best("loss", keep=0),
        lambda: Best(""),
        lambda: ckpt.Checkpointer("unused", keep=3),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_rule_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"Keep|Best"):
        make()


# Real runs


def state_of(step: int) -> dict[str, Any]:
    return {"weight": torch.full((5000,), float(step)), "step": step}


def train(path: Path, steps: range, keep: Keep | None, first: int | None = None) -> None:
    with ckpt.Checkpointer(path, keep=keep) as checkpointer:
        if first is not None:
            assert checkpointer.restore(state_of(0)) == first
        for step in steps:
            checkpointer.save(step, state_of(step), metrics={"loss": abs(step - 4)})
    until("the keeper has deleted, and ended", lambda: not keepers(os.environ["CKPT_RAM_DIR"]))


def on_disk(path: Path) -> list[int]:
    return sorted(int(attempt.name.partition(".")[0]) for attempt in (path / "steps").iterdir())


def steps_of(path: Path) -> list[int]:
    return [found.step for found in RunDirectory.open(path).log.read().standing()]


def test_a_run_deletes_what_it_does_not_keep_and_goes_on(tmp_path: Path) -> None:
    train(tmp_path, range(1, 11), Keep(last=2, every=6, best=Best("loss")))
    assert steps_of(tmp_path) == on_disk(tmp_path) == [1, 4, 6, 9, 10]
    train(tmp_path, range(11, 14), Keep(last=1), first=10)
    assert steps_of(tmp_path) == on_disk(tmp_path) == [10, 13]  # it went on from step 10
    with pytest.raises(ckpt.NotFound, match="no step 4"):
        ckpt.restore(tmp_path, state_of(0), step=4)
    state = state_of(0)
    assert ckpt.restore(tmp_path, state) == 13
    assert torch.equal(state["weight"], state_of(13)["weight"])


def test_without_a_rule_nothing_is_deleted(tmp_path: Path) -> None:
    train(tmp_path, range(1, 8), None)
    assert on_disk(tmp_path) == list(range(1, 8))


def test_what_a_crash_left_after_the_record_is_deleted_the_next_time(tmp_path: Path) -> None:
    train(tmp_path, range(1, 4), None)
    run = RunDirectory.open(tmp_path)
    view = run.log.read()
    assert view.holder is not None
    leaving, holder = [found.attempt for found in view.lineage()[:2]], view.holder
    record = decide_retire(
        view, generation=holder.generation, holder_nonce=holder.nonce, nonce="dead", attempts=leaving
    )
    assert run.log.append(lambda view: record) == record
    assert (steps_of(tmp_path), on_disk(tmp_path)) == ([3], [1, 2, 3])
    train(tmp_path, range(4, 5), Keep(last=5), first=3)
    assert on_disk(tmp_path) == [3, 4]


def test_only_what_we_wrote_is_deleted_and_no_link_is_followed(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    train(run, range(1, 4), None)
    first, second, _ = sorted((run / "steps").iterdir())
    (first / "Notes of mine.txt").write_text("kept")
    (first / ".tmp-mine").mkdir()
    (first / ".tmp-mine" / "thesis").write_text("kept")
    elsewhere.mkdir()
    for file in ("r00000.part", "a letter"):
        (elsewhere / file).write_text("not ours")
    for file in second.iterdir():
        file.unlink()
    second.rmdir()
    second.symlink_to(elsewhere)
    (run / "steps" / "lost+found").mkdir()
    train(run, range(4, 5), Keep(), first=3)
    assert sorted(file.name for file in first.rglob("*")) == [".tmp-mine", "Notes of mine.txt", "thesis"]
    assert second.is_symlink()
    assert sorted(file.name for file in elsewhere.iterdir()) == ["a letter", "r00000.part"]
    assert (run / "steps" / "lost+found").is_dir()
    assert steps_of(run) == [3, 4]


def test_a_stale_holder_deletes_nothing(tmp_path: Path) -> None:
    train(tmp_path, range(1, 5), None)
    run = RunDirectory.open(tmp_path)
    stale = run.log.read().holder
    assert stale is not None
    Holder(RunDirectory.open(tmp_path), run_id=None, takeover=True).take("newer")
    with pytest.raises(ckpt.Fenced):
        apply_retention(run, Keep(), stale.generation, stale.nonce)
    assert on_disk(tmp_path) == [1, 2, 3, 4]


def test_more_attempts_leave_than_one_record_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step refers to is not retired before the step: newer ones go first, and no record is refused."""
    monkeypatch.setattr(holder_module, "RETIRED_AT_ONCE", 3)
    weights = torch.randn(200_000)
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        for step in range(1, 9):
            checkpointer.save(step, {"w": weights, "n": torch.randn(2_000)}, blocking=True)
        checkpointer.save(9, {"w": weights + 1, "n": torch.randn(2_000)}, blocking=True)
    assert any(commit.sources for commit in RunDirectory.open(tmp_path).log.read().lineage())
    CliRunner().invoke(cli, ["gc", str(tmp_path), "--last", "1", "--takeover"], catch_exceptions=False)
    assert steps_of(tmp_path) == on_disk(tmp_path) == [9]


def test_what_cannot_be_deleted_does_not_keep_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, range(1, 6), None)
    clear = PosixStore.clear
    broken = next(each for each in (tmp_path / "steps").iterdir() if each.name.startswith("000000002."))

    def failing(store: PosixStore, directory: str, ours: Any) -> list[str]:
        if broken.name in directory:
            raise ckpt.StorageError(f"clear {directory}: the device failed")
        return clear(store, directory, ours)

    monkeypatch.setattr(PosixStore, "clear", failing)
    words = ["gc", str(tmp_path), "--last", "1", "--takeover"]
    assert isinstance(CliRunner().invoke(cli, words).exception, ckpt.StorageError)
    assert on_disk(tmp_path) == [2, 5]
    monkeypatch.undo()
    CliRunner().invoke(cli, words, catch_exceptions=False)
    assert on_disk(tmp_path) == [5]


def test_a_job_that_starts_while_the_command_decides_is_not_fenced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, range(1, 4), None)
    train(tmp_path.with_name("other"), range(5, 6), None)
    forget()

    def job_starts(*_: Any) -> None:
        Holder(RunDirectory.open(tmp_path), run_id="another", takeover=True).take("a job")

    monkeypatch.setattr(change, "require_idle", job_starts)
    for words in (["gc", str(tmp_path), "--last", "1"], ["cp", str(tmp_path.with_name("other")), str(tmp_path)]):
        refused = CliRunner().invoke(cli, words).exception
        assert isinstance(refused, ckpt.Fenced), words
        assert on_disk(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_reader_that_loses_the_race_takes_the_newest_or_says_so(tmp_path: Path, by_hand: bool) -> None:
    from ckpt.ranks import Alone

    train(tmp_path, range(1, 3), None)
    run = RunDirectory.open(tmp_path)
    old = find_commit(run.log.read(), 1)  # the reader has chosen; now the run goes on
    train(tmp_path, range(3, 5), Keep(), first=2)
    state = state_of(0)

    def read() -> Commit:
        return restore_or_fall_back(Alone(), run, old, state, Relaxed(), False, list, chosen=by_hand)

    if by_hand:
        with pytest.raises(ckpt.NotFound, match=r"step 1 .* was deleted by retention"):
            read()
    else:
        assert read().step == 4
        assert state["step"] == 4


@pytest.mark.parametrize("by_hand", [False, True])
def test_whole_tensors_that_lose_the_race_come_from_the_newest_or_it_says_so(
    tmp_path: Path, by_hand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, range(1, 3), None)

    class Late(StepReader):
        """Has chosen, and is overtaken by the run before it reads."""

        def __init__(self, *given: Any) -> None:
            monkeypatch.undo()
            train(tmp_path, range(3, 5), Keep(), first=2)
            super().__init__(*given)

    monkeypatch.setattr("ckpt.loader.StepReader", Late)
    if by_hand:
        with pytest.raises(ckpt.NotFound, match=r"step 1 .* was deleted by retention"):
            ckpt.load(tmp_path, step=1)
    else:
        monkeypatch.setattr("ckpt.loader.find_commit", lambda view, step: find_commit(view, 1))
        assert ckpt.load(tmp_path)["step"] == 4


# The command


def gc(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ckpt.cli", "gc", *words], capture_output=True, text=True, check=False)


def test_the_command_does_what_its_dry_run_says(tmp_path: Path) -> None:
    code = f"import test_retention as t, pathlib; t.train(pathlib.Path({str(tmp_path)!r}), range(1, 9), None)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, timeout=120)
    (tmp_path / "steps" / "000000007.dead").mkdir()
    rule = [str(tmp_path), "--last", "2", "--best", "loss", "--json"]
    said = json.loads(gc(*rule, "--dry-run").stdout)
    assert on_disk(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 7, 8]
    done = json.loads(gc(*rule).stdout)
    assert (said.pop("dry_run"), done.pop("dry_run")) == (True, False)
    assert said == done
    assert [step["step"] for step in done["deleted"]] == [1, 2, 3, 5, 6]
    assert done["abandoned"] == ["000000007.dead"]
    assert {step["step"]: step["why"] for step in done["kept"]} == {
        4: "among the best 1 by loss",
        7: "among the last 2",
        8: "among the last 2",
    }
    assert steps_of(tmp_path) == on_disk(tmp_path) == [4, 7, 8]
    again = gc(*rule[:-1])
    assert "0 attempts deleted" in again.stdout


def test_the_command_leaves_a_run_alone_that_a_job_holds(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        for step in range(1, 4):
            checkpointer.save(step, state_of(step), blocking=True)
        refused = gc(str(tmp_path), "--last", "1")
        assert refused.returncode == 11
        assert f"pid {os.getpid()}" in refused.stderr
        assert on_disk(tmp_path) == [1, 2, 3]
        assert gc(str(tmp_path), "--last", "1", "--dry-run").returncode == 0
    assert gc(str(tmp_path), "--last", "1", "--takeover").returncode == 0
    assert on_disk(tmp_path) == [3]


def test_the_step_that_a_job_went_on_from_outlives_the_command_however_often_it_is_called(tmp_path: Path) -> None:
    """A start of gc itself reads nothing back: after it the head alone would stay, which nobody has read."""
    command = ["gc", str(tmp_path), "--last", "1", "--takeover"]
    train(tmp_path, range(1, 3), None)
    train(tmp_path, range(3, 6), None, first=2)
    for _ in range(3):
        CliRunner().invoke(cli, command, catch_exceptions=False)
        assert steps_of(tmp_path) == on_disk(tmp_path) == [2, 5]
    train(tmp_path, range(6, 7), None, first=5)
    CliRunner().invoke(cli, command, catch_exceptions=False)
    assert steps_of(tmp_path) == on_disk(tmp_path) == [5, 6]


def test_the_command_adopts_what_a_job_left_complete(tmp_path: Path) -> None:
    """A crash between MANIFEST and commit record; the next start adopts only from the generation before it."""
    train(tmp_path, range(1, 5), None)
    newest = max((tmp_path / "log").iterdir())
    assert isinstance(_records(tmp_path)[-1], Commit)
    newest.unlink()
    assert steps_of(tmp_path) == [1, 2, 3]
    assert gc(str(tmp_path), "--last", "2", "--takeover").returncode == 0
    assert steps_of(tmp_path) == on_disk(tmp_path) == [2, 3, 4]


def test_a_retire_record_outlives_the_keeper(tmp_path: Path) -> None:
    """The keeper deletes before it ends, so a job that ends leaves what its rule keeps."""
    with ckpt.Checkpointer(tmp_path, keep=Keep(last=1)) as checkpointer:
        for step in range(1, 6):
            checkpointer.save(step, state_of(step))
    until("the keeper has deleted, and ended", lambda: not keepers(os.environ["CKPT_RAM_DIR"]))
    assert on_disk(tmp_path) == [5]
    assert any(isinstance(record, Retire) for record in _records(tmp_path))


def _records(path: Path) -> list[Entry]:
    from ckpt.records import decode_record

    return [decode_record(file.read_bytes()) for file in sorted((path / "log").iterdir())]


def test_the_best_step_is_that_of_the_rule_or_of_the_metric_that_is_asked_for(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, keep=Keep(last=9, best=Best("loss"))) as checkpointer:
        assert checkpointer.best_step() is None
        for step, loss, accuracy in ((1, 0.5, 0.1), (2, 0.2, 0.9), (3, 0.2, 0.3), (4, float("nan"), 0.2)):
            checkpointer.save(step, {"n": step}, metrics={"loss": loss, "accuracy": accuracy}, blocking=True)
        assert checkpointer.best_step() == 3
        assert checkpointer.best_step(Best("accuracy", "max")) == 2
        assert checkpointer.best_step(Best("unknown")) is None
    with (
        ckpt.Checkpointer(tmp_path) as checkpointer,
        pytest.raises(ckpt.Incompatible, match=r'Best\("val_loss"\)'),
    ):
        checkpointer.best_step()


LEFT = """
import os, signal, sys
import torch, ckpt

checkpointer = ckpt.Checkpointer(sys.argv[1])
for step in (1, 2, 3):
    checkpointer.save(step, {"w": torch.full((4,), float(step))}).wait()
print("go", flush=True)
sys.stdin.readline()
checkpointer.save(4, {"w": torch.full((4,), 4.0)}).wait_copied()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("words", [("gc", "--last", "1"), ("delete", "1")])
def test_what_a_dead_job_left_in_memory_is_stored_before_the_command_takes_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(change, "SETTLE_S", 1.0)
    url = str(tmp_path / "run")
    command = [words[0], url, *words[1:]]
    with subprocess.Popen([sys.executable, "-c", LEFT, url], stdin=-1, stdout=-1, text=True) as job:
        assert job.stdin is not None
        assert job.stdout is not None
        assert job.stdout.readline() == "go\n"
        (keeper,) = keepers(os.environ["CKPT_RAM_DIR"])
        os.kill(keeper, signal.SIGSTOP)  # a store that takes its time
        print("", file=job.stdin, flush=True)
    try:
        refused = CliRunner().invoke(cli, command).exception
        assert isinstance(refused, ckpt.Fenced)
        assert "not stored yet" in str(refused)
        assert RunDirectory.open(url).log.read().generation == 1
    finally:
        os.kill(keeper, signal.SIGCONT)
    until("it can be done", lambda: CliRunner().invoke(cli, command).exit_code == 0)
    assert ckpt.load(url)["w"].tolist() == [4.0] * 4


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a namespace of process ids")
def test_a_job_whose_process_ids_are_not_seen_here_may_live(tmp_path: Path) -> None:
    """As in another container of the same host: in ours there is no process of its number."""
    train(tmp_path, range(1, 4), None)
    forget()
    command = [sys.executable, "-m", "ckpt.cli", "gc", str(tmp_path), "--last", "1"]
    done = subprocess.run(["unshare", "-pf", "--mount-proc", *command], capture_output=True, text=True, check=False)
    assert (done.returncode, "may still run" in done.stderr) == (11, True), done
    assert on_disk(tmp_path) == [1, 2, 3]


def test_the_dry_run_names_what_a_crash_left_of_deleted_steps(tmp_path: Path) -> None:
    train(tmp_path, range(1, 4), None)
    run = RunDirectory.open(tmp_path)
    first = run.log.read().standing()[0].attempt
    holder = Holder(run, run_id=None, takeover=True)
    started = holder.take("gc")
    run.log.append(
        lambda view: decide_retire(
            view, generation=started.generation, holder_nonce=started.nonce, nonce="r", attempts=[first]
        )
    )
    found = json.loads(gc(str(tmp_path), "--last", "9", "--dry-run", "--json").stdout)
    assert (found["deleted"], found["unfinished"]) == ([], [first])
    assert "its deletion was cut short" in gc(str(tmp_path), "--last", "9", "--takeover").stdout
    assert on_disk(tmp_path) == [2, 3]
