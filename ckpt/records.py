"""The records of a run's log, the names they use, and their bytes.

Pure. A record is one line of JSON that ends in its own digest; a hostile or torn one is `Corrupt`, never half
believed. What records add up to is decided in `ckpt.log`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgspec
import xxhash

from ckpt.errors import Corrupt

RECORD_LIMIT_BYTES: Final = 64 * 1024
NAME_LIMIT: Final = 128
STEP_END: Final = 2**63
MAINTENANCE: Final = frozenset({"gc", "cp", "import"})  # reasons of starts that go on with no training

_NAME = re.compile(r"[a-z0-9_-][a-z0-9._-]*")
_ATTEMPT_NAME = re.compile(r"([0-9]{9,19})\.([a-z0-9_-][a-z0-9._-]*)")
_SLOT_NAME = re.compile(r"([0-9]{10})\.json")
_HEX_DIGITS = re.compile(r"(?:[0-9a-f]{2}){1,64}")
_SIGNED = re.compile(rb'(.*),"signature":"([0-9a-f]{64})","digest":"[0-9a-f]{32}"}\n', re.DOTALL)
_NON_FINITE = ("inf", "-inf", "nan")


class Start(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="start"):
    """A (re)start of the run: it takes the next generation and goes on from the attempt `base`, None for nothing."""

    generation: int
    nonce: str
    run_id: str | None
    reason: str
    base: str | None
    host: str
    pid: int
    boot_id: str
    unix_s: float  # informs people; nothing is decided by it
    addresses: tuple[str, ...] = ()
    members: tuple[Any, ...] = ()  # plain JSON values; `elastic` gives them their meaning


class Commit(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="commit"):
    """Step `step` exists: its bytes are those of `attempt`. `parent` is the attempt of the head it was built on.

    `sources`: the earlier attempts in whose data files some of its tensors lie.
    """

    generation: int
    nonce: str
    step: int
    attempt: str
    parent: str | None
    manifest_digest: str
    manifest_bytes: int
    content_digest: str
    metrics: dict[str, float]
    world: int
    unix_s: float
    nbytes: int
    sources: tuple[str, ...] = ()


class Pin(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="pin"):
    """Retention never takes `attempt` while `name` points to it. The same name pinned again moves.

    It names no generation: anyone may pin, and fences nobody.
    """

    nonce: str
    attempt: str
    name: str


class Unpin(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="unpin"):
    """`name` points nowhere from now on."""

    nonce: str
    name: str


class Retire(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="retire"):
    """The bytes of these attempts may be gone from now on. Appended before anything is deleted."""

    generation: int
    nonce: str
    attempts: tuple[str, ...]


class Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="request"):
    """What is asked of the holder. It names no generation: anyone may ask. The only verb is `delete` {attempt}."""

    nonce: str
    verb: str
    arguments: dict[str, str]


@dataclass(frozen=True)
class Unknown:
    """A record of a kind that a later minor version added: it takes its slot and has no effect here."""

    kind: str
    nonce: str


Record: TypeAlias = Start | Commit | Pin | Unpin | Retire | Request
Entry: TypeAlias = Record | Unknown | None  # what a slot can hold; None is a void slot
_KINDS: dict[str, type[Record]] = {
    "start": Start, "commit": Commit, "pin": Pin, "unpin": Unpin, "retire": Retire, "request": Request
}  # fmt: skip


def is_name(text: object) -> bool:
    """Whether `text` may name something in a run: `[a-z0-9._-]`, no leading dot, at most 128 characters."""
    return isinstance(text, str) and len(text) <= NAME_LIMIT and _NAME.fullmatch(text) is not None


def slot_name(slot: int) -> str:
    """File name of a slot: `slot_name(42) == "0000000042.json"`. Raises ValueError outside [0, 10**10)."""
    if 0 <= slot < 10**10:
        return f"{slot:010d}.json"
    raise ValueError(f"slot {slot} is outside [0, 10**10)")


def parse_slot(name: str) -> int | None:
    """The slot that `name` names, or None if it is no slot's name."""
    match = _SLOT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def attempt_name(step: int, nonce: str) -> str:
    """Directory name of one attempt to save `step`. Raises ValueError if it would break the grammar."""
    if parse_attempt(name := f"{step:09d}.{nonce}") == (step, nonce):
        return name
    raise ValueError(f"no attempt can be named {name!r}: step in [0, 2**63), nonce of [a-z0-9._-]")


def parse_attempt(name: str) -> tuple[int, str] | None:
    """(step, nonce) of an attempt's name, or None if it is none; exactly what `attempt_name` makes is accepted."""
    match = _ATTEMPT_NAME.fullmatch(name)
    if match is None or len(name) > NAME_LIMIT:
        return None
    step, nonce = int(match[1]), match[2]
    return (step, nonce) if step < STEP_END and f"{step:09d}" == match[1] else None


# One field name means one thing in every kind of record, so the rules are by field name.
_Rule: TypeAlias = tuple[Callable[[Any], bool], str]
_ANY_NAME: _Rule = (is_name, "a name of [a-z0-9._-]")
_COUNT: _Rule = (range(STEP_END).__contains__, "an integer in [0, 2**63)")
_POSITIVE: _Rule = (range(1, STEP_END).__contains__, "an integer in [1, 2**63)")
_HEX: _Rule = (lambda value: _HEX_DIGITS.fullmatch(value) is not None, "a digest in hex")
_ATTEMPT: _Rule = (lambda value: parse_attempt(value) is not None, "an attempt's name, <step>.<nonce>")
_BASE: _Rule = (lambda value: value is None or _ATTEMPT[0](value), "an attempt's name or null")
_ATTEMPTS: _Rule = (lambda value: all(map(_ATTEMPT[0], value)), "a list of attempts' names")
_FINITE: _Rule = (math.isfinite, "a finite number")
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("nonce", "name", "verb"), _ANY_NAME),
    **dict.fromkeys(("step", "pid", "manifest_bytes", "nbytes"), _COUNT),
    **dict.fromkeys(("generation", "world"), _POSITIVE),
    **dict.fromkeys(("manifest_digest", "content_digest"), _HEX),
    **dict.fromkeys(("parent", "base"), _BASE),
    "attempt": _ATTEMPT,
    **dict.fromkeys(("attempts", "sources"), _ATTEMPTS),
    "unix_s": _FINITE,
}


def _problem(record: Record) -> str | None:
    for name in record.__struct_fields__:
        rule, expected = _RULES.get(name, (None, ""))
        value = getattr(record, name)
        if rule is not None and not rule(value):
            return f"{name} must be {expected}, got {value!r:.200}"
    if isinstance(record, Commit) and not record.attempt.startswith(f"{record.step:09d}."):
        return f"attempt {record.attempt!r} is not one of step {record.step}"
    return None


def encode_record(record: Record, sign: Callable[[bytes], bytes | None] = lambda body: None) -> bytes:
    """One line of JSON; its last field is the digest of what stands before it, the one before it may be a signature.

    Raises ValueError if the record breaks a rule or exceeds 64 KiB.

    JSON has no inf and nan: a non-finite metric is written as the string "inf", "-inf" or "nan".
    """
    if problem := _problem(record):
        raise ValueError(f"cannot write this {type(record).__name__.lower()} record: {problem}")
    fields = msgspec.to_builtins(record)
    if isinstance(record, Commit):
        metrics = ((name, float(value)) for name, value in record.metrics.items())
        fields["metrics"] = {name: value if math.isfinite(value) else str(value) for name, value in metrics}
    body = msgspec.json.encode(fields)[:-1]
    if signature := sign(body):
        body += b',"signature":"' + signature.hex().encode() + b'"'
    data = body + seal(body)
    if len(data) <= RECORD_LIMIT_BYTES:
        decode_record(data)  # what no reader could read must never stand in the log
        return data
    raise ValueError(f"cannot write this record: {len(data)} bytes, the limit is {RECORD_LIMIT_BYTES}")


def decode_record(data: bytes) -> Record | Unknown:
    """The record in `data`; `Unknown` if a later minor version added its kind. Unknown fields are skipped.

    Raises Corrupt if anything is wrong with it. The size is checked before the first byte is parsed.
    """
    if len(data) > RECORD_LIMIT_BYTES:
        raise Corrupt(f"log record of {len(data)} bytes; the limit is {RECORD_LIMIT_BYTES}")
    if is_incomplete(data):
        raise Corrupt(f"log record of {len(data)} bytes is cut off: it does not end in a newline")
    body = data[: -len(seal(b""))]
    if data[len(body) :] != seal(body):
        raise Corrupt("log record does not match its own digest")
    try:
        fields = msgspec.json.decode(data)
        json.loads(data, object_pairs_hook=_distinct)  # it knows of twice, the other one of all else
        record = _from_fields(fields)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise Corrupt(f"log record cannot be read: {error}") from error
    if not isinstance(record, Unknown) and (problem := _problem(record)):
        raise Corrupt(f"log record of kind {type(record).__name__.lower()!r}: {problem}")
    return record


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field stands twice in it")
    return found


def seal(body: bytes) -> bytes:
    """The end of a record: without it a flipped bit in `parent` would take an acknowledged step out of the lineage."""
    return b',"digest":"' + xxhash.xxh3_128_hexdigest(body).encode() + b'"}\n'


def signature_of(data: bytes) -> tuple[bytes, bytes]:
    """The bytes of a record that were signed, and the signature; b"" for both if there is none."""
    match = _SIGNED.fullmatch(data)
    return (match[1], bytes.fromhex(match[2].decode())) if match else (b"", b"")


def is_incomplete(data: bytes) -> bool:
    """Whether the writer of `data` stopped half-way: every whole record ends in a newline."""
    return not data.endswith(b"\n")


def _from_fields(fields: Any) -> Record | Unknown:
    kind, nonce = (fields.get("kind"), fields.get("nonce")) if isinstance(fields, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(nonce, str) or not is_name(nonce):
        raise Corrupt(f"log record without a valid kind and nonce: kind {kind!r:.100}, nonce {nonce!r:.100}")
    if kind not in _KINDS:
        return Unknown(kind, nonce)
    if kind == "commit" and isinstance(fields.get("metrics"), dict):
        fields["metrics"] = {name: _unpack_float(value) for name, value in fields["metrics"].items()}
    return msgspec.convert(fields, _KINDS[kind])


def _unpack_float(value: object) -> float:
    if isinstance(value, str) and value in _NON_FINITE:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Corrupt(f"a metric must be a number, 'inf', '-inf' or 'nan', got {value!r:.100}")
    return float(value)
