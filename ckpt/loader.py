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
from ckpt.errors import NotFound
from ckpt.holder import find_commit
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
    reader = StepReader(run, find_commit(run.log.read(), step))
    chosen = tuple(keys) if keys is not None else None
    saved, _ = reader.saved()
    names = [key for key in (*saved.specs, *saved.aliases) if selected(key, chosen)]
    tensors = _tensors(reader, sorted({saved.stored(key) for key in names}))
    loaded: dict[str, Any] = {key: tensors[saved.stored(key)] for key in names}
    for name, owner in reader.manifest.world.value_owner.items():
        if selected(name, chosen):  # and then what lies below it
            refs = {key[len(name) + 1 :]: partial(loaded.__getitem__, key) for key in saved.under(name)}
            loaded[name] = decode_value(reader.part(owner).values[name], refs)
    if chosen is not None and not loaded:
        raise NotFound(f"step {reader.commit.step} of {run.url} holds none of {list(chosen)}; `ckpt show` lists keys")
    return dict(sorted(loaded.items()))


def _tensors(reader: StepReader, keys: Sequence[str]) -> dict[str, torch.Tensor]:
    manifest = reader.manifest
    tensors = [torch.empty(s.shape, dtype=dtype_from_name(s.dtype)) for s in (manifest.world.specs[k] for k in keys)]
    targets = [
        Target(key, pieces_of(Whole(), tuple(t.shape), 0), tuple(t.shape), direct=True)
        for key, t in zip(keys, tensors, strict=True)
    ]
    parts = needed_parts(manifest.world, manifest.ownership, targets)
    plan = plan_load(targets, {rank: reader.part(rank).chunks for rank in sorted(parts)})
    read_data(reader.open_data, plan, tensors, threads=reader.threads)
    return dict(zip(keys, tensors, strict=True))


def read_box(reader: StepReader, key: str, box: Slice) -> torch.Tensor:
    """The elements in `box` of stored tensor `key`, whatever its layout was; every block verified."""
    manifest = reader.manifest
    spec = manifest.world.specs[key]
    into = torch.empty(box.shape, dtype=dtype_from_name(spec.dtype))
    target = Target(key, pieces_of(Declared(box), spec.shape, 0), box.shape, direct=True)
    parts = needed_parts(manifest.world, manifest.ownership, [target])
    plan = plan_load([target], {rank: reader.part(rank).chunks for rank in sorted(parts)})
    read_data(reader.open_data, plan, [into], threads=reader.threads)
    return into
