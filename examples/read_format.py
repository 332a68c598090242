"""Read a holdfast checkpoint without holdfast: one page, from docs/format.md alone.

    python examples/read_format.py RUN_DIRECTORY

Prints every tensor of the newest step with its dtype, shape and sum. What it reads is verified on the way.
"""

import hashlib
import json
import struct
import sys
from pathlib import Path

import msgspec
import torch
import xxhash
import zstandard

BLOCK = 256 * 1024


def digest(data: bytes, nbytes: int = 16) -> bytes:
    """xxh3_128; of 32 bytes, in a signed run, SHA-256."""
    return hashlib.sha256(data).digest() if nbytes == 32 else xxhash.xxh3_128_digest(data)


def read_log(run: Path) -> dict | None:
    """The commit of the newest step in the lineage, or None."""
    assert json.loads((run / "FORMAT.json").read_text())["major"] == 1
    generation, head, commits = 0, None, {}
    for path in sorted((run / "log").glob("[0-9]*.json")):
        line = path.read_bytes()
        body, _, rest = line.rpartition(b',"digest":"')
        assert rest == digest(body).hex().encode() + b'"}\n', f"{path} is damaged"
        record = json.loads(line)
        if record["kind"] == "start" and record["generation"] == generation + 1:
            if record["base"] is None or record["base"] in commits:
                generation, head = record["generation"], commits.get(record["base"])
        elif record["kind"] == "commit" and record["generation"] == generation:
            above = record["parent"] is None if head is None else record["parent"] == head["attempt"]
            if above and (head is None or record["step"] > head["step"]):
                head = commits[record["attempt"]] = record
    return head


def read_frame(path: Path, magic: bytes, nbytes: int, expected_digest: str) -> dict:
    """The payload of a MANIFEST or part, whose size and digest are known from elsewhere."""
    data = path.read_bytes()
    assert len(data) == nbytes, f"{path} has another size"
    assert digest(data, len(expected_digest) // 2).hex() == expected_digest, f"{path} is damaged"
    assert data[:8] == magic, f"{path} is something else"
    return msgspec.msgpack.decode(data[16:-16])


def own_file(rank: int, chunks: list) -> str:
    return f"r{rank:05d}.{'packed' if any(c[7] == 'zstd' and not c[4] for c in chunks) else 'safetensors'}"


def unpack(data: bytes, frames: bytes, count: int, itemsize: int) -> bytes:
    """The blocks of a chunk: of each, the sizes of its planes, then the planes, first bytes of all elements first."""
    raw, at, per_block = bytearray(), 0, BLOCK // itemsize
    for number, (size,) in enumerate(struct.iter_unpack("<I", frames)):
        elements = min(per_block, count - number * per_block)
        block, plane_at = bytearray(elements * itemsize), at + 4 * itemsize
        for i, (stored,) in enumerate(struct.iter_unpack("<I", data[at:plane_at])):
            plane = data[plane_at : plane_at + stored]
            whole = stored == elements
            block[i::itemsize] = plane if whole else zstandard.decompress(plane, max_output_size=elements)
            plane_at += stored
        raw += block
        at += size
    return bytes(raw)


def read_chunk(step: Path, rank: int, chunk: list) -> torch.Tensor:
    _, _, shape, dtype, elsewhere, at, nbytes, codec, digests, frames = chunk
    file = step.parent / elsewhere if elsewhere else step / own_file(rank, [chunk])
    with file.open("rb") as opened:
        opened.seek(at)
        data = opened.read(nbytes)
    if codec == "zstd":
        data = unpack(data, frames, torch.Size(shape).numel(), getattr(torch, dtype).itemsize)
    starts = range(0, len(data), BLOCK)
    each = len(digests) // len(starts)
    assert b"".join(digest(data[i : i + BLOCK], each) for i in starts) == digests, f"{file} is damaged"
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(getattr(torch, dtype)).view(shape)


def read_step(run: Path, commit: dict) -> dict[str, torch.Tensor]:
    """Every tensor of a step, whole."""
    step = run / "steps" / commit["attempt"]
    manifest = read_frame(step / "MANIFEST", b"HFmanif\x01", commit["manifest_bytes"], commit["manifest_digest"])
    tensors: dict[str, torch.Tensor] = {}
    for layout in manifest["world"]["layouts"]:
        for key, dtype, shape, _, _ in layout["tensors"]:
            tensors.setdefault(key, torch.zeros(shape, dtype=getattr(torch, dtype)))
    for rank, (nbytes, part_digest, data_bytes, _) in enumerate(manifest["parts"]):
        part = read_frame(step / f"r{rank:05d}.part", b"HFpart_\x01", nbytes, part_digest.hex())
        own = step / own_file(rank, part["chunks"])
        assert own.stat().st_size == data_bytes, f"{own} is cut"
        for chunk in part["chunks"]:
            key, offset, shape = chunk[:3]
            box = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            tensors[key][box] = read_chunk(step, rank, chunk)
    for layout in manifest["world"]["layouts"]:
        tensors.update({alias: tensors[key] for alias, key in layout["aliases"]})
    return tensors


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "FORMAT.json").exists():
        sys.exit(__doc__)
    found = read_log(Path(sys.argv[1]))
    if found is None:
        sys.exit("no step")
    print(f"step {found['step']}")
    for name, tensor in sorted(read_step(Path(sys.argv[1]), found).items()):
        print(f"{name}  {tensor.dtype}  {list(tensor.shape)}  sum {tensor.to(torch.complex128).sum().real:.6g}")
