"""Plans, carried out in NumPy as `ckpt.stage` and `ckpt.reading` do: what is written can be read, anywhere."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_worlds import content, ddp, fsdp, gpt2_specs, layout_of, local_of, local_shape, specs_drawn, window, worlds
from safetensors import safe_open

from ckpt.errors import Corrupt
from ckpt.layout import OWNERSHIP, World
from ckpt.manifest import BLOCK_BYTES, DIGEST_BYTES, Chunk
from ckpt.plan import (
    ALIGN_BYTES,
    RUN_BYTES,
    SAFETENSORS_DTYPE,
    Copy,
    Fetch,
    LoadPlan,
    SavePlan,
    Segment,
    Target,
    copy_boxes,
    needed_parts,
    plan_load,
    plan_save,
)
from ckpt.sharding import ITEMSIZE, Mesh, OnMesh, Replicate, Split, TensorSpec, Whole, pieces_of
from ckpt.slices import Slice, flat_span

# Writing


def raw_chunks(world: World, rank: int, plan: SavePlan) -> list[bytes]:
    """The raw bytes of each planned chunk, out of the rank's local tensors."""
    found = []
    for chunk in plan.chunks:
        local = local_of(world, chunk.owned.key, rank)
        found.append(np.ascontiguousarray(local[window(chunk.owned.box, chunk.owned.at)]).tobytes())
    return found


def write(world: World, rank: int, plan: SavePlan) -> bytes:
    """The data file, by its header and runs; every byte of it is written once."""
    data = bytearray(plan.file.header.ljust(plan.file.data_bytes, b"\xff"))
    raw = raw_chunks(world, rank, plan)
    written = len(plan.file.header)
    for run in sorted(plan.file.runs, key=lambda run: run.at):
        assert run.at == written, "a hole or an overlap between runs"
        memory = bytearray(run.nbytes)
        end = 0
        for index, start, stop, at in run.pieces:
            assert end <= at
            memory[at : at + stop - start] = raw[index][start:stop]
            end = at + stop - start
        assert end <= run.nbytes
        data[run.at : run.at + run.nbytes] = memory
        written += run.nbytes
    assert written == plan.file.data_bytes == len(data)
    return bytes(data)


def chunks_of(plan: SavePlan) -> list[Chunk]:
    return [
        Chunk(
            c.owned.key,
            c.owned.box.offset,
            c.owned.box.shape,
            c.spec.dtype,
            "",
            c.at,
            c.nbytes,
            "raw",
            bytes(-(-c.nbytes // BLOCK_BYTES) * DIGEST_BYTES),
        )
        for c in plan.chunks
    ]


@st.composite
def any_world(draw: st.DrawFn) -> World:
    return draw(worlds(draw(specs_drawn())))


@given(any_world())
@settings(deadline=None)
def test_runs_and_chunks_of_a_save_are_consistent(world: World) -> None:
    for rank in range(world.size):
        plan = plan_save(world, rank)
        data = write(world, rank, plan)
        assert len(plan.file.header) % ALIGN_BYTES == plan.file.data_bytes % ALIGN_BYTES == 0
        for run in plan.file.runs:
            assert run.at % ALIGN_BYTES == run.nbytes % ALIGN_BYTES == 0
            assert run.nbytes <= RUN_BYTES
            assert all(start % BLOCK_BYTES == 0 for _, start, _, _ in run.pieces), "a run begins inside a block"
        assert [(c.owned.key, c.owned.box) for c in plan.chunks] == sorted(
            (c.owned.key, c.owned.box) for c in plan.chunks
        )
        for chunk, raw in zip(plan.chunks, raw_chunks(world, rank, plan), strict=True):
            assert chunk.nbytes == len(raw)
            assert data[chunk.at : chunk.at + chunk.nbytes] == raw
            assert chunk.at % 64 == 0


def test_many_small_tensors_share_runs_and_a_large_one_is_cut_into_runs() -> None:
    specs = {f"t{i:03d}": TensorSpec("uint8", (60_000 + i,)) for i in range(200)}
    world = ddp({**specs, "large": TensorSpec("int32", (3 << 20,))}, 1)
    plan = plan_save(world, 0)
    write(world, 0, plan)
    assert [len(run.pieces) for run in plan.file.runs[:3]] == [1, 1, 1]
    assert [len(run.pieces) for run in plan.file.runs[3:]] == [69, 69, 62]
    assert all(run.at % ALIGN_BYTES == run.nbytes % ALIGN_BYTES == 0 for run in plan.file.runs)
    assert all(run.nbytes <= RUN_BYTES for run in plan.file.runs)


@given(any_world())
@settings(deadline=None, max_examples=30)
def test_safetensors_opens_every_data_file(world: World) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world.size):
            plan = plan_save(world, rank)
            path = Path(folder) / "data.safetensors"
            path.write_bytes(write(world, rank, plan))
            with safe_open(path, framework="np") as file:
                names = [name for name in file.keys() if not name.startswith(".pad/")]  # noqa: SIM118
                assert len(names) == len(plan.chunks)
                for chunk in plan.chunks:
                    name = f"{chunk.owned.key}@{','.join(map(str, chunk.owned.box.offset))}"
                    stored = file.get_tensor(name)
                    expected = content(chunk.owned.key, chunk.spec)[window(chunk.owned.box)]
                    if chunk.spec.dtype in SAFETENSORS_DTYPE:
                        assert stored.dtype == expected.dtype
                        np.testing.assert_array_equal(stored, expected)
                    else:
                        assert stored.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_safetensors_opens_every_dtype(dtype: str, tmp_path: Path) -> None:
    world = ddp({"a": TensorSpec(dtype, (3, 5)), "b": TensorSpec(dtype, ())}, 1)
    plan = plan_save(world, 0)
    path = tmp_path / "data.safetensors"
    path.write_bytes(plan.file.header.ljust(plan.file.data_bytes, b"\0"))
    with safe_open(path, framework="pt") as file:
        stored = file.get_tensor("a@0,0")
        if dtype in SAFETENSORS_DTYPE:
            assert str(stored.dtype) == f"torch.{dtype}"
            assert stored.shape == (3, 5)
        else:
            assert stored.numel() == 15 * ITEMSIZE[dtype]


def test_a_rank_without_tensors_writes_a_file_that_opens(tmp_path: Path) -> None:
    plan = plan_save(ddp({}, 1), 0)
    assert (plan.chunks, plan.file.runs) == ((), ())
    (tmp_path / "data").write_bytes(plan.file.header)
    with safe_open(tmp_path / "data", framework="np") as file:
        assert list(file.keys()) == []


def test_keys_that_look_like_ours_do_not_collide() -> None:
    specs = {key: TensorSpec("uint8", (2,)) for key in (".pad/0", "a", "a@0", "__metadata__", 'quote"\n\u00e9')}
    plan = plan_save(ddp(specs | {"a@0@0": TensorSpec("uint8", ())}, 1), 0)
    table = json.loads(plan.file.header[8:])
    assert len([name for name in table if name != "__metadata__" and not name.startswith(".pad/0@")]) >= 6
    pairs = json.loads(plan.file.header[8:], object_pairs_hook=lambda pairs: pairs)
    assert len({name for name, _ in pairs}) == len(pairs)


def test_values_are_written_by_their_owner() -> None:
    world = World((replace(ddp({}, 1).layouts[0], values=("step",)),), (0, 0))
    assert [plan_save(world, rank).values for rank in range(2)] == [("step",), ()]


# Reading


class Reader:
    """Carries out a LoadPlan on files in memory, and counts how often each element of a target is written."""

    def __init__(self, files: dict[int, bytes], targets: Sequence[Target], specs: dict[str, TensorSpec]) -> None:
        self.files, self.targets, self.specs = files, targets, specs
        self.arrays = [np.zeros(t.shape, np.dtype(specs[t.key].dtype)) for t in targets]
        self.counts = [np.zeros(t.shape, int) for t in targets]

    def carry_out(self, plan: LoadPlan) -> None:
        for fetch in plan.fetches:
            data = self.files[fetch.part][fetch.at : fetch.at + fetch.nbytes]
            assert len(data) == fetch.nbytes > 0
            for segment in fetch.segments:
                self._check(fetch, segment)
                if segment.in_place is not None:
                    self._in_place(fetch, segment, data)
                    continue
                assert fetch.nbytes <= RUN_BYTES
                raw = data[segment.chunk.at + segment.start - fetch.at :][: segment.stop - segment.start]
                self._copy(segment, raw)

    @staticmethod
    def _check(fetch: Fetch, segment: Segment) -> None:
        """Whole blocks, so that each can be verified, inside the chunk and the fetch."""
        assert segment.start % BLOCK_BYTES == 0
        assert segment.stop % BLOCK_BYTES == 0 or segment.stop == segment.chunk.raw_bytes
        assert 0 <= segment.start < segment.stop <= segment.chunk.raw_bytes
        assert segment.stop - segment.start <= RUN_BYTES
        assert fetch.at <= segment.chunk.at + segment.start
        assert segment.chunk.at + segment.stop <= fetch.at + fetch.nbytes
        assert segment.copies

    def _in_place(self, fetch: Fetch, segment: Segment, data: bytes) -> None:
        (copy,), (one,) = segment.copies, fetch.segments
        assert one is segment
        assert self.targets[copy.target].direct
        assert not copy.compare
        assert segment.in_place is not None
        array, itemsize = self.arrays[copy.target], ITEMSIZE[segment.chunk.dtype]
        memory = array.reshape(-1).view(np.uint8)
        assert segment.in_place + len(data) <= memory.size
        memory[segment.in_place : segment.in_place + len(data)] = np.frombuffer(data, np.uint8)
        counts = self.counts[copy.target].reshape(-1)
        counts[segment.in_place // itemsize : (segment.in_place + len(data)) // itemsize] += 1

    def _copy(self, segment: Segment, raw: bytes) -> None:
        dtype = np.dtype(segment.chunk.dtype)
        for copy in segment.copies:
            for first, box, part, goes in copy_boxes(segment, copy):
                source = np.frombuffer(raw, dtype, box.numel, first).reshape(box.shape)[window(part)]
                if copy.compare:
                    np.testing.assert_array_equal(content(segment.chunk.key, self.specs[segment.chunk.key]), source)
                    continue
                self.arrays[copy.target][window(goes)] = source
                self.counts[copy.target][window(goes)] += 1


def targets_of(world: World, rank: int, direct: dict[str, bool]) -> list[Target]:
    return [
        Target(
            entry.key,
            pieces_of(entry.sharding, entry.spec.shape, rank),
            local_shape(entry.sharding, entry.spec.shape, rank),
            direct[entry.key],
        )
        for entry in world.layout(rank).entries
    ]


@given(st.data())
@settings(deadline=None, max_examples=120)
def test_any_world_is_restored_into_any_other(data: st.DataObject) -> None:
    specs = data.draw(specs_drawn())
    saved, target = data.draw(worlds(specs)), data.draw(worlds(specs))
    ownership = data.draw(st.sampled_from([OWNERSHIP, OWNERSHIP, "another/1"]))
    plans = [plan_save(saved, rank) for rank in range(saved.size)]
    files = {rank: write(saved, rank, plan) for rank, plan in enumerate(plans)}
    direct = {key: data.draw(st.booleans()) for key in specs}
    for rank in range(target.size):
        targets = targets_of(target, rank, direct)
        parts = needed_parts(saved, ownership, targets)
        plan = plan_load(targets, {part: chunks_of(plans[part]) for part in sorted(parts)})
        reader = Reader(files, targets, specs)
        reader.carry_out(plan)
        for t, array, counts in zip(targets, reader.arrays, reader.counts, strict=True):
            np.testing.assert_array_equal(array, local_of(target, t.key, rank), err_msg=t.key)
            assert (counts == 1).all(), f"{t.key}: an element was not written exactly once"
        wanted = sum(piece.box.numel * ITEMSIZE[specs[t.key].dtype] for t in targets for piece in t.pieces)
        assert plan.used_bytes == wanted
        if ownership == OWNERSHIP:
            assert {fetch.part for fetch in plan.fetches} == parts, "a part was opened for nothing"


def test_one_tensor_into_two_targets_of_which_one_is_compared() -> None:
    specs = {"t": TensorSpec("int32", (700, 400))}
    world = ddp(specs, 1)
    save = plan_save(world, 0)
    pieces = pieces_of(Whole(), (700, 400), 0)
    targets = [Target("t", pieces, (700, 400), True), Target("t", pieces, (700, 400), True, compare=True)]
    plan = plan_load(targets, {0: chunks_of(save)})
    reader = Reader({0: write(world, 0, save)}, targets, specs)
    reader.carry_out(plan)
    assert (reader.counts[0] == 1).all()
    assert not reader.counts[1].any(), "what is compared is not written"
    compared = [copy for f in plan.fetches for segment in f.segments for copy in segment.copies if copy.target == 1]
    assert compared
    assert all(copy.compare for copy in compared)


def _loads(saved: World, target: World) -> list[LoadPlan]:
    tables = {rank: chunks_of(plan_save(saved, rank)) for rank in range(saved.size)}
    direct = dict.fromkeys(target.specs, True)
    plans = []
    for rank in range(target.size):
        targets = targets_of(target, rank, direct)
        plans.append(plan_load(targets, {p: tables[p] for p in needed_parts(saved, OWNERSHIP, targets)}))
    return plans


@pytest.mark.parametrize(("before", "after", "most"), [(4, 3, 1.05), (2, 4, 1.05), (2, 1, 1.0), (4, 4, 1.0)])
def test_resharding_gpt2_reads_little_more_than_it_uses(before: int, after: int, most: float) -> None:
    specs = gpt2_specs()
    plans = _loads(fsdp(specs, before), fsdp(specs, after))
    read, used = sum(plan.read_bytes for plan in plans), sum(plan.used_bytes for plan in plans)
    assert used >= sum(spec.nbytes for spec in specs.values())
    assert read <= most * used * 1.001  # a few kilobytes of padding between small tensors


def test_most_bytes_of_gpt2_are_read_in_place() -> None:
    specs = gpt2_specs()
    for plan in _loads(fsdp(specs, 4), fsdp(specs, 3)):
        direct = sum(f.nbytes for f in plan.fetches if f.segments[0].in_place is not None)
        assert direct >= 0.9 * plan.read_bytes


def test_the_parts_that_are_needed_are_few() -> None:
    """64 x 8 -> 48 x 8: a rank's shard meets the shards of two or three writers of the same tensor-parallel rank."""

    def world(data: int, *, replicas: int = 1) -> World:
        grid = Mesh((replicas, data, 8), tuple(range(replicas * data * 8)))
        specs = {f"t{i}": TensorSpec("float32", (6144, 1024 * (i + 1))) for i in range(20)}
        sharding = OnMesh(grid, (Replicate(), Split(0), Split(1)))
        return World((layout_of(specs, dict.fromkeys(specs, sharding)),), (0,) * len(grid.ranks))

    target = world(48)
    for saved, most in ((world(64), 2), (world(16, replicas=4), 8)):
        for rank in (0, 101, 383):
            parts = needed_parts(saved, OWNERSHIP, targets_of(target, rank, dict.fromkeys(target.specs, True)))
            assert 1 <= len(parts) <= most
            assert all(part % 8 == rank % 8 for part in parts)


def _stored() -> tuple[list[Target], dict[int, Sequence[Chunk]]]:
    world = fsdp({"t": TensorSpec("float32", (8, 4)), "u": TensorSpec("float32", (8, 4))}, 2)
    parts: dict[int, Sequence[Chunk]] = {rank: chunks_of(plan_save(world, rank)) for rank in range(2)}
    whole_world = ddp(dict(world.specs), 1)
    return targets_of(whole_world, 0, dict.fromkeys(world.specs, True)), parts


def test_a_missing_part_or_chunk_is_corrupt() -> None:
    targets, parts = _stored()
    with pytest.raises(Corrupt, match="t: the stored chunks do not cover it: gap in"):
        plan_load(targets, {0: parts[0]})
    with pytest.raises(Corrupt, match="u: the stored chunks do not cover it: gap in"):
        plan_load(targets, {0: parts[0], 1: parts[1][:1]})
    with pytest.raises(Corrupt, match="t: the stored chunks do not cover it"):
        plan_load(targets, {})


def test_overlapping_chunks_are_corrupt() -> None:
    targets, parts = _stored()
    with pytest.raises(Corrupt, match="t: the stored chunks do not cover it: overlap in"):
        plan_load(targets, {**parts, 2: parts[1]})


def test_a_chunk_of_another_number_of_dimensions_is_corrupt() -> None:
    targets, parts = _stored()
    odd = Chunk("t", (0, 0, 0), (4, 4, 1), "float32", "", 4096, 64, "raw", bytes(16))
    with pytest.raises(Corrupt, match="t: a stored chunk has shape"):
        plan_load(targets, {0: [odd], 1: parts[1]})


@given(st.integers(0, 3), st.integers(1, 6), st.data())
@settings(deadline=None)
def test_copy_boxes_are_the_wanted_elements_of_a_segment(offset: int, rows: int, data: st.DataObject) -> None:
    """Element by element, for segments that begin and end in the middle of rows."""
    chunk = Chunk("t", (offset, 1), (rows, 5), "int16", "", 0, rows * 10, "raw", bytes(16))
    start = data.draw(st.integers(0, rows * 5 - 1))
    stop = data.draw(st.integers(start + 1, rows * 5))
    top = data.draw(st.integers(offset, offset + rows - 1))
    left = data.draw(st.integers(1, 5))
    box = Slice((top, left), (data.draw(st.integers(1, offset + rows - top)), data.draw(st.integers(1, 6 - left))))
    segment = Segment(chunk, start * 2, stop * 2, ())
    seen = []
    for first, inside, part, goes in copy_boxes(segment, Copy(0, box, (10, 20))):
        for at in np.ndindex(*part.shape):
            where = tuple(int(p + a) for p, a in zip(part.offset, at, strict=True))
            flat = start + first // 2 + flat_span(inside.shape, Slice(where, (1, 1)))[0]
            target = tuple(int(g + a) for g, a in zip(goes.offset, at, strict=True))
            seen.append((flat, target))
    expected = [
        ((r - offset) * 5 + c - 1, (r + 10, c + 20))
        for r in range(top, top + box.shape[0])
        for c in range(left, left + box.shape[1])
        if start <= (r - offset) * 5 + c - 1 < stop
    ]
    assert sorted(seen) == sorted(expected)
    assert len(set(seen)) == len(seen)


def test_narrow_columns_of_wide_rows_do_not_bring_whole_rows() -> None:
    specs = {"t": TensorSpec("float32", (8, 1 << 20))}
    world = ddp(specs, 1)
    piece = pieces_of(OnMesh(Mesh((16,), tuple(range(16))), (Split(1),)), (8, 1 << 20), 3)
    plan = plan_load([Target("t", piece, (8, 1 << 16), True)], {0: chunks_of(plan_save(world, 0))})
    assert plan.used_bytes == 8 * (1 << 18)
    assert plan.read_bytes == plan.used_bytes
    assert prod((8, 1 << 16)) * 4 == plan.used_bytes


def test_sharding_split_keeps_the_plan_of_an_empty_shard_empty() -> None:
    world = fsdp({"t": TensorSpec("float32", (2, 3))}, 4)
    assert plan_save(world, 3).chunks == ()
    target = Target("t", pieces_of(OnMesh(Mesh((4,), (0, 1, 2, 3)), (Split(0),)), (2, 3), 3), (0, 3), True)
    assert needed_parts(world, OWNERSHIP, [target]) == set()
    assert plan_load([target], {}) == LoadPlan((), 0)
