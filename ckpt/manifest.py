"""MANIFEST and parts: what one attempt holds, as bytes and back. `docs/format.md` describes the same in prose.

    frame    = magic (8 bytes) + payload length (8, little endian) + payload + xxh3_128 of all before (16)
    MANIFEST = frame of a msgpack map `Manifest`: symbolic shardings, world, size and digest of every part
    part     = frame of a msgpack map `Part`: the chunks and values that one writer stored

Encode, decode and validate stand side by side. Input is untrusted: sizes are checked before parsing, types
while parsing, and every number and name after it; anything wrong is `Corrupt`.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import accumulate, pairwise
from math import prod
from typing import TypeAlias, TypeVar

import msgspec
import xxhash

from ckpt.errors import Corrupt, Incompatible
from ckpt.layout import World, cover_faults
from ckpt.sharding import ITEMSIZE
from ckpt.slices import Slice
from ckpt.symbolic import MAX_BYTES, MAX_WORLD, WireWorld, encode_layout, spec_of, world_from_wire, world_to_wire

MANIFEST_MAGIC = b"HFmanif\x01"
PART_MAGIC = b"HFpart_\x01"
MANIFEST_LIMIT_BYTES = 256 << 20
PART_LIMIT_BYTES = 1 << 30
BLOCK_BYTES = 256 * 1024
"""Raw bytes under one digest; counted from the first byte of a chunk."""
RAW, PACKED = CODECS = ("raw", "zstd")
"""How the bytes of a chunk are stored: as they are, or as `ckpt.packing` packs them."""
SOURCES_LIMIT = 16
"""Earlier attempts whose data files the chunks of one may lie in."""
DIGEST_BYTES = 16
STRONG_DIGEST_BYTES = 32
_ATTEMPT = re.compile(r"[0-9]{9,19}\.[a-z0-9_-][a-z0-9._-]{0,200}")
_DATA_NAME = re.compile(r"r[0-9]{5,7}\.(safetensors|packed)")

T = TypeVar("T")
Digest: TypeAlias = Callable[[bytes | memoryview], bytes]


def digest(data: bytes | memoryview) -> bytes:
    """xxh3_128 of `data`, 16 bytes, big endian."""
    return xxhash.xxh3_128_digest(data)


def strong_digest(data: bytes | memoryview) -> bytes:
    """SHA-256 of `data`, 32 bytes: nobody can make other bytes that have it. Used where records are signed."""
    return hashlib.sha256(data).digest()


def matches(data: bytes | memoryview, expected: bytes) -> bool:
    """Whether `expected` is a digest of `data`; its length says which."""
    return (strong_digest if len(expected) == STRONG_DIGEST_BYTES else digest)(data) == expected


def most_packed(nbytes: int, itemsize: int) -> int:
    """The most bytes that a packed block of `nbytes` can have (`ckpt.packing`)."""
    return nbytes + 4 * itemsize


def part_name(rank: int) -> str:
    return f"r{rank:05d}.part"


def data_name(rank: int, packed: bool = False) -> str:
    return f"r{rank:05d}.{'packed' if packed else 'safetensors'}"


class Chunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A stored Slice. Row-major raw bytes; `digests` holds one digest for each BLOCK_BYTES of them.

    Where they are packed (`ckpt.packing`), each block by itself, `frames` has the stored size of each, 4 bytes.
    """

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    file: str  # "" is the data file of this part's writer; else <attempt>/<data file> of an earlier one
    at: int  # first byte in the file
    stored_bytes: int
    codec: str  # one of CODECS
    digests: bytes
    frames: bytes = b""

    @property
    def box(self) -> Slice:
        return Slice(self.offset, self.shape)

    @property
    def source(self) -> str:
        """The earlier attempt that stored these bytes; "": this one did."""
        return self.file.partition("/")[0]

    @property
    def raw_bytes(self) -> int:
        return prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def packed(self) -> bool:
        return self.codec != RAW

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Where in the file its raw bytes [start, stop) begin and end; packed, on block borders or at the end."""
        if self.codec == RAW:
            return self.at + start, self.at + stop
        ends = _ends(self.frames)
        first, last = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
        return self.at + ends[first], self.at + ends[last]

    @property
    def digest_bytes(self) -> int:
        """Bytes of the digest of one block."""
        return len(self.digests) // -(-self.raw_bytes // BLOCK_BYTES)


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one writer stored: its chunks in order of (key, offset), the shared values it owns, its own values."""

    rank: int
    attempt: str
    data_bytes: int
    chunks: tuple[Chunk, ...]
    values: dict[str, bytes]
    rank_values: dict[str, bytes]

    @property
    def data_name(self) -> str:
        """Name of its own data file: its chunks there are all packed, or none is."""
        return data_name(self.rank, any(chunk.packed and not chunk.file for chunk in self.chunks))

    def content_digest(self) -> bytes:
        """Digest of what is stored, whatever the file layout and codec."""
        content = [(c.key, c.offset, c.shape, c.dtype, c.digests) for c in self.chunks]
        return digest(msgspec.msgpack.encode((content, sorted(self.values.items()), sorted(self.rank_values.items()))))


class PartRef(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Size and digest of a part, the size of its data file, and the digest of what is stored, wherever it lies."""

    part_bytes: int
    part_digest: bytes
    data_bytes: int
    content_digest: bytes


class Manifest(msgspec.Struct, frozen=True):
    """One attempt. `parent` is the attempt that its lineage continues; the part of rank i is `parts[i]`.

    `sources`: the earlier attempts in whose data files some of its chunks lie.
    """

    step: int
    generation: int
    attempt: str
    parent: str | None
    world: World
    ownership: str
    parts: tuple[PartRef, ...]
    content_digest: bytes
    metrics: dict[str, float]
    sources: tuple[str, ...] = ()


class _Manifest(msgspec.Struct, forbid_unknown_fields=True):
    step: int
    generation: int
    attempt: str
    parent: str | None
    world: WireWorld
    ownership: str
    parts: tuple[PartRef, ...]
    content_digest: bytes
    metrics: dict[str, float]
    sources: tuple[str, ...]


def content_digest_of(world: World, parts: Iterable[bytes]) -> bytes:
    """Digest of what a step holds, from those of its parts: the same in every tier and every place it is copied to."""
    layouts = b"".join(digest(encode_layout(layout)) for layout in world.layouts)
    return digest(layouts + b"".join(parts))


def encode_manifest(manifest: Manifest) -> bytes:
    fields = {name: getattr(manifest, name) for name in Manifest.__struct_fields__}
    wire = _Manifest(**{**fields, "world": world_to_wire(manifest.world)})
    return _frame(MANIFEST_MAGIC, msgspec.msgpack.encode(wire), MANIFEST_LIMIT_BYTES)


def decode_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in `data`. `Corrupt`, naming `where`, if anything in it is not as it must be."""
    wire = _unframe(MANIFEST_MAGIC, data, MANIFEST_LIMIT_BYTES, _Manifest, where)
    world = _valid(where, lambda: world_from_wire(wire.world))
    if faults := cover_faults(world):
        raise Corrupt(f"{where}: its tensors are not covered exactly once: {'; '.join(faults[:3])}"[:1000])
    if len(wire.parts) != world.size:
        raise Corrupt(f"{where}: {len(wire.parts)} parts for a world of {world.size} ranks")
    if not 0 <= wire.step < 1 << 63 or wire.generation < 0:
        raise Corrupt(f"{where}: step {wire.step} or generation {wire.generation} is out of range")
    for name in (wire.attempt, wire.parent, *wire.sources):
        if name is not None and not _ATTEMPT.fullmatch(name):
            raise Corrupt(f"{where}: {name[:80]!r} is not the name of an attempt")
    if not wire.attempt.startswith(f"{wire.step:09d}."):
        raise Corrupt(f"{where}: attempt {wire.attempt!r} is not one of step {wire.step}")
    if len(wire.sources) > SOURCES_LIMIT or sorted({*wire.sources} - {wire.attempt}) != list(wire.sources):
        raise Corrupt(
            f"{where}: its {len(wire.sources)} sources are not distinct, ascending and at most {SOURCES_LIMIT}"
        )
    for found in (wire.content_digest, *(ref.content_digest for ref in wire.parts)):
        if len(found) != DIGEST_BYTES:
            raise Corrupt(f"{where}: a content digest has {len(found)} bytes")
    for ref in wire.parts:
        _require_bytes(where, "part", ref.part_bytes, PART_LIMIT_BYTES)
        _require_bytes(where, "data file", ref.data_bytes, MAX_BYTES)
        if len(ref.part_digest) not in (DIGEST_BYTES, STRONG_DIGEST_BYTES):
            raise Corrupt(f"{where}: the digest of a part has {len(ref.part_digest)} bytes")
    fields = {name: getattr(wire, name) for name in _Manifest.__struct_fields__}
    return Manifest(**{**fields, "world": world})


def encode_part(part: Part) -> bytes:
    return _frame(PART_MAGIC, msgspec.msgpack.encode(part), PART_LIMIT_BYTES)


def decode_part(data: bytes, where: str) -> Part:
    """The part in `data`. `Corrupt`, naming `where`, if anything in it is not as it must be."""
    part = _unframe(PART_MAGIC, data, PART_LIMIT_BYTES, Part, where)
    if not 0 <= part.rank < MAX_WORLD or not _ATTEMPT.fullmatch(part.attempt):
        raise Corrupt(f"{where}: rank {part.rank} or attempt {part.attempt[:80]!r} is out of range")
    _require_bytes(where, "data file", part.data_bytes, MAX_BYTES)
    _valid(where, lambda: _check_chunks(part, where))
    return part


def check_part(part: Part, manifest: Manifest, rank: int, where: str) -> None:
    """`Corrupt`, naming `where`, unless `part` can be what writer `rank` stored for `manifest`."""
    if part.rank != rank or part.attempt != manifest.attempt:
        raise Corrupt(f"{where}: it is the part of another attempt or rank")
    specs = manifest.world.specs
    for chunk in part.chunks:
        if chunk.file and chunk.source not in manifest.sources:
            raise Corrupt(f"{where}: chunk of {chunk.key} lies in {chunk.file}, which its MANIFEST does not name")
        spec = specs.get(chunk.key)
        if spec is None or spec.dtype != chunk.dtype or len(spec.shape) != len(chunk.shape):
            raise Corrupt(f"{where}: chunk of {chunk.key} as {chunk.dtype} {chunk.shape}, its MANIFEST says {spec}")
        if any(o + n > whole for o, n, whole in zip(chunk.offset, chunk.shape, spec.shape, strict=True)):
            raise Corrupt(f"{where}: chunk of {chunk.key} at {chunk.offset} + {chunk.shape} is outside {spec.shape}")


# Frames


def _frame(magic: bytes, payload: bytes, limit_bytes: int) -> bytes:
    body = magic + len(payload).to_bytes(8, "little") + payload
    if len(body) + DIGEST_BYTES > limit_bytes:
        raise Incompatible(f"metadata of {len(body)} bytes is over the format's limit of {limit_bytes}")
    return body + digest(body)


def _unframe(magic: bytes, data: bytes, limit_bytes: int, kind: type[T], where: str) -> T:
    if len(data) > limit_bytes:
        raise Corrupt(f"{where}: {len(data)} bytes, over the limit of {limit_bytes}")
    if data[:7] == magic[:7] and len(data) > 7 and data[7] != magic[7]:
        raise Incompatible(f"{where}: format version {data[7]}; this release reads {magic[7]}. Use a newer holdfast.")
    if data[:8] != magic or len(data) < 16 + DIGEST_BYTES:
        raise Corrupt(f"{where}: not a {magic[2:7].decode()} (starts with {data[:8]!r}, {len(data)} bytes)")
    length = int.from_bytes(data[8:16], "little")
    if len(data) != 16 + length + DIGEST_BYTES:
        raise Corrupt(f"{where}: {len(data)} bytes, its header says {16 + length + DIGEST_BYTES}: truncated or padded")
    if digest(memoryview(data)[:-DIGEST_BYTES]) != data[-DIGEST_BYTES:]:
        raise Corrupt(f"{where}: its bytes do not match its own digest")
    try:
        return msgspec.msgpack.decode(memoryview(data)[16:-DIGEST_BYTES], type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Corrupt(f"{where}: {error}") from error


def _valid(where: str, build: Callable[[], T]) -> T:
    try:
        return build()
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Corrupt(f"{where}: {error}") from error


def _require_bytes(where: str, what: str, nbytes: int, limit: int) -> None:
    if not 0 <= nbytes <= limit:
        raise Corrupt(f"{where}: a {what} of {nbytes} bytes is out of range")


# Chunks


def _check_chunks(part: Part, where: str) -> None:
    for chunk in part.chunks:
        if chunk.codec not in CODECS:
            raise Incompatible(
                f"{where}: chunk of {chunk.key} is stored with codec {chunk.codec[:80]!r}; this release reads "
                f"{' and '.join(CODECS)}. Use a newer holdfast."
            )
        _check_chunk(chunk, part.data_bytes)
    if len({chunk.codec for chunk in part.chunks if not chunk.file}) > 1:
        raise ValueError("some chunks of one data file are packed and others are not")
    if any((left.key, left.offset) >= (right.key, right.offset) for left, right in pairwise(part.chunks)):
        raise ValueError("chunks are not distinct and ascending by key and offset")
    spans = sorted((c.file, c.at, c.at + c.stored_bytes) for c in part.chunks)
    if any(left[0] == right[0] and left[2] > right[1] for left, right in pairwise(spans)):
        raise ValueError("two chunks share bytes of one file")


def _check_chunk(chunk: Chunk, data_bytes: int) -> None:
    spec = spec_of(chunk.dtype, chunk.shape)
    if not spec.nbytes:
        raise ValueError(f"chunk of {chunk.key}: shape {chunk.shape} holds nothing")
    _ = chunk.box
    if any(o > MAX_BYTES for o in chunk.offset):
        raise ValueError(f"chunk of {chunk.key}: offset {chunk.offset} is out of range")
    attempt, _, name = chunk.file.partition("/")
    if chunk.file and not (_ATTEMPT.fullmatch(attempt) and _DATA_NAME.fullmatch(name)):
        raise ValueError(f"chunk of {chunk.key}: {chunk.file[:200]!r} is not <attempt>/<data file>")
    blocks = -(-spec.nbytes // BLOCK_BYTES)
    if chunk.packed:
        _check_frames(chunk, spec.nbytes, blocks)
    elif chunk.stored_bytes != spec.nbytes or chunk.frames:
        raise ValueError(f"chunk of {chunk.key}: {chunk.stored_bytes} stored bytes, its shape needs {spec.nbytes}")
    if chunk.at < 0 or chunk.at + chunk.stored_bytes > (MAX_BYTES if chunk.file else data_bytes):
        raise ValueError(f"chunk of {chunk.key}: bytes {chunk.at}+{chunk.stored_bytes} reach outside the data file")
    if len(chunk.digests) not in (blocks * DIGEST_BYTES, blocks * STRONG_DIGEST_BYTES):
        raise ValueError(f"chunk of {chunk.key}: {len(chunk.digests)} bytes of digests for {spec.nbytes} bytes")


def _check_frames(chunk: Chunk, nbytes: int, blocks: int) -> None:
    if len(chunk.frames) != 4 * blocks:
        raise ValueError(f"chunk of {chunk.key}: {len(chunk.frames)} bytes of frames for {blocks} blocks")
    sizes, itemsize = array("I", chunk.frames), ITEMSIZE[chunk.dtype]
    raw = [min(BLOCK_BYTES, nbytes - block * BLOCK_BYTES) for block in range(blocks)]
    if any(size > most_packed(whole, itemsize) for size, whole in zip(sizes, raw, strict=True)):
        raise ValueError(f"chunk of {chunk.key}: a packed block is larger than it can be")
    if sum(sizes) != chunk.stored_bytes:
        raise ValueError(f"chunk of {chunk.key}: its packed blocks have {sum(sizes)} bytes, not {chunk.stored_bytes}")


@lru_cache(maxsize=4096)
def _ends(frames: bytes) -> list[int]:
    """Where each packed block begins, and where the last one ends."""
    return [0, *accumulate(array("I", frames))]
