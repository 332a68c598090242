"""SIGKILL at every single system call with which a job changes its run's directory, one after the other.

A worker and its keeper, real processes, save three steps in two generations with retention. Each time a reader finds
the old step or the new one, bit for bit; what `wait()` acknowledged is there; the next job restores it and goes on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from keepers import forget
from syscalls import Forge, Plan, forge

import ckpt
from ckpt.errors import CkptError, NotFound
from ckpt.run import RunDirectory

LIMIT = 1000  # more calls than one job makes
KEEP = ckpt.Keep(last=2)


def state(step: int) -> dict[str, Any]:
    return {"a": torch.full((150_000,), float(step)), "b": torch.full((300,), float(step)), "n": step}


def is_whole(found: dict[str, Any], step: int) -> bool:
    return found["n"] == step and all(bool((found[name] == step).all()) for name in "ab")


def job(path: str) -> None:
    """Says each step that `wait()` acknowledged."""
    step = 0
    for saves in (2, 1):
        with ckpt.Checkpointer(path, keep=KEEP) as checkpointer:
            step = checkpointer.restore(state(0)) or 0
            for _ in range(saves):
                step += 1
                checkpointer.save(step, state(step)).wait()
                print(step, flush=True)


@pytest.fixture(scope="module")
def forged() -> Iterator[Forge]:
    with forge() as made:
        yield made


def check_reader(path: Path, acknowledged: int) -> None:
    """The newest step is the old one or the new one; all that stand are whole. A keeper may live, and go on."""
    steps = standing(path)
    assert (steps[-1] if steps else 0) in (acknowledged, acknowledged + 1)
    for step in steps:
        try:
            found = ckpt.load(path, step=step)
        except CkptError:
            assert step not in standing(path), f"step {step} stands, and cannot be read"
        else:
            assert is_whole(found, step)


def standing(path: Path) -> list[int]:
    try:
        return [commit.step for commit in RunDirectory.open(path).log.read().standing()]
    except NotFound:
        return []


def check_next_job(path: Path, acknowledged: int) -> None:
    target = state(0)
    with ckpt.Checkpointer(path, keep=KEEP) as checkpointer:
        step = checkpointer.restore(target) or 0
        assert step in (acknowledged, acknowledged + 1)
        assert is_whole(target, step)
        checkpointer.save(step + 1, state(step + 1), blocking=True)
    forget()
    check_reader(path, step + 1)
    assert standing(path)[-1] == step + 1


@pytest.fixture(scope="module")
def unharmed(forged: Forge, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """What a job does that nobody kills."""
    plan = Plan(str(tmp_path_factory.mktemp("unharmed") / "run"))
    assert len(forged.run("test_kill_syscalls:job", plan)) == 3
    forget()
    assert plan.calls["worker"] > 20
    assert plan.calls["keeper"] > 80
    return plan


def kill_at(forged: Forge, path: Path, plan: Plan) -> None:
    try:
        said = [int(line) for line in forged.run("test_kill_syscalls:job", plan)]
        assert said == list(range(1, len(said) + 1))
        check_reader(path, len(said))
        check_next_job(path, len(said))
        if plan.who == "keeper" and not plan.everybody:
            assert len(said) == 3, "the worker did not go on with another keeper"
    except Exception as error:
        raise AssertionError(f"call {plan.n}, {plan.killed}: {error}") from error


@pytest.mark.parametrize("count", [2, pytest.param(LIMIT, marks=[pytest.mark.prove, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("victim", ["worker", "keeper", "both"])
def test_killed_at_each_call(forged: Forge, unharmed: Plan, tmp_path: Path, victim: str, count: int) -> None:
    who = "worker" if victim == "worker" else "keeper"
    total, seed = unharmed.calls[who], random.randrange(1 << 32)
    print(f"{victim}: {total} calls, seed {seed}")
    killed = 0
    for n in sorted(random.Random(seed).sample(range(1, total + 1), min(count, total))):
        plan = Plan(str(tmp_path / str(n)), who, n, everybody=victim == "both")
        kill_at(forged, tmp_path / str(n), plan)
        print(f"{n} {plan.killed}")
        killed += bool(plan.killed)
    assert killed > min(count, total) // 2  # a run may make some calls less than another
