"""MANIFEST and parts as bytes: there and back, and a gallery of files that must be refused."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from time import monotonic
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_worlds import specs_drawn, worlds

from ckpt import manifest as module
from ckpt.errors import Corrupt, Incompatible
from ckpt.layout import OWNERSHIP, World
from ckpt.manifest import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    MANIFEST_LIMIT_BYTES,
    MANIFEST_MAGIC,
    PART_LIMIT_BYTES,
    PART_MAGIC,
    SOURCES_LIMIT,
    Chunk,
    Manifest,
    Part,
    PartRef,
    check_part,
    data_name,
    decode_manifest,
    decode_part,
    digest,
    encode_manifest,
    encode_part,
    part_name,
)
from ckpt.sharding import OnMesh, Split
from ckpt.symbolic import MAX_SPLIT_FACTOR, placement_code

ATTEMPT = "000000012.abc"
WHERE = "steps/x/MANIFEST"


def manifest_of(world: World) -> Manifest:
    refs = tuple(PartRef(100 + rank, digest(b"%d" % rank), 4096 * rank, bytes(16)) for rank in range(world.size))
    metrics, sources = {"loss": float("inf")}, ("000000009.abc", "000000010.abc")
    return Manifest(12, 3, ATTEMPT, "000000011.abc", world, OWNERSHIP, refs, bytes(16), metrics, sources)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    return manifest_of(draw(worlds(draw(specs_drawn()))))


def some_part() -> Part:
    chunks = (
        Chunk("a", (0, 0), (2, 3), "float32", "", 4096, 24, "raw", bytes(16)),
        Chunk("a", (2, 0), (2, 3), "float32", "", 4160, 24, "raw", bytes(16)),
        Chunk("b", (), (), "bool", "", 4224, 1, "raw", bytes(16)),
        Chunk("c", (5,), (BLOCK_BYTES + 1,), "uint8", "", 8192, BLOCK_BYTES + 1, "raw", bytes(32)),
    )
    return Part(3, ATTEMPT, 8192 + 2 * BLOCK_BYTES, chunks, {"step": b"\x01"}, {"rng": b"\x02\x03"})


@given(manifests())
@settings(deadline=None)
def test_a_manifest_comes_back_unchanged(manifest: Manifest) -> None:
    data = encode_manifest(manifest)
    found = decode_manifest(data, WHERE)
    assert found == manifest
    assert encode_manifest(found) == data


def test_a_part_comes_back_unchanged() -> None:
    data = encode_part(some_part())
    assert decode_part(data, WHERE) == some_part()
    assert encode_part(decode_part(data, WHERE)) == data


def test_names_and_content_digest() -> None:
    part = some_part()
    assert (part_name(3), data_name(123456)) == ("r00003.part", "r123456.safetensors")
    moved = msgspec.structs.replace(part, chunks=tuple(msgspec.structs.replace(c, at=c.at + 64) for c in part.chunks))
    assert moved.content_digest() == part.content_digest(), "where bytes lie is no content"
    other = msgspec.structs.replace(part, values={"step": b"\x02"})
    assert other.content_digest() != part.content_digest()
    assert [chunk.raw_bytes for chunk in part.chunks] == [24, 24, 1, BLOCK_BYTES + 1]


# Damage


def encoded() -> dict[str, tuple[bytes, Callable[[bytes, str], object]]]:
    return {
        "manifest": (module._frame(MANIFEST_MAGIC, pack(manifest_tree()), 1 << 20), decode_manifest),
        "part": (encode_part(some_part()), decode_part),
    }


@pytest.mark.parametrize("kind", ["manifest", "part"])
def test_every_truncation_and_every_flipped_bit_is_noticed(kind: str) -> None:
    data, decode = encoded()[kind]
    decode(data, WHERE)
    for length in range(len(data)):
        with pytest.raises(Corrupt, match=WHERE):
            decode(data[:length], WHERE)
    for extra in (b"\0", data):
        with pytest.raises(Corrupt, match=WHERE):
            decode(data + extra, WHERE)
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises(Incompatible if at == 7 else Corrupt, match=WHERE):
                decode(bytes(damaged), WHERE)


@pytest.mark.parametrize("kind", ["manifest", "part"])
@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_format_version_is_incompatible(kind: str, version: int) -> None:
    data, decode = encoded()[kind]
    with pytest.raises(Incompatible, match=f"format version {version}.*Use a newer holdfast"):
        decode(data[:7] + bytes([version]) + data[8:], WHERE)


def test_a_part_is_no_manifest() -> None:
    with pytest.raises(Corrupt, match="not a manif"):
        decode_manifest(encoded()["part"][0], WHERE)
    with pytest.raises(Corrupt, match="not a part"):
        decode_part(encoded()["manifest"][0], WHERE)


@pytest.mark.parametrize(
    ("decode", "limit"), [(decode_manifest, MANIFEST_LIMIT_BYTES), (decode_part, PART_LIMIT_BYTES)]
)
def test_too_many_bytes_are_refused_unread(decode: Callable[[bytes, str], object], limit: int) -> None:
    class Long(bytes):
        def __len__(self) -> int:
            return limit + 1

    with pytest.raises(Corrupt, match="over the limit"):
        decode(Long(), WHERE)


def test_metadata_over_the_limit_is_refused_at_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_LIMIT_BYTES", 100)
    with pytest.raises(Incompatible, match="over the format's limit"):
        encode_part(some_part())


def test_a_factor_over_the_limit_is_refused_at_save() -> None:
    with pytest.raises(Incompatible, match="strided shard of factor"):
        placement_code(Split(0, MAX_SPLIT_FACTOR + 1))


# The gallery: frames and digests are right, what they hold is not.

HUGE = 1 << 63


def pack(tree: object) -> bytes:
    return msgspec.msgpack.encode(tree)


def manifest_tree() -> dict[str, Any]:
    """A small valid manifest as plain objects: `a` on a mesh of two, `b` whole and tied, `c` declared by each."""
    shared = [["a", "float32", [4, 3], 0, "parameter"], ["b", "int64", [], 1, "tensor"]]
    layouts = [
        {
            "tensors": [*shared, ["c", "bool", [4], 2 + rank, "buffer"]],
            "aliases": [["z", "b"]],
            "values": ["step"],
            "rank_values": ["rng"],
        }
        for rank in range(2)
    ]
    tree: dict[str, Any] = {
        "step": 12,
        "generation": 1,
        "attempt": ATTEMPT,
        "parent": None,
        "world": {
            "meshes": [[[2], [0, 1]]],
            "shardings": [
                {"mesh": 0, "placements": ["S0"]},
                {},
                {"offset": [0], "shape": [1]},
                {"offset": [1], "shape": [3]},
            ],
            "layouts": layouts,
            "layout_of": [0, 1],
        },
        "ownership": OWNERSHIP,
        "parts": [[100, bytes(16), 4096, bytes(16)], [100, bytes(16), 4096, bytes(16)]],
        "content_digest": bytes(16),
        "metrics": {"loss": 1.5},
        "sources": ["000000010.abc"],
    }
    copied: dict[str, Any] = msgspec.msgpack.decode(pack(tree))  # no two places share a list
    return copied


def part_tree() -> dict[str, Any]:
    tree: dict[str, Any] = msgspec.msgpack.decode(pack(some_part()))
    return tree


Path = tuple[object, ...]
GONE = object()


def changed(tree: Any, path: Path, value: object) -> Any:
    at = tree
    for step in path[:-1]:
        at = at[step]
    if value is GONE:
        del at[path[-1]]
    elif callable(value):
        at[path[-1]] = value(at[path[-1]])
    else:
        at[path[-1]] = value
    return tree


TENSOR: Path = ("world", "layouts", 0, "tensors", 0)
SHARDING: Path = ("world", "shardings", 0)
PLACEMENT: Path = (*SHARDING, "placements", 0)
MESH: Path = ("world", "meshes", 0)

BAD_MANIFESTS: dict[str, tuple[Path, object]] = {
    "unknown dtype": ((*TENSOR, 1), "float31"),
    "dtype that is no string": ((*TENSOR, 1), 5),
    "negative shape": ((*TENSOR, 2, 0), -4),
    "huge shape": ((*TENSOR, 2, 0), HUGE),
    "huge product": ((*TENSOR, 2), [1 << 40, 1 << 40]),
    "shape over 64 bits": ((*TENSOR, 2, 0), 2.0**80),
    "shape of floats": ((*TENSOR, 2), [1.5, 2]),
    "too many dimensions": ((*TENSOR, 2), [1] * 65),
    "very many dimensions": ((*TENSOR, 2), [HUGE] * 300_000),
    "unknown role": ((*TENSOR, 4), "spare"),
    "sharding out of range": ((*TENSOR, 3), 4),
    "negative sharding": ((*TENSOR, 3), -1),
    "huge sharding": ((*TENSOR, 3), HUGE),
    "a field too many": (TENSOR, lambda t: [*t, 1]),
    "a field too few": (TENSOR, lambda t: t[:-1]),
    "another shape on another rank": ((*TENSOR, 2, 0), 5),
    "unsorted keys": (TENSOR[:-1], lambda tensors: tensors[::-1]),
    "duplicate keys": (TENSOR[:-1], lambda tensors: [tensors[0], *tensors]),
    "key that is no text": ((*TENSOR, 0), b"\xff\xff"),
    "placement for a missing dimension": (PLACEMENT, "S2"),
    "placement of nonsense": (PLACEMENT, "X"),
    "empty placement": (PLACEMENT, ""),
    "negative placement": (PLACEMENT, "S-1"),
    "placement with spaces": (PLACEMENT, "S 0"),
    "placement with foreign digits": (PLACEMENT, "S٠"),
    "placement with leading zeros": (PLACEMENT, "S00"),
    "long placement": (PLACEMENT, "S" + "9" * 100_000),
    "zero split factor": (PLACEMENT, "S0/0"),
    "huge split factor": (PLACEMENT, f"S0/{HUGE}"),
    "Partial": (PLACEMENT, "P"),
    "too many placements": (SHARDING, {"mesh": 0, "placements": ["S0", "S1"]}),
    "no placements": (SHARDING, {"mesh": 0}),
    "no mesh": (SHARDING, {"placements": ["S0"]}),
    "mesh out of range": ((*SHARDING, "mesh"), 1),
    "negative mesh": ((*SHARDING, "mesh"), -1),
    "mixture of mesh and box": (SHARDING, {"mesh": 0, "placements": ["S0"], "offset": [0, 0], "shape": [4, 3]}),
    "box without a shape": (SHARDING, {"offset": [0, 0]}),
    "unknown field of a sharding": (SHARDING, {"colour": 1}),
    "box outside the tensor": (SHARDING, {"offset": [1, 0], "shape": [4, 3]}),
    "box with a huge offset": (SHARDING, {"offset": [HUGE, 0], "shape": [1, 1]}),
    "box of fewer dimensions": (SHARDING, {"offset": [0], "shape": [4]}),
    "box of more dimensions": (SHARDING, {"offset": [0, 0, 0], "shape": [4, 3, 1]}),
    "box with a negative offset": (SHARDING, {"offset": [-1, 0], "shape": [4, 3]}),
    "box of two ranks": (SHARDING, {"offset": [0, 0], "shape": [4]}),
    "boxes that overlap": (("world", "shardings", 3), {"offset": [0], "shape": [4]}),
    "boxes with a gap": (("world", "shardings", 3), {"offset": [2], "shape": [2]}),
    "mesh with a rank outside the world": ((*MESH, 1), [0, 2]),
    "mesh with a negative rank": ((*MESH, 1), [0, -1]),
    "mesh with a huge rank": ((*MESH, 1), [0, HUGE]),
    "mesh with a rank twice": ((*MESH, 1), [0, 0]),
    "mesh with fewer ranks than its shape": ((*MESH, 0), [3]),
    "mesh of negative shape": ((*MESH, 0), [-1, -2]),
    "mesh of no shape": (MESH, [[0], []]),
    "mesh without some holders": (MESH, [[1], [0]]),
    "mesh of very many dimensions": ((*MESH, 0), [HUGE] * 300_000),
    "tie to nothing": (("world", "layouts", 0, "aliases"), [["z", "nothing"]]),
    "tie of a stored key": (("world", "layouts", 0, "aliases"), [["a", "b"]]),
    "tie twice": (("world", "layouts", 0, "aliases"), [["z", "b"], ["z", "a"]]),
    "value twice": (("world", "layouts", 0, "values"), ["step", "step"]),
    "layout out of range": (("world", "layout_of"), [0, 2]),
    "negative layout": (("world", "layout_of"), [0, -1]),
    "layout of no rank": (("world", "layout_of"), [0, 0]),
    "world of no ranks": (("world", "layout_of"), []),
    "huge layout index": (("world", "layout_of"), [0, HUGE]),
    "missing layouts": (("world", "layouts"), []),
    "more parts than ranks": (("parts",), lambda parts: [*parts, parts[0]]),
    "fewer parts than ranks": (("parts",), lambda parts: parts[:1]),
    "huge part": (("parts", 0, 0), PART_LIMIT_BYTES + 1),
    "negative part": (("parts", 0, 0), -1),
    "short digest of a part": (("parts", 0, 1), bytes(15)),
    "huge data file": (("parts", 0, 2), HUGE),
    "short content digest": (("content_digest",), b""),
    "short content digest of a part": (("parts", 0, 3), bytes(15)),
    "a source outside the run": (("sources", 0), "../000000010.abc"),
    "itself as a source": (("sources", 0), ATTEMPT),
    "a source twice": (("sources",), lambda found: found * 2),
    "sources out of order": (("sources",), ["000000010.b", "000000010.a"]),
    "too many sources": (("sources",), [f"{step:09d}.a" for step in range(SOURCES_LIMIT + 1)]),
    "negative step": (("step",), -1),
    "huge step": (("step",), HUGE),
    "negative generation": (("generation",), -1),
    "attempt outside the run": (("attempt",), "../000000012.abc"),
    "attempt with a separator": (("attempt",), "000000012.a/b"),
    "attempt of another step": (("attempt",), "000000013.abc"),
    "parent with a separator": (("parent",), "000000011.abc/.."),
    "parent with a line end": (("parent",), "000000011.abc\n"),
    "metrics that are no numbers": (("metrics",), {"loss": "low"}),
    "missing field": (("world",), GONE),
    "unknown field": (("colour",), 1),
}

CHUNK: Path = ("chunks", 0)
BAD_PARTS: dict[str, tuple[Path, object]] = {
    "negative rank": (("rank",), -1),
    "huge rank": (("rank",), HUGE),
    "attempt outside the run": (("attempt",), "../../x"),
    "negative data file": (("data_bytes",), -1),
    "huge data file": (("data_bytes",), HUGE),
    "unknown dtype": ((*CHUNK, 3), "float31"),
    "negative shape": ((*CHUNK, 2), [-2, 3]),
    "two negative sizes": ((*CHUNK, 2), [-2, -3]),
    "huge shape": ((*CHUNK, 2), [HUGE, 3]),
    "empty chunk": ((*CHUNK, 2), [0, 3]),
    "too many dimensions": (CHUNK, lambda c: [c[0], [0] * 65, [1] * 64 + [6], *c[3:]]),
    "offset of fewer dimensions": ((*CHUNK, 1), [0]),
    "negative offset": ((*CHUNK, 1), [-1, 0]),
    "huge offset": ((*CHUNK, 1), [HUGE, 0]),
    "before the file": ((*CHUNK, 5), -1),
    "after the file": ((*CHUNK, 5), 8192 + 2 * BLOCK_BYTES - 23),
    "far after the file": ((*CHUNK, 5), HUGE),
    "more bytes than its shape": ((*CHUNK, 6), 25),
    "negative bytes": ((*CHUNK, 6), -24),
    "another file": ((*CHUNK, 4), "r00001.safetensors"),
    "a file outside": ((*CHUNK, 4), "../../../etc/passwd"),
    "a file of an attempt outside": ((*CHUNK, 4), "../r00001.safetensors"),
    "another kind of file": ((*CHUNK, 4), "000000010.abc/MANIFEST"),
    "a file below a file": ((*CHUNK, 4), "000000010.abc/r00001.safetensors/x"),
    "far into another file": (CHUNK, lambda c: [*c[:4], "000000010.abc/r00001.safetensors", HUGE, *c[6:]]),
    "too few digests": ((*CHUNK, 8), b""),
    "too many digests": ((*CHUNK, 8), bytes(48)),
    "half a digest": ((*CHUNK, 8), bytes(8)),
    "a field too many": (CHUNK, lambda c: [*c, [[[[]]]]]),
    "a field too few": (CHUNK, lambda c: c[:-2]),
    "frames of raw bytes": ((*CHUNK, 9), bytes(4)),
    "packed without frames": ((*CHUNK, 7), "zstd"),
    "packed blocks that are larger than can be": (CHUNK, lambda c: [*c[:6], 1000, "zstd", c[8], b"\xe8\x03\0\0"]),
    "packed blocks of another sum": (CHUNK, lambda c: [*c[:6], 9, "zstd", c[8], b"\x08\0\0\0"]),
    "packed and raw in one file": (CHUNK, lambda c: [*c[:6], 8, "zstd", c[8], b"\x08\0\0\0"]),
    "shared bytes": ((*CHUNK, 5), 4160 - 23),
    "the same chunk twice": (("chunks",), lambda chunks: [chunks[0], *chunks]),
    "unsorted chunks": (("chunks",), lambda chunks: chunks[::-1]),
    "one place with two shapes": (
        ("chunks",),
        lambda c: [c[0], [*c[0][:2], [1, 6], *c[0][3:5], 4224, *c[0][6:]], c[3]],
    ),
    "values that are no bytes": (("values",), {"step": 1}),
    "missing field": (("chunks",), GONE),
    "unknown field": (("colour",), 1),
}


def refuse(data: bytes, decode: Callable[[bytes, str], object], error: type[Exception] = Corrupt) -> str:
    """`decode` raises `error`, soon, without much memory; its message."""
    tracemalloc.start()
    try:
        began = monotonic()
        with pytest.raises(error, match=WHERE) as caught:
            decode(data, WHERE)
        assert monotonic() - began < 5
        assert tracemalloc.get_traced_memory()[1] < 50 * len(data) + (4 << 20)
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 4000
    return str(caught.value)


def framed(magic: bytes, payload: bytes) -> bytes:
    return module._frame(magic, payload, 1 << 30)


def test_the_gallery_starts_from_what_is_valid() -> None:
    assert decode_manifest(framed(MANIFEST_MAGIC, pack(manifest_tree())), WHERE).world.size == 2
    assert decode_part(framed(PART_MAGIC, pack(part_tree())), WHERE) == some_part()


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_hostile_manifests_are_refused(name: str) -> None:
    refuse(framed(MANIFEST_MAGIC, pack(changed(manifest_tree(), *BAD_MANIFESTS[name]))), decode_manifest)


@pytest.mark.parametrize("name", BAD_PARTS)
def test_hostile_parts_are_refused(name: str) -> None:
    refuse(framed(PART_MAGIC, pack(changed(part_tree(), *BAD_PARTS[name]))), decode_part)


PAYLOADS = {
    "nothing": b"",
    "no map": pack([]),
    "null": pack(None),
    "deep nesting": b"\x91" * 1_000_000,
    "deep nesting in a field": b"\x81\xa5world" + b"\x81\xa6meshes" + b"\x91" * 1_000_000,
    "an array that claims 4 billion": b"\x81\xa5parts\xdd\xff\xff\xff\xff",
    "bytes that claim 4 billion": b"\x81\xaecontent_digest\xc6\xff\xff\xff\xff",
    "a key twice": b"\x82\xa4step\x01\xa4step\x02",
    "keys that are no text": b"\x81\xa2\xff\xfe\x01",
    "trailing bytes": pack({}) + b"\0",
    "an extension": b"\xc7\x05\x01hello",
    "integers as keys": b"\x81\x01\x02",
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_hostile_payloads_are_refused(name: str) -> None:
    refuse(framed(MANIFEST_MAGIC, PAYLOADS[name]), decode_manifest)
    refuse(framed(PART_MAGIC, PAYLOADS[name]), decode_part)


def test_an_unknown_codec_needs_a_newer_release() -> None:
    data = framed(PART_MAGIC, pack(changed(part_tree(), (*CHUNK, 7), "lz9")))
    assert "'lz9'; this release reads raw and zstd. Use a newer holdfast" in refuse(data, decode_part, Incompatible)


def test_an_unknown_ownership_rule_can_be_read() -> None:
    data = framed(MANIFEST_MAGIC, pack(changed(manifest_tree(), ("ownership",), "another/1")))
    assert decode_manifest(data, WHERE).ownership == "another/1"


@pytest.mark.parametrize("kind", ["manifest", "part"])
def test_random_damage_behind_a_right_digest_is_refused_or_harmless(kind: str) -> None:
    """Whatever the bytes, decoding raises `Corrupt` or gives a value that can be encoded again."""
    tree, magic = (manifest_tree(), MANIFEST_MAGIC) if kind == "manifest" else (part_tree(), PART_MAGIC)
    payload, draw = pack(tree), random.Random(12)
    for _ in range(3000):
        damaged = bytearray(payload)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        data = framed(magic, bytes(damaged))
        try:
            if kind == "manifest":
                encode_manifest(decode_manifest(data, WHERE))
            else:
                encode_part(decode_part(data, WHERE))
        except (Corrupt, Incompatible):
            continue


def test_a_strided_shard_of_a_huge_tensor_is_decoded_without_a_look_at_its_pieces() -> None:
    tree = changed(manifest_tree(), PLACEMENT, f"S0/{MAX_SPLIT_FACTOR}")
    for rank in range(2):
        tree["world"]["layouts"][rank]["tensors"][0][2] = [1 << 50, 3]
    began = monotonic()
    world = decode_manifest(framed(MANIFEST_MAGIC, pack(tree)), WHERE).world
    assert monotonic() - began < 1
    sharding = world.layouts[0].entries[0].sharding
    assert isinstance(sharding, OnMesh)
    assert sharding.placements == (Split(0, MAX_SPLIT_FACTOR),)


# A part against its manifest


def _pair() -> tuple[Part, Manifest]:
    tree = manifest_tree()
    manifest = decode_manifest(framed(MANIFEST_MAGIC, pack(tree)), WHERE)
    chunk = Chunk("a", (2, 0), (2, 3), "float32", "", 64, 24, "raw", bytes(16))
    return Part(1, ATTEMPT, 4096, (chunk,), {}, {}), manifest


def test_a_part_fits_its_manifest() -> None:
    part, manifest = _pair()
    check_part(part, manifest, 1, WHERE)


@pytest.mark.parametrize("change", [{"rank": 0}, {"attempt": "000000012.other"}], ids=lambda change: next(iter(change)))
def test_the_part_of_another_attempt_is_corrupt(change: dict[str, Any]) -> None:
    part, manifest = _pair()
    with pytest.raises(Corrupt, match=f"{WHERE}: it is the part of another"):
        check_part(msgspec.structs.replace(part, **change), manifest, 1, WHERE)


@pytest.mark.parametrize(
    "change",
    [
        {"key": "nothing"},
        {"dtype": "int32"},
        {"shape": (6,), "offset": (0,)},
        {"shape": (2, 3, 1), "offset": (0, 0, 0)},
        {"offset": (3, 0)},
    ],
    ids=str,
)
def test_a_chunk_that_the_manifest_does_not_know_is_corrupt(change: dict[str, Any]) -> None:
    """An int32 chunk of a float32 tensor would be read into the target bit by bit, in silence."""
    part, manifest = _pair()
    wrong = msgspec.structs.replace(part, chunks=(msgspec.structs.replace(part.chunks[0], **change),))
    with pytest.raises(Corrupt, match=f"{WHERE}: chunk of"):
        check_part(wrong, manifest, 1, WHERE)


def test_digests_are_xxh3_of_128_bits() -> None:
    assert digest(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert len(digest(b"x")) == DIGEST_BYTES
