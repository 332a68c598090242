"""Ranks that are killed with SIGKILL inside a save: the survivors hear of it, and a restart finds one whole step.

Every element of step s holds a number made of s and the name of its tensor, so that a mix of two steps shows. The
points at which a rank dies are calls of the save and of the file system, before or after the n-th of them.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import DEADLINE_S, Outcome, Pool, run_job
from torch.distributed.checkpoint import FileSystemWriter, load, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import ckpt
import ckpt.saver
import ckpt.transfer
from ckpt.holder import Holder
from ckpt.stores.posix import PosixStore

TIMEOUT_S = 10
ELEMENTS = {"a": 400_000, "b": 1_500_001, "c": 3}

CALLS: dict[str, tuple[Any, str]] = {
    "write_data": (ckpt.saver, "write_data"),
    "write_run": (ckpt.transfer, "_write_run"),
    "put": (PosixStore, "put"),
    "create": (PosixStore, "create"),
    "commit": (Holder, "commit"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "link": (os, "link"),
}


def state_of(step: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,))
    tensors: dict[str, Any] = {
        name: distribute_tensor(torch.full((n,), _number(step, name)), mesh, [Shard(0)], src_data_rank=None)
        for name, n in ELEMENTS.items()
    }
    return {**tensors, "whole": torch.full((300_000,), _number(step, "whole")), "step": step}


def _number(step: int, name: str) -> float:
    return step * 1000.0 + len(name) + ord(name[0])


def steps_seen(state: dict[str, Any]) -> set[float]:
    """The steps whose numbers stand in `state`; more than one is a mix."""
    found: set[float] = {float(state["step"])}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            local = value.to_local() if isinstance(value, DTensor) else value
            found |= {(number - _number(0, name)) / 1000 for number in local.unique().tolist()}
    return found


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(name: str, when: str, nth: int) -> None:
    """From now on: die before or after the n-th call of `name`."""
    owner, attribute = CALLS[name]
    call: Callable[..., Any] = getattr(owner, attribute)
    calls, lock = [0], threading.Lock()

    def armed(*args: Any, **kwargs: Any) -> Any:
        with lock:
            calls[0] += 1
            last = calls[0] == nth
        if last and when == "before":
            die()
        result = call(*args, **kwargs)
        if last:
            die()
        return result

    setattr(owner, attribute, armed)


def save_and_die(rank: int, world: int, url: str, points: Sequence[tuple[str, str, int]], victims: list[int]) -> Any:
    """Save step 1; victims arm themselves; save step 2. What a survivor heard, and after how many seconds."""
    with ckpt.Checkpointer(url, commit_timeout_s=TIMEOUT_S) as checkpointer:
        checkpointer.save(1, state_of(1, world))
        second = state_of(2, world)
        if rank in victims:
            for point in points:
                arm(*point)
        dist.barrier()
        began = time.monotonic()
        try:
            checkpointer.save(2, second)
        except ckpt.CkptError as error:
            return type(error).__name__, str(error), time.monotonic() - began
        return "", "saved", time.monotonic() - began


def restart(rank: int, world: int, url: str) -> tuple[int | None, set[float], set[float]]:
    """Restore, and save and restore once more: the step, and the steps seen in the state each time."""
    state = state_of(7, world)
    with ckpt.Checkpointer(url, commit_timeout_s=TIMEOUT_S) as checkpointer:
        step = checkpointer.restore(state)
        seen = steps_seen(state)
        checkpointer.save(5, state_of(5, world))
        checkpointer.restore(state)
        return step, seen, steps_seen(state)


def check_restart(pool: Pool, url: str, world: int, allowed: set[int]) -> int:
    """The same whole step on every rank, one of `allowed`; returns it."""
    outcomes = pool.results(restart, world, url)
    step = outcomes[0][0]
    assert step in allowed
    assert outcomes == [(step, {float(step)}, {5.0})] * world
    assert {name: value for name, value in ckpt.load(url).items() if name == "step"} == {"step": 5}
    return step


def check_survivors(outcomes: list[Outcome], victims: list[int]) -> None:
    for rank, outcome in enumerate(outcomes):
        if rank in victims:
            assert outcome.returncode == -signal.SIGKILL, outcome
            assert not isinstance(outcome.error, TimeoutError), outcome
        else:
            kind, message, seconds = outcome.result
            assert kind in ("SaveFailed", "DeadlineExceeded"), message
            assert seconds < 2 * TIMEOUT_S


# (the point, who dies, the world of the restart, the step it must find)
POINTS = [
    (("write_data", "before", 1), [1], 2, 1),
    (("write_run", "before", 2), [0, 1], 3, 1),
    (("fsync", "before", 1), [0], 1, 1),
    (("write_data", "after", 1), [1], 3, 1),
    (("rename", "before", 1), [0, 1], 2, 1),
    (("put", "after", 1), [1], 1, 1),
    (("put", "before", 2), [0], 2, 1),  # MANIFEST
    (("put", "after", 2), [0], 3, 2),  # complete but for its commit record: adopted
    (("link", "before", 1), [0], 1, 2),
    (("link", "after", 1), [0], 2, 2),
    (("commit", "after", 1), [0], 4, 2),
]


@pytest.mark.parametrize(
    ("point", "victims", "world", "step"), POINTS, ids=lambda v: "-".join(map(str, v)) if isinstance(v, tuple) else None
)
def test_killed_inside_a_save(
    pool: Pool, tmp_path: Path, point: tuple[str, str, int], victims: list[int], world: int, step: int
) -> None:
    outcomes = run_job(save_and_die, 2, str(tmp_path), [point], victims)
    check_survivors(outcomes, victims)
    assert check_restart(pool, str(tmp_path), world, {step}) == step


def random_kill(pool: Pool, url: str, seed: int) -> None:
    """Kill some ranks at points drawn from `seed`; the save may also be over before they come."""
    draw = random.Random(seed)
    points = [(draw.choice(list(CALLS)), draw.choice(["before", "after"]), draw.randint(1, 3)) for _ in range(2)]
    victims = draw.choice([[0], [1], [2], [0, 1, 2], [1, 2]])
    outcomes = run_job(save_and_die, 3, url, points, victims)
    killed = [rank for rank, outcome in enumerate(outcomes) if outcome.returncode is not None]
    saved = any(outcome.returncode is None and outcome.result[0] == "" for outcome in outcomes)
    assert set(killed) <= set(victims), (seed, points, outcomes)
    assert not any(isinstance(outcome.error, TimeoutError) for outcome in outcomes), (seed, points, outcomes)
    check_restart(pool, url, draw.randint(1, 4), {2} if saved else {1, 2})


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_points(pool: Pool, tmp_path: Path, seed: int) -> None:
    random_kill(pool, str(tmp_path), seed)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_killed_at_many_random_points(pool: Pool, tmp_path: Path) -> None:
    for seed in range(100, 160):
        random_kill(pool, str(tmp_path / str(seed)), seed)


# torch's own distributed checkpoint, through the same


def dcp_save_and_die(rank: int, world: int, path: str) -> None:
    """Overwrite step 1 by step 2 in place; rank 0 dies after its data is written, rank 1 before."""
    save(state_of(1, world), storage_writer=FileSystemWriter(path, overwrite=True))
    write = FileSystemWriter.write_data

    def dying(self: Any, *args: Any) -> Any:
        if rank == 0:
            write(self, *args).wait()
        die()

    FileSystemWriter.write_data = dying
    save(state_of(2, world), storage_writer=FileSystemWriter(path, overwrite=True))


def dcp_restart(rank: int, world: int, path: str) -> tuple[str, set[float]]:
    state = state_of(7, world)
    try:
        load(state, checkpoint_id=path)
    except Exception as error:
        return f"{type(error).__name__}: {error}", set()
    return "loaded", steps_seen(state)


def test_dcp_killed_while_it_overwrites(
    pool: Pool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """What DCP returns after the kill is recorded, not required; ours must return step 1 whole after the same."""
    path = str(tmp_path / "dcp")
    outcomes = run_job(dcp_save_and_die, 2, path, deadline_s=DEADLINE_S)
    assert [outcome.returncode for outcome in outcomes] == [-signal.SIGKILL] * 2
    answers = pool.results(dcp_restart, 2, path)
    seen = set().union(*(steps for _, steps in answers))
    verdict = "a mix of steps" if len(seen) > 1 else f"step {seen.pop():g}" if seen else "a failure"
    record_property("dcp", f"{verdict}: {answers}")
    print(f"DCP, killed while overwriting in place, returned {verdict}: {answers}")

    ours = str(tmp_path / "ours")
    assert all(outcome.returncode == -signal.SIGKILL for outcome in run_job(ours_and_die, 2, ours))
    assert check_restart(pool, ours, 2, {1}) == 1


def ours_and_die(rank: int, world: int, url: str) -> None:
    save_and_die(rank, world, url, [("write_data", "before" if rank else "after", 1)], [0, 1])
