"""Files of torch.save: what is in them as a tree, and a tree as such a file, without holding the tensors.

Where its bytes lie is told by loading it with fake tensors; the bytes are then read range by range. A file from
before torch 1.6 has no such ranges and is read as a whole. Only what `weights_only` allows is unpickled here.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from ckpt.adapt.tensors import bytes_view
from ckpt.adapt.values import dtype_from_name, dtype_name
from ckpt.buffers import narrow
from ckpt.errors import Corrupt, Incompatible
from ckpt.interop.files import Files, FileTensor, MemoryTensor, file_tensor_extent, write_at
from ckpt.interop.hf import Read, write_tensor
from ckpt.interop.tree import Leaf
from ckpt.sharding import TensorSpec
from ckpt.slices import Slice, whole

PICKLE_LIMIT_BYTES: Final = 256 << 20


class Slab(io.RawIOBase):
    """Bytes [at, at + nbytes) of a file, as a file."""

    def __init__(self, files: Files, path: str, at: int, nbytes: int) -> None:
        self._files, self._path, self._at, self._nbytes, self._where = files, path, at, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._where

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._where = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._where, os.SEEK_END: self._nbytes}[whence])
        return self._where

    def readinto(self, into: Any) -> int:
        view = memoryview(into).cast("B")
        count = max(0, min(len(view), self._nbytes - self._where))
        self._files.pread(self._path, self._at + self._where, view[:count])
        self._where += count
        return count


def read_torch(path: Path, files: Files, hint: str) -> Any:
    """The tree in a file of torch.save; `hint` says what to do where it needs more of pickle than is safe."""
    size = os.fstat(files.open(str(path))).st_size
    return load_slab(files, str(path), 0, size, hint)


def load_slab(files: Files, path: str, at: int, nbytes: int, hint: str) -> Any:
    """The tree that torch.save wrote into bytes [at, at + nbytes) of a file. Runs nothing of it."""
    slab = Slab(files, path, at, nbytes)
    magic = slab.read(4)
    slab.seek(0)
    try:
        if magic != b"PK\x03\x04":
            slab.seek(0)
            buffered: IO[bytes] = io.BufferedReader(slab)
            return _tree(torch.load(buffered, map_location="cpu", weights_only=True), path, None)
        _check_records(slab, path)
        slab.seek(0)
        with FakeTensorMode():
            loaded = torch.load(slab, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
            return _tree(loaded, path, at)
    except pickle.UnpicklingError as error:
        why = str(error).replace("\n", " ").partition("WeightsUnpickler error: ")[2] or str(error)
        raise Incompatible(
            f"{path}: it needs more of pickle than is safe: {why[:300]}. Nothing of it ran. {hint}"
        ) from None
    except RecursionError:
        raise Incompatible(f"{path}: nested too deep") from None
    except (RuntimeError, zipfile.BadZipFile, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Corrupt(f"{path}: not a file of torch.save: {str(error)[:300]}") from error


def _check_records(slab: Slab, path: str) -> None:
    """torch stores records as they are: a compressed one could grow without bound, and has no range of its own."""
    with zipfile.ZipFile(slab) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise Corrupt(f"{path}: record {record.filename[:100]!r} is compressed, which torch.save does not do")
            if record.filename.endswith("/data.pkl") and record.file_size > PICKLE_LIMIT_BYTES:
                raise Corrupt(f"{path}: a pickle of {record.file_size} bytes; at most {PICKLE_LIMIT_BYTES} are read")


def _tree(node: Any, path: str, base: int | None) -> Any:
    """The loaded object with leaves for tensors. Containers without tensors stay what they are."""
    if isinstance(node, torch.Tensor):
        return _leaf(node, path, base)
    if isinstance(node, dict):
        made: Any = {name: _tree(item, path, base) for name, item in node.items()}
    elif type(node) in (list, tuple):
        made = type(node)(_tree(item, path, base) for item in node)
    else:
        return node
    items = zip(made.values(), node.values(), strict=True) if isinstance(node, dict) else zip(made, node, strict=True)
    return node if all(new is old for new, old in items) else made


def _leaf(tensor: torch.Tensor, path: str, base: int | None) -> Leaf:
    if isinstance(tensor, DTensor):
        raise Incompatible(f"{path}: holds one rank's part of a DTensor; import what DCP saved, or whole tensors")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise Incompatible(f"{path}: holds a {tensor.layout} or lazy tensor; only plain dense ones can be stored")
    spec, strides = TensorSpec(dtype_name(tensor.dtype), tuple(tensor.shape)), tuple(tensor.stride())
    if base is None:
        name = (tensor.data_ptr(), strides) if tensor.numel() else (id(tensor),)
        return MemoryTensor(spec, name, tensor.detach())
    storage: Any = tensor.untyped_storage()
    at = base + int(storage._checkpoint_offset or 0) + int(tensor.storage_offset()) * tensor.itemsize
    return FileTensor(spec, (file_tensor_extent(spec.shape, strides, whole(spec.shape), path, at),))


# Writing


def write_torch(path: Path, tree: Any, read: Read) -> None:
    """What `torch.save` of `tree` would write; tensors come from `read` in bands, and tied ones are stored once.

    torch writes the pickle and leaves room for the tensors, one record for each in the order in which it meets them.
    """
    leaves = list(dict.fromkeys(_leaves(tree)))
    with FakeTensorMode():
        fakes = {leaf: torch.empty(leaf.spec.shape, dtype=dtype_from_name(leaf.spec.dtype)) for leaf in leaves}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(_mapped(tree, fakes), path)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        with zipfile.ZipFile(path) as archive:
            by_name = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            directory = archive.start_dir
        records = [info for name, info in by_name.items() if name.startswith("data/")]
        found = [by_name.get(f"data/{number}") for number in range(len(leaves))]
        if len(records) != len(leaves) or [r.file_size if r else -1 for r in found] != [
            le.spec.nbytes for le in leaves
        ]:
            raise Incompatible("a value of the step holds tensors where torch.save cannot leave room for them; --only")
        sums = {r.filename: _write_record(fd, r, leaf, read) for r, leaf in zip(found, leaves, strict=True) if r}
        _patch_sums(fd, directory, sums)
    finally:
        os.close(fd)


def _leaves(node: Any) -> Iterator[Leaf]:
    """Tensors in the order in which pickle meets them."""
    if isinstance(node, Leaf):
        yield node
    elif isinstance(node, torch.Tensor):
        yield _of_memory(node)
    elif isinstance(node, dict | list | tuple):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _leaves(item)


def _of_memory(tensor: torch.Tensor) -> MemoryTensor:
    return MemoryTensor(TensorSpec(dtype_name(tensor.dtype), tuple(tensor.shape)), (id(tensor),), tensor)


def _mapped(node: Any, fakes: dict[Leaf, torch.Tensor]) -> Any:
    if isinstance(node, Leaf):
        return fakes[node]
    if isinstance(node, torch.Tensor):
        return fakes[_of_memory(node)]
    if next(_leaves(node), None) is None:
        return node
    if isinstance(node, dict):
        return type(node)((name, _mapped(item, fakes)) for name, item in node.items())
    return type(node)(_mapped(item, fakes) for item in node)


def _write_record(fd: int, record: zipfile.ZipInfo, leaf: Leaf, read: Read) -> int:
    """Write the bytes of a tensor into its record; the CRC of them."""
    name_bytes, extra_bytes = struct.unpack("<HH", os.pread(fd, 4, record.header_offset + 26))
    found = 0

    def read_summed(leaf: Leaf, box: Slice) -> torch.Tensor:
        nonlocal found
        tensor = leaf.tensor if isinstance(leaf, MemoryTensor) else read(leaf, box)
        tensor = narrow(tensor, box).contiguous() if isinstance(leaf, MemoryTensor) else tensor
        found = zlib.crc32(bytes_view(tensor), found)
        return tensor

    write_tensor(fd, record.header_offset + 30 + name_bytes + extra_bytes, leaf, read_summed)
    return found


def _patch_sums(fd: int, at: int, sums: dict[str, int]) -> None:
    """Put the CRCs of the records into the directory of the archive, whose other tools verify them."""
    while os.pread(fd, 4, at) == b"PK\x01\x02":
        name_bytes, extra_bytes, comment_bytes = struct.unpack("<HHH", os.pread(fd, 6, at + 28))
        name = os.pread(fd, name_bytes, at + 46).decode()
        if name in sums:
            write_at(fd, at + 16, memoryview(struct.pack("<I", sums[name])))
        at += 46 + name_bytes + extra_bytes + comment_bytes
