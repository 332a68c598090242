"""Directories of torch.distributed.checkpoint, read and written by one process without a process group.

Reading goes by our own parser of `.metadata` and by ranges; writing by DCP itself, which asks for one band of a
tensor at a time.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from ckpt.adapt.values import dtype_from_name
from ckpt.errors import CkptError, Corrupt, Incompatible, NotFound
from ckpt.interop.files import Extent, Files, FileTensor, fits
from ckpt.interop.hf import Read
from ckpt.interop.metadata import METADATA_LIMIT_BYTES, Place, StoredTensor, parse_metadata
from ckpt.interop.torchfile import load_slab
from ckpt.interop.tree import Leaf
from ckpt.slices import Slice, bands, whole

METADATA_NAME: Final = ".metadata"
VALUE_LIMIT_BYTES: Final = 64 << 20
BAND_BYTES: Final = 16 << 20
_HINT: Final = "Load it with DCP in the program that wrote it, and save plain values"


def read_dcp(directory: Path, files: Files) -> Any:
    """The tree in a DCP directory. Raises Corrupt where its metadata or its files are not what they must be."""
    path = directory / METADATA_NAME
    if not path.is_file():
        raise NotFound(f"{directory}: no {METADATA_NAME}; is the path right, and the checkpoint complete?")
    size = path.stat().st_size
    if size > METADATA_LIMIT_BYTES:
        raise Corrupt(f"{path}: {size} bytes; at most {METADATA_LIMIT_BYTES} are read")
    found = parse_metadata(path.read_bytes(), str(path))
    tree: dict[str | int, Any] = {}
    for name, item in found.items.items():
        value = (
            _tensor(directory, name, item, files) if isinstance(item, StoredTensor) else _value(directory, item, files)
        )
        _place(tree, found.paths[name], value)
    return _with_lists(tree)


def _slab_of(directory: Path, place: Place, files: Files) -> str:
    path = str(directory / place.file)
    if os.path.islink(path):
        raise Corrupt(f"{path}: a link in place of a file of the checkpoint is not followed")
    fits(place.nbytes, place.at, os.fstat(files.open(path)).st_size, f"{directory / METADATA_NAME}")
    return path


def _value(directory: Path, place: Place, files: Files) -> Any:
    if place.nbytes > VALUE_LIMIT_BYTES:
        raise Incompatible(
            f"{directory / place.file}: a value of {place.nbytes} bytes; the limit is {VALUE_LIMIT_BYTES}"
        )
    return load_slab(files, _slab_of(directory, place, files), place.at, place.nbytes, _HINT)


def _tensor(directory: Path, name: str, stored: StoredTensor, files: Files) -> Leaf:
    extents: list[Extent] = []
    for box, place in stored.boxes:
        if not box.numel:
            continue
        part = load_slab(files, _slab_of(directory, place, files), place.at, place.nbytes, _HINT)
        if not isinstance(part, FileTensor) or (part.spec.dtype, part.spec.shape) != (stored.spec.dtype, box.shape):
            raise Corrupt(f"{directory}: {name[:200]} at {box.offset} is not the tensor that {METADATA_NAME} says")
        (inner,) = part.extents
        extents.append(dataclasses.replace(inner, box=box))
    return FileTensor(stored.spec, tuple(extents))


def _place(tree: dict[str | int, Any], path: tuple[str | int, ...], value: Any) -> None:
    node = tree
    for part in path[:-1]:
        node = node.setdefault(part, _Node())
        if not isinstance(node, _Node):
            raise Corrupt(f"{METADATA_NAME}: {path} lies below something that is no dict")
    if path[-1] in node:
        raise Corrupt(f"{METADATA_NAME}: two entries for {path}")
    node[path[-1]] = value


class _Node(dict[str | int, Any]):
    """A container that stood on the path of a name: a list where all its names are numbers."""


def _with_lists(node: dict[str | int, Any]) -> Any:
    made = {name: _with_lists(item) if isinstance(item, _Node) else item for name, item in node.items()}
    if isinstance(node, _Node) and made and all(type(name) is int for name in made):
        return [made[index] for index in sorted(made)]
    return made


# Writing


def write_dcp(directory: Path, tree: dict[str, Any], read: Read) -> None:
    """Have DCP save `tree` into `directory`."""
    planner = _BandPlanner(read)
    writer = FileSystemWriter(directory, single_file_per_rank=True, sync_files=True, thread_count=1)
    try:
        save(planner.prepared(tree), storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, CkptError | OSError):
                raise cause from None
        raise


class _BandPlanner(DefaultSavePlanner):
    """Plans bands of large tensors, and reads each when DCP asks for its data."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self._read = read
        self._leaves: dict[int, Leaf] = {}
        self._boxes: dict[MetadataIndex, tuple[Leaf, Slice]] = {}

    def prepared(self, node: Any) -> Any:
        """The tree with tensors that have no memory in place of leaves."""
        if isinstance(node, Leaf):
            empty = torch.empty(node.spec.shape, dtype=dtype_from_name(node.spec.dtype), device="meta")
            self._leaves[id(empty)] = node
            return empty
        if isinstance(node, dict):
            return {name: self.prepared(item) for name, item in node.items()}
        return [self.prepared(item) for item in node] if type(node) is list else node

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        return dataclasses.replace(plan, items=[made for item in plan.items for made in self._in_bands(item)])

    def _in_bands(self, item: WriteItem) -> list[WriteItem]:
        leaf = self._leaves.get(id(self.state_dict[item.index.fqn]))
        if leaf is None or item.tensor_data is None:
            return [item]
        made = []
        shape = leaf.spec.shape
        for box in (
            bands(shape, dtype_from_name(leaf.spec.dtype).itemsize, BAND_BYTES) if leaf.spec.nbytes else [whole(shape)]
        ):
            chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))
            index = MetadataIndex(item.index.fqn, torch.Size(box.offset))
            self._boxes[index] = leaf, box
            data = dataclasses.replace(item.tensor_data, chunk=chunk)
            made.append(dataclasses.replace(item, index=index, type=WriteItemType.SHARD, tensor_data=data))
        return made

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.index in self._boxes:
            return self._read(*self._boxes[write_item.index])
        return super().resolve_data(write_item)
