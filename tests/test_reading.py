"""Reading: every way a byte can take gives the same bytes, finds the same damage, and stays within its bounds."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from jobs import Pool

import ckpt
from ckpt import direct
from ckpt.adapt.tensors import bytes_view
from ckpt.buffers import aligned
from ckpt.datafile import LocalFile
from ckpt.errors import Corrupt
from ckpt.manifest import BLOCK_BYTES, Chunk, digest
from ckpt.plan import ALIGN_BYTES, RUN_BYTES, LoadPlan, Target, plan_load
from ckpt.reading import ALONE, OPEN_FILES, READ_THREADS, Neighbours, _in_turn, read_data, verify_chunks
from ckpt.sharding import Piece, Whole, pieces_of
from ckpt.slices import Slice, whole


@dataclass
class Stored:
    """A data file of uint8 tensors, and what is in them."""

    path: Path
    chunks: list[Chunk]
    content: list[torch.Tensor]

    def drop(self) -> None:
        """Take the file out of the page cache; skips the test where that cannot be done."""
        fd = os.open(self.path, os.O_RDWR)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        cached = direct.is_cached(fd, 0, max(1, os.fstat(fd).st_size))
        os.close(fd)
        if cached is not False:
            pytest.skip("this file system does not say what is cached, or cannot forget it")

    def is_cached(self) -> bool | None:
        fd = os.open(self.path, os.O_RDONLY)
        cached = direct.is_cached(fd, 0, os.fstat(fd).st_size)
        os.close(fd)
        return cached


def store(path: Path, shapes: list[tuple[int, ...]], gaps: list[int] | None = None) -> Stored:
    """Tensors of `shapes`, with `gaps[i]` bytes before tensor i; the file ends with the last."""
    chunks, content, at = [], [], 0
    with path.open("wb") as stream:
        for i, (shape, gap) in enumerate(zip(shapes, gaps or [0] * len(shapes), strict=True)):
            tensor = torch.randint(0, 256, shape, dtype=torch.uint8)
            memory = bytes_view(tensor)
            digests = b"".join(digest(memory[s : s + BLOCK_BYTES]) for s in range(0, len(memory), BLOCK_BYTES))
            at += gap
            stream.write(bytes(gap) + bytes(memory))
            chunks.append(Chunk(f"t{i}", (0,) * len(shape), shape, "uint8", "", at, len(memory), "raw", digests))
            content.append(tensor)
            at += len(memory)
    return Stored(path, chunks, content)


def target(chunk: Chunk, *, in_place: bool = True) -> Target:
    return Target(chunk.key, pieces_of(Whole(), chunk.shape, 0), chunk.shape, direct=in_place)


def everyone(stored: Stored) -> Neighbours:
    """Somebody else who reads all of it too."""
    return Neighbours(0, 2, {chunk.key: [whole(chunk.shape)] for chunk in stored.chunks})


def read_all(stored: Stored, neighbours: Neighbours = ALONE, *, in_place: bool = True) -> list[torch.Tensor]:
    plan = plan_load([target(chunk, in_place=in_place) for chunk in stored.chunks], {0: stored.chunks})
    tensors = [torch.zeros(chunk.shape, dtype=torch.uint8) for chunk in stored.chunks]
    read_data(lambda *_: LocalFile(str(stored.path)), plan, tensors, neighbours)
    return tensors


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


WAYS = ["warm", "cold", "shared"]


def by(way: str, stored: Stored, *, in_place: bool = True) -> list[torch.Tensor]:
    """Read all of it in this way."""
    if way != "warm":
        stored.drop()
    return read_all(stored, everyone(stored) if way == "shared" else ALONE, in_place=in_place)


# The bytes


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_any_place_and_length_in_a_file(tmp_path: Path, way: str, in_place: bool) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [0, 1, ALIGN_BYTES - 1, ALIGN_BYTES, BLOCK_BYTES + 1, RUN_BYTES - 1, RUN_BYTES, RUN_BYTES + 1]
    sizes += [rng.randrange(3 * RUN_BYTES) for _ in range(4)]
    rng.shuffle(sizes)
    gaps = [rng.choice([0, 1, 63, 64, ALIGN_BYTES, rng.randrange(2 * ALIGN_BYTES)]) for _ in sizes]
    stored = store(tmp_path / "data", [(size,) for size in sizes], gaps)
    assert same(by(way, stored, in_place=in_place), stored.content)


@pytest.mark.parametrize("way", WAYS)
def test_a_part_of_a_tensor(tmp_path: Path, way: str) -> None:
    stored = store(tmp_path / "data", [(1000, 9001)], [100])
    box, tensor = Slice((37, 11), (901, 8000)), torch.zeros(901, 8000, dtype=torch.uint8)
    plan = plan_load([Target("t0", (Piece(box, (0, 0)),), box.shape, direct=True)], {0: stored.chunks})
    if way != "warm":
        stored.drop()
    read_data(lambda *_: LocalFile(str(stored.path)), plan, [tensor], everyone(stored) if way == "shared" else ALONE)
    assert torch.equal(tensor, stored.content[0][37 : 37 + 901, 11 : 11 + 8000])


def test_what_nobody_else_wants_leaves_the_page_cache_alone(tmp_path: Path) -> None:
    stored = store(tmp_path / "data", [(3 * RUN_BYTES + 5,)] * 2)
    by("cold", stored)
    assert stored.is_cached() is False
    by("shared", stored)
    assert stored.is_cached() is True


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_in_memory(in_place: bool) -> None:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no tmpfs here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        stored = store(Path(folder) / "data", [(RUN_BYTES + 77,), (5,)], [3, 1])
        assert same(read_all(stored, in_place=in_place), stored.content)


def test_direct_reads_that_are_refused_become_ordinary_ones(tmp_path: Path) -> None:
    stored = store(tmp_path / "data", [(RUN_BYTES + 77,)], [3])
    file, buffer = (
        LocalFile(str(stored.path)),
        bytes_view(aligned(RUN_BYTES + 3 * ALIGN_BYTES))[1:],
    )  # refused: not aligned
    try:
        first = file.read_cold(3, RUN_BYTES, buffer)
        assert buffer[first : first + RUN_BYTES] == bytes_view(stored.content[0])[:RUN_BYTES]
    finally:
        file.close()


def test_a_view_keeps_its_memory() -> None:
    """One that did not let a read write into freed memory, which ended the process some time later."""
    tensor = torch.arange(5, dtype=torch.int16)
    view, owner = bytes_view(tensor)[2:], weakref.ref(tensor)
    del tensor
    assert owner() is not None
    assert bytes(view) == b"\1\0\2\0\3\0\4\0"
    del view
    assert owner() is None


# Damage


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_block_is_found_and_named(tmp_path: Path, way: str, in_place: bool) -> None:
    stored = store(tmp_path / "data", [(5 * BLOCK_BYTES,), (5 * BLOCK_BYTES + 3,)], [64, 0])
    at = stored.chunks[1].at + 3 * BLOCK_BYTES + 9
    with stored.path.open("r+b") as stream:
        stream.seek(at)
        stream.write(bytes([stored.content[1][3 * BLOCK_BYTES + 9] ^ 1]))
    with pytest.raises(Corrupt, match=r"data: tensor t1 at \[0\] is damaged: block 3, "):
        by(way, stored, in_place=in_place)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("missing", [1, ALIGN_BYTES, RUN_BYTES + 1])
@pytest.mark.parametrize("way", WAYS)
def test_a_short_file_is_named(tmp_path: Path, way: str, missing: int, in_place: bool) -> None:
    stored = store(tmp_path / "data", [(3 * RUN_BYTES,)], [10])
    size = 10 + 3 * RUN_BYTES - missing
    os.truncate(stored.path, size)
    with pytest.raises(Corrupt, match=rf"data: ends at byte {size}, its manifest says it has \d+ or more"):
        by(way, stored, in_place=in_place)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    stored = store(tmp_path / "data", [(10,)])
    stored.path.unlink()
    with pytest.raises(Corrupt, match="data: this data file of a committed step is missing"):
        read_all(stored)


@pytest.fixture
def unreadable(tmp_path: Path) -> Iterator[Path]:
    """A block device of 16 MiB of which the disk can read nothing: nothing is left of the file behind it."""
    if os.geteuid() or not shutil.which("losetup"):
        pytest.skip("needs root and losetup")
    behind = tmp_path / "behind"
    behind.touch()
    os.truncate(behind, 16 << 20)
    made = subprocess.run(["losetup", "--find", "--show", behind], capture_output=True, text=True)
    if made.returncode:
        pytest.skip("this kernel gives no loop device")
    try:
        os.truncate(behind, 0)
        yield Path(made.stdout.strip())
    finally:
        subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


def refused_by(path: Path, neighbours: Callable[[Stored], Neighbours]) -> None:
    stored = Stored(path, [Chunk("t0", (0,), (RUN_BYTES,), "uint8", "", 0, RUN_BYTES, "raw", bytes(16 * 16))], [])
    with pytest.raises(Corrupt, match=f"read {path} at byte 0: Input/output error"):
        read_all(stored, neighbours(stored))


@pytest.mark.parametrize("neighbours", [lambda _: ALONE, everyone])
def test_what_the_disk_cannot_read_is_damaged(unreadable: Path, neighbours: Callable[[Stored], Neighbours]) -> None:
    refused_by(unreadable, neighbours)


def test_what_a_check_cannot_read_is_damaged() -> None:
    segment = (
        plan_load(
            [Target("t", pieces_of(Whole(), (10,), 0), (10,), direct=True)],
            {0: [Chunk("t", (0,), (10,), "uint8", "", 0, 10, "raw", bytes(16))]},
        )
        .fetches[0]
        .segments[0]
    )
    path = f"/proc/{os.getpid()}/mem"  # nothing is mapped at address 0: EIO
    assert [reason for _, reason in verify_chunks(LocalFile(path), [segment])] == [
        f"read {path} at byte 0: Input/output error"
    ]


# Bounds


def many_files(folder: Path, count: int) -> tuple[LoadPlan, list[torch.Tensor], list[torch.Tensor]]:
    (folder / "parts").mkdir()
    found = [store(folder / "parts" / str(i), [(BLOCK_BYTES + i,)]) for i in range(count)]
    chunks = [Chunk(f"p{i}", *list(_fields(s.chunks[0]))[1:]) for i, s in enumerate(found)]
    for s in found:
        s.drop()
    plan = plan_load([target(chunk) for chunk in chunks], {i: [chunk] for i, chunk in enumerate(chunks)})
    tensors = [torch.zeros(chunk.shape, dtype=torch.uint8) for chunk in chunks]
    return plan, tensors, [s.content[0] for s in found]


def _fields(chunk: Chunk) -> Iterator[object]:
    return (getattr(chunk, name) for name in chunk.__struct_fields__)


def test_few_files_are_open_at_a_time_and_none_afterwards(tmp_path: Path) -> None:
    plan, tensors, content = many_files(tmp_path, 3 * OPEN_FILES)
    seen, before = list[int](), len(os.listdir("/proc/self/fd"))

    def open_file(part: int, file: str) -> LocalFile:
        seen.append(len(os.listdir("/proc/self/fd")))
        return LocalFile(str(tmp_path / "parts" / str(part)))

    read_data(open_file, plan, tensors)
    assert same(tensors, content)
    assert len(os.listdir("/proc/self/fd")) == before
    assert max(seen) - before <= 2 * (OPEN_FILES + READ_THREADS + 1)


def test_an_error_leaves_no_descriptor_open(tmp_path: Path) -> None:
    stored = store(tmp_path / "data", [(3 * RUN_BYTES,)])
    os.truncate(stored.path, RUN_BYTES)
    before = len(os.listdir("/proc/self/fd"))
    for way in WAYS:
        with pytest.raises(Corrupt):
            by(way, stored)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("in_place", [True, False])
def test_a_cold_read_takes_a_buffer_a_thread(tmp_path: Path, in_place: bool) -> None:
    stored = store(tmp_path / "data", [(32 * RUN_BYTES,)])
    plan = plan_load([target(stored.chunks[0], in_place=in_place)], {0: stored.chunks})
    tensors = [torch.ones(stored.chunks[0].shape, dtype=torch.uint8)]
    stored.drop()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    read_data(lambda *_: LocalFile(str(stored.path)), plan, tensors)
    assert _status("VmHWM") - before <= READ_THREADS * (RUN_BYTES + 3 * ALIGN_BYTES) + (8 << 20)
    assert same(tensors, stored.content)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# Several ranks on one machine


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_neighbours_take_turns_and_leave_nothing_out(tmp_path: Path, count: int) -> None:
    stored = store(tmp_path / "data", [(40 * RUN_BYTES + 1,)])
    fetches = plan_load([target(stored.chunks[0])], {0: stored.chunks}).fetches
    orders = [list(_in_turn(fetches, Neighbours(index, count))) for index in range(count)]
    assert all(sorted(order, key=lambda fetch: fetch.at) == list(fetches) for order in orders)
    starts = sorted(order[0].at for order in orders)
    assert all(b - a >= len(fetches) // count // 2 * RUN_BYTES or b - a >= 8 * RUN_BYTES for a, b in pairwise(starts))


def restore_cold(rank: int, world: int, url: str, split: bool) -> tuple[int, bool]:
    """Bytes that this rank had the disk read during a restore, and whether it got what was saved."""
    from torch.distributed import barrier
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))

    def state(fill: bool) -> dict[str, DTensor]:
        made = [torch.arange(8 << 20).add(i).reshape(2048, -1) if fill else torch.zeros(2048, 4096) for i in range(2)]
        return {
            f"t{i}": distribute_tensor(tensor.float(), mesh, [Shard(0) if split else Replicate()])
            for i, tensor in enumerate(made)
        }

    saved, found = state(True), state(False)
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(1, saved, blocking=True)
    barrier()
    for path in Path(url).glob("steps/*/*.safetensors") if rank == 0 else ():
        Stored(path, [], []).drop()
    barrier()
    before = _read_bytes()
    ckpt.restore(url, found)
    nbytes = _read_bytes() - before
    barrier()
    return nbytes, all(torch.equal(found[key].to_local(), saved[key].to_local()) for key in saved)


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@pytest.mark.parametrize("split", [False, True])
def test_the_ranks_of_a_machine_read_each_byte_once(pool: Pool, tmp_path: Path, split: bool) -> None:
    outcomes = pool.results(restore_cold, 2, str(tmp_path), split)
    stored = sum(path.stat().st_size for path in tmp_path.glob("steps/*/*.safetensors"))
    assert all(equal for _, equal in outcomes)
    assert 0.9 * stored <= sum(nbytes for nbytes, _ in outcomes) <= 1.1 * stored
