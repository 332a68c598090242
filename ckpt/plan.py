"""Plans: what one rank writes, byte by byte, and which bytes it reads to fill its targets. Pure values.

A SavePlan is fixed by the layout alone: it is computed once and reused until the layout changes.
A LoadPlan is fixed by the targets and the chunks of the parts that hold them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from ckpt.errors import Corrupt
from ckpt.layout import OWNERSHIP, Owned, World, held, owned_by, writers
from ckpt.manifest import BLOCK_BYTES, Chunk
from ckpt.sharding import ITEMSIZE, Piece, TensorSpec
from ckpt.slices import Slice, cover_fault, flat_boxes, flat_span, is_flat

ALIGN_BYTES = 4096
SMALL_BYTES = 64 * 1024  # smaller chunks lie together, aligned to 64 bytes
RUN_BYTES = 4 << 20  # one write, and the most that one read brings

SAFETENSORS_DTYPE = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float16": "F16",
    "bfloat16": "BF16",
    "int16": "I16",
    "uint16": "U16",
    "float32": "F32",
    "int32": "I32",
    "uint32": "U32",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
    "complex64": "C64",
}
"""What safetensors calls our dtypes; the others are stored as U8 and typed by the part."""


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """An owned box: where it lies in the local tensor, and in the data file."""

    owned: Owned
    spec: TensorSpec
    at: int  # first byte in the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class Run:
    """Aligned bytes [at, at + nbytes) of the data file, made of raw bytes [start, stop) of these chunks."""

    at: int
    nbytes: int
    pieces: tuple[tuple[int, int, int, int], ...]  # (chunk index, start, stop, first byte in the run)


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes that a data file is to hold under a name: those of one box of a tensor."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class FileLayout:
    """A data file: `header` opens it, extent i starts at byte `starts[i]`, and `runs` fill the rest."""

    header: bytes
    starts: tuple[int, ...]
    runs: tuple[Run, ...]
    data_bytes: int  # of the whole file

    @property
    def header_runs(self) -> tuple[Run, ...]:
        """The writes of the header; no pieces lie in them."""
        whole = len(self.header)
        return tuple(Run(at, min(RUN_BYTES, whole - at), ()) for at in range(0, whole, RUN_BYTES))


def lay_out(extents: Sequence[Extent]) -> FileLayout:
    """The file of `extents`: large ones first, each on a page border, then small ones side by side."""
    sizes = [extent.nbytes for extent in extents]
    packs = _pack(sizes)
    data_bytes = _round_up(packs[-1].stop, ALIGN_BYTES) if packs else 0
    starts = {index: start for pack in packs for index, start in zip(pack.members, pack.starts, strict=True)}
    header = _header([(extents[i], start) for i, start in starts.items()], data_bytes)
    base = len(header)
    runs = tuple(run for pack in packs for run in _runs(pack, sizes, base))
    return FileLayout(header, tuple(base + starts[i] for i in range(len(extents))), runs, base + data_bytes)


@dataclass(frozen=True)
class SavePlan:
    """What one rank writes: `chunks` ordered by key, in a data file laid out as `file`."""

    chunks: tuple[PlannedChunk, ...]
    file: FileLayout
    values: tuple[str, ...]  # shared values that this rank writes


def plan_save(world: World, rank: int) -> SavePlan:
    """The plan of `rank`: a function of what it holds and of its replica groups."""
    values = tuple(name for name in world.layout(rank).values if world.value_owner[name] == rank)
    return plan_file(owned_by(world, rank), world.specs, values)


def plan_file(owned: Sequence[Owned], specs: Mapping[str, TensorSpec], values: tuple[str, ...]) -> SavePlan:
    """The plan of a writer of these boxes, ordered by key and box, and of these values."""
    extents = [
        Extent(o.key, o.box.offset, o.box.shape, (dtype := specs[o.key].dtype), o.box.numel * ITEMSIZE[dtype])
        for o in owned
    ]
    file = lay_out(extents)
    chunks = tuple(
        PlannedChunk(o, specs[o.key], at, extent.nbytes)
        for o, extent, at in zip(owned, extents, file.starts, strict=True)
    )
    return SavePlan(chunks, file, values)


@dataclass(slots=True)
class _Pack:
    """Chunks that lie together from one page border to the next: a large one alone, or small ones."""

    members: list[int]
    starts: list[int]
    stop: int


def _pack(sizes: Sequence[int]) -> list[_Pack]:
    """Where each chunk starts in the data section: large ones first, in order of key, then small ones."""
    packs: list[_Pack] = []
    at = 0
    for index, size in ((i, n) for i, n in enumerate(sizes) if n >= SMALL_BYTES):
        packs.append(_Pack([index], [at], at + size))
        at = _round_up(at + size, ALIGN_BYTES)
    small: _Pack | None = None
    for index, size in ((i, n) for i, n in enumerate(sizes) if n < SMALL_BYTES):
        if small is None or _round_up(small.stop, 64) + size - small.starts[0] > RUN_BYTES:
            small = _Pack([], [], _round_up(small.stop, ALIGN_BYTES) if small else at)
            packs.append(small)
        small.members.append(index)
        small.starts.append(_round_up(small.stop, 64))
        small.stop = small.starts[-1] + size
    return packs


def _runs(pack: _Pack, sizes: Sequence[int], base: int) -> Iterable[Run]:
    """The writes of a pack: at most RUN_BYTES each, so that a run of a large chunk holds whole blocks."""
    first = base + pack.starts[0]
    if len(pack.members) > 1 or sizes[pack.members[0]] <= RUN_BYTES:
        pieces = tuple((i, 0, sizes[i], at - pack.starts[0]) for i, at in zip(pack.members, pack.starts, strict=True))
        yield Run(first, _round_up(base + pack.stop - first, ALIGN_BYTES), pieces)
        return
    index = pack.members[0]
    for start in range(0, sizes[index], RUN_BYTES):
        stop = min(start + RUN_BYTES, sizes[index])
        yield Run(first + start, _round_up(stop - start, ALIGN_BYTES), ((index, start, stop, 0),))


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to


def entry_name(key: str, offset: tuple[int, ...]) -> str:
    """Name of a chunk in the safetensors file: the key, `@`, the global offset of its first element."""
    return f"{key}@{','.join(map(str, offset))}"


def _header(placed: Iterable[tuple[Extent, int]], data_bytes: int) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = pads = 0
    for extent, start in placed:
        if start > end:
            table[f".pad/{pads}"] = _pad(end, start)
            pads += 1
        end = start + extent.nbytes
        dtype = SAFETENSORS_DTYPE.get(extent.dtype)
        table[entry_name(extent.key, extent.offset)] = {
            "dtype": dtype or "U8",
            "shape": list(extent.shape) if dtype else [extent.nbytes],
            "data_offsets": [start, end],
        }
    if data_bytes > end:
        table[f".pad/{pads}"] = _pad(end, data_bytes)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (_round_up(8 + len(text), ALIGN_BYTES) - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


def _pad(start: int, stop: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}


# Loading


@dataclass(frozen=True, slots=True)
class Target:
    """Memory to fill: the pieces of tensor `key` that a local tensor of `shape` holds.

    `direct`: the memory is plain host memory, contiguous, of the stored dtype, so bytes may be read into it.
    `compare`: the memory is filled by another target already and must be equal (tied weights, overlapping views).
    """

    key: str
    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]
    direct: bool
    compare: bool = False


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements of `box` go to target `target`; `moved` turns global offsets into offsets of its local tensor."""

    target: int
    box: Slice
    moved: tuple[int, ...]
    compare: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """Raw bytes [start, stop) of a chunk, on block borders: verified, then copied, or read in place.

    `in_place` is the first byte in the memory of target `copies[0].target`; None goes through a buffer.
    """

    chunk: Chunk
    start: int
    stop: int
    copies: tuple[Copy, ...]
    in_place: int | None = None

    @property
    def span(self) -> tuple[int, int]:
        """Where its bytes, packed or not, begin and end in the file."""
        return self.chunk.span(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class Fetch:
    """One read of a data file: bytes [at, at + nbytes), which hold these segments in order.

    `file` is the one that the chunks of part `part` name: "" is its own.
    """

    part: int
    file: str
    at: int
    nbytes: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class LoadPlan:
    """Reads that fill every target; `used_bytes` of the `read_bytes` end up in a target."""

    fetches: tuple[Fetch, ...]
    used_bytes: int

    @property
    def read_bytes(self) -> int:
        return sum(fetch.nbytes for fetch in self.fetches)


def needed_parts(world: World, ownership: str, targets: Iterable[Target]) -> set[int]:
    """The writers whose parts are needed to fill `targets`."""
    found: set[int] = set()
    known: dict[object, bool] = {}  # by what all tensors of a layer's kind have in common: whether nobody shares them
    for key, box in {(target.key, piece.box) for target in targets for piece in target.pieces}:
        alike = world.specs[key].shape, tuple(world.instances[key].items()), box
        if alike not in known:
            groups = held(world, key, box)
            known[alike] = all(len(group.ranks) == 1 for group in groups)
            if known[alike] or ownership != OWNERSHIP:
                found.update(rank for group in groups for rank in group.ranks)
        if not known[alike] and ownership == OWNERSHIP:
            found.update(writers(world, key, box))
    return found


def plan_load(targets: Sequence[Target], parts: dict[int, Sequence[Chunk]]) -> LoadPlan:
    """Reads of the fewest blocks that fill every target. `Corrupt` if the chunks do not tile a target exactly."""
    stored: dict[str, list[_Stored]] = {}
    for part, chunks in parts.items():
        for chunk in chunks:
            stored.setdefault(chunk.key, []).append(_Stored(part, chunk, chunk.box, []))
    wanted: list[_Stored] = []
    used = 0
    for index, target in enumerate(targets):
        for piece in target.pieces:
            moved = tuple(a - o for a, o in zip(piece.at, piece.box.offset, strict=True))
            meets: list[Slice] = []
            for one in stored.get(target.key, ()):
                if len(one.box.shape) != len(piece.box.shape):
                    raise Corrupt(f"{target.key}: a stored chunk has shape {one.box.shape}, the tensor another rank")
                if box := one.box.intersect(piece.box):
                    meets.append(box)
                    used += box.numel * ITEMSIZE[one.chunk.dtype]
                    if not one.copies:
                        wanted.append(one)
                    one.copies.append(Copy(index, box, moved, target.compare))
            if meets != [piece.box] and (fault := cover_fault(piece.box, meets)):
                raise Corrupt(f"{target.key}: the stored chunks do not cover it: {fault}")
    segments: dict[tuple[int, str], list[Segment]] = {}
    for one in wanted:
        segments.setdefault((one.part, one.chunk.file), []).extend(_segments(one.chunk, one.copies, targets))
    fetches = [fetch for (part, file), found in segments.items() for fetch in _coalesce(part, file, found)]
    return LoadPlan(tuple(fetches), used)


@dataclass(slots=True)
class _Stored:
    """A chunk, the box that it holds, and what is wanted of it."""

    part: int
    chunk: Chunk
    box: Slice
    copies: list[Copy]


def _segments(chunk: Chunk, copies: Sequence[Copy], targets: Sequence[Target]) -> Iterable[Segment]:
    """The block runs of `chunk` that these copies need, each at most RUN_BYTES."""
    nbytes, itemsize = chunk.raw_bytes, ITEMSIZE[chunk.dtype]
    if len(copies) == 1 and (inside := _in_place(chunk, copies[0], targets[copies[0].target])):
        first, last, memory = inside
        for start in range(first, last, RUN_BYTES):
            yield Segment(chunk, start, min(start + RUN_BYTES, last), tuple(copies), memory + start - first)
        if (first, last) == (0, nbytes):
            return
        needed = _blocks(chunk, copies[0].box) - set(range(first // BLOCK_BYTES, -(-last // BLOCK_BYTES)))
    elif nbytes <= BLOCK_BYTES:
        yield Segment(chunk, 0, nbytes, tuple(copies))
        return
    else:
        needed = set().union(*(_blocks(chunk, copy.box) for copy in copies))
    for first_block, stop_block in _consecutive(sorted(needed)):
        start, stop = first_block * BLOCK_BYTES, min(stop_block * BLOCK_BYTES, nbytes)
        inside_segment = tuple(c for c in copies if _meets(chunk, c.box, start // itemsize, stop // itemsize))
        yield Segment(chunk, start, stop, inside_segment)


def _in_place(chunk: Chunk, copy: Copy, target: Target) -> tuple[int, int, int] | None:
    """Whole blocks [first, last) in bytes of the chunk, and where they start in the target's memory; or None."""
    if not target.direct or target.compare or chunk.packed:
        return None
    nbytes = chunk.raw_bytes
    if copy.box.shape == chunk.shape == target.shape:
        return 0, nbytes, 0
    start, stop = flat_span(chunk.shape, copy.box.relative_to(chunk.offset))
    into, into_stop = flat_span(target.shape, copy.box.moved_by(copy.moved))
    if stop - start != copy.box.numel or into_stop - into != stop - start:  # not in one piece, there or here
        return None
    itemsize = ITEMSIZE[chunk.dtype]
    start, stop, into = start * itemsize, stop * itemsize, into * itemsize
    first = _round_up(start, BLOCK_BYTES)
    last = stop if stop == nbytes else stop // BLOCK_BYTES * BLOCK_BYTES
    if first >= last:
        return None
    return first, last, into + first - start


def _blocks(chunk: Chunk, box: Slice) -> set[int]:
    found: set[int] = set()
    for start, stop in _spans(chunk.shape, box.relative_to(chunk.offset), ITEMSIZE[chunk.dtype]):
        found.update(range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)))
    return found


def _spans(shape: tuple[int, ...], box: Slice, itemsize: int, base: int = 0) -> Iterable[tuple[int, int]]:
    """Byte runs of a row-major tensor that hold `box`; gaps under two blocks are not worth leaving out."""
    start, stop = flat_span(shape, box)
    row = flat_span(shape, Slice((0,) * len(shape), (1, *shape[1:])))[1] if shape else 1
    if is_flat(shape, box) or row * itemsize < 2 * BLOCK_BYTES:
        yield base + start * itemsize, base + stop * itemsize
        return
    rest = Slice(box.offset[1:], box.shape[1:])
    for i in range(box.offset[0], box.offset[0] + box.shape[0]):
        yield from _spans(shape[1:], rest, itemsize, base + i * row * itemsize)


def _consecutive(blocks: Sequence[int]) -> Iterable[tuple[int, int]]:
    per_run = RUN_BYTES // BLOCK_BYTES
    first = previous = None
    for block in blocks:
        if first is None or previous is None or block != previous + 1 or block - first == per_run:
            if first is not None and previous is not None:
                yield first, previous + 1
            first = block
        previous = block
    if first is not None and previous is not None:
        yield first, previous + 1


def _meets(chunk: Chunk, box: Slice, start: int, stop: int) -> bool:
    low, high = flat_span(chunk.shape, box.relative_to(chunk.offset))
    return low < stop and start < high


def _coalesce(part: int, file: str, segments: Iterable[Segment]) -> Iterable[Fetch]:
    """Reads in file order; buffered segments that lie side by side share one read of at most RUN_BYTES."""
    batch: list[Segment] = []
    first = last = 0  # of the bytes of the batch
    for (start, stop), segment in sorted(((segment.span, segment) for segment in segments), key=itemgetter(0)):
        if segment.in_place is not None:
            yield Fetch(part, file, start, stop - start, (segment,))
            continue
        if batch and (start > last + ALIGN_BYTES or stop - first > RUN_BYTES):
            yield Fetch(part, file, first, last - first, tuple(batch))
            batch = []
        first, last = first if batch else start, stop
        batch.append(segment)
    if batch:
        yield Fetch(part, file, first, last - first, tuple(batch))


def copy_boxes(segment: Segment, copy: Copy) -> Iterable[tuple[int, Slice, Slice, Slice]]:
    """The boxes that make up a copy out of a segment's bytes.

    Each is (first byte in the segment, a box that lies there in row-major order, the wanted part of that box
    relative to its first element, where that part goes in the target's local tensor).
    """
    itemsize, shape = ITEMSIZE[segment.chunk.dtype], segment.chunk.shape
    for box in flat_boxes(shape, segment.start // itemsize, segment.stop // itemsize):
        inside = box.moved_by(segment.chunk.offset)
        if meet := inside.intersect(copy.box):
            first = flat_span(shape, box)[0] * itemsize - segment.start
            yield first, box, meet.relative_to(inside.offset), meet.moved_by(copy.moved)
