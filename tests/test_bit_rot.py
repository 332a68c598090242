"""A bit flips in each field of each header, and in each page of the data: nothing is ever restored wrong in silence."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from keepers import forget
from states import bits

import ckpt
from ckpt.errors import CkptError

PAGE_BYTES = 4096


def _saved(path: Path, compression: str | None) -> dict[str, object]:
    """Two steps; the second one refers to a tensor of the first. What the newest holds."""
    made = torch.Generator().manual_seed(3)
    frozen = torch.randn(80_000, generator=made)
    state = {"w": torch.randn(150, 333, generator=made), "frozen": frozen, "n": 7, "name": "x", "small": torch.ones(3)}
    with ckpt.Checkpointer(path, compression=compression) as checkpointer:
        for step in (1, 2):
            state["w"] = torch.randn(150, 333, generator=made)
            checkpointer.save(step, state, blocking=True, metrics={"loss": 0.5})
    forget()
    return ckpt.load(path)


def _places(path: Path, chance: random.Random, stride: int) -> Iterator[tuple[Path, int]]:
    """Bytes to damage: of metadata every `stride`-th, of data one in every page and those of its header."""
    for file in sorted(path.rglob("*")):
        if not file.is_file():
            continue
        size = file.stat().st_size
        if file.suffix in (".safetensors", ".packed"):
            header = 8 + int.from_bytes(file.read_bytes()[:8], "little") if file.suffix == ".safetensors" else 0
            yield from ((file, at) for at in range(chance.randrange(stride), header, stride))
            for page in range(0, size, PAGE_BYTES):
                yield file, chance.randrange(page, min(page + PAGE_BYTES, size))
        else:
            yield from ((file, at) for at in range(chance.randrange(stride), size, stride))


def _damaged_everywhere(path: Path, compression: str | None, stride: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance, right = random.Random(seed), bits(_saved(path, compression))
    met: Counter[str] = Counter()
    for file, at in _places(path, chance, stride):
        whole = file.read_bytes()
        broken = bytearray(whole)
        broken[at] ^= 1 << chance.randrange(8)
        file.write_bytes(broken)
        try:
            found = bits(ckpt.load(path))
        except CkptError as error:
            met[type(error).__name__] += 1
        else:
            assert found == right, f"byte {at} of {file}"
            met["not needed for it, and right"] += 1
        file.write_bytes(whole)
    print(dict(met))
    assert met["Corrupt"] > 50
    assert bits(ckpt.load(path)) == right


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_flipped_bit_is_never_restored_in_silence(tmp_path: Path, compression: str | None) -> None:
    _damaged_everywhere(tmp_path, compression, stride=29)


@pytest.mark.prove
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_flipped_bit_in_every_byte_of_the_metadata(tmp_path: Path, compression: str | None) -> None:
    _damaged_everywhere(tmp_path, compression, stride=1)
