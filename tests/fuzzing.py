"""Fuzzes what a store may hand to a reader, in a process with little memory: python tests/fuzzing.py EXAMPLES.

Every input is changed behind right digests. A decoder refuses it with a `CkptError`, or returns what is valid: it can
be written, and what is read back is equal. Anything else, MemoryError above all, ends this process with a traceback.
"""

from __future__ import annotations

import copy
import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_manifest import framed, manifest_tree, pack, part_tree

from ckpt.check import _read_header, _table_faults
from ckpt.errors import CkptError, Corrupt
from ckpt.manifest import (
    MANIFEST_MAGIC,
    PART_MAGIC,
    check_part,
    decode_manifest,
    decode_part,
    encode_manifest,
    encode_part,
)
from ckpt.records import Unknown, decode_record, encode_record, seal

ROOM_BYTES = 64 << 20  # of address space for a decoder, beyond what is there

NUMBERS = [
    0,
    1,
    -1,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63 - 1,
    -64,
    -(2**63),
    2**64 - 1,
    0.5,
    float("inf"),
    float("nan"),
    1e300,
]
TEXTS = [
    "",
    "/",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a\0b",
    ".",
    "\u202e",
    "x" * 300,
    "000000001.a",
    "S0",
    "S0/3",
]
LEAVES: list[Any] = [*NUMBERS, *TEXTS, None, True, False, b"", bytes(16), bytes(32)]


def _values(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
        max_leaves=12,
    )


_anything = st.sampled_from(LEAVES) | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8) | st.binary(max_size=40)
MSGPACK = _values(_anything)
JSON = _values(_anything.filter(lambda value: not isinstance(value, bytes)))


def paths(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [at] * bool(at) + [found for key in keys for found in paths(tree[key], (*at, key))]


def changed(data: st.DataObject, tree: Any, values: st.SearchStrategy[Any] = MSGPACK) -> Any:
    """`tree` with one to three places replaced, taken out, or there twice."""
    tree = copy.deepcopy(tree)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(paths(tree)))
        at = tree
        for key in path[:-1]:
            at = at[key]
        kind = data.draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
        if kind == "replace":
            likely = NUMBERS if isinstance(at[path[-1]], int) and data.draw(st.booleans()) else None
            at[path[-1]] = data.draw(st.sampled_from(likely) if likely else values)
        elif kind == "remove":
            del at[path[-1]]
        elif isinstance(at, list):
            at.extend([at[path[-1]]] * data.draw(st.sampled_from([1, 2, 70])))
        if not paths(tree):
            break
    return tree


@contextmanager
def little_memory() -> Iterator[None]:
    """MemoryError for whoever allocates what an input claims."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class InMemory:
    """A data file that is a few bytes, whatever its header says."""

    def __init__(self, data: bytes) -> None:
        self.name, self._data = "fuzzed", data

    def size(self) -> int:
        return len(self._data)

    def read(self, at: int, into: memoryview) -> None:
        into[:] = self._data[at : at + len(into)]


def fuzz_manifest(data: st.DataObject) -> None:
    given_bytes = framed(MANIFEST_MAGIC, pack(changed(data, manifest_tree())))
    with little_memory():
        found = decode_manifest(given_bytes, "fuzzed")
        assert repr(decode_manifest(encode_manifest(found), "fuzzed")) == repr(found)


def fuzz_part(data: st.DataObject) -> None:
    manifest = decode_manifest(framed(MANIFEST_MAGIC, pack(manifest_tree())), "fuzzed")
    given_bytes = framed(PART_MAGIC, pack(changed(data, part_tree())))
    with little_memory():
        part = decode_part(given_bytes, "fuzzed")
        assert decode_part(encode_part(part), "fuzzed") == part
        with suppress(Corrupt):  # it is of another world
            check_part(part, manifest, 0, "fuzzed")
    spans = sorted((chunk.at, chunk.at + chunk.stored_bytes) for chunk in part.chunks)
    assert all(0 <= start < stop <= part.data_bytes for start, stop in spans)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))


RECORDS = [
    {"kind": "start", "generation": 1, "nonce": "a", "run_id": None, "reason": "r", "base": None, "host": "h", "pid": 1}
    | {"boot_id": "b", "unix_s": 0.0, "addresses": ["x"], "members": [1]},
    {"kind": "commit", "generation": 1, "nonce": "a", "step": 1, "attempt": "000000001.a", "parent": None}
    | {"manifest_digest": "00" * 16, "manifest_bytes": 1, "content_digest": "00" * 16, "metrics": {"m": 1.0}}
    | {"world": 1, "unix_s": 0.0, "nbytes": 1},
    {"kind": "pin", "nonce": "a", "attempt": "000000001.a", "name": "x"},
    {"kind": "retire", "generation": 1, "nonce": "a", "attempts": ["000000001.a"]},
    {"kind": "request", "nonce": "a", "verb": "delete", "arguments": {"attempt": "000000001.a"}},
]


def fuzz_record(data: st.DataObject) -> None:
    tree = changed(data, data.draw(st.sampled_from(RECORDS)), JSON)
    body = json.dumps(tree).encode()[:-1]
    if data.draw(st.booleans()):
        body += b',"step":9,"step":' + str(data.draw(st.sampled_from(NUMBERS))).encode()
    with little_memory():
        found = decode_record(body + seal(body))
        if not isinstance(found, Unknown):
            assert repr(decode_record(encode_record(found))) == repr(found)


HEADER = {f"t{i}": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24 * i, 24 * i + 24]} for i in range(3)}


def fuzz_header(data: st.DataObject) -> None:
    text = json.dumps(changed(data, HEADER, JSON)).encode()
    if data.draw(st.booleans()):
        text = text[:-1] + b',"t0":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"t0":{}}'
    said = data.draw(st.sampled_from([len(text), len(text), len(text), 2**63, 2**64 - 1, 0, len(text) + 1, 90_000_000]))
    file = InMemory(said.to_bytes(8, "little") + text + bytes(72))
    claimed = data.draw(st.sampled_from([file.size(), 2**62]))
    with little_memory():
        table, base = _read_header(file, claimed - 8)  # type: ignore[arg-type]
    part = decode_part(framed(PART_MAGIC, pack(part_tree())), "fuzzed")
    assert list(_table_faults(table, base, part)), "a header of other tensors passes as the part's"


TARGETS = (fuzz_manifest, fuzz_part, fuzz_record, fuzz_header)


def property_of(target: Callable[[st.DataObject], None], examples: int, outcomes: dict[str, int]) -> Callable[[], None]:
    """What must hold of every input; counts in `outcomes` those that were refused, and those that were valid."""

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        try:
            target(data)
        except CkptError as error:
            if isinstance(error.__cause__, MemoryError) or len(str(error)) > 10_000:
                raise AssertionError(f"not how to refuse: {str(error)[:200]}") from error
            outcomes["refused"] += 1
        else:
            outcomes["valid"] += 1

    return run


def main(examples: int) -> None:
    for target in TARGETS:
        outcomes = {"refused": 0, "valid": 0}
        property_of(target, examples, outcomes)()
        print(target.__name__, json.dumps(outcomes), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
