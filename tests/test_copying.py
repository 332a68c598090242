"""`ckpt cp`: a step arrives whole, verified, in its order, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from jobs import Pool
from keepers import forget
from layouts import assert_same_state, build, full_state
from states import bits

import ckpt
from ckpt import copying
from ckpt.check import check_step
from ckpt.cli import cli
from ckpt.copying import copy_steps
from ckpt.errors import Corrupt, Incompatible
from ckpt.holder import Holder
from ckpt.run import RunDirectory

ROOT = Path(__file__).parent.parent


def state(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    return {"big": torch.randn(1_300_000), "odd": torch.randn(77, 3).bfloat16(), "n": step, "rng": ckpt.Rng()}


@pytest.fixture
def source(tmp_path: Path) -> RunDirectory:
    with ckpt.Checkpointer(tmp_path / "from") as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state(step), blocking=True)
    forget()
    return RunDirectory.open(tmp_path / "from")


def target(tmp_path: Path) -> Holder:
    return Holder(RunDirectory.open(tmp_path / "to", create=True), run_id=None, takeover=False)


def whole(path: Path) -> list[int]:
    """The steps of a run, each checked to the last byte."""
    run = RunDirectory.open(path)
    lineage = run.log.read().standing()
    assert all(check_step(run, commit).findings == () for commit in lineage)
    return [commit.step for commit in lineage]


def test_all_steps_in_their_order(source: RunDirectory, tmp_path: Path) -> None:
    commits = source.log.read().standing()
    made = copy_steps(source, commits, target(tmp_path))
    assert whole(tmp_path / "to") == [1, 2, 3]
    assert [each.content_digest for each in made] == [each.content_digest for each in commits]
    for step in (1, 2, 3):
        assert bits(ckpt.load(tmp_path / "to", step=step)) == bits(ckpt.load(source.url, step=step))
    assert copy_steps(source, commits, target(tmp_path)) == []
    fresh = state(9)
    with ckpt.Checkpointer(tmp_path / "to") as checkpointer:
        assert checkpointer.restore(fresh) == 3
        checkpointer.save(4, fresh, blocking=True)  # and it goes on there
    assert torch.equal(fresh["big"], state(3)["big"])


def test_one_step_alone_and_no_older_one_after_it(source: RunDirectory, tmp_path: Path) -> None:
    first, second, _ = source.log.read().standing()
    copy_steps(source, [second], target(tmp_path))
    assert whole(tmp_path / "to") == [2]
    with pytest.raises(Incompatible, match="steps only grow"):
        copy_steps(source, [first], target(tmp_path))
    assert whole(tmp_path / "to") == [2]


@pytest.mark.parametrize("where", ["data", "header"])
def test_a_damaged_step_does_not_arrive(source: RunDirectory, tmp_path: Path, where: str) -> None:
    commits = source.log.read().standing()
    path = tmp_path / "from" / source.attempt_path(commits[1].attempt, "r00000.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if where == "data" else 40] ^= 4
    path.write_bytes(content)
    with pytest.raises(Corrupt, match=r"r00000\.safetensors"):
        copy_steps(source, commits, target(tmp_path))
    assert whole(tmp_path / "to") == [1]
    content[len(content) // 2 if where == "data" else 40] ^= 4
    path.write_bytes(content)
    copy_steps(source, commits[1:], target(tmp_path))
    assert whole(tmp_path / "to") == [1, 2, 3]


def save_on(rank: int, world: int, url: str) -> Any:
    training = build("fsdp2", rank, world, seed=1)
    training.train(1)
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(1, training.state, blocking=True)
    return full_state(training.model, training.optim)


def restore_on(rank: int, world: int, url: str) -> Any:
    training = build("fsdp2", rank, world, seed=2)
    with ckpt.Checkpointer(url) as checkpointer:
        assert checkpointer.restore(training.state) == 1
    return full_state(training.model, training.optim)


def test_what_was_copied_is_not_copied_again(tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = pool.results(save_on, 3, str(tmp_path / "from"))
    source = RunDirectory.open(tmp_path / "from")
    commits, copied, put = source.log.read().standing(), list[int](), copying._copy_data

    def interrupted(file: Any, part: Any, *rest: Any) -> Any:
        copied.append(part.rank)
        if copied == [0, 1]:
            raise KeyboardInterrupt
        return put(file, part, *rest)

    monkeypatch.setattr(copying, "_copy_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        copy_steps(source, commits, target(tmp_path))
    assert RunDirectory.open(tmp_path / "to").log.read().commits == {}
    copy_steps(source, commits, target(tmp_path))
    assert copied == [0, 1, 1, 2]
    assert whole(tmp_path / "to") == [1]
    assert_same_state(saved, pool.results(restore_on, 2, str(tmp_path / "to")))


def test_into_a_signed_run(source: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without signatures cannot get them later, but its steps can be copied into one that has them."""
    commits = source.log.read().standing()
    monkeypatch.setenv("CKPT_SIGNING_KEY", "5e" * 32)
    copy_steps(source, commits, target(tmp_path))
    assert whole(tmp_path / "to") == [1, 2, 3]
    assert all(
        len(bytes.fromhex(each.manifest_digest)) == 32
        for each in RunDirectory.open(tmp_path / "to").log.read().standing()
    )


def test_the_command(source: RunDirectory, tmp_path: Path) -> None:
    def cp(*words: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, "-m", "ckpt.cli", "cp", *map(str, words)],
            capture_output=True, text=True, env=environment, timeout=120, check=False,
        )  # fmt: skip

    done = cp(f"{source.url}@2", tmp_path / "to")
    assert done.returncode == 0, done.stderr
    assert "step 2: 5.0 MiB copied and verified" in done.stdout
    found = json.loads(cp(source.url, tmp_path / "to", "--json").stdout)
    assert [each["step"] for each in found["copied"]] == [3]
    done = cp(source.url, tmp_path / "to")
    assert "step 3 was there already" in done.stdout
    assert cp(source.url, tmp_path / "to", "--all").returncode == 13
    assert whole(tmp_path / "to") == [2, 3]


@pytest.mark.parametrize("harm", ["a flipped bit", "a lost file", "a shorter file", "nothing"])
def test_what_was_copied_is_trusted_only_where_it_reads_as_what_it_was(
    source: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    commits, copied, put = source.log.read().standing()[:1], list[int](), copying._copy_data

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(copying, "commit_parts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        copy_steps(source, commits, target(tmp_path))
    monkeypatch.undo()
    (path,) = (tmp_path / "to").rglob("r00000.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= harm == "a flipped bit"
    path.write_bytes(content[: -4096 if harm == "a shorter file" else None])
    if harm == "a lost file":
        path.unlink()
    monkeypatch.setattr(copying, "_copy_data", lambda *args: (copied.append(1), put(*args))[1])
    copy_steps(source, commits, target(tmp_path))
    assert whole(tmp_path / "to") == [1]
    assert copied == ([] if harm == "nothing" else [1])


def test_a_step_that_was_deleted_over_there_is_not_said_to_be_there(source: RunDirectory, tmp_path: Path) -> None:
    into = str(tmp_path / "to")
    for words in (["cp", source.url, into, "--all"], ["gc", into, "--last", "1", "--takeover"]):
        CliRunner().invoke(cli, words, catch_exceptions=False)
    refused = CliRunner().invoke(cli, ["cp", f"{source.url}@2", into, "--takeover"]).exception
    assert isinstance(refused, Incompatible)
    assert "step 2 was in" in str(refused)
    again = CliRunner().invoke(cli, ["cp", f"{source.url}@3", into, "--json", "--takeover"], catch_exceptions=False)
    assert json.loads(again.stdout)["there_already"] == [3]


def test_a_copy_of_a_directory_is_another_run_beside_the_first(source: RunDirectory, tmp_path: Path) -> None:
    """As people do it, to try something else from there: both go on at once, on one node."""
    shutil.copytree(source.url, tmp_path / "copy")
    places = (Path(source.url), tmp_path / "copy")
    jobs = [ckpt.Checkpointer(place) for place in places]
    for job in jobs:
        assert job.restore(state(0)) == 3
    for step in (4, 5):
        handles = [job.save(step, state(step)) for job in jobs]
        assert [handle.wait(60).step for handle in handles] == [step, step]
    for job, place in zip(jobs, places, strict=True):
        job.close()
        assert whole(place) == [1, 2, 3, 4, 5]
        assert sorted(RunDirectory.open(place).attempts()) == sorted(RunDirectory.open(place).log.read().commits)
