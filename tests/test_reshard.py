"""What one layout saved, any other restores: bit by bit, at every world size, and the training goes on as it would.

A run is saved once per layout and world size, after two real optimizer steps; every target restores that run into a
model of another seed, before its first step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import layouts
import pytest
import torch
from jobs import Pool
from layouts import MESHES, assert_same_state, build, draws, full_state, whole

import ckpt

WORLDS = (1, 2, 3, 4)
KINDS = ("ddp", "fsdp2", "tp", "fsdp_tp", "pipeline")


@dataclass(frozen=True)
class Told:
    """What one rank saw: its state at the save or after the restore, then ten losses and the next random numbers."""

    full: dict[str, Any]
    rest: tuple[Any, ...]
    losses: list[str]
    draws: tuple[float, float, float]


def tell(training: layouts.Training, step: int | None) -> Told:
    groups = [_plain_group(group) for group in training.optim.param_groups]
    rest = (dict(training.sched.state_dict()), dict(training.state["extra"]), groups, step)
    full = full_state(training.model, training.optim)
    training.begin_again()
    return Told(full, rest, training.train(10), draws())


def _plain_group(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def save_run(rank: int, world: int, url: str, kind: str, tied: bool) -> Told:
    training = build(kind, rank, world, seed=1, tied=tied)
    training.train(2)
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(2, training.state, blocking=True)
    return tell(training, 2)


def restore_run(rank: int, world: int, url: str, kind: str, tied: bool) -> Told:
    training = build(kind, rank, world, seed=2, tied=tied)
    with ckpt.Checkpointer(url, takeover=True) as checkpointer:
        return tell(training, checkpointer.restore(training.state))


Runs = Callable[..., tuple[str, list[Told]]]


@pytest.fixture(scope="module")
def runs(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The address of a run saved by `kind` at `world`, and what its ranks told; saved at its first use."""
    made: dict[tuple[str, int, bool], tuple[str, list[Told]]] = {}

    def saved(kind: str, world: int, tied: bool = True) -> tuple[str, list[Told]]:
        at = (kind, world, tied)
        if at not in made:
            url = str(tmp_path_factory.mktemp(f"{kind}-{world}"))
            made[at] = (url, pool.results(save_run, world, url, kind, tied))
        return made[at]

    return saved


def same(saved: list[Told], restored: list[Told]) -> None:
    assert_same_state([told.full for told in saved], [told.full for told in restored])
    for told in restored:
        assert told.rest == saved[0].rest


@pytest.mark.parametrize("target", WORLDS)
@pytest.mark.parametrize("source", WORLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_world_size_to_every_other(pool: Pool, runs: Runs, kind: str, source: int, target: int) -> None:
    url, saved = runs(kind, source)
    restored = pool.results(restore_run, target, url, kind, True)
    same(saved, restored)
    if source == target:
        assert [told.losses for told in restored] == [told.losses for told in saved]
        assert [told.draws for told in restored] == [told.draws for told in saved]
    else:
        assert len({told.draws for told in restored}) == target


ACROSS = [
    ("ddp", 2, "fsdp2", 3),
    ("ddp", 3, "fsdp_tp", 4),
    ("ddp", 4, "plain", 1),
    ("plain", 1, "fsdp_tp", 4),
    ("fsdp2", 4, "ddp", 2),
    ("fsdp2", 3, "fsdp_tp", 4),
    ("fsdp2", 3, "plain", 1),
    ("fsdp2", 4, "hsdp", 4),
    ("fsdp_tp", 4, "fsdp2", 3),
    ("fsdp_tp", 4, "ddp", 3),
    ("fsdp_tp", 4, "tp", 3),
    ("fsdp_tp", 4, "fsdp_tp_wide", 4),
    ("fsdp_tp_wide", 3, "fsdp_tp", 4),
    ("fsdp_tp_wide", 2, "hsdp", 3),
    ("hsdp", 4, "fsdp2", 3),
    ("hsdp", 3, "tp", 2),
    ("hsdp", 4, "hsdp", 2),
    ("tp", 3, "fsdp_tp", 2),
    ("tp", 4, "ddp", 2),
    ("fsdp1", 2, "fsdp1", 3),
    ("fsdp1", 2, "fsdp2", 2),
    ("fsdp1", 2, "plain", 1),
    ("fsdp1", 3, "fsdp_tp", 4),
    ("fsdp2", 3, "fsdp1", 2),
    ("ddp", 2, "fsdp1", 2),
]


@pytest.mark.parametrize(("kind", "source", "other", "target"), ACROSS)
def test_every_layout_to_others(pool: Pool, runs: Runs, kind: str, source: int, other: str, target: int) -> None:
    url, saved = runs(kind, source)
    same(saved, pool.results(restore_run, target, url, other, True))


@pytest.mark.parametrize(
    ("kind", "source", "other", "target"),
    [
        ("pipeline", 4, "fsdp2", 2),
        ("pipeline", 3, "fsdp_tp", 4),
        ("ddp", 2, "pipeline", 3),
        ("fsdp_tp", 4, "pipeline", 2),
    ],
)
def test_pipeline_stages_to_other_layouts(
    pool: Pool, runs: Runs, kind: str, source: int, other: str, target: int
) -> None:
    """Stages on different ranks cannot share the tied weight, so the model is untied here."""
    url, saved = runs(kind, source, tied=False)
    same(saved, pool.results(restore_run, target, url, other, False))


@pytest.mark.parametrize("kind", ["hsdp", "fsdp_tp_wide", "fsdp1"])
def test_same_world_size_goes_on_as_it_would(pool: Pool, runs: Runs, kind: str) -> None:
    url, saved = runs(kind, 3)
    restored = pool.results(restore_run, 3, url, kind, True)
    same(saved, restored)
    assert [(told.losses, told.draws) for told in restored] == [(told.losses, told.draws) for told in saved]


def test_losses_would_show_a_difference(pool: Pool, runs: Runs) -> None:
    """Without the restore the losses differ, so their equality above says something."""
    _, saved = runs("fsdp2", 2)
    unrestored = pool.results(train_only, 2)
    assert all(mine.losses[0] != losses[0] for mine, losses in zip(saved, unrestored, strict=True))


def train_only(rank: int, world: int) -> list[str]:
    return build("fsdp2", rank, world, seed=2).train(10)


@pytest.mark.parametrize(("kind", "world"), [("fsdp2", 3), ("fsdp_tp", 4), ("pipeline", 3), ("fsdp1", 2)])
def test_load_gives_the_whole_tensors_without_a_process_group(runs: Runs, kind: str, world: int) -> None:
    url, saved = runs(kind, world)
    loaded = ckpt.load(url)
    expected: dict[str, Any] = {}
    for told in saved:
        expected = told.full | expected
    found = {_told_name(key): value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    ties = ("model/layers.0.embed.weight", "model/layers.5.head.weight")
    assert {name: whole(value) for name, value in found.items()} == expected
    assert kind == "pipeline" or loaded[ties[0]] is loaded[ties[1]]


def _told_name(key: str) -> str:
    return key.replace("optim/state/model/", "optim/")


def test_meshes_cover_the_worlds_that_are_tested() -> None:
    used = {(kind, world) for pairs in ACROSS for kind, world in (pairs[:2], pairs[2:])}
    assert all(world in MESHES[kind] for kind, world in used if kind in MESHES)
