"""Is a stored step still what was committed? Follows the digests from the commit record to the last block.

    record -> MANIFEST -> parts -> data files: size, header, padding -> every block of every chunk
    all parts together -> every tensor exactly once; every value can be decoded

Never writes. Holds one part, one header and one read buffer at a time, and of the chunks seen only their boxes.
Goes on after what it finds, so that one run names all that is damaged. Whether a step was deleted by retention in
the meantime is for the caller to ask the log.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice

import torch

from ckpt.adapt import decode_value
from ckpt.adapt.values import dtype_from_name
from ckpt.datafile import DataFile, open_data
from ckpt.errors import CkptError, Corrupt, Incompatible, NotFound, StorageError
from ckpt.layout import OWNERSHIP, World, owned_by
from ckpt.log import View
from ckpt.manifest import BLOCK_BYTES, PART_LIMIT_BYTES, Chunk, Part, decode_part, matches, part_name
from ckpt.plan import RUN_BYTES, SAFETENSORS_DTYPE, Segment, entry_name
from ckpt.reading import verify_chunks
from ckpt.records import Commit, slot_name
from ckpt.restorer import StepReader
from ckpt.run import LOG, RunDirectory
from ckpt.slices import Slice, cover_fault, whole
from ckpt.store import Store

log = logging.getLogger("ckpt")

FINDINGS_LIMIT = 100
PAGE_BYTES, ENTRY_ROOM_BYTES = 4096, 512  # to fill up a header; for what is not counted in an entry, and its padding
HEADER_LIMIT_BYTES = 100_000_000  # what safetensors itself reads at most

_DAMAGE = frozenset({errno.EIO, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO})
_NAMED_LIMIT = 4  # tensors named in one finding

OnBytes = Callable[[int, int], None]


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was committed: in `file` (relative to the run), of `tensor` where it is one's."""

    file: str
    problem: str
    tensor: str | None = None


@dataclass(frozen=True)
class Report:
    """What the check of one step found. `complete` is False where it stopped after `FINDINGS_LIMIT` findings."""

    commit: Commit
    findings: tuple[Finding, ...]
    complete: bool

    @property
    def ok(self) -> bool:
        return not self.findings


def check_step(run: RunDirectory, commit: Commit, on_bytes: OnBytes | None = None) -> Report:
    """Read all of a step and compare it with what was committed. `on_bytes(done, total)` hears of the progress.

    Raises StorageError where the store fails in a way that says nothing about the bytes (no permission, a stale
    mount), Incompatible for a step in the format of a later version.
    """
    found = list(islice(_Check(run, commit, on_bytes).findings(), FINDINGS_LIMIT + 1))
    return Report(commit, tuple(found[:FINDINGS_LIMIT]), len(found) <= FINDINGS_LIMIT)


def is_whole(run: RunDirectory, commit: Commit, *, thorough: bool) -> bool:
    """Whether all files of a step are there, in full length, and their metadata is what was committed.

    `thorough`: every byte of the tensors, too. Raises as `check_step` does.
    """
    if thorough:
        return check_step(run, commit).ok
    try:
        reader = StepReader(run, commit)
        for rank in range(reader.manifest.world.size):
            reader.check_files(rank)
    except Corrupt as error:
        log.warning("step %d is damaged: %s", commit.step, error)
        return False
    return True


def check_log(view: View) -> list[Finding]:
    """Records that stand in the log and have no effect, though no writer of this version appends one."""
    return [
        Finding(f"{LOG}/{slot_name(ignored.slot)}", f"a {type(ignored.entry).__name__.lower()} record {ignored.reason}")
        for ignored in view.without_effect
    ]


class Values:
    """Decodes the shared values of a step, with shapes (meta tensors) in place of tensors stored apart from them."""

    def __init__(self, world: World) -> None:
        self._specs, self._aliases = world.specs, world.aliases
        self._keys = sorted((*world.specs, *world.aliases))

    def decode(self, name: str, data: bytes) -> object:
        """The value `name` whose bytes are `data`. Raises Corrupt or Incompatible."""
        first = bisect_left(self._keys, f"{name}/")
        keys = self._keys[first : bisect_left(self._keys, f"{name}0")]  # "0" follows "/"
        return decode_value(data, {key[len(name) + 1 :]: self._stand_in(key) for key in keys})

    def _stand_in(self, key: str) -> Callable[[], torch.Tensor]:
        spec = self._specs[self._aliases.get(key, key)]
        return lambda: torch.empty(spec.shape, dtype=dtype_from_name(spec.dtype), device="meta")


class _Check:
    """The check of one step, in the order of the chain."""

    def __init__(self, run: RunDirectory, commit: Commit, on_bytes: OnBytes | None) -> None:
        self._run, self._commit = run, commit
        self._on_bytes = on_bytes or (lambda done, total: None)
        self._done = 0
        self._boxes: dict[str, list[Slice]] = {}
        self._lost: list[str] = []  # parts that cannot be read

    def findings(self) -> Iterator[Finding]:
        commit = self._commit
        try:
            data = self._read("MANIFEST", commit.manifest_bytes, bytes.fromhex(commit.manifest_digest), "commit record")
            reader = StepReader(self._run, commit, data)
        except CkptError as error:
            yield self._broken(self._file("MANIFEST"), error)
            return
        self._reader, self._manifest, self._world = reader, reader.manifest, reader.manifest.world
        self._values = Values(self._world)
        self._owned_values: dict[int, set[str]] = {}
        for name, owner in self._world.value_owner.items():
            self._owned_values.setdefault(owner, set()).add(name)
        self._advance(len(reader.manifest_data))
        yield from self._record_faults()
        for rank in range(self._world.size):
            yield from self._rank(rank)
        yield from self._cover_faults()

    def _file(self, name: str) -> str:
        return self._run.attempt_path(self._commit.attempt, name)

    def _broken(self, file: str, error: CkptError) -> Finding:
        """The finding for a file that cannot be read as what it is; what is no damage is raised again."""
        if not _is_damage(error):
            raise error
        if isinstance(error, NotFound):
            return Finding(file, "is missing")
        return Finding(file, str(error).replace(f"{self._run.url}/", "").removeprefix(f"{file}: "))

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._on_bytes(self._done, self._commit.nbytes)

    def _record_faults(self) -> Iterator[Finding]:
        commit, manifest = self._commit, self._manifest
        said = (commit.step, commit.attempt, commit.parent, commit.world, commit.content_digest)
        held = (manifest.step, manifest.attempt, manifest.parent, manifest.world.size, manifest.content_digest.hex())
        for name, expected, got in zip(
            ("step", "attempt", "parent", "world", "content digest"), said, held, strict=True
        ):
            if expected != got:
                yield Finding(self._file("MANIFEST"), f"{name} is {got}, its commit record says {expected}")

    def _rank(self, rank: int) -> Iterator[Finding]:
        """One part, and its data file."""
        file = self._file(part_name(rank))
        done, ref = self._done, self._manifest.parts[rank]
        try:
            part = self._read_part(rank, file)
        except CkptError as error:
            self._lost.append(file)
            yield self._broken(file, error)
        else:
            self._advance(ref.part_bytes)
            yield from (Finding(file, problem, key) for key, problem in self._part_faults(part))
            yield from self._data_faults(rank, part)
        self._advance(done + ref.part_bytes + ref.data_bytes - self._done)

    def _read(self, name: str, nbytes: int, expected: bytes, named_by: str) -> bytes:
        """A file of metadata whose size and digest are known. Raises NotFound, Corrupt, StorageError."""
        data = self._run.store.read(self._file(name), limit_bytes=PART_LIMIT_BYTES)
        if len(data) != nbytes:
            raise Corrupt(f"has {len(data)} bytes, the {named_by} says {nbytes}")
        if not matches(data, expected):
            raise Corrupt(f"its bytes do not match the digest in the {named_by}")
        return data

    def _read_part(self, rank: int, file: str) -> Part:
        ref = self._manifest.parts[rank]
        data = self._read(part_name(rank), ref.part_bytes, ref.part_digest, "MANIFEST")
        part = decode_part(data, file)
        if (part.rank, part.attempt, part.data_bytes) != (rank, self._commit.attempt, ref.data_bytes):
            raise Corrupt(f"is the part of rank {part.rank} of attempt {part.attempt}")
        if part.content_digest() != ref.content_digest:
            raise Corrupt("what it says is stored does not match the content digest in the MANIFEST")
        return part

    # Parts

    def _part_faults(self, part: Part) -> Iterator[tuple[str | None, str]]:
        for chunk in part.chunks:
            spec = self._world.specs.get(chunk.key)
            if spec is None or spec.dtype != chunk.dtype:
                listed = f"as {spec.dtype}" if spec else "not at all"
                yield chunk.key, f"stored as {chunk.dtype}; the MANIFEST lists it {listed}"
            if chunk.file and chunk.source not in self._manifest.sources:
                yield chunk.key, f"lies in {chunk.file}, which the MANIFEST does not name as a source"
            self._boxes.setdefault(chunk.key, []).append(chunk.box)
        if self._manifest.ownership == OWNERSHIP:
            owned = {(o.key, o.box) for o in owned_by(self._world, part.rank)}
            for key, box in sorted(owned ^ {(chunk.key, chunk.box) for chunk in part.chunks}):
                has = "lacks" if (key, box) in owned else "holds"
                yield key, f"this part {has} {box}, against the rule {OWNERSHIP} by which readers look for it"
        yield from self._value_faults(part)

    def _value_faults(self, part: Part) -> Iterator[tuple[str | None, str]]:
        own = set(self._world.layout(part.rank).rank_values)
        for expected, held in (self._owned_values.get(part.rank, set()), part.values), (own, part.rank_values):
            if expected != set(held):
                yield None, f"values {_names(expected ^ set(held))} are missing here, or not expected"
        for name, data in part.values.items():
            yield from _undecodable(name, partial(self._values.decode, name, data))
        for name, data in part.rank_values.items():
            yield from _undecodable(name, partial(decode_value, data, {}))

    def _cover_faults(self) -> Iterator[Finding]:
        """Tensors that the parts together do not hold exactly once; those that lost parts explain in one finding."""
        faults = {key: cover_fault(whole(s.shape), self._boxes.get(key, ())) for key, s in self._world.specs.items()}
        keys = sorted(key for key, fault in faults.items() if fault)
        if keys and self._lost:
            yield Finding(self._lost[0], f"without the lost parts {len(keys)} tensors are not whole: {_names(keys)}")
            return
        for key in keys:
            yield Finding(self._file("MANIFEST"), f"its chunks do not tile it: {faults[key]}", key)

    # Data files

    def _data_faults(self, rank: int, part: Part) -> Iterator[Finding]:
        """The part's own file, and then the chunks of it that lie in files of earlier attempts."""
        files: dict[str, list[Chunk]] = {"": []}
        for chunk in part.chunks:
            files.setdefault(chunk.file, []).append(chunk)
        for file, chunks in files.items():
            path = self._reader.data_path(rank, file)
            found = self._own_faults(path, part, chunks) if not file else self._source_faults(path, chunks)
            yield from (Finding(path, problem, key) for key, problem in found)

    def _own_faults(self, path: str, part: Part, chunks: list[Chunk]) -> Iterator[tuple[str | None, str]]:
        store = self._run.store
        problem, size = _file_problem(store, path, part.data_bytes)
        if problem:
            yield None, problem if size is not None else f"{problem}; it held {_names({c.key for c in chunks})}"
        if size is not None:
            with closing(open_data(store, path)) as file:
                if not any(chunk.packed for chunk in chunks):
                    yield from header_faults(file, part)
                yield from self._chunk_faults(file, self._counted(chunks), size)

    def _source_faults(self, path: str, chunks: list[Chunk]) -> Iterator[tuple[str | None, str]]:
        store = self._run.store
        problem, size = _file_problem(store, path, None)
        if problem:
            yield None, f"{problem}; this step needs {_names({c.key for c in chunks})} from it"
        if size is not None:
            with closing(open_data(store, path)) as file:
                yield from self._chunk_faults(file, in_order(chunks), size)

    def _chunk_faults(self, file: DataFile, segments: Iterable[Segment], size: int) -> Iterator[tuple[str | None, str]]:
        damaged = verify_chunks(file, segments)
        for _, group in groupby(damaged, lambda found: id(found[0].chunk)):
            found = list(group)
            chunk, reason = found[0][0].chunk, found[0][1]
            if _stop(chunk) > size:
                yield chunk.key, f"its chunk at {list(chunk.offset)} reaches to file byte {_stop(chunk)}, past the end"
                continue
            bad = [s.start for segment, _ in found for s, _ in verify_chunks(file, _blocks_of(segment))]
            if not bad:
                yield chunk.key, f"was damaged when read first and intact when read again ({reason}): suspect hardware"
                continue
            blocks = -(-chunk.raw_bytes // BLOCK_BYTES)
            yield (
                chunk.key,
                f"chunk at {list(chunk.offset)}, shape {list(chunk.shape)}: {len(bad)} of {blocks} blocks do not "
                f"match their digest; the first starts at file byte {chunk.span(bad[0], bad[0])[0]}",
            )

    def _counted(self, chunks: list[Chunk]) -> Iterator[Segment]:
        for segment in in_order(chunks):
            yield segment
            self._advance(segment.stop - segment.start)


def _is_damage(error: CkptError) -> bool:
    """Whether an error met while reading says that the bytes are wrong, and not that the store or we cannot."""
    cause = error.__cause__
    if isinstance(error, StorageError):
        return isinstance(cause, OSError) and cause.errno in _DAMAGE
    return not isinstance(error, Incompatible)


def _names(names: Iterable[str]) -> str:
    """The first few of `names`, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - _NAMED_LIMIT
    return ", ".join(ordered[:_NAMED_LIMIT]) + (f" and {more} more" if more > 0 else "")


def _undecodable(name: str, decode: Callable[[], object]) -> Iterator[tuple[str | None, str]]:
    try:
        decode()
    except CkptError as error:
        if not isinstance(error.__cause__, ImportError):  # NumPy is missing here, the value is not
            yield None, f"value {name} cannot be decoded: {error}"


def in_order(chunks: Iterable[Chunk]) -> Iterator[Segment]:
    for chunk in sorted(chunks, key=lambda chunk: chunk.at):
        yield from _segments(chunk, RUN_BYTES)


def _stop(chunk: Chunk) -> int:
    return chunk.at + chunk.stored_bytes


def _segments(chunk: Chunk, nbytes: int) -> Iterator[Segment]:
    for start in range(0, chunk.raw_bytes, nbytes):
        yield Segment(chunk, start, min(start + nbytes, chunk.raw_bytes), ())


def _blocks_of(segment: Segment) -> Iterator[Segment]:
    for start in range(segment.start, segment.stop, BLOCK_BYTES):
        yield Segment(segment.chunk, start, min(start + BLOCK_BYTES, segment.stop), ())


def _file_problem(store: Store, name: str, expected_bytes: int | None) -> tuple[str | None, int | None]:
    """What is wrong with a data file as a file, and its size if it can be read at all. None: of any size."""
    path = store.local_path(name)
    try:
        size = store.size(name)
        mode = os.lstat(path).st_mode if path is not None else stat.S_IFREG
    except (NotFound, FileNotFoundError):
        return "is missing", None
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "something else"
        return f"is {kind}, not a regular file; readers refuse it", None
    if expected_bytes is not None and size != expected_bytes:
        how = "cut off" if size < expected_bytes else "too long"
        return f"is {how}: {size} bytes, the MANIFEST says {expected_bytes}", size
    return None, size


# The header of a data file: what another safetensors reader would believe


@dataclass(frozen=True)
class _Entry:
    """A tensor of a safetensors file; `start` and `stop` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} in bytes {self.start} to {self.stop}"


def header_faults(file: DataFile, part: Part) -> Iterator[tuple[str | None, str]]:
    """How the header differs from the part, and padding that is not zero."""
    try:
        table, base = _read_header(file, min(part.data_bytes - 8, _header_limit(part)))
        yield from _table_faults(table, base, part)
        pads = [entry for name, entry in table.items() if _is_pad(name)]
        bad = [base + e.start for e in pads if any(_read_some(file, base + e.start, min(e.stop - e.start, RUN_BYTES)))]
    except CkptError as error:
        if not _is_damage(error):
            raise
        yield None, str(error).removeprefix(f"{file.name}: ")
        return
    if bad:
        yield None, f"padding is not zero in {len(bad)} places, the first at file byte {bad[0]}; no tensor lies there"


def _read_header(file: DataFile, limit_bytes: int) -> tuple[dict[str, _Entry], int]:
    """The header's entries, and the file byte where the data section starts. Raises Corrupt."""
    length = int.from_bytes(_read_some(file, 0, 8), "little")
    if not 2 <= length <= min(HEADER_LIMIT_BYTES, limit_bytes):
        raise Corrupt(f"its safetensors header claims {length} bytes")
    try:
        fields = json.loads(_read_some(file, 8, length), object_pairs_hook=_distinct)
        fields.pop("__metadata__", None)
        table = {name: _entry(value) for name, value in fields.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Corrupt(f"its safetensors header cannot be read: {error}") from error
    return table, 8 + length


def _header_limit(part: Part) -> int:
    """More than a header that names the chunks of `part`, each with padding behind it, can need."""
    named = ((entry_name(c.key, c.offset), len(c.shape)) for c in part.chunks if not c.file)
    return 2 * PAGE_BYTES + sum(12 * len(name) + 24 * dims + ENTRY_ROOM_BYTES for name, dims in named)


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice in it")
    return table


def _entry(value: dict[str, object]) -> _Entry:
    if set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"an entry has the fields {sorted(value)!s:.100}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError("an entry's shape or offsets are not lists")
    if any(type(n) is not int or n < 0 for n in (*shape, *offsets)):
        raise ValueError("an entry's shape or offsets are not counts")
    return _Entry(str(value["dtype"]), tuple(shape), *offsets)


def _table_faults(table: dict[str, _Entry], base: int, part: Part) -> Iterator[tuple[str | None, str]]:
    own = [chunk for chunk in part.chunks if not chunk.file]
    expected = {entry_name(c.key, c.offset): (c.key, _expected_entry(c, base)) for c in own}
    for name, (key, entry) in expected.items():
        if (held := table.get(name)) != entry:
            yield key, f"its header entry is {held or 'missing'}; the part says {entry}"
    if stray := [name for name in table if name not in expected and not _is_pad(name)]:
        yield None, f"its header names tensors that the part does not: {_names(stray)}"
    at = 0
    for entry in sorted(table.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != at or entry.stop < at:
            break
        at = entry.stop
    if at != part.data_bytes - base:
        yield None, f"its header's entries do not fill the file one after the other; they fail at byte {base + at}"


def _expected_entry(chunk: Chunk, base: int) -> _Entry:
    dtype = SAFETENSORS_DTYPE.get(chunk.dtype)
    shape = chunk.shape if dtype else (chunk.stored_bytes,)
    return _Entry(dtype or "U8", shape, chunk.at - base, _stop(chunk) - base)


def _is_pad(name: str) -> bool:
    return name.startswith(".pad/")


def _read_some(file: DataFile, at: int, nbytes: int) -> bytes:
    """Bytes [at, at + nbytes), fewer only where the file ends."""
    found = bytearray(max(0, min(nbytes, file.size() - at)))
    file.read(at, memoryview(found))
    return bytes(found)
