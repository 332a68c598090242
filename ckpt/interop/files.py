"""Tensors as ranges of files, and destinations that appear whole or not at all.

Nothing is mapped: a mapped file counts as memory of the process, and a file that shrinks kills it. Ranges are read
when they are asked for, and every range is checked against the file as it is then.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ckpt import direct
from ckpt.adapt.tensors import bytes_view
from ckpt.adapt.values import dtype_from_name
from ckpt.buffers import narrow
from ckpt.errors import Corrupt, Incompatible, StorageError
from ckpt.interop.tree import Leaf
from ckpt.slices import Slice, flat_span, is_flat


@dataclass(frozen=True)
class Extent:
    """A box of a tensor, row-major in a file from byte `at` on; with `strides` (in elements) in that order instead."""

    box: Slice
    path: str
    at: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class FileTensor(Leaf):
    """A tensor that lies in files, in boxes that tile it."""

    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class MemoryTensor(Leaf):
    """A tensor that had to be read as a whole; `name` tells one memory from another."""

    name: tuple[object, ...]
    tensor: torch.Tensor = field(compare=False, repr=False)


def file_tensor_extent(shape: tuple[int, ...], strides: tuple[int, ...], box: Slice, path: str, at: int) -> Extent:
    """The extent of a stored tensor of these strides: without them where they are those of row-major order."""
    expected, step = [], 1
    for length in reversed(shape):
        expected.append(step)
        step *= length
    plain = all(n < 2 or s == e for n, s, e in zip(shape, strides, reversed(expected), strict=True))
    return Extent(box, path, at, None if plain else strides)


class Files:
    """The files that tensors are read from, opened once each. Reads come from any thread."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def open(self, path: str) -> int:
        if path not in self._fds:
            try:
                self._fds[path] = direct.open_read(path, follow=True)
            except OSError as error:
                raise StorageError(f"open {path}: {error.strerror}") from error
        return self._fds[path]

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def read(self, leaf: Leaf, box: Slice, into: torch.Tensor) -> None:
        """Fill `into`, a tensor of the box's shape, with the elements in `box`. Raises Corrupt where a file ends."""
        if isinstance(leaf, MemoryTensor):
            into.copy_(narrow(leaf.tensor, box))
            return
        assert isinstance(leaf, FileTensor)
        for extent in leaf.extents:
            if meet := extent.box.intersect(box):
                self._read(extent, meet.relative_to(extent.box.offset), narrow(into, meet.relative_to(box.offset)))

    def _read(self, extent: Extent, box: Slice, into: torch.Tensor) -> None:
        shape, itemsize = extent.box.shape, into.element_size()
        if extent.strides is not None:
            self._read_strided(extent, box, into)
        elif is_flat(shape, box):
            memory = into if into.is_contiguous() else torch.empty(into.shape, dtype=into.dtype)
            self.pread(extent.path, extent.at + flat_span(shape, box)[0] * itemsize, bytes_view(memory))
            if memory is not into:
                into.copy_(memory)
        else:
            dim = next(d for d, n in enumerate(box.shape) if n > 1)
            for i in range(box.shape[dim]):
                at, size = (*box.offset[:dim], box.offset[dim] + i), (*box.shape[:dim], 1)
                row = Slice((*at, *box.offset[dim + 1 :]), (*size, *box.shape[dim + 1 :]))
                self._read(extent, row, into.narrow(dim, i, 1))

    def _read_strided(self, extent: Extent, box: Slice, into: torch.Tensor) -> None:
        """What lies in another order: the whole range that holds the box is in memory for a moment."""
        strides = extent.strides or ()
        first = sum(o * s for o, s in zip(box.offset, strides, strict=True))
        last = first + sum((n - 1) * s for n, s in zip(box.shape, strides, strict=True))
        memory = torch.empty(last + 1 - first, dtype=into.dtype)
        self.pread(extent.path, extent.at + first * into.element_size(), bytes_view(memory))
        into.copy_(memory.as_strided(box.shape, strides))

    def pread(self, path: str, at: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `at` on."""
        done = 0
        while done < len(into):
            try:
                got = os.preadv(self._fds[path], [into[done:]], at + done)
            except OSError as error:
                raise StorageError(f"read {path} at byte {at}: {error.strerror}") from error
            if not got:
                raise Corrupt(f"{path}: ends at byte {at + done}, it says that it has {at + len(into)} or more")
            done += got


def read_whole(files: Files, leaf: Leaf) -> torch.Tensor:
    """A small tensor, as it is."""
    into = torch.empty(leaf.spec.shape, dtype=dtype_from_name(leaf.spec.dtype))
    if into.numel():
        files.read(leaf, Slice((0,) * into.dim(), leaf.spec.shape), into)
    return into


def fits(leaf_bytes: int, at: int, size: int, where: str) -> None:
    """Raise Corrupt unless bytes [at, at + leaf_bytes) lie within a file of `size` bytes."""
    if at < 0 or at + leaf_bytes > size:
        raise Corrupt(f"{where}: says that its bytes are {at} to {at + leaf_bytes}, the file has {size}")


# Destinations


@contextmanager
def appearing(target: Path, *, directory: bool) -> Iterator[Path]:
    """A temporary name beside `target` to write to; it becomes `target`, durable, when all went well.

    Raises Incompatible if something stands at `target`; what was begun is removed when anything is raised.
    """
    refuse_existing(target)
    temporary = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")  # torch refuses a leading dot
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if directory:
            temporary.mkdir()
        yield temporary
        for path in [*temporary.iterdir(), temporary] if directory else [temporary]:
            _sync(path)
        refuse_existing(target)
        if directory:
            os.rename(temporary, target)
        else:
            os.link(temporary, target)  # never over a file that came in between
            os.unlink(temporary)
        _sync(target.parent)
    except OSError as error:
        raise StorageError(f"write {target}: {error.strerror or error}. Nothing was left there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True) if directory else temporary.unlink(missing_ok=True)


def refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise Incompatible(f"{target} exists, and nothing is overwritten. Remove it, or choose another name")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_at(fd: int, at: int, memory: memoryview) -> None:
    while memory:
        done = os.pwrite(fd, memory, at)
        at, memory = at + done, memory[done:]
