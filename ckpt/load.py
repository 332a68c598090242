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
from ckpt.restorer import StepReader
from ckpt.run import RunDirectory
from ckpt.sharding import Whole, pieces_of
from ckpt.transfer import read_data


def load(url: str | os.PathLike[str], *, step: int | None = None, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """The tensors (whole, on the CPU) and shared values of a step by key, as `ckpt show` prints them.

    `keys` restricts this to keys at or below these paths. Tied tensors come as one tensor under each name; what
    belongs to single ranks (`PerRank`, random generators) is left out. Every byte is verified. Never writes.
    `NotFound` if there is no such step or key, `Corrupt` if what is read is damaged.
    """
    run = RunDirectory.open(url)
    reader = StepReader(run, find_commit(run.log.read(), step))
    chosen = tuple(keys) if keys is not None else None
    world = reader.manifest.world
    aliases = {alias: key for alias, key in world.aliases.items() if selected(alias, chosen)}
    tensors = _tensors(reader, sorted({k for k in world.specs if selected(k, chosen)} | set(aliases.values())))
    names = [key for key in world.specs if selected(key, chosen)]
    loaded: dict[str, Any] = {key: tensors[key] for key in names} | {a: tensors[k] for a, k in aliases.items()}
    for name, owner in world.value_owner.items():
        if selected(name, chosen):
            refs = {
                key[len(name) + 1 :]: _tensors(reader, [world.aliases.get(key, key)]).popitem()[1]
                for key in (*world.specs, *world.aliases)
                if key.startswith(name + "/")
            }
            loaded[name] = decode_value(
                reader.part(owner).values[name], {ref: partial(torch.Tensor.detach, t) for ref, t in refs.items()}
            )
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
    read_data(reader.data_path, plan, tensors)
    return dict(zip(keys, tensors, strict=True))
