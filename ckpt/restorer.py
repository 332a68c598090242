"""One restore, on all ranks together: agree on a step, validate, plan, read, verify, set values.

Nothing of the state is touched before every rank has validated its target against the manifest.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from ckpt.adapt import Bound, Local, Rng, Saved, Wanted, bind_state, decode_value
from ckpt.adapt.members import selected
from ckpt.adapt.values import can_cast, dtype_name
from ckpt.agreement import together
from ckpt.datafile import DataFile, LocalFile, open_data
from ckpt.errors import CkptError, Corrupt, Incompatible, NotFound
from ckpt.keeper.ram import RamTier
from ckpt.manifest import (
    MANIFEST_LIMIT_BYTES,
    PART_LIMIT_BYTES,
    Manifest,
    Part,
    check_part,
    decode_manifest,
    decode_part,
    matches,
    part_name,
)
from ckpt.plan import LoadPlan, Target, needed_parts, plan_load
from ckpt.process import no_collection
from ckpt.ranks import Ranks
from ckpt.reading import READ_THREADS, Neighbours, machine, read_data
from ckpt.records import Commit
from ckpt.run import RunDirectory
from ckpt.sharding import Sharding, TensorSpec, pieces_of
from ckpt.slices import Slice
from ckpt.store import REQUESTS, by_requests

log = logging.getLogger("ckpt")


@dataclass(frozen=True)
class Relaxed:
    """What a restore may overlook, each on purpose."""

    strict: bool = True
    only: tuple[str, ...] | None = None
    rename: Mapping[str, str] | None = None
    cast: bool = False


class StepReader:
    """A committed step, opened for reading: its manifest, and its parts as they are asked for."""

    def __init__(
        self, run: RunDirectory, commit: Commit, manifest_data: bytes | None = None, ram: RamTier | None = None
    ) -> None:
        self.run, self.commit, self._ram = run, commit, ram
        data = manifest_data or self._metadata("MANIFEST", min(commit.manifest_bytes, MANIFEST_LIMIT_BYTES))
        if len(data) != commit.manifest_bytes or not matches(data, bytes.fromhex(commit.manifest_digest)):
            raise self._damaged("MANIFEST", f"its bytes are not those that the commit of step {commit.step} names")
        self.manifest_data = data
        self._parts: dict[int, Part] = {}
        self._ranks_in_ram: set[int] = set()

    @cached_property
    def manifest(self) -> Manifest:
        """What the step holds; decoded at the first look, so that all ranks do it at the same time."""
        manifest = decode_manifest(self.manifest_data, self._where("MANIFEST"))
        if (manifest.attempt, manifest.step) != (self.commit.attempt, self.commit.step):
            raise self._damaged("MANIFEST", f"it is that of {manifest.attempt}, step {manifest.step}")
        return manifest

    def _where(self, name: str) -> str:
        """What a person would call the file `name` of this attempt, or one that is given by its path."""
        path = name if "/" in name else self.run.attempt_path(self.commit.attempt, name)
        return f"{self.run.url}/{path}"

    def _damaged(self, name: str, what: str) -> Corrupt:
        return Corrupt(
            f"{self._where(name)}: {what}. Other steps are not affected: `ckpt check {self.run.url} --all` tells which "
            "are whole, restore(..., fallback=True) takes the newest of them"
        )

    def _metadata(self, name: str, limit_bytes: int) -> bytes:
        try:
            return self.run.store.read(self.run.attempt_path(self.commit.attempt, name), limit_bytes=limit_bytes)
        except NotFound:
            raise self._damaged(name, f"this file of step {self.commit.step} is missing") from None
        except Corrupt as error:
            raise self._damaged(name, str(error)) from error

    def part(self, rank: int) -> Part:
        """The part of writer `rank`, verified. Kept until the reader goes."""
        if rank not in self._parts:
            name = part_name(rank)
            part = self._in_ram(rank) or self._in_store(rank)
            check_part(part, self.manifest, rank, self._where(name))
            world = self.manifest.world
            layout = world.layout(rank)
            lacking = {value for value in layout.values if world.value_owner[value] == rank} - set(part.values)
            if lacking := lacking | (set(layout.rank_values) - set(part.rank_values)):
                raise self._damaged(name, f"it lacks the value {min(lacking)}")
            self._parts[rank] = part
        return self._parts[rank]

    @property
    def used_ram(self) -> bool:
        """Whether anything of this step was found in this node's RAM tier."""
        return bool(self._ranks_in_ram)

    def _in_store(self, rank: int) -> Part:
        name, ref = part_name(rank), self.manifest.parts[rank]
        data = self._metadata(name, min(ref.part_bytes, PART_LIMIT_BYTES))
        if len(data) != ref.part_bytes or not matches(data, ref.part_digest):
            raise self._damaged(name, "its bytes are not those that the MANIFEST names")
        part = decode_part(data, self._where(name))
        if part.data_bytes != ref.data_bytes:
            raise self._damaged(name, f"its data file has {part.data_bytes} bytes, the MANIFEST says {ref.data_bytes}")
        return part

    def _in_ram(self, rank: int) -> Part | None:
        """The part of writer `rank` as this node's RAM tier holds it, with all of its data, if it does.

        There nothing is stored by reference: its content is the same, and its data file another one.
        """
        if self._ram is None:
            return None
        attempt = self.commit.attempt
        try:
            part = decode_part(Path(path := self._ram.beside(attempt, rank, "part")).read_bytes(), path)
            whole = os.stat(self._ram.data(attempt, rank)).st_size >= part.data_bytes
        except (OSError, CkptError):
            return None
        alike = part.content_digest() == self.manifest.parts[rank].content_digest
        if not whole or not alike or any(chunk.file or chunk.packed for chunk in part.chunks):
            return None
        self._ranks_in_ram.add(rank)
        return part

    def check_files(self, rank: int) -> None:
        """`Corrupt` unless all that the part of writer `rank` refers to is there in full length."""
        part = self.part(rank)
        if rank in self._ranks_in_ram:
            return
        needed: dict[str, int] = {}
        for chunk in part.chunks:
            if chunk.file:
                needed[chunk.file] = max(needed.get(chunk.file, 0), chunk.at + chunk.stored_bytes)
        own, expected = self.data_path(rank), self.manifest.parts[rank].data_bytes
        if (found := self._size(own)) != expected:
            raise self._damaged(own, f"it has {found} bytes, its MANIFEST says {expected}")
        for file, nbytes in needed.items():
            if (found := self._size(path := self.data_path(rank, file))) < nbytes:
                raise self._damaged(path, f"it has {found} bytes, tensors of step {self.commit.step} need {nbytes}")

    def _size(self, path: str) -> int:
        try:
            return self.run.store.size(path)
        except NotFound:
            raise self._damaged(path, f"this file of step {self.commit.step} is missing") from None

    def data_path(self, rank: int, file: str = "") -> str:
        """Where in the store the file lies that chunks of the part of `rank` call `file`; "" is its own."""
        attempt, _, name = file.partition("/")
        return self.run.attempt_path(attempt or self.commit.attempt, name or self.part(rank).data_name)

    def open_data(self, rank: int, file: str = "") -> DataFile:
        """The `file` of writer `rank`: in this node's RAM if its part is there."""
        if rank in self._ranks_in_ram and self._ram is not None:
            return LocalFile(self._ram.data(self.commit.attempt, rank))
        return open_data(self.run.store, self.data_path(rank, file))

    @property
    def threads(self) -> int:
        """How many reads are under way at a time."""
        return REQUESTS if by_requests(self.run.store) else READ_THREADS

    def saved(self, rename: Mapping[str, str] | None = None) -> tuple[Saved, dict[str, str]]:
        """What the step holds under the names of the target, and the stored name of each."""
        world = self.manifest.world
        rank_values = {name for layout in world.layouts for name in layout.rank_values}
        names = [*world.specs, *world.aliases, *world.value_owner, *rank_values]
        new = {name: _renamed(name, rename or {}) for name in names}
        if len(set(new.values())) != len(new):
            raise Incompatible("rename= gives two stored tensors or values the same name")
        saved = Saved(
            {new[key]: spec for key, spec in world.specs.items()},
            {new[alias]: new[key] for alias, key in world.aliases.items()},
            frozenset(new[name] for name in world.value_owner),
            frozenset(new[name] for name in rank_values),
        )
        return saved, {target: stored for stored, target in new.items()}


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    for old in sorted(rename, key=len, reverse=True):
        if selected(name, (old,)):
            return rename[old] + name[len(old) :]
    return name


def _bind(reader: StepReader, state: Any, relaxed: Relaxed, ranks: Ranks) -> tuple[Saved, dict[str, str], Bound]:
    saved, stored_name = reader.saved(relaxed.rename)
    return saved, stored_name, bind_state(state, saved, ranks.rank, ranks.size, relaxed.only)


def _prepare(
    reader: StepReader, saved: Saved, bound: Bound, targets: list[Local], stored_name: dict[str, str], ranks: Ranks
) -> tuple[list[tuple[Wanted, list[bytes]]], _Reads]:
    values = _stored_values(reader, bound, stored_name, ranks)
    _check_early(values, bound, reader, ranks)
    return values, _plan(reader, saved, targets, stored_name, ranks.rank)


def _neighbours(
    reader: StepReader, saved: Saved, targets: Sequence[Local], stored_name: Mapping[str, str], ranks: Ranks
) -> Neighbours:
    """The ranks on this machine, and what they read if they have the same tensors as this one. Collective."""
    machines = ranks.gather(machine())
    here = [rank for rank, name in enumerate(machines) if name == machines[ranks.rank]]
    others = [rank for rank in here if rank != ranks.rank]
    wanted: dict[str, tuple[Slice, ...]] = {}
    boxes: dict[tuple[Sharding, tuple[int, ...]], tuple[Slice, ...]] = {}
    for local in targets if others else ():
        key = stored_name[saved.stored(local.key)]
        kind = local.sharding, reader.manifest.world.specs[key].shape
        if kind not in boxes:
            boxes[kind] = tuple({box for rank in others for box in _boxes_of(*kind, rank)})
        wanted[key] = wanted[key] + boxes[kind] if key in wanted else boxes[kind]
    return Neighbours(here.index(ranks.rank), len(here), wanted)


def _boxes_of(sharding: Sharding, shape: tuple[int, ...], rank: int) -> list[Slice]:
    try:
        return [piece.box for piece in pieces_of(sharding, shape, rank)]
    except ValueError:  # not in the mesh
        return []


def restore_step(reader: StepReader, ranks: Ranks, state: Any, relaxed: Relaxed) -> None:
    """Fill `state` with the step of `reader`. Collective: on every rank it succeeds, or raises on every rank.

    `Incompatible` before anything is touched if target and step differ; `Corrupt` if what is read is damaged:
    the state is unusable then, and the error says so.
    """
    began = time.monotonic()
    with no_collection():
        saved, stored_name, bound = together(ranks, lambda: _bind(reader, state, relaxed, ranks))
        unexpected = _unexpected(ranks, saved, bound, relaxed)
        targets = together(ranks, lambda: _validate(reader, saved, bound, relaxed, unexpected, ranks.size))
        values, reads = together(ranks, lambda: _prepare(reader, saved, bound, targets, stored_name, ranks))
        neighbours = _neighbours(reader, saved, targets, stored_name, ranks)
    try:
        together(ranks, lambda: _read(reader, reads, neighbours))
        together(ranks, lambda: _finish(values, bound, reader, ranks))
    except CkptError as error:
        raise type(error)(
            f"{error}\nThe state passed to restore is partly overwritten and must not be used; every stored step is "
            f"as it was. See `ckpt check {reader.run.url}`."
        ) from error
    except Exception as error:  # of the user's own load_state_dict
        error.add_note("The state passed to ckpt's restore is partly overwritten and must not be used.")
        raise
    if ranks.rank == 0:
        log.info(
            "restored step %d: %d bytes read by rank 0 in %.2f s",
            reader.commit.step,
            reads.fill.read_bytes,
            time.monotonic() - began,
        )


def _validate(
    reader: StepReader, saved: Saved, bound: Bound, relaxed: Relaxed, unexpected: Sequence[str], world: int
) -> list[Local]:
    """The tensors to fill; everything that does not fit, in one error."""
    problems = [f"missing in the checkpoint: {key}" for key in bound.missing if relaxed.strict]
    kept: list[Local] = []
    filled = {local.identity for local in bound.locals if saved.stored(local.key) in saved.specs}
    for local in bound.locals:
        spec = saved.specs.get(saved.stored(local.key))
        if spec is None:
            if relaxed.strict and local.identity not in filled:  # else tied to what is there: stored under one name
                problems.append(f"missing in the checkpoint: {local.key}")
            continue
        if problem := _mismatch(local, spec, relaxed.cast):
            problems.append(problem)
        kept.append(local)
    for wanted in bound.wanted:
        if wanted.on_resize == "error" and world != reader.manifest.world.size:
            problems.append(_needs_resize(reader, wanted, world))
    if relaxed.strict:
        problems += [f"in the checkpoint, not in the state: {name}" for name in unexpected]
        problems += _idle(saved, bound, relaxed.only or ())
    if problems:
        raise Incompatible(_explain(reader, problems))
    return kept


def _idle(saved: Saved, bound: Bound, only: Sequence[str]) -> list[str]:
    """The entries of `only` that select nothing on either side: they were mistyped."""
    names = [*saved.specs, *saved.aliases, *saved.values, *saved.rank_values]
    names += [local.key for local in bound.locals] + bound.missing
    return [
        f"only={p!r} names nothing in the checkpoint" for p in only if not any(selected(name, (p,)) for name in names)
    ]


def _needs_resize(reader: StepReader, wanted: Wanted, world: int) -> str:
    saved = reader.manifest.world.size
    what = "a PerRank, or a DataLoader, which counts what its own rank has taken of the data"
    if wanted.on_resize != "error":
        what = "a loader or sampler, at another place on each"
    return (
        f"{wanted.key} belongs to each of the {saved} ranks that saved it ({what}), and there are {world} now: say "
        'what each gets by ckpt.PerRank(obj, on_resize="first") or on_resize=fn(states, rank, world), or leave it '
        "out and begin the epoch anew: only=[...] names all other members"
    )


def _mismatch(local: Local, spec: TensorSpec, cast: bool) -> str | None:
    if local.spec.shape != spec.shape:
        return f"{local.key}: shape {list(spec.shape)} in the checkpoint, {list(local.spec.shape)} in the state"
    if local.spec.dtype != spec.dtype:
        differ = f"{local.key}: {spec.dtype} in the checkpoint, {local.spec.dtype} in the state"
        if not can_cast(spec.dtype, local.spec.dtype):
            return f"{differ}, which cast=True does not convert"
        return None if cast else f"{differ} (cast=True converts)"
    return None


_OF_OPTIMIZERS: Final = re.compile(r"/(group_of|state)/")


def _explain(reader: StepReader, problems: Sequence[str]) -> str:
    ordered = sorted(
        problems, key=lambda problem: _OF_OPTIMIZERS.search(problem) is not None
    )  # they follow from others
    shown = "\n  ".join(ordered[:40]) + (f"\n  ... and {len(problems) - 40} more" if len(problems) > 40 else "")
    return (
        f"step {reader.commit.step} of {reader.run.url} does not fit the state:\n  {shown}\n"
        f"Nothing was touched. `ckpt show {reader.run.url}` lists what the step holds; only=[...], rename=, cast=True "
        "and strict=False relax the comparison on purpose."
    )


def _unexpected(ranks: Ranks, saved: Saved, bound: Bound, relaxed: Relaxed) -> list[str]:
    """What the step holds and no rank wants. Collective."""
    used = {saved.stored(local.key) for local in bound.locals} | {wanted.key for wanted in bound.wanted}
    names = [n for n in sorted({*saved.specs, *saved.values, *saved.rank_values}) if selected(n, relaxed.only)]
    marks = ranks.maximum(bytes(name in used for name in names))
    return [name for name, mark in zip(names, marks, strict=True) if not mark]


def _check_early(values: Sequence[tuple[Wanted, list[bytes]]], bound: Bound, reader: StepReader, ranks: Ranks) -> None:
    """Decode the values that validation needs, and see whether they fit."""
    for wanted, stored in values:
        if wanted.early:
            wanted.apply(_value(wanted, stored, reader, ranks))
    if problems := [problem for check in bound.checks if (problem := check())]:
        raise Incompatible(_explain(reader, problems))


@dataclass(frozen=True)
class _Reads:
    """Reads into memory, then reads of what must equal it; `tensors[i]` is behind target i of either plan."""

    fill: LoadPlan
    fill_tensors: list[torch.Tensor]
    compare: LoadPlan
    compare_tensors: list[torch.Tensor]


def _plan(reader: StepReader, saved: Saved, locals_: Sequence[Local], stored_name: dict[str, str], rank: int) -> _Reads:
    fill: list[tuple[Target, torch.Tensor]] = []
    compare: list[tuple[Target, torch.Tensor]] = []
    keys_of: dict[object, set[str]] = {}
    for local in locals_:
        key = stored_name[saved.stored(local.key)]
        known = keys_of.setdefault(local.identity, set())
        if key not in known:
            (compare if known else fill).append(_target(reader, key, local, rank, compare=bool(known)))
            known.add(key)
    for i in _interleaved([tensor for _, tensor in fill]):  # filled, and compared once all are: right if all are equal
        target, tensor = fill[i]
        fill[i] = replace(target, direct=False), tensor
        compare.append((replace(target, direct=False, compare=True), tensor))
    return _Reads(*_plan_reads(reader, fill), *_plan_reads(reader, compare))


def _interleaved(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Indices of the tensors whose memory, first to last byte, meets that of another: they may share elements."""
    spans = []
    for i, tensor in enumerate(tensors):
        if tensor.numel():
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            spans.append((str(tensor.device), start, start + (last + 1) * tensor.element_size(), i))
    found, reach = set[int](), ("", 0, -1)  # device, end and index of the span that reaches furthest
    for device, start, end, i in sorted(spans):
        if device == reach[0] and start < reach[1]:
            found |= {i, reach[2]}
        if device != reach[0] or end > reach[1]:
            reach = (device, end, i)
    return sorted(found)


def _target(reader: StepReader, key: str, local: Local, rank: int, *, compare: bool) -> tuple[Target, torch.Tensor]:
    spec, tensor = reader.manifest.world.specs[key], local.make()
    direct = tensor.device.type == "cpu" and tensor.is_contiguous() and dtype_name(tensor.dtype) == spec.dtype
    pieces = pieces_of(local.sharding, spec.shape, rank)
    return Target(key, pieces, tuple(tensor.shape), direct, compare), tensor


def _plan_reads(
    reader: StepReader, found: Sequence[tuple[Target, torch.Tensor]]
) -> tuple[LoadPlan, list[torch.Tensor]]:
    targets = [target for target, _ in found]
    manifest = reader.manifest
    ranks = needed_parts(manifest.world, manifest.ownership, targets)
    for rank in sorted(ranks):
        reader.check_files(rank)
    plan = plan_load(targets, {rank: reader.part(rank).chunks for rank in sorted(ranks)})
    return plan, [tensor for _, tensor in found]


def _read(reader: StepReader, reads: _Reads, neighbours: Neighbours) -> None:
    read_data(reader.open_data, reads.fill, reads.fill_tensors, neighbours, reader.threads)
    if reads.fill_tensors:
        torch.autograd.graph.increment_version(reads.fill_tensors)  # autograd notices a restore inside a graph
    read_data(reader.open_data, reads.compare, reads.compare_tensors, neighbours, reader.threads)


def _stored_values(
    reader: StepReader, bound: Bound, stored_name: dict[str, str], ranks: Ranks
) -> list[tuple[Wanted, list[bytes]]]:
    """The stored bytes of every wanted value: one, or those of several ranks for a resize."""
    return [(wanted, _stored_value(reader, wanted, stored_name[wanted.key], ranks)) for wanted in bound.wanted]


def _stored_value(reader: StepReader, wanted: Wanted, name: str, ranks: Ranks) -> list[bytes]:
    world = reader.manifest.world
    try:
        if wanted.on_resize is None:
            return [reader.part(world.value_owner[name]).values[name]]
        holders = [rank for rank in range(world.size) if name in world.layout(rank).rank_values]
        if world.size == ranks.size:
            if ranks.rank not in holders:
                raise Incompatible(
                    f"missing in the checkpoint: {wanted.key} of rank {ranks.rank}; only ranks {holders[:8]} of "
                    f"{world.size} stored one. Nothing was touched."
                )
            holders = [ranks.rank]
        elif wanted.on_resize in ("first", "reseed"):
            holders = holders[:1]
        stored = [reader.part(rank).rank_values[name] for rank in holders]
        if wanted.on_resize == "equal" and len(set(stored)) > 1:
            raise Incompatible(_needs_resize(reader, wanted, ranks.size) + ". Nothing was touched.")
        return stored
    except KeyError as error:
        raise Corrupt(f"step {reader.commit.step} of {reader.run.url}: the part lacks the value {error}") from None


def _finish(values: Sequence[tuple[Wanted, list[bytes]]], bound: Bound, reader: StepReader, ranks: Ranks) -> None:
    """Values, then what is made of them, then the random generators."""
    for wanted, stored in values:
        if not wanted.last and not wanted.early:
            wanted.apply(_value(wanted, stored, reader, ranks))
    for act in bound.finish:
        act()
    for wanted, stored in values:
        if wanted.last:
            wanted.apply(_value(wanted, stored, reader, ranks))


def _value(wanted: Wanted, stored: Sequence[bytes], reader: StepReader, ranks: Ranks) -> object:
    decoded = [decode_value(data, wanted.refs) for data in stored]
    if wanted.on_resize in (None, "first", "equal") or reader.manifest.world.size == ranks.size:
        return decoded[0]
    resize = Rng.reseed if wanted.on_resize == "reseed" else wanted.on_resize
    assert callable(resize)
    return resize(decoded, ranks.rank, ranks.size)
