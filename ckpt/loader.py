"""Whole tensors of a step in one process, without a process group: for tools, export, a look inside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ckpt.adapt import decode_value
from ckpt.adapt.members import selected
from ckpt.adapt.values import dtype_from_name
from ckpt.errors import Corrupt, NotFound
from ckpt.holder import find_commit, instead_of
from ckpt.plan import Target, needed_parts, plan_load
from ckpt.reading import read_data
from ckpt.restorer import StepReader
from ckpt.run import RunDirectory
from ckpt.sharding import Declared, Whole, pieces_of
from ckpt.slices import Slice


def load(url: str | os.PathLike[str], *, step: int | None = None, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """The tensors (whole, on the CPU) and shared values of a step by key, as `ckpt show` prints them.

    `keys` restricts this to keys at or below these paths. Tied tensors come as one tensor under each name; what
    belongs to single ranks (`PerRank`, random generators) is left out. Every byte is verified. Never writes.
    `NotFound` if there is no such step or key, `Corrupt` if what is read is damaged.
    """
    run = RunDirectory.open(url)
    chosen = tuple(keys) if keys is not None else None
    commit = find_commit(run.log.read(), step)
    while True:
        try:
            return _load(StepReader(run, commit), chosen)
        except Corrupt:
            if (newer := instead_of(run, commit, chosen=step is not None)) is None:
                raise
            commit = newer


def _load(reader: StepReader, chosen: tuple[str, ...] | None) -> dict[str, Any]:
    saved, _ = reader.saved()
    names = [key for key in (*saved.specs, *saved.aliases) if selected(key, chosen)]
    tensors = _tensors(reader, sorted({saved.stored(key) for key in names}))
    loaded: dict[str, Any] = {key: tensors[saved.stored(key)] for key in names}
    for name, owner in reader.manifest.world.value_owner.items():
        if selected(name, chosen):  # and then what lies below it
            refs = {key[len(name) + 1 :]: partial(loaded.__getitem__, key) for key in saved.under(name)}
            loaded[name] = decode_value(reader.part(owner).values[name], refs)
    if chosen is not None and not loaded:
        raise NotFound(
            f"step {reader.commit.step} of {reader.run.url} holds none of {list(chosen)}; `ckpt show` lists keys"
        )
    return dict(sorted(loaded.items()))


def _tensors(reader: StepReader, keys: Sequence[str]) -> dict[str, torch.Tensor]:
    shapes = [reader.manifest.world.specs[key].shape for key in keys]
    targets = [
        Target(key, pieces_of(Whole(), shape, 0), shape, direct=True) for key, shape in zip(keys, shapes, strict=True)
    ]
    return dict(zip(keys, _read(reader, targets), strict=True))


def read_box(reader: StepReader, key: str, box: Slice) -> torch.Tensor:
    """The elements in `box` of stored tensor `key`, whatever its layout was; every block verified."""
    shape = reader.manifest.world.specs[key].shape
    (found,) = _read(reader, [Target(key, pieces_of(Declared(box), shape, 0), box.shape, direct=True)])
    return found


def _read(reader: StepReader, targets: Sequence[Target]) -> list[torch.Tensor]:
    """Tensors filled as the targets say. No memory is taken before what shall fill it was found in full length."""
    world = reader.manifest.world
    parts = sorted(needed_parts(world, reader.manifest.ownership, targets))
    for rank in parts:
        reader.check_files(rank)
    plan = plan_load(targets, {rank: reader.part(rank).chunks for rank in parts})
    tensors = [torch.empty(each.shape, dtype=dtype_from_name(world.specs[each.key].dtype)) for each in targets]
    read_data(reader.open_data, plan, tensors, threads=reader.threads)
    return tensors
