"""Packed tensors: every dtype comes back bit for bit, floats shrink to their mantissas, no packed byte is trusted."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import Pool
from keepers import forget
from states import bits

import ckpt
from ckpt.check import check_step
from ckpt.copying import copy_steps
from ckpt.errors import Corrupt
from ckpt.holder import Holder
from ckpt.keeper.ram import RamTier
from ckpt.manifest import BLOCK_BYTES, most_packed
from ckpt.packing import pack, pays, unpack
from ckpt.records import Commit
from ckpt.restorer import StepReader
from ckpt.run import RunDirectory


@given(st.binary(max_size=5000), st.sampled_from([1, 2, 4, 8, 16]), st.booleans())
@settings(deadline=None)
def test_a_block_comes_back(data: bytes, itemsize: int, repetitive: bool) -> None:
    raw = (data[:3] * 1000 if repetitive else data) + bytes(itemsize)
    raw = raw[: len(raw) // itemsize * itemsize]
    packed = pack(memoryview(raw), itemsize)
    assert len(packed) <= most_packed(len(raw), itemsize)
    into = bytearray(len(raw))
    unpack(memoryview(packed), memoryview(into), itemsize)
    assert bytes(into) == raw


def test_a_plane_that_packing_does_not_make_smaller_comes_back() -> None:
    """A frame as long as its plane was taken for the plane: 17 equal elements, and some others, were lost for good."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    dice = random.Random(seed)
    for count in range(1, 120):
        for distinct in (1, 2, 3, 8):
            raw = bytes(dice.randrange(distinct) for _ in range(4 * count))
            for itemsize in (1, 2, 4):
                into = bytearray(len(raw))
                unpack(memoryview(pack(memoryview(raw), itemsize)), memoryview(into), itemsize)
                assert bytes(into) == raw, (count, distinct, itemsize)


def test_floats_shrink_to_their_mantissas() -> None:
    weights = torch.randn(1 << 16, generator=torch.Generator().manual_seed(1)) * 0.02
    for tensor, share in ((weights, 0.88), (weights.bfloat16(), 0.75)):
        raw = tensor.view(torch.uint8).numpy().tobytes()
        assert len(pack(memoryview(raw), tensor.itemsize)) < share * len(raw)


def test_every_damage_to_a_packed_block_is_noticed_or_gives_other_bytes() -> None:
    """Never another error, never memory beyond the block: the digest above it tells the rest."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    dice = random.Random(seed)
    raw = torch.randn(2000).view(torch.uint8).numpy().tobytes()
    packed = pack(memoryview(raw), 4)
    for _ in range(300):
        hurt = bytearray(packed)
        for _ in range(dice.randint(1, 4)):
            hurt[dice.randrange(len(hurt))] ^= 1 << dice.randrange(8)
        into = bytearray(len(raw))
        try:
            unpack(memoryview(hurt), memoryview(into), 4)
        except Corrupt:
            continue
        assert len(into) == len(raw)
    for length in range(len(packed)):
        with pytest.raises(Corrupt):
            unpack(memoryview(packed)[:length], memoryview(bytearray(len(raw))), 4)


@pytest.mark.parametrize(
    "frame",
    [
        zstandard.ZstdCompressor().compress(bytes(1 << 30)),  # a bomb: 1 GiB in 32 KiB
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000)),
        b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 62) + bytes(20),
        os.urandom(64),
    ],
    ids=["bomb", "of unknown size", "of 2^62 bytes", "no frame"],
)
def test_what_a_frame_claims_is_looked_at_first(frame: bytes) -> None:
    count = max(1000, len(frame) + 1)
    with pytest.raises(Corrupt):
        unpack(memoryview(struct.pack("<I", len(frame)) + frame), memoryview(bytearray(count)), 1)


def test_packing_pays_where_the_store_is_slow() -> None:
    assert pays(ratio=0.8, packs_per_s=800e6, stores_per_s=100e6)
    assert not pays(ratio=0.8, packs_per_s=800e6, stores_per_s=2000e6), "the store is faster than the packing"
    assert not pays(ratio=0.95, packs_per_s=800e6, stores_per_s=100e6), "nothing shrinks"
    assert not pays(ratio=0.8, packs_per_s=800e6, stores_per_s=0.0), "nothing is known of the store yet"


def state(step: int) -> dict[str, Any]:
    made = torch.Generator().manual_seed(step)
    return {
        "w": torch.randn(1_300_000, generator=made),
        "half": torch.randn(777, 501, generator=made).bfloat16(),
        "zeros": torch.zeros(300_000, dtype=torch.float64),
        "flags": torch.rand(70_001, generator=made) > 0.5,
        "complex": torch.randn(301, dtype=torch.complex64, generator=made),
        "small": [torch.randn(i + 1, generator=made) for i in range(9)],
        "n": step,
    }


def save_all(url: Path, steps: range, **options: Any) -> list[Commit]:
    with ckpt.Checkpointer(url, compression="zstd", **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, state(step), blocking=True)
    forget()
    return RunDirectory.open(url).log.read().standing()


def is_right(url: Path, step: int) -> None:
    run = RunDirectory.open(url)
    assert check_step(run, next(c for c in run.log.read().standing() if c.step == step)).findings == ()
    target = state(999)
    assert ckpt.restore(url, target, step=step) == step
    assert bits(target) == bits(state(step))


@pytest.mark.parametrize("options", [{}, {"ram_budget_bytes": 0}], ids=["from RAM", "through a ring"])
def test_steps_are_smaller_and_come_back_bit_for_bit(tmp_path: Path, options: dict[str, int]) -> None:
    commits = save_all(tmp_path, range(1, 3), **options)
    raw = sum(t.nbytes for t in (*[v for v in state(1).values() if isinstance(v, torch.Tensor)], *state(1)["small"]))
    assert all(commit.nbytes < 0.7 * raw for commit in commits)
    for step in (1, 2):
        is_right(tmp_path, step)
    with ckpt.Checkpointer(tmp_path) as checkpointer:  # and on without
        target = state(999)
        assert checkpointer.restore(target) == 2
        checkpointer.save(3, state(3), blocking=True)
    forget()
    is_right(tmp_path, 3)


def test_unchanged_and_packed_together(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, compression="zstd") as checkpointer:
        held = state(1)
        for step in range(1, 6):
            held["half"] = state(step)["half"]
            checkpointer.save(step, held, blocking=True)
    forget()
    commits = RunDirectory.open(tmp_path).log.read().standing()
    assert commits[-1].sources
    assert commits[-1].nbytes < 0.3 * commits[0].nbytes
    target = state(999)
    assert ckpt.restore(tmp_path, target) == 5
    assert bits({**target, "n": 0}) == bits({**held, "n": 0})
    made = copy_steps(
        RunDirectory.open(tmp_path),
        commits[-1:],
        Holder(RunDirectory.open(tmp_path / "to", create=True), run_id=None, takeover=False),
    )
    assert made[0].content_digest == commits[-1].content_digest
    assert ckpt.restore(tmp_path / "to", target) == 5
    assert bits({**target, "n": 0}) == bits({**held, "n": 0})


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    save_all(tmp_path, range(1, 3))
    run = RunDirectory.open(tmp_path)
    last = run.log.read().standing()[-1]
    path = tmp_path / "steps" / last.attempt / "r00000.packed"
    chunk = next(chunk for chunk in StepReader(run, last).part(0).chunks if chunk.key == "w")
    whole = path.read_bytes()
    for at in (chunk.span(BLOCK_BYTES, BLOCK_BYTES)[0], chunk.span(BLOCK_BYTES, BLOCK_BYTES)[0] + 40_000):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
        findings = check_step(run, last).findings
        assert [(finding.tensor, finding.file) for finding in findings] == [
            ("w", f"steps/{last.attempt}/r00000.packed")
        ]
        assert "1 of 20 blocks" in findings[0].problem
        with pytest.raises(Corrupt, match="w at"):
            ckpt.restore(tmp_path, state(999))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Corrupt, match=r"r00000\.packed"):
        ckpt.restore(tmp_path, state(999))
    target = state(999)
    assert ckpt.restore(tmp_path, target, fallback=True) == 1


def test_the_copy_in_ram_is_as_it_was_copied(tmp_path: Path) -> None:
    """A job that is killed reads its last step from RAM, whatever the store has made of it."""
    with ckpt.Checkpointer(tmp_path, compression="zstd") as checkpointer:
        commit = checkpointer.save(1, state(1), blocking=True).wait()
        reader = StepReader(RunDirectory.open(tmp_path), commit, ram=RamTier.of(RunDirectory.open(tmp_path)))
        assert reader.part(0).data_name.endswith(".safetensors")
        assert reader.used_ram


def _sharded(rank: int, world: int, url: str, step: int) -> int | None:
    rows = torch.randn(1200, 700, generator=torch.Generator().manual_seed(7))
    size = 1200 // world
    mine = rows[rank * size : (rank + 1) * size].clone()
    held = {"w": ckpt.Shard(mine, (1200, 700), (rank * size, 0)), "n": 0}
    with ckpt.Checkpointer(url, compression="zstd") as checkpointer:
        mine.zero_()
        start = checkpointer.restore(held)
        if start is not None:
            assert torch.equal(mine, rows[rank * size : (rank + 1) * size])
        mine.copy_(rows[rank * size : (rank + 1) * size])
        checkpointer.save(step, held, blocking=True)
    return start


def test_at_another_world_size(tmp_path: Path) -> None:
    pool = Pool(3)
    try:
        assert pool.results(_sharded, 2, str(tmp_path), 1) == [None, None]
        assert pool.results(_sharded, 3, str(tmp_path), 2) == [1, 1, 1]
        assert pool.results(_sharded, 1, str(tmp_path), 3) == [2]
    finally:
        pool.close()
    run = RunDirectory.open(tmp_path)
    assert all(check_step(run, commit).findings == () for commit in run.log.read().standing())


def test_a_step_without_a_tensor_of_its_own(tmp_path: Path) -> None:
    """Values alone, and then what has not changed: its file was looked for under another name than it had."""
    frozen = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    states = {1: {"n": 1}} | {step: {"n": step, "frozen": frozen} for step in range(2, 6)}
    with ckpt.Checkpointer(tmp_path, compression="zstd") as checkpointer:
        for step, state in states.items():
            checkpointer.save(step, state, blocking=True)
    forget()
    run = RunDirectory.open(tmp_path)
    for commit in run.log.read().standing():
        assert check_step(run, commit).findings == ()
        target = {name: torch.zeros_like(frozen) if name == "frozen" else 0 for name in states[commit.step]}
        assert ckpt.restore(tmp_path, target, step=commit.step) == commit.step
        assert bits(target) == bits(states[commit.step])
    assert run.log.view.standing()[-1].sources
