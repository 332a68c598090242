"""safetensors: one file, or the sharded layout of Hugging Face, with an index beside the shards.

Headers are parsed here, not by the safetensors package, which maps the file; the same rules hold: sizes are checked
before parsing, entries after it, and the entries tile the file. Tied tensors are stored once; the header's metadata
names the others, as `safetensors.torch.save_model` does.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import torch

from ckpt.adapt.tensors import bytes_view
from ckpt.errors import Corrupt, Incompatible, NotFound
from ckpt.interop.files import Extent, Files, FileTensor, write_at
from ckpt.interop.tree import Leaf
from ckpt.plan import SAFETENSORS_DTYPE
from ckpt.sharding import ITEMSIZE, TensorSpec
from ckpt.slices import Slice, bands, flat_span, whole

HEADER_LIMIT_BYTES: Final = 100_000_000  # that of the safetensors package
INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
BAND_BYTES: Final = 16 << 20
_DTYPES: Final = {name: dtype for dtype, name in SAFETENSORS_DTYPE.items()}
_SHARD_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.(?:safetensors|bin)")

Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Read = Callable[[Leaf, Slice], torch.Tensor]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[tuple[Size, ...], msgspec.Meta(max_length=64)]
    data_offsets: tuple[Size, Size]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    metadata: dict[str, Any] = {}


def read_safetensors(path: Path, files: Files) -> dict[str, Leaf]:
    """The tensors of one file by name. Raises Corrupt where its header lies about them."""
    fd = files.open(str(path))
    size = os.fstat(fd).st_size
    head = bytearray(8)
    files.pread(str(path), 0, memoryview(head))
    length = int.from_bytes(head, "little")
    if length > min(HEADER_LIMIT_BYTES, size - 8):
        raise Corrupt(f"{path}: a header of {length} bytes in a file of {size}; at most {HEADER_LIMIT_BYTES} are read")
    text = bytearray(length)
    files.pread(str(path), 8, memoryview(text))
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(raw.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
        table = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{path}: its header cannot be read: {error}") from error
    _check_tiles(path, table, size - 8 - length)
    found = {name: _leaf(path, 8 + length, name, entry) for name, entry in table.items()}
    return found | {name: found[kept] for name, kept in metadata.items() if kept in found and name not in found}


def _leaf(path: Path, base: int, name: str, entry: _Entry) -> Leaf:
    if entry.dtype not in _DTYPES:
        raise Incompatible(f"{path}: tensor {name[:200]} has dtype {entry.dtype[:40]!r}, which this cannot store")
    spec = TensorSpec(_DTYPES[entry.dtype], entry.shape)
    start, stop = entry.data_offsets
    if stop - start != spec.nbytes:
        raise Corrupt(f"{path}: tensor {name[:200]} of {spec.nbytes} bytes has {stop - start} in the file")
    return FileTensor(spec, (Extent(whole(entry.shape), str(path), base + start),))


def _check_tiles(path: Path, table: Mapping[str, _Entry], nbytes: int) -> None:
    at = 0
    for start, stop in sorted(entry.data_offsets for entry in table.values()):
        if start != at or stop < start:
            raise Corrupt(f"{path}: its tensors overlap, or leave a hole, at byte {at} of the data")
        at = stop
    if at != nbytes:
        raise Corrupt(f"{path}: its header says {at} bytes of data, the file has {nbytes}")


def read_hf(directory: Path, files: Files) -> dict[str, Leaf]:
    """The tensors of a directory in the layout of Hugging Face. Raises Corrupt where index and shards disagree."""
    index_path = directory / INDEX_NAME
    if not index_path.is_file():
        return read_safetensors(directory / SINGLE_NAME, files)
    return read_shards(index_path, lambda path: read_safetensors(path, files))


def read_shards(index_path: Path, read: Callable[[Path], Any]) -> dict[str, Leaf]:
    """The tensors of all files that an index names, in the order of their names; `read` gives those of one."""
    directory = index_path.parent
    try:
        if index_path.stat().st_size > HEADER_LIMIT_BYTES:
            raise Corrupt(f"{index_path}: over {HEADER_LIMIT_BYTES} bytes, which is the most that is read")
        index = msgspec.json.decode(index_path.read_bytes(), type=_Index)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{index_path}: cannot be read: {error}") from error
    found: dict[str, Leaf] = {}
    for name in sorted(set(index.weight_map.values())):
        if not _SHARD_NAME.fullmatch(name) or Path(name).suffix != Path(index_path.name.partition(".index")[0]).suffix:
            raise Corrupt(f"{index_path}: names {name[:100]!r}, which is not the name of a shard beside it")
        if not (directory / name).exists():
            raise NotFound(f"{directory / name}: this shard, which the index names, is missing. Download it again")
        shard = read(directory / name)
        if not isinstance(shard, dict) or not all(isinstance(leaf, Leaf) for leaf in shard.values()):
            raise Corrupt(f"{directory / name}: holds no dict of tensors, as a shard does")
        found |= {key: leaf for key, leaf in shard.items() if index.weight_map.get(key, name) == name}
    if lacking := set(index.weight_map) - set(found):
        raise Corrupt(f"{index_path}: names {sorted(lacking)[:5]}, which no shard holds")
    return found


# Writing


@dataclass(frozen=True)
class ShardPlan:
    """One file: its name, its tensors in order, and the other names of some of them."""

    name: str
    tensors: tuple[tuple[str, Leaf], ...]
    ties: Mapping[str, str]


def plan_shards(tensors: Mapping[str, Leaf], ties: Mapping[str, str], limit_bytes: int | None) -> list[ShardPlan]:
    """Which tensors go into which file: in order of name, each file up to `limit_bytes`, one tensor at least."""
    unstorable = sorted(name for name, leaf in tensors.items() if leaf.spec.dtype not in SAFETENSORS_DTYPE)
    if unstorable:
        raise Incompatible(f"safetensors has no dtype for {unstorable[:5]}. Use --format dcp or torch")
    groups: list[list[tuple[str, Leaf]]] = [[]]
    used = 0
    for name, leaf in sorted(tensors.items()):
        if limit_bytes is not None and groups[-1] and used + leaf.spec.nbytes > limit_bytes:
            groups.append([])
            used = 0
        groups[-1].append((name, leaf))
        used += leaf.spec.nbytes
    plans = []
    for number, group in enumerate(groups, 1):
        file = SINGLE_NAME if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        held = {name for name, _ in group}
        plans.append(ShardPlan(file, tuple(group), {tie: kept for tie, kept in ties.items() if kept in held}))
    return plans


def write_safetensors(path: Path, plan: ShardPlan, read: Read) -> None:
    """Write one file of `plan`, its tensors brought by `read` in bands."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **plan.ties}}
    ordered = sorted(plan.tensors, key=lambda item: (-ITEMSIZE[item[1].spec.dtype], item[0]))  # keeps all aligned
    at = 0
    for name, leaf in ordered:
        stop = at + leaf.spec.nbytes
        dtype, shape = SAFETENSORS_DTYPE[leaf.spec.dtype], list(leaf.spec.shape)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT_BYTES:
        raise Incompatible(f"a header of {len(text)} bytes is over the limit of safetensors; use --max-shard-bytes")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_at(fd, 0, memoryview(len(text).to_bytes(8, "little") + text))
        for name, leaf in ordered:
            write_tensor(fd, 8 + len(text) + table[name]["data_offsets"][0], leaf, read)
    finally:
        os.close(fd)


def write_tensor(fd: int, at: int, leaf: Leaf, read: Read) -> None:
    """Write a tensor row-major from byte `at` on."""
    itemsize = ITEMSIZE[leaf.spec.dtype]
    for box in bands(leaf.spec.shape, itemsize, BAND_BYTES):
        if prod(box.shape):
            first = flat_span(leaf.spec.shape, box)[0] * itemsize
            write_at(fd, at + first, bytes_view(read(leaf, box)))


def write_index(path: Path, plans: Sequence[ShardPlan]) -> None:
    """The index of several shards."""
    leaves = [leaf for plan in plans for _, leaf in plan.tensors]
    metadata = {
        "total_parameters": sum(prod(leaf.spec.shape) for leaf in leaves),
        "total_size": sum(leaf.spec.nbytes for leaf in leaves),
    }
    weight_map = {name: plan.name for plan in plans for name, _ in plan.tensors}
    path.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n")
