"""The `.metadata` of a DCP directory: a pickle, read without making an object of it.

Only the globals that such a file needs are known. Each gives an inert record of its own, never the class of that
name, so a crafted file can neither run code nor change one; everything is checked once the records are there. The
unpickler is Python's own in Python: the one in C allocates what a single opcode asks for.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from ckpt.errors import Corrupt, Incompatible
from ckpt.sharding import ITEMSIZE, TensorSpec
from ckpt.slices import Slice, cover_fault, whole

METADATA_LIMIT_BYTES: Final = 256 << 20
_DCP: Final = "torch.distributed.checkpoint"
_RECORDS: Final = frozenset(
    {
        *((f"{_DCP}.metadata", name) for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )),
        (f"{_DCP}.filesystem", "_StorageInfo"), (f"{_DCP}.filesystem", "_StoragePrefix"),
        ("torch.serialization", "_get_layout"),
        *(("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")),
        *(("pathlib._local", name) for name in ("PosixPath", "WindowsPath")),
    }
)  # fmt: skip
_REFUSED: Final = (pickle.BYTEARRAY8, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET)
"""Opcodes that take memory before they read, or hash what a crafted file nested: no metadata has them."""
_MISSING: Final = object()


@dataclass(frozen=True)
class Place:
    """Where a stored item lies: a file of the directory, and bytes of it."""

    file: str
    at: int
    nbytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, and its stored boxes, which tile it."""

    spec: TensorSpec
    boxes: tuple[tuple[Slice, Place], ...]


@dataclass(frozen=True)
class Directory:
    """What a DCP directory holds: by flat name a tensor, or a pickled value; and the path each name stands for."""

    items: Mapping[str, StoredTensor | Place]
    paths: Mapping[str, tuple[str | int, ...]]


class _Record:
    """An inert stand-in of a class: the fields that were set."""

    kind = ""

    def __new__(cls, *args: object, **fields: object) -> Any:
        made = object.__new__(cls)
        made.__dict__.update(fields)
        return made

    def __init__(self, *args: object, **fields: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Dtype(str):
    """The name of a torch dtype."""


class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: act for code, act in pickle._Unpickler.dispatch.items() if code not in {c[0] for c in _REFUSED}
    }

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._records: dict[tuple[str, str], type] = {}  # new ones for each file: it may write into them

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return self._records.setdefault((module, name), type(name, (_Record,), {"kind": name}))
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in ITEMSIZE:
            return _Dtype(name)
        raise pickle.UnpicklingError(f"it asks for {module[:100]}.{name[:100]}, which no DCP metadata needs")

    def persistent_load(self, pid: object) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of itself")


def _set(into: object, pairs: Sequence[Any]) -> None:
    if type(into) is not dict or any(not isinstance(key, str | int | _Record) for key in pairs[::2]):
        raise pickle.UnpicklingError("its dicts have keys that no DCP metadata needs")
    into.update(zip(pairs[::2], pairs[1::2], strict=True))


def _load_setitem(machine: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set(machine.stack[-1], [key, value])


def _load_setitems(machine: Any) -> None:
    pairs = machine.pop_mark()
    _set(machine.stack[-1], pairs)


def _load_dict(machine: Any) -> None:
    made: dict[Any, Any] = {}
    _set(made, machine.pop_mark())
    machine.append(made)


_Unpickler.dispatch.update(
    {pickle.SETITEM[0]: _load_setitem, pickle.SETITEMS[0]: _load_setitems, pickle.DICT[0]: _load_dict}
)


def parse_metadata(data: bytes, where: str) -> Directory:
    """What `.metadata` says. Raises Corrupt, or Incompatible for what is beyond this reader; runs nothing of it."""
    if len(data) > METADATA_LIMIT_BYTES:
        raise Corrupt(f"{where}: {len(data)} bytes; at most {METADATA_LIMIT_BYTES} are read")
    try:
        root = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # whatever a crafted stream makes the opcodes raise
        raise Corrupt(
            f"{where}: not the metadata of a DCP checkpoint: {str(error)[:300]}. Nothing of it was run. "
            "If you trust it, load it with DCP and save it again"
        ) from error
    try:
        return _directory(root, where)
    except (TypeError, ValueError, AttributeError, KeyError, RecursionError) as error:
        raise Corrupt(f"{where}: {str(error)[:300]}") from error


def _get(record: object, kind: str, name: str, default: object = _MISSING) -> Any:
    if not isinstance(record, _Record) or type(record).kind != kind:
        raise ValueError(f"a {kind} was expected, not a {type(record).__name__}")
    found = record.__dict__.get(name, default)
    if found is _MISSING:
        raise ValueError(f"a {kind} lacks {name}")
    return found


def _directory(root: object, where: str) -> Directory:
    states = _typed(_get(root, "Metadata", "state_dict_metadata"), dict)
    storage = _typed(_get(root, "Metadata", "storage_data"), dict)
    places = {}
    for index, info in storage.items():
        offset = _get(index, "MetadataIndex", "offset", None)
        key = _typed(_get(index, "MetadataIndex", "fqn"), str), None if offset is None else _ints(offset)
        places[key] = _place(info, where)
    items: dict[str, StoredTensor | Place] = {}
    for name, state in states.items():
        if getattr(type(state), "kind", "") == "BytesStorageMetadata":
            items[_typed(name, str)] = places[name, None]
        else:
            items[_typed(name, str)] = _tensor(name, state, places)
    planned = _get(root, "Metadata", "planner_data", None)
    paths = {name: _path(name, path) for name, path in planned.items()} if isinstance(planned, dict) else {}
    return Directory(items, {name: paths.get(name, (name,)) for name in items})


def _tensor(name: str, state: object, places: Mapping[tuple[str, tuple[int, ...] | None], Place]) -> StoredTensor:
    properties = _get(state, "TensorStorageMetadata", "properties")
    dtype = _typed(_get(properties, "TensorProperties", "state"), tuple)[0]
    if not isinstance(dtype, _Dtype):
        raise ValueError(f"{name}: it has no dtype that can be stored")
    shape = _ints(_get(state, "TensorStorageMetadata", "size"))
    spec = TensorSpec(str(dtype), shape)
    boxes = []
    for chunk in _typed(_get(state, "TensorStorageMetadata", "chunks"), list):
        sizes = _ints(_get(chunk, "ChunkStorageMetadata", "sizes"))
        offsets = _ints(_get(chunk, "ChunkStorageMetadata", "offsets"))
        place = places.get((name, offsets)) or places.get((name, None))
        if place is None:
            raise ValueError(f"{name}: its part at {offsets} lies nowhere")
        boxes.append((Slice(offsets, sizes), place))
    if fault := cover_fault(whole(shape), [box for box, _ in boxes]):
        raise ValueError(f"{name}: its parts do not cover it: {fault}")
    return StoredTensor(spec, tuple(boxes))


def _place(info: object, where: str) -> Place:
    if _get(info, "_StorageInfo", "transform_descriptors", None):
        raise Incompatible(f"{where}: its data is compressed by an extension of DCP; save it again without one")
    file = _typed(_get(info, "_StorageInfo", "relative_path"), str)
    if not file or "/" in file or "\\" in file or "\0" in file or file in (".", "..", ".metadata"):
        raise ValueError(f"{file[:100]!r} is not the name of a file of the directory")
    at, nbytes = _ints((_get(info, "_StorageInfo", "offset"), _get(info, "_StorageInfo", "length")))
    return Place(file, at, nbytes)


def _path(name: object, path: object) -> tuple[str | int, ...]:
    parts = tuple(_typed(path, tuple))
    if not isinstance(name, str) or not parts or any(type(part) not in (str, int) for part in parts):
        raise ValueError("the path of a name is not made of names")
    return parts


def _typed(value: object, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {kind.__name__} was expected, not a {type(value).__name__}")
    return value


def _ints(value: object) -> tuple[int, ...]:
    found = tuple(_typed(value, tuple))
    if len(found) > 64 or any(type(n) is not int or not 0 <= n < 1 << 62 for n in found):
        raise ValueError("sizes and offsets are numbers from 0 on")
    return found
