"""Power cuts at every instant of real saves: each directory that may be left is recovered to the old or the new step.

Real jobs save, go back, adopt and delete; what they and their keepers do to the run's directory is recorded. Every
prefix of that, with subsets of what was not certain to last (`crash`), is laid out and read: what was acknowledged is
there, bit for bit, and nothing is ever a mix, or damaged.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import run_job
from keepers import forget
from states import bits
from test_kill import state_of, steps_seen
from torch.distributed.tensor import DTensor

import ckpt
from ckpt.errors import NotFound
from ckpt.run import RunDirectory
from ckpt.testing import crash

IMAGES = 60  # of each scenario in the normal suite
ALL_IMAGES = int(os.environ.get("HOLDFAST_CRASH_IMAGES", "12000"))  # of all scenarios together, when asked for
RESTORED_EVERY = 60  # images that a job restores, too, and goes on from


def small(step: int, world: int) -> dict[str, Any]:
    """Some pages on each rank, all of them made of the step's number."""
    whole = state_of(step, world)
    return {
        "a": _cut(whole["a"], 3000),
        "b": _cut(whole["b"], 9001),
        "whole": whole["whole"][:2000].clone(),
        "step": step,
    }


def _cut(tensor: DTensor, elements: int) -> DTensor:
    return DTensor.from_local(tensor.to_local()[:elements].clone(), tensor.device_mesh, tensor.placements)


def noise_of(step: int) -> dict[str, torch.Tensor]:
    """A part that never changes, and one that no two steps have in common; neither can be packed to nothing."""
    parts = {"frozen": (20_000, 0), "noise": (3000, step)}
    return {name: torch.randn(n, generator=torch.Generator().manual_seed(seed)) for name, (n, seed) in parts.items()}


class Job:
    """A rank that saves and says what is certain from then on."""

    def __init__(self, rank: int, world: int, url: str, notes: str) -> None:
        os.environ["PYTHONPATH"] = f"{Path(__file__).parent / 'keeper_site'}:{Path(__file__).parent}"
        os.environ[crash.VARIABLE] = f"{url}|{notes}"
        self.rank, self.world, self.url = rank, world, url
        self._note = crash.record(url, notes)

    def open(self, **options: Any) -> ckpt.Checkpointer:
        return ckpt.Checkpointer(self.url, **options)

    def acknowledged(self, step: int) -> None:
        torch.distributed.barrier()
        if self.rank == 0:
            self.note_acknowledged(step)

    def note_acknowledged(self, step: int) -> None:
        self._note(("acknowledged", step))

    def save(self, checkpointer: ckpt.Checkpointer, *steps: int, noisy: bool = False) -> None:
        for step in steps:
            state = small(step, self.world) | (noise_of(step) if noisy else {})
            checkpointer.save(step, state, blocking=True)
            self.acknowledged(step)


def saves(rank: int, world: int, url: str, notes: str) -> None:
    job = Job(rank, world, url, notes)
    with job.open() as checkpointer:
        job.save(checkpointer, 1, 2)


def retention(rank: int, world: int, url: str, notes: str) -> None:
    job = Job(rank, world, url, notes)
    with job.open(keep=ckpt.Keep(last=1)) as checkpointer:
        job.save(checkpointer, 1, 2, 3)


def rollback(rank: int, world: int, url: str, notes: str) -> None:
    job = Job(rank, world, url, notes)
    with job.open() as checkpointer:
        job.save(checkpointer, 1, 2)
        assert checkpointer.restore(small(7, world), step=1) == 1
        job.acknowledged(1)
        job.save(checkpointer, 3)


def adoption(rank: int, world: int, url: str, notes: str) -> None:
    """Everything of step 2 is there but its record; the next job commits it before it goes on."""
    job = Job(rank, world, url, notes)
    with job.open() as checkpointer:
        job.save(checkpointer, 1)
    with job.open() as checkpointer:
        job.save(checkpointer, 2)
        record = max(Path(url, "log").iterdir())
    torch.distributed.barrier()
    if rank == 0:
        forget()
        os.unlink(record)
        fd = os.open(os.path.dirname(record), os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        job.note_acknowledged(1)
    torch.distributed.barrier()
    with job.open() as checkpointer:
        assert checkpointer.restore(small(7, world)) == 2
        job.acknowledged(2)
        job.save(checkpointer, 3)


def references(rank: int, world: int, url: str, notes: str) -> None:
    """Steps 3 to 5 refer to step 2, which stays for them; step 6 needs nothing of them."""
    job = Job(rank, world, url, notes)
    with job.open(keep=ckpt.Keep(last=1)) as checkpointer:
        job.save(checkpointer, 1, 2, 3, 4, 5, noisy=True)
        commits = {commit.step: commit for commit in RunDirectory.open(url).log.read().standing()}
        assert commits[5].sources == (commits[2].attempt,)
        job.save(checkpointer, 6)


def packed(rank: int, world: int, url: str, notes: str) -> None:
    job = Job(rank, world, url, notes)
    with job.open(keep=ckpt.Keep(last=1), compression="zstd") as checkpointer:
        job.save(checkpointer, 1, 2, 3, noisy=True)


Scenario = Callable[[int, int, str, str], None]
SCENARIOS: list[tuple[Scenario, int]] = [
    (saves, 1), (saves, 2), (retention, 1), (rollback, 1), (adoption, 1), (references, 1), (packed, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Scenario, int], list[crash.Note]]:
    """The notes of a scenario on `world` ranks; made at their first use."""
    made: dict[tuple[Scenario, int], list[crash.Note]] = {}

    def notes(scenario: Scenario, world: int) -> list[crash.Note]:
        if (scenario, world) not in made:
            folder = tmp_path_factory.mktemp("recorded")
            run = folder / "run"
            run.mkdir()
            outcomes = run_job(scenario, world, str(run), str(folder / "notes"))
            assert all(outcome.error is None and outcome.returncode is None for outcome in outcomes), outcomes
            forget()
            made[scenario, world] = crash.notes_of(folder / "notes")
            disk = crash.Disk()
            for note in made[scenario, world]:
                if note[0] != "acknowledged":
                    disk.replay(note)
            assert crash.digest_of(disk.tree()) == crash.digest_of(crash.read_tree(run)), "the record lacks something"
        return made[scenario, world]

    return notes


def cuts(notes: list[crash.Note], seed: int, torn: int, seen: set[bytes]) -> Iterator[tuple[int, crash.Tree, set[int]]]:
    """(instant, image that was not `seen`, steps that may be found: 0 is none) for all instants, in order."""
    draw, disk = random.Random(seed), crash.Disk()
    heads = [0, *(note[1] for note in notes if note[0] == "acknowledged")]
    passed = 0
    for instant, note in enumerate(notes):
        if note[0] == "acknowledged":
            passed += 1
            continue
        disk.replay(note)
        allowed = {heads[passed], heads[min(passed + 1, len(heads) - 1)]}
        for tree in disk.images(draw, torn):
            if (digest := crash.digest_of(tree)) not in seen:
                seen.add(digest)
                yield instant, tree, allowed


def check(notes: list[crash.Note], seed: int, limit: int, seen: set[bytes]) -> int:
    """Read `limit` images at most, spread over all instants; how many there were."""
    found = list(cuts(notes, seed, 2, seen))
    chosen = found if len(found) <= limit else random.Random(seed).sample(found, limit)
    expected = dict.fromkeys(range(1, 7))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for number, (instant, tree, allowed) in enumerate(chosen):
            path = Path(folder) / str(number)
            crash.lay_out(tree, path)
            where = f"seed {seed}, instant {instant} of {len(notes)}, after {notes[instant][:2]}"
            step = 0
            for step in standing(path, where):  # the last one is the head
                state = ckpt.load(path, step=step)
                noise = {name: state.pop(name) for name in noise_of(step) if name in state}
                assert steps_seen(state) == {float(step)}, where
                assert all(torch.equal(value, noise_of(step)[name]) for name, value in noise.items()), where
                expected[step] = expected[step] or bits(state)
                assert bits(state) == expected[step], where
            assert step in allowed, f"{where}: found {step}, expected one of {allowed}"
            if number % RESTORED_EVERY == 0:
                goes_on(path, allowed, where)
            shutil.rmtree(path)
    return len(chosen)


def standing(path: Path, where: str) -> list[int]:
    """The steps that the log says are there: each of them must be."""
    try:
        return [commit.step for commit in RunDirectory.open(path).log.read().standing()]
    except NotFound:
        return []
    except ckpt.CkptError as error:
        raise AssertionError(f"{where}: {error!r}") from error


def goes_on(path: Path, allowed: set[int], where: str) -> None:
    """A job finds the old step or the new one there, too, and saves on top of it."""
    state = {"step": 0}
    with ckpt.Checkpointer(path) as checkpointer:
        step = checkpointer.restore(state, only=["step"]) or 0
        assert step in allowed, f"{where}: restored {step}, expected one of {allowed}"
        checkpointer.save(9, {"step": 9}, blocking=True)
    forget()
    assert ckpt.load(path) == {"step": 9}, where


@pytest.mark.parametrize(("scenario", "world"), SCENARIOS)
def test_every_image_is_the_old_step_or_the_new(
    scenario: Scenario, world: int, recorded: Callable[[Scenario, int], list[crash.Note]]
) -> None:
    seed = int(os.environ.get("HOLDFAST_SEED", "1"))
    count = check(recorded(scenario, world), seed, IMAGES, set())
    print(f"{scenario.__name__} on {world}: {count} images, seed {seed}")


@pytest.mark.prove
def test_ten_thousand_images(recorded: Callable[[Scenario, int], list[crash.Note]]) -> None:
    total, seed, seen = 0, 100, {key: set[bytes]() for key in SCENARIOS}
    while total < ALL_IMAGES:
        for scenario, world in SCENARIOS:
            count = check(recorded(scenario, world), seed, ALL_IMAGES, seen[scenario, world])
            print(f"{scenario.__name__} on {world}: {count} images, seed {seed}", flush=True)
            total += count
        seed += 1
    print(f"{total} distinct images")
