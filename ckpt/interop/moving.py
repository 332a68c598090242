"""`ckpt export` and `ckpt import`: a step as another library's checkpoint, and the other way round.

Both go through memory in bands, whatever the world size of the run was, without a process group. An export appears
whole under its name or not at all; an import is a step like any other once its commit stands in the log.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from ckpt import codec
from ckpt.adapt import decode_value
from ckpt.adapt.state import INLINE_ELEMENTS
from ckpt.adapt.values import dtype_from_name, extend_encode
from ckpt.errors import Incompatible, NotFound
from ckpt.holder import Holder, discard
from ckpt.interop import SHARD_BYTES, Format, Source
from ckpt.interop.dcpfiles import METADATA_NAME, read_dcp, write_dcp
from ckpt.interop.files import Files, appearing, read_whole
from ckpt.interop.folder import is_training, read_training
from ckpt.interop.hf import (
    INDEX_NAME,
    SINGLE_NAME,
    plan_shards,
    read_hf,
    read_safetensors,
    write_index,
    write_safetensors,
)
from ckpt.interop.torchfile import read_torch, write_torch
from ckpt.interop.tree import Content, Leaf, content_of, tree_of
from ckpt.interop.trusted import unpickle_apart
from ckpt.layout import OWNERSHIP, Entry, Layout, World
from ckpt.loader import read_box
from ckpt.plan import PlannedChunk, plan_save
from ckpt.records import Commit, attempt_name
from ckpt.restorer import StepReader
from ckpt.sharding import ITEMSIZE, Whole
from ckpt.slices import Slice, flat_boxes
from ckpt.writing import check_follows, commit_step, write_part

PART_BYTES: Final = 64 << 30
"""An import is written in as many parts as it takes of this size: several ranks read several files."""

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Moved:
    """What was exported or imported: counts, bytes of tensors, and what a person should know."""

    tensors: int
    values: int
    nbytes: int
    notes: tuple[str, ...]


# Out


@dataclass(frozen=True)
class StepTensor(Leaf):
    """A tensor of a step."""

    key: str


def export_step(
    reader: StepReader,
    target: Path,
    form: Format,
    only: str = "",
    shard_bytes: int = SHARD_BYTES,
    on_bytes: OnBytes = lambda nbytes: None,
) -> Moved:
    """Write the step, or what lies at `only` in it, to `target`: a directory for hf and dcp, a file for the others.

    Raises Incompatible if `target` exists or the format cannot hold the tensors, NotFound if `only` names nothing.
    """
    tree = _tree(reader, only)
    notes = [] if only else _left_out(reader)

    def read(leaf: Leaf, box: Slice) -> torch.Tensor:
        assert isinstance(leaf, StepTensor)
        if not box.numel:
            return torch.empty(box.shape, dtype=dtype_from_name(leaf.spec.dtype))
        tensor = read_box(reader, leaf.key, box)
        on_bytes(tensor.nbytes)
        return tensor

    leaves, values = _flat(tree)
    with appearing(target, directory=form in ("hf", "dcp")) as path:
        match form:
            case "dcp":
                write_dcp(path, tree, read)
            case "torch":
                write_torch(path, tree, read)
            case "safetensors" | "hf":
                first, ties = _tied(leaves)
                plans = plan_shards(first, ties, shard_bytes if form == "hf" else None)
                for plan in plans:
                    write_safetensors(path / plan.name if form == "hf" else path, plan, read)
                if len(plans) > 1:
                    write_index(path / INDEX_NAME, plans)
                if values:
                    notes.append(f"{values} values were left out: {form} holds tensors alone")
    return Moved(len(leaves), values, sum(leaf.spec.nbytes for leaf in set(leaves.values())), tuple(notes))


def _tree(reader: StepReader, only: str) -> dict[str, Any]:
    world = reader.manifest.world
    tensors: dict[str, Leaf] = {key: StepTensor(spec, key) for key, spec in world.specs.items()}
    tensors |= {alias: tensors[key] for alias, key in world.aliases.items()}
    values = {name: partial(_decoded, reader, name, owner) for name, owner in world.value_owner.items()}
    return tree_of(tensors, values, only)


def _decoded(reader: StepReader, name: str, owner: int, refs: Mapping[str, Leaf]) -> object:
    makers: Any = {ref: partial(_itself, leaf) for ref, leaf in refs.items()}
    return decode_value(reader.part(owner).values[name], makers)


def _itself(leaf: Leaf) -> Leaf:
    return leaf


def _left_out(reader: StepReader) -> list[str]:
    names = sorted({name for layout in reader.manifest.world.layouts for name in layout.rank_values})
    return [f"left out, for it is each rank's own: {', '.join(names[:10])}"] if names else []


def _flat(node: Any, name: str = "") -> tuple[dict[str, Leaf], int]:
    """The tensors by dotted name, and how many values there are."""
    if isinstance(node, Leaf):
        return {name: node}, 0
    if not isinstance(node, dict | list) or (isinstance(node, list) and not any(_flat(item)[0] for item in node)):
        return {}, 1
    found: dict[str, Leaf] = {}
    values = 0
    for key, item in node.items() if isinstance(node, dict) else enumerate(node):
        leaves, count = _flat(item, f"{name}.{key}" if name else str(key))
        if twice := found.keys() & leaves.keys():
            raise Incompatible(f"two tensors would be called {min(twice)}; export a part of the step with --only")
        found |= leaves
        values += count
    return found, values


def _tied(leaves: Mapping[str, Leaf]) -> tuple[dict[str, Leaf], dict[str, str]]:
    """Each tensor once, under the name that sorts first; and the other names with it."""
    first: dict[Leaf, str] = {}
    for name in sorted(leaves):
        first.setdefault(leaves[name], name)
    return {name: leaf for leaf, name in first.items()}, {
        name: first[leaf] for name, leaf in leaves.items() if first[leaf] != name
    }


# In


def import_step(
    source: Path,
    holder: Holder,
    step: int,
    form: Source = "auto",
    *,
    prefix: str = "",
    only: str = "",
    trust_pickle: bool = False,
    part_bytes: int = PART_BYTES,
    on_begin: OnBytes = lambda nbytes: None,
    on_bytes: OnBytes = lambda nbytes: None,
) -> tuple[Commit, Moved]:
    """Commit what `source` holds as step `step` of the holder's run.

    Raises NotFound, Corrupt or Incompatible for a source that is missing, damaged or of no use, before anything is
    written; Incompatible where the run has passed the step; Fenced where another start took the run meanwhile.
    """
    holder.run.log.read()
    check_follows(holder.run, step)
    with ExitStack() as stack:
        files = Files()
        stack.callback(files.close)
        tree, notes, ordered = _read(source, form, trust_pickle, files, stack)
        content = content_of(tree, prefix, only, ordered)
        values = {name: _encoded(name, value, files) for name, value in content.values.items()}
        total = sum(leaf.spec.nbytes for leaf in content.tensors.values())
        on_begin(total)
        commit = _write(holder, step, content, values, files, -(-total // part_bytes), on_bytes)
    return commit, Moved(len(content.tensors), len(values), total, (*notes, *content.notes))


def _read(
    source: Path, form: Source, trust_pickle: bool, files: Files, stack: ExitStack
) -> tuple[Any, list[str], bool]:
    """The tree, what a person should know, and whether models in it list their parameters in their own order."""
    notes: list[str] = []

    def pickled(path: Path) -> Any:
        if not path.is_file():
            raise NotFound(f"{path}: there is no such file")
        if not trust_pickle:
            return read_torch(path, files, "If you trust whoever wrote it, pass --trust-pickle")
        into = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckpt-import-"))) / "plain.pt"
        notes.extend(unpickle_apart(path, into))
        return read_torch(into, files, "The child process wrote it so; this file cannot be imported")

    match form if form != "auto" else detect(source):
        case "safetensors":
            return read_safetensors(source, files), [], False
        case "hf":
            return read_hf(source, files), [], False
        case "dcp":
            return read_dcp(source, files), [], False
        case "training":
            tree, left, ordered = read_training(source, files, pickled)
            return tree, [*notes, *left], ordered
    return pickled(source), notes, True


def detect(source: Path) -> Source:
    """The format of what lies at `source`. Raises NotFound, or Incompatible where it is none of them."""
    if source.is_dir():
        if (source / METADATA_NAME).exists():
            return "dcp"
        if is_training(source):
            return "training"
        if (source / INDEX_NAME).exists() or (source / SINGLE_NAME).exists():
            return "hf"
        raise Incompatible(f"{source}: neither {METADATA_NAME} (DCP) nor {INDEX_NAME} nor {SINGLE_NAME} lies there")
    if not source.is_file():
        raise NotFound(f"{source}: there is no such file or directory")
    with open(source, "rb") as file:
        head = file.read(9)
    return "safetensors" if head[8:9] == b"{" else "torch"


def _encoded(name: str, value: object, files: Files) -> bytes:
    def extend(item: object) -> tuple[str, object] | None:
        if isinstance(item, Leaf) and item.spec.nbytes <= INLINE_ELEMENTS * ITEMSIZE[item.spec.dtype]:
            return extend_encode(read_whole(files, item))
        return extend_encode(item)

    try:
        return codec.encode(value, extend)
    except Incompatible as error:
        raise Incompatible(f"{name}: {error}. Import a part of the file with --only") from error


def _write(
    holder: Holder,
    step: int,
    content: Content,
    values: Mapping[str, bytes],
    files: Files,
    parts: int,
    on_bytes: OnBytes,
) -> Commit:
    entries = (Entry(key, leaf.spec, Whole(), "parameter") for key, leaf in sorted(content.tensors.items()))
    layout = Layout(tuple(entries), tuple(sorted(content.aliases.items())), tuple(values))
    world = World((layout,), (0,) * max(parts, 1))
    start = holder.ensure_started("import")
    attempt, written = attempt_name(step, secrets.token_hex(4)), []

    def fill(chunk: PlannedChunk, first: int, stop: int, memory: torch.Tensor) -> None:
        _fill(files, content.tensors[chunk.owned.key], chunk, first, stop, memory)
        on_bytes(stop - first)

    try:
        for rank in range(world.size):
            plan = plan_save(world, rank)
            own = {name: values[name] for name in plan.values}
            written.append(write_part(holder.run, attempt, rank, plan, fill, own))
    except BaseException:
        discard(holder.run, attempt)
        raise
    return commit_step(holder.run, start, step, attempt, world, OWNERSHIP, written)


def _fill(files: Files, leaf: Leaf, chunk: PlannedChunk, first: int, stop: int, memory: torch.Tensor) -> None:
    itemsize, at = ITEMSIZE[leaf.spec.dtype], 0
    for box in flat_boxes(chunk.owned.box.shape, first // itemsize, stop // itemsize):
        into = torch.empty(box.shape, dtype=dtype_from_name(leaf.spec.dtype))
        files.read(leaf, box.moved_by(chunk.owned.box.offset), into)
        memory[at : at + into.nbytes] = into.reshape(-1).view(torch.uint8)
        at += into.nbytes
