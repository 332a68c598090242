"""Blocks of tensors made smaller, and back: byte planes, then zstd. Input to `unpack` is untrusted.

The bytes of a block are split into planes: first bytes of all elements, second bytes, and so on. In floating point
numbers the planes with signs and exponents shrink, those with mantissas do not, and each is stored the shorter way.

    packed block = stored size of each plane (4 bytes each, little endian) + the planes
    plane        = as it is, where its size is that of the plane; else one zstd frame that says its size
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterable

import zstandard

from ckpt.errors import Corrupt

LEVEL = 1  # higher ones cost much and gain little on planes
WORTH_IT = 0.9  # of the time that storing takes without it


def pack(raw: memoryview, itemsize: int) -> bytes:
    """`raw`, whole elements of `itemsize` bytes each, at most a few bytes longer than it was."""
    data = bytes(raw)
    planes = [data[i::itemsize] for i in range(itemsize)]
    stored = [min(plane, _tools.compressor.compress(plane), key=len) for plane in planes]  # of equal size: as it is
    return struct.pack(f"<{itemsize}I", *map(len, stored)) + b"".join(stored)


def unpack(packed: memoryview, into: memoryview, itemsize: int) -> None:
    """Fill `into` with the block that `packed` holds. Raises Corrupt if it cannot be one of that size."""
    count, rest = divmod(len(into), itemsize)
    header = 4 * itemsize
    if rest or len(packed) < header:
        raise Corrupt(f"a packed block of {len(packed)} bytes is too short")
    sizes = struct.unpack(f"<{itemsize}I", packed[:header])
    if header + sum(sizes) != len(packed) or max(sizes) > count:
        raise Corrupt(f"the planes of a packed block have {sum(sizes)} bytes, it has {len(packed)}")
    at, raw = header, bytearray(len(into))
    for index, size in enumerate(sizes):
        plane = packed[at : at + size]
        raw[index::itemsize] = plane if size == count else _plane(plane, count)
        at += size
    into[:] = raw


def measure(blocks: Iterable[tuple[memoryview, int]]) -> tuple[float, float]:
    """(bytes that one thread packs in a second, packed bytes for each raw byte) of some blocks (bytes, itemsize)."""
    raw = packed = 0
    began = time.perf_counter()
    for block, itemsize in blocks:
        raw, packed = raw + len(block), packed + len(pack(block, itemsize))
    return raw / max(time.perf_counter() - began, 1e-9), packed / max(raw, 1)


def pays(ratio: float, packs_per_s: float, stores_per_s: float) -> bool:
    """Whether packing and storing side by side take clearly less time than storing alone. Rates in bytes."""
    return stores_per_s > 0 and max(1 / packs_per_s, ratio / stores_per_s) < WORTH_IT / stores_per_s


def _plane(frame: memoryview, count: int) -> bytes:
    """One plane of `count` bytes; what a frame claims is looked at before memory is taken for it."""
    try:
        if zstandard.frame_content_size(frame) != count:
            raise Corrupt(f"a plane of a packed block does not have {count} bytes")
        return _tools.decompressor.decompress(frame, max_output_size=count)
    except zstandard.ZstdError as error:
        raise Corrupt(f"a packed block cannot be read: {error}") from error


class _Tools(threading.local):
    """One of each for every thread: they cannot be shared."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 20)


_tools = _Tools()
