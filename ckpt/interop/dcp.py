"""torch.distributed.checkpoint onto a run: `dcp.save` and `dcp.load` with our stores, digests and commit.

    dcp.save(state, storage_writer=HoldfastWriter(url, step=step))
    dcp.load(state, storage_reader=HoldfastReader(url))

Each rank writes one part with the boxes and values that DCP's plan gives it; the coordinator writes the MANIFEST and
commits once all have. A key is the path of an entry in the state dict, so such a step is read by everything that
reads a run. Values are stored by our codec, never as pickles: what it does not know is refused at the save.
"""

from __future__ import annotations

import io
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final
from urllib.parse import unquote

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ckpt import codec
from ckpt.adapt import decode_value
from ckpt.adapt.state import component
from ckpt.adapt.values import can_cast, dtype_from_name, dtype_name, extend_encode
from ckpt.arguments import run_id_of, step_number
from ckpt.buffers import narrow
from ckpt.errors import Incompatible, NotFound
from ckpt.holder import Given, Holder, find_commit
from ckpt.layout import Entry, Layout, Owned, World, cover_faults
from ckpt.loader import read_box
from ckpt.manifest import PartRef
from ckpt.plan import PlannedChunk, Target, needed_parts, plan_file, plan_load
from ckpt.reading import read_data
from ckpt.records import Commit, attempt_name
from ckpt.restorer import StepReader
from ckpt.run import RunDirectory
from ckpt.sharding import Declared, Piece, Sharding, TensorSpec, Whole
from ckpt.slices import Slice, flat_boxes, whole
from ckpt.writing import check_follows, commit_step, write_part

AS_WRITTEN: Final = "as-written/1"
"""Ownership of such steps: who wrote what is said by the parts alone, so a reader opens those of all holders."""

_holders: dict[str, Holder] = {}  # by the run's nonce: a process takes one generation, however many writers it makes


@dataclass(frozen=True)
class _Order:
    """What the coordinator tells a rank: where its part goes."""

    run: str
    attempt: str
    rank: int


@dataclass(frozen=True)
class _Written:
    """What a rank tells the coordinator: its part, which is durable."""

    rank: int
    ref: PartRef


class HoldfastWriter(StorageWriter):
    """Saves one step of the run at `url` through `dcp.save` or `dcp.async_save`; `commit` is what it became.

    Where a generation of the run is taken: by the first save of the coordinator's process. `dcp.save` raises, with our
    error in it, `Fenced` if another job took the run since, `Incompatible` for a step that is not above the newest
    one or a value that cannot be stored. Then nothing was committed, and every older step is as it was.
    """

    def __init__(self, url: str | os.PathLike[str], *, step: int) -> None:
        self.url, self.step = os.fspath(url), step_number(step)
        self.commit: Commit | None = None
        self._attempt = ""
        self._world: World | None = None
        self._holder: Holder | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        _refuse_id(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._holder = holder = _holder_of(RunDirectory.open(self.url, create=True))
        holder.run.log.read()
        check_follows(holder.run, self.step)
        self._world = world_of(plans)
        holder.ensure_started("dcp")
        self._attempt = attempt_name(self.step, secrets.token_hex(4))
        return [
            replace(plan, storage_data=_Order(holder.run.nonce, self._attempt, rank)) for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        order: _Order = plan.storage_data
        run = RunDirectory.open(self.url)
        if run.nonce != order.run:
            raise Incompatible(f"{self.url} leads rank {order.rank} to another run than rank 0: share one place")
        written = write_items(run, order, plan, planner)
        result = WriteResult(MetadataIndex(order.attempt), written.ref.data_bytes, written)
        done: Future[list[WriteResult]] = Future()
        done.set_result([result])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written: dict[int, _Written] = {r.storage_data.rank: r.storage_data for found in results for r in found}
        holder = self._holder
        assert holder is not None and holder.start is not None and self._world is not None  # noqa: PT018
        parts = [written[rank].ref for rank in range(self._world.size)]
        self.commit = commit_step(holder.run, holder.start, self.step, self._attempt, self._world, AS_WRITTEN, parts)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def _refuse_id(checkpoint_id: object) -> None:
    if checkpoint_id is not None:
        raise Incompatible(
            f"checkpoint_id={checkpoint_id!r:.200}: a HoldfastWriter or HoldfastReader has its place and step already. "
            "Leave checkpoint_id out"
        )


def _holder_of(run: RunDirectory) -> Holder:
    if run.nonce not in _holders:
        given = Given.of(os.environ.get("CKPT_START", ""))
        _holders[run.nonce] = Holder(run, run_id=run_id_of(None), takeover=False, given=given)
    return _holders[run.nonce]


def newest_step(url: str | os.PathLike[str]) -> int | None:
    """The newest step of the run at `url`, to go on from; None where there is none yet."""
    try:
        return find_commit(RunDirectory.open(url).log.read(), None).step
    except NotFound:
        return None


# What a plan of DCP says, as ours


def key_of(path: Iterable[str | int]) -> str:
    """The key of an entry of a state dict."""
    return "/".join(component(str(name)) for name in path)


def _keys(plan: SavePlan) -> Mapping[str, str]:
    paths = plan.planner_data if isinstance(plan.planner_data, dict) else {}
    return {item.index.fqn: key_of(paths.get(item.index.fqn, (item.index.fqn,))) for item in plan.items}


def _owned(item: WriteItem, key: str) -> tuple[Owned, TensorSpec]:
    data = item.tensor_data
    assert data is not None
    box = Slice(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    try:
        spec = TensorSpec(dtype_name(data.properties.dtype), tuple(data.size))
    except Incompatible as error:
        raise Incompatible(f"{key}: {error}") from None
    return Owned(key, box, (0,) * len(box.shape)), spec


def world_of(plans: Sequence[SavePlan]) -> World:
    """Who writes what. A rank with one box of a tensor declares it; where one has several, each writer is a holder.

    Raises Incompatible unless the boxes of each tensor tile it: DCP itself would commit a hole.
    """
    boxes: dict[str, dict[int, list[Slice]]] = {}
    specs: dict[str, TensorSpec] = {}
    values: list[set[str]] = [set() for _ in plans]
    for rank, plan in enumerate(plans):
        keys = _keys(plan)
        for item in plan.items:
            key = keys[item.index.fqn]
            if item.type == WriteItemType.BYTE_IO:
                values[rank].add(key)
                continue
            owned, spec = _owned(item, key)
            if specs.setdefault(key, spec) != spec:
                raise Incompatible(f"{key}: ranks hold it as {specs[key]} and as {spec}. Nothing was written")
            boxes.setdefault(key, {}).setdefault(rank, []).append(owned.box)
    entries: list[list[Entry]] = [[] for _ in plans]
    for key, by_rank in sorted(boxes.items()):
        several = any(len(found) > 1 for found in by_rank.values()) or not specs[key].nbytes
        for rank, found in by_rank.items():
            sharding: Sharding = Whole() if several else Declared(found[0])
            entries[rank].append(Entry(key, specs[key], sharding, "parameter"))
    layouts = [Layout(tuple(e), (), tuple(sorted(v))) for e, v in zip(entries, values, strict=True)]
    distinct = list(dict.fromkeys(layouts))
    world = World(tuple(distinct), tuple(distinct.index(layout) for layout in layouts))
    named = Counter(name for names in values for name in names) + Counter(specs.keys())
    if faults := [*cover_faults(world), *(f"{key}: planned for several ranks" for key, n in named.items() if n > 1)]:
        raise Incompatible(
            f"the ranks do not hold each tensor exactly once: {'; '.join(faults[:5])}. Nothing was written"
        )
    return world


def write_items(run: RunDirectory, order: _Order, plan: SavePlan, planner: SavePlanner) -> _Written:
    """Write what DCP gave this rank as its part."""
    keys = _keys(plan)
    tensors: dict[tuple[str, Slice], torch.Tensor] = {}
    specs: dict[str, TensorSpec] = {}
    values: dict[str, bytes] = {}
    for item in plan.items:
        key = keys[item.index.fqn]
        data = planner.resolve_data(item)
        if isinstance(data, torch.Tensor):
            owned, specs[key] = _owned(item, key)
            if owned.box.numel:
                tensors[key, owned.box] = data.detach()
        else:
            values[key] = _value(key, data)

    def fill(chunk: PlannedChunk, start: int, stop: int, memory: torch.Tensor) -> None:
        _copy(tensors[chunk.owned.key, chunk.owned.box], start, stop, memory)

    boxes = [Owned(key, box, (0,) * len(box.shape)) for key, box in sorted(tensors)]
    planned = plan_file(boxes, specs, tuple(sorted(values)))
    return _Written(order.rank, write_part(run, order.attempt, order.rank, planned, fill, values))


def _value(key: str, data: io.BytesIO) -> bytes:
    """What DCP pickled a moment ago in this very process, in the codec's form."""
    data.seek(0)
    try:
        return codec.encode(torch.load(data, map_location="cpu", weights_only=False), extend_encode)
    except Incompatible as error:
        raise Incompatible(f"{key}: {error}. Pass its state_dict(), or leave it out: no pickle is stored") from error


def _copy(tensor: torch.Tensor, start: int, stop: int, memory: torch.Tensor) -> None:
    """Raw bytes [start, stop) of a tensor, wherever it is, into `memory`."""
    at, itemsize = 0, tensor.element_size()
    for box in flat_boxes(tuple(tensor.shape), start // itemsize, stop // itemsize):
        found = narrow(tensor, box).resolve_conj().resolve_neg().cpu().contiguous()
        memory[at : at + found.nbytes] = found.reshape(-1).view(torch.uint8)
        at += found.nbytes


# Reading


class HoldfastReader(StorageReader):
    """Loads a step (the newest one if None) of the run at `url` through `dcp.load`, on any number of ranks.

    A rank reads, and verifies, the blocks that hold its shards; no metadata but the MANIFEST is read by all. Steps that
    a Checkpointer saved have their tensors and values under DCP's names too, but for optimizers.
    """

    def __init__(self, url: str | os.PathLike[str], *, step: int | None = None) -> None:
        self.url, self.step = os.fspath(url), step
        self._reader: StepReader | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        _refuse_id(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        run = RunDirectory.open(self.url)
        self._reader = StepReader(run, find_commit(run.log.read(), self.step))
        world = self._reader.manifest.world
        specs = {**world.specs, **{alias: world.specs[key] for alias, key in world.aliases.items()}}
        found: dict[str, Any] = {_name(key): _tensor_metadata(spec) for key, spec in specs.items()}
        found |= {_name(key): BytesStorageMetadata() for key in world.value_owner}
        paths = {_name(key): _path(key) for key in (*specs, *world.value_owner)}
        return Metadata(state_dict_metadata=found, planner_data=paths)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        world = self._opened.manifest.world
        self._key_of = {_name(key): key for key in (*world.specs, *world.aliases, *world.value_owner)}

    @property
    def _opened(self) -> StepReader:
        if self._reader is None:
            raise Incompatible("read_metadata comes first, as dcp.load does it")
        return self._reader

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return replace(plan, storage_data=self._opened.commit.attempt)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        if len(attempts := {plan.storage_data for plan in plans}) > 1:
            raise Incompatible(
                f"{self.url}: ranks see different newest steps, {sorted(attempts)}; pass HoldfastReader(url, step=...)"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        reader, world = self._opened, self._opened.manifest.world
        wanted = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        tensors = [planner.resolve_tensor(item).detach() for item in wanted]
        targets = []
        for item, tensor in zip(wanted, tensors, strict=True):
            name = self._key_of[item.storage_index.fqn]
            key = world.aliases.get(name, name)
            targets.append(_target(key, item, tensor, world.specs[key]))
        parts = needed_parts(world, reader.manifest.ownership, targets)
        load_plan = plan_load(targets, {rank: reader.part(rank).chunks for rank in sorted(parts)})
        read_data(reader.open_data, load_plan, tensors, threads=reader.threads)
        for item, tensor in zip(wanted, tensors, strict=True):
            planner.commit_tensor(item, tensor)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._bytes(self._key_of[item.storage_index.fqn]))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _bytes(self, key: str) -> io.BytesIO:
        """The value, pickled here for a planner that expects what torch.save writes."""
        reader = self._opened
        data = reader.part(reader.manifest.world.value_owner[key]).values[key]
        out = io.BytesIO()
        saved, _ = reader.saved()
        refs = {name[len(key) + 1 :]: partial(_whole, reader, saved.stored(name)) for name in saved.under(key)}
        torch.save(decode_value(data, refs), out)
        out.seek(0)
        return out

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def _whole(reader: StepReader, key: str) -> torch.Tensor:
    return read_box(reader, key, whole(reader.manifest.world.specs[key].shape))


def _target(key: str, item: ReadItem, tensor: torch.Tensor, spec: TensorSpec) -> Target:
    """Where a box of a stored tensor goes: `tensor` is just that box of the state, in its own memory."""
    if not can_cast(spec.dtype, dtype_name(tensor.dtype)):
        raise Incompatible(f"{key}: {spec.dtype} in the step, {tensor.dtype} in the state, which cannot hold it")
    box = Slice(tuple(item.storage_offsets), tuple(item.lengths))
    pieces = (Piece(box, (0,) * len(box.shape)),) if box.numel else ()
    direct = tensor.device.type == "cpu" and tensor.is_contiguous() and dtype_name(tensor.dtype) == spec.dtype
    return Target(key, pieces, tuple(tensor.shape), direct)


def _path(key: str) -> tuple[str | int, ...]:
    return tuple(int(name) if name.isdecimal() else unquote(name) for name in key.split("/"))


def _name(key: str) -> str:
    """What DCP calls an entry: its path with dots."""
    return ".".join(map(unquote, key.split("/")))


def _tensor_metadata(spec: TensorSpec) -> TensorStorageMetadata:
    chunk = ChunkStorageMetadata(torch.Size([0] * len(spec.shape)), torch.Size(spec.shape))
    return TensorStorageMetadata(TensorProperties(dtype_from_name(spec.dtype)), torch.Size(spec.shape), [chunk])
