"""Torch and NumPy objects inside values: the `extend` pair of `ckpt.codec`.

Owns the extension tags and the names of dtypes. Tensors here are small and belong to a value (a scheduler's state, a
random generator's state); tensors of the model go through the data files instead.

    tag                  payload
    torch.dtype          name, as in DTYPES
    torch.device         str(device)
    torch.Size           [int, ...]
    torch.layout         name
    torch.memory_format  name
    torch.tensor         [dtype name, [int, ...], bytes]     C order, little-endian; read back on the CPU
    numpy.dtype          dtype.str, as "<f4": byte order, kind, item size
    numpy.scalar         [dtype.str, bytes]
    numpy.ndarray        [dtype.str, [int, ...], bytes]      C order, in the byte order of the dtype

Never pickle and never an object array: a payload is checked against these shapes and anything else is Corrupt.
NumPy is optional: without it only reading a NumPy value fails.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

from ckpt.errors import Corrupt, Incompatible

_DTYPE_NAMES = (
    *("float16", "bfloat16", "float32", "float64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("bool", "complex32", "complex64", "complex128"),
)
_LAYOUT_NAMES = ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")
_MEMORY_FORMAT_NAMES = ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
_NUMPY_ITEMS = ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
_NUMPY_DTYPES = frozenset({"|b1", "|i1", "|u1"} | {order + item for order in "<>" for item in _NUMPY_ITEMS})
_MAX_DIMS = 64  # NumPy's limit


def _named(names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(torch, name) for name in names if hasattr(torch, name)}


DTYPES: Mapping[str, torch.dtype] = _named(_DTYPE_NAMES)
_LAYOUTS: Mapping[str, torch.layout] = _named(_LAYOUT_NAMES)
_MEMORY_FORMATS: Mapping[str, torch.memory_format] = _named(_MEMORY_FORMAT_NAMES)
_DTYPE_TO_NAME = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The stored name of a dtype, as "bfloat16". Raises Incompatible for one that cannot be stored."""
    name = _DTYPE_TO_NAME.get(dtype)
    if name is None:
        raise Incompatible(f"{dtype} cannot be stored; storable are {', '.join(DTYPES)}")
    return name


def dtype_from_name(name: str) -> torch.dtype:
    """The dtype of a stored name. Raises Corrupt for any other name."""
    dtype = DTYPES.get(name)
    if dtype is None:
        raise Corrupt(f"{name!r:.80} is not a dtype that can be stored; known are {', '.join(DTYPES)}")
    return dtype


def can_cast(stored: str, wanted: str) -> bool:
    """Whether values of one dtype may become the other: real or complex of any width, integers without loss."""
    source, target = dtype_from_name(stored), dtype_from_name(wanted)
    if source.is_complex or target.is_complex:
        return source.is_complex and target.is_complex
    if source.is_floating_point or target.is_floating_point:
        return source.is_floating_point and target.is_floating_point
    if torch.bool in (source, target):
        return source is torch.bool
    narrow, wide = torch.iinfo(source), torch.iinfo(target)
    return wide.min <= narrow.min and narrow.max <= wide.max


def extend_encode(value: object) -> tuple[str, object] | None:
    """(tag, payload) of a torch or NumPy object, None for anything else.

    Tensors lose `requires_grad` and their device. Raises Incompatible for one whose bytes cannot be stored exactly:
    tensor and array subclasses, DTensor among them, sparse, quantized and meta tensors, object and structured arrays;
    and for a DataLoader.
    """
    write = _WRITE.get(type(value))
    if write is not None:
        return write(value)
    if isinstance(value, torch.Tensor):
        raise Incompatible("only plain tensors and parameters fit into a value; keep it as an entry of the state")
    if isinstance(value, torch.utils.data.DataLoader):
        raise Incompatible(
            "its place in the data cannot be asked for. Take torchdata's StatefulDataLoader or elastic.batches; if it "
            "is left out, a restored run begins the data anew"
        )
    numpy = sys.modules.get("numpy")
    return None if numpy is None else _write_numpy(numpy, value)


def extend_decode(tag: str, payload: object) -> object:
    """The object of a tag and payload.

    Raises Corrupt if they do not fit each other, Incompatible if NumPy is needed and absent.
    """
    read = _READ.get(tag)
    if read is None:
        raise Corrupt(f"stored value holds unknown extension {tag!r:.80}; known are {', '.join(_READ)}")
    try:
        return read(payload)
    except (TypeError, ValueError, OverflowError, RuntimeError, MemoryError) as error:
        raise Corrupt(f"stored {tag} is not valid: {error}") from error


def _write_named(tag: str, table: Mapping[str, object]) -> Callable[[Any], tuple[str, object]]:
    names = {item: name for name, item in table.items()}

    def write(value: object) -> tuple[str, object]:
        if value not in names:
            raise Incompatible(f"{value} cannot be stored; storable are {', '.join(table)}")
        return tag, names[value]

    return write


def _read_named(table: Mapping[str, object]) -> Callable[[object], object]:
    def read(payload: object) -> object:
        name = _expect(payload, str)
        if name not in table:
            raise Corrupt(f"stored name {name!r:.80} is unknown; known are {', '.join(table)}")
        return table[name]

    return read


def _write_tensor(value: torch.Tensor) -> tuple[str, object]:
    if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.device.type == "meta":
        raise Incompatible("sparse, quantized, nested and meta tensors have no plain bytes; store their parts")
    return "torch.tensor", [dtype_name(value.dtype), list(value.shape), _tensor_bytes(value)]


def _tensor_bytes(value: torch.Tensor) -> bytes:
    if sys.byteorder != "little":
        raise Incompatible("tensors inside values are stored on little-endian machines only")
    plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # not plain.numpy(): that needs NumPy and lacks bfloat16; string_at copies, and `plain` outlives it
    return ctypes.string_at(plain.data_ptr(), plain.nbytes) if plain.nbytes else b""


def _read_tensor(payload: object) -> torch.Tensor:
    name, dims, body = _parts(payload, 3)
    dtype = dtype_from_name(_expect(name, str))
    shape = _shape(dims)
    data = _exact_bytes(body, shape, dtype.itemsize)
    if not data:
        return torch.empty(shape, dtype=dtype)
    # frombuffer borrows the bytearray; the clone is an ordinary tensor: aligned, and it can be resized
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).clone().view(dtype).reshape(shape)


def _write_numpy(numpy: ModuleType, value: Any) -> tuple[str, object] | None:
    if isinstance(value, numpy.dtype):
        return "numpy.dtype", _numpy_name(value)
    if type(value) is numpy.ndarray:
        return "numpy.ndarray", [_numpy_name(value.dtype), list(value.shape), value.tobytes(order="C")]
    if isinstance(value, numpy.ndarray):
        raise Incompatible("a subclass of numpy.ndarray would lose what it adds; store numpy.asarray(value)")
    if isinstance(value, numpy.generic) and type(value) is value.dtype.type:
        return "numpy.scalar", [_numpy_name(value.dtype), value.tobytes()]
    return None


def _numpy_name(dtype: Any) -> str:
    name: str = dtype.str
    if dtype.names is not None or dtype.subdtype is not None or name not in _NUMPY_DTYPES:
        raise Incompatible(f"numpy dtype {dtype} cannot be stored; storable are bool, int, uint, float and complex")
    return name


def _read_numpy_dtype(payload: object) -> Any:
    name = _expect(payload, str)
    if name not in _NUMPY_DTYPES:
        raise Corrupt(f"{name!r:.80} is not a numpy dtype that can be stored")
    return _numpy().dtype(name)


def _read_numpy_scalar(payload: object) -> Any:
    name, body = _parts(payload, 2)
    return _numpy_array(name, [], body)[()]


def _read_ndarray(payload: object) -> Any:
    return _numpy_array(*_parts(payload, 3))


def _numpy_array(name: object, dims: object, body: object) -> Any:
    dtype = _read_numpy_dtype(name)
    shape = _shape(dims)
    return _numpy().ndarray(shape, dtype, buffer=_exact_bytes(body, shape, dtype.itemsize)).copy()


def _numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise Incompatible(
            "the checkpoint holds a NumPy value and numpy is not installed: pip install numpy"
        ) from error
    return numpy


def _expect(payload: object, kind: type) -> Any:
    if type(payload) is not kind:
        raise Corrupt(f"stored value holds {type(payload).__name__} where {kind.__name__} was expected")
    return payload


def _parts(payload: object, length: int) -> list[object]:
    parts: list[object] = _expect(payload, list)
    if len(parts) != length:
        raise Corrupt(f"stored value holds {len(parts)} parts where {length} were expected")
    return parts


def _ints(payload: object) -> list[int]:
    items: list[int] = _expect(payload, list)
    if not all(type(item) is int for item in items):
        raise Corrupt("stored sizes hold something other than ints")
    return items


def _shape(payload: object) -> list[int]:
    shape = _ints(payload)
    if len(shape) > _MAX_DIMS or not all(0 <= size < 2**63 for size in shape):
        raise Corrupt(f"{shape!r:.80} is not the shape of a tensor")
    return shape


def _exact_bytes(body: object, shape: list[int], itemsize: int) -> bytes:
    data: bytes = _expect(body, bytes)
    if len(data) != math.prod(shape) * itemsize:
        raise Corrupt(f"stored tensor of shape {shape!r:.80} and item size {itemsize} has {len(data)} bytes")
    return data


_WRITE: dict[type, Callable[[Any], tuple[str, object]]] = {
    torch.dtype: lambda value: ("torch.dtype", dtype_name(value)),
    torch.device: lambda value: ("torch.device", str(value)),
    torch.Size: lambda value: ("torch.Size", list(value)),
    torch.layout: _write_named("torch.layout", _LAYOUTS),
    torch.memory_format: _write_named("torch.memory_format", _MEMORY_FORMATS),
    torch.Tensor: _write_tensor,
    torch.nn.Parameter: _write_tensor,
}

_READ: dict[str, Callable[[object], object]] = {
    "torch.dtype": lambda payload: dtype_from_name(_expect(payload, str)),
    "torch.device": lambda payload: torch.device(_expect(payload, str)),
    "torch.Size": lambda payload: torch.Size(_ints(payload)),
    "torch.layout": _read_named(_LAYOUTS),
    "torch.memory_format": _read_named(_MEMORY_FORMATS),
    "torch.tensor": _read_tensor,
    "numpy.dtype": _read_numpy_dtype,
    "numpy.scalar": _read_numpy_scalar,
    "numpy.ndarray": _read_ndarray,
}
