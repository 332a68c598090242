"""Workers and keepers that are killed with SIGKILL around a save: no step is lost that was copied, and none is a mix.

Every element of step s holds a number made of s and the name of its tensor, so that a mix of two steps shows. First
at chosen points, with one right outcome; then at random instants of a training that saves all the time.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import DEADLINE_S, Outcome, Pool, run_job
from keepers import forget, keepers, until
from points import Point, arm_worker, die, let_keeper_be_armed, set_point
from torch.distributed.checkpoint import FileSystemWriter, load, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import ckpt
from ckpt.run import RunDirectory

TIMEOUT_S = 10
ELEMENTS = {"a": 400_000, "b": 1_500_001, "c": 3}


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


# At chosen points of the save of step 2


def save_and_die(
    rank: int, world: int, url: str, worker: Point | None, victims: list[int], keeper: Point | None
) -> Any:
    """Save step 1; then step 2, in which `victims` die at `worker`, and the keeper, with `victims`, at `keeper`.

    What a survivor heard, and after how many seconds.
    """
    point = Path(url).with_suffix(".point")
    let_keeper_be_armed(point)
    pids: list[Any] = [None] * world
    dist.all_gather_object(pids, os.getpid())
    with ckpt.Checkpointer(url, commit_timeout_s=TIMEOUT_S) as checkpointer:
        checkpointer.save(1, state_of(1, world), blocking=True)
        second = state_of(2, world)
        if worker is not None and rank in victims:
            arm_worker(worker)
        if keeper is not None and rank == 0:
            set_point(point, keeper, [pids[victim] for victim in victims])
        dist.barrier()
        began = time.monotonic()
        try:
            checkpointer.save(2, second, blocking=True)
        except ckpt.CkptError as error:
            return type(error).__name__, str(error), time.monotonic() - began
        return "", "saved", time.monotonic() - began


def restart(rank: int, world: int, url: str) -> tuple[int | None, set[float], set[float]]:
    """Restore, and save and restore once more: the step, and the steps seen in the state each time."""
    state = state_of(7, world)
    with ckpt.Checkpointer(url, commit_timeout_s=TIMEOUT_S) as checkpointer:
        step = checkpointer.restore(state)
        seen = steps_seen(state)
        checkpointer.save(5, state_of(5, world), blocking=True)
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


def check_survivors(outcomes: list[Outcome], victims: list[int], kinds: tuple[str, ...]) -> None:
    for rank, outcome in enumerate(outcomes):
        if rank in victims:
            assert outcome.returncode == -signal.SIGKILL, outcome
            assert not isinstance(outcome.error, TimeoutError), outcome
        else:
            kind, message, seconds = outcome.result
            assert kind in kinds, message
            assert seconds < 2 * TIMEOUT_S


WORKER_POINTS = [  # the point, who dies, the world of the restart, the step it must find
    (("copy", "before", 1), [1], 2, 1),
    (("copy", "before", 2), [0, 1], 3, 1),
    (("copy", "after", 1), [0], 1, 1),
    (("copied", "before", 1), [1], 3, 1),
    (("copied", "after", 1), [0, 1], 1, 2),  # the keeper has all it needs
    (("copied", "after", 1), [0, 1], 4, 2),
]


@pytest.mark.parametrize(("point", "victims", "world", "step"), WORKER_POINTS, ids=str)
def test_workers_die_inside_a_save(
    pool: Pool, tmp_path: Path, point: Point, victims: list[int], world: int, step: int
) -> None:
    outcomes = run_job(save_and_die, 2, str(tmp_path / "run"), point, victims, None)
    check_survivors(outcomes, victims, ("SaveFailed", "DeadlineExceeded"))
    check_restart(pool, str(tmp_path / "run"), world, {step})


KEEPER_POINTS: list[Point] = [
    ("create", "before", 1),
    ("create", "after", 2),
    ("write", "after", 1),
    ("fsync", "before", 1),
    ("seal", "before", 2),
    ("seal", "after", 1),
    ("rename", "before", 2),
    ("put", "before", 1),
    ("put", "after", 2),
    ("put", "before", 3),  # the MANIFEST
    ("put", "after", 3),
    ("commit", "before", 1),
    ("link", "before", 1),
    ("link", "after", 1),
    ("commit", "after", 1),
]


@pytest.mark.parametrize("point", KEEPER_POINTS, ids=str)
def test_the_keeper_dies_and_the_save_goes_on_with_another(pool: Pool, tmp_path: Path, point: Point) -> None:
    url = str(tmp_path / "run")
    outcomes = run_job(save_and_die, 2, url, None, [], point)
    assert not (tmp_path / "run.point").exists(), "the point was never reached"
    check_survivors(outcomes, [], ("",))
    check_restart(pool, url, 3, {2})


@pytest.mark.parametrize(
    ("point", "steps"),
    [
        (("create", "before", 1), {1, 2}),  # perhaps nothing was sealed yet
        (("seal", "after", 2), {2}),
        (("put", "after", 1), {1, 2}),
        (("put", "before", 3), {2}),
        (("put", "after", 3), {2}),
        (("commit", "before", 1), {2}),
        (("commit", "after", 1), {2}),
    ],
    ids=str,
)
def test_keeper_and_workers_die_together(pool: Pool, tmp_path: Path, point: Point, steps: set[int]) -> None:
    url = str(tmp_path / "run")
    outcomes = run_job(save_and_die, 2, url, None, [0, 1], point)
    assert not (tmp_path / "run.point").exists(), "the point was never reached"
    check_survivors(outcomes, [0, 1], ())
    check_restart(pool, url, 2, steps)


# At random instants of a training that saves every step


class SetTo(torch.optim.Optimizer):
    """Sets every parameter to the numbers of a step."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__([{"params": [value], "name": name} for name, value in parameters.items()], {})
        self.step_number = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.step_number += 1
        for group in self.param_groups:
            group["params"][0].fill_(_number(self.step_number, group["name"]))


def trained(world: int, step: int) -> tuple[dict[str, Any], SetTo]:
    tensors = {key: value for key, value in state_of(step, world).items() if key != "step"}
    parameters = {name: torch.nn.Parameter(value) for name, value in tensors.items()}
    optimizer = SetTo(parameters)
    optimizer.step_number = step
    return {**parameters, "optim": optimizer, "step": step}, optimizer


def train(rank: int, world: int, url: str, budget: int | None) -> int:
    """Save every step until somebody says stop; keeps a note of the newest step that was copied. The last step."""
    note, stop = Path(f"{url}.copied.{rank}"), Path(f"{url}.stop")
    state, optimizer = trained(world, 0)
    (Path(f"{url}.pid.{rank}")).write_text(str(os.getpid()))
    with ckpt.Checkpointer(url, commit_timeout_s=TIMEOUT_S, ram_budget_bytes=budget) as checkpointer:
        checkpointer.restore(state)
        step = 0
        while True:
            step += 1
            optimizer.step()
            state["step"] = step
            handle = checkpointer.save(step, state, blocking=step == 1)
            torch.mm(torch.ones(300, 300), torch.ones(300, 300))  # the next step's forward and backward
            handle.wait_copied()
            unfinished = Path(f"{note}.new")
            unfinished.write_text(str(step))
            unfinished.rename(note)  # the kill may come at any instant
            ended = torch.tensor(float(stop.exists()))
            dist.all_reduce(ended, dist.ReduceOp.MAX)
            if ended:
                return step


def resume(rank: int, world: int, url: str) -> tuple[int | None, set[float]]:
    state, _ = trained(world, 9999)
    with ckpt.Checkpointer(url, commit_timeout_s=TIMEOUT_S) as checkpointer:
        step = checkpointer.restore(state)
        del state["optim"]
        return step, steps_seen(state)


def random_kill(pool: Pool, path: Path, seed: int) -> None:
    """Kill some workers, the keeper, or both, a random while after the first step was copied."""
    forget()
    draw = random.Random(seed)
    path.mkdir()
    url, world = str(path / "run"), 2
    victims, keeper = draw.choice([([0], False), ([0, 1], False), ([], True), ([1], True), ([0, 1], True)])
    delay, budget, other = draw.uniform(0, 0.5), draw.choice([None, None, 0]), draw.randint(1, 4)
    print(f"seed {seed}: kill workers {victims}, keeper {keeper}, after {delay:.3f} s; budget {budget}, then {other}")
    notes = [Path(f"{url}.copied.{rank}") for rank in range(world)]
    committed = [0]

    def kill() -> None:
        try:
            until("a step is copied on every rank", lambda: all(note.exists() for note in notes))
            time.sleep(delay)  # the instant is the test's subject
            committed[0] = _committed(url)
            pids = [int(Path(f"{url}.pid.{rank}").read_text()) for rank in victims]
            for pid in [*pids, *(keepers(os.environ["CKPT_RAM_DIR"]) if keeper else [])]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not victims and budget != 0:
                at = max(_noted(notes))
                until("training goes on", lambda: min(_noted(notes)) > at + 3)
        finally:
            Path(f"{url}.stop").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    outcomes = run_job(train, world, url, budget)
    killer.join()
    results = pool.results(resume, other, url)
    step = results[0][0]
    untouched = 9999.0
    assert results == [(step, {untouched if step is None else float(step)})] * other, (seed, outcomes)
    noted = _noted(notes)
    if not victims and budget != 0:
        assert [outcome.result for outcome in outcomes] == [step] * world, (seed, outcomes)
    least = committed[0] if keeper or budget == 0 else min(noted)
    assert least <= (step or 0) <= max(noted) + 1, (seed, least, noted, outcomes)


def _committed(url: str) -> int:
    head = RunDirectory.open(url).log.read().head
    return head.step if head else 0


def _noted(notes: Iterable[Path]) -> list[int]:
    return [int(note.read_text()) for note in notes]


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_a_random_instant(pool: Pool, tmp_path: Path, seed: int) -> None:
    random_kill(pool, tmp_path / "job", seed)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_killed_at_200_random_instants(pool: Pool, tmp_path: Path) -> None:
    for seed in range(100, 300):
        random_kill(pool, tmp_path / str(seed), seed)


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
    assert all(outcome.returncode for outcome in outcomes), outcomes  # the one that dies later may abort instead
    answers = pool.results(dcp_restart, 2, path)
    seen = set().union(*(steps for _, steps in answers))
    verdict = "a mix of steps" if len(seen) > 1 else f"step {seen.pop():g}" if seen else "a failure"
    record_property("dcp", f"{verdict}: {answers}")
    print(f"DCP, killed while overwriting in place, returned {verdict}: {answers}")

    ours = str(tmp_path / "ours")
    outcomes = run_job(ours_and_die, 2, ours)
    assert [outcome.returncode for outcome in outcomes] == [-signal.SIGKILL] * 2, outcomes
    assert check_restart(pool, ours, 2, {1}) == 1


def ours_and_die(rank: int, world: int, url: str) -> None:
    save_and_die(rank, world, url, ("copied", "before" if rank else "after", 1), [0, 1], None)
