"""The run's log: its records, their encoding, what they add up to, and what may be appended next.

Pure: no file, clock, thread or random number here. `ckpt.run.RunLog` reads and appends.

    bytes of slot n  -- decode_record -->  Record         a hostile or torn record is Corrupt, never half believed
    records in order -- replay -------->   View           generation, holder, head, lineage
    View             -- decide_* ------>   Record         or Fenced, Incompatible, NotFound: nothing is appended then

The rules, all of them:

- Slots are numbered from 0 without a gap. A slot holds one record, or is void (a crash on a store without hard links).
- A `start` counts if its generation is the current one + 1 and its base is None or a commit that counted.
- A `commit` counts if it is of the current generation, its parent is the head and its step is above the head's.
- `pin` and `retire` count if they are of the current generation; a `request` always does.
- Whatever does not count is kept in `View.ignored`, with the reason: also kinds that a later minor version adds.
- Head: the newest generation's last commit, else the commit its start is based on. Lineage: the head's parents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import msgspec
import xxhash

from ckpt.errors import Corrupt, Fenced, Incompatible, NotFound

RECORD_LIMIT_BYTES: Final = 64 * 1024
NAME_LIMIT: Final = 128
STEP_END: Final = 2**63
HEAD: Final = "head"  # `decide_start(base=HEAD)`: go on from where the log ends; no attempt can have this name

_NAME = re.compile(r"[a-z0-9_-][a-z0-9._-]*")
_ATTEMPT_NAME = re.compile(r"([0-9]{9,19})\.([a-z0-9_-][a-z0-9._-]*)")
_SLOT_NAME = re.compile(r"([0-9]{10})\.json")
_HEX_DIGITS = re.compile(r"(?:[0-9a-f]{2}){1,64}")
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
    """Step `step` exists: its bytes are those of `attempt`. `parent` is the attempt of the head it was built on."""

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


class Pin(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="pin"):
    """Retention never takes `attempt` while `name` points to it. The same name pinned again moves."""

    generation: int
    nonce: str
    attempt: str
    name: str


class Retire(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="retire"):
    """The bytes of these attempts may be gone from now on. Appended before anything is deleted."""

    generation: int
    nonce: str
    attempts: tuple[str, ...]


class Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="request"):
    """What a command asks of the live holder. It names no generation: anyone may ask."""

    nonce: str
    verb: str
    arguments: dict[str, str]


@dataclass(frozen=True)
class Unknown:
    """A record of a kind that a later minor version added: it takes its slot and has no effect here."""

    kind: str
    nonce: str


Record: TypeAlias = Start | Commit | Pin | Retire | Request
Entry: TypeAlias = Record | Unknown | None  # what a slot can hold; None is a void slot
_KINDS: dict[str, type[Record]] = {"start": Start, "commit": Commit, "pin": Pin, "retire": Retire, "request": Request}


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
    "attempts": _ATTEMPTS,
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


def encode_record(record: Record) -> bytes:
    """One line of JSON; its last field is the digest of what stands before it. Raises ValueError if the record breaks a rule or exceeds 64 KiB.

    JSON has no inf and nan: a non-finite metric is written as the string "inf", "-inf" or "nan".
    """
    if problem := _problem(record):
        raise ValueError(f"cannot write this {type(record).__name__.lower()} record: {problem}")
    fields = msgspec.to_builtins(record)
    if isinstance(record, Commit):
        metrics = ((name, float(value)) for name, value in record.metrics.items())
        fields["metrics"] = {name: value if math.isfinite(value) else str(value) for name, value in metrics}
    body = msgspec.json.encode(fields)[:-1]
    data = body + seal(body)
    if len(data) <= RECORD_LIMIT_BYTES:
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
        record = _from_fields(msgspec.json.decode(data))
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise Corrupt(f"log record cannot be read: {error}") from error
    if not isinstance(record, Unknown) and (problem := _problem(record)):
        raise Corrupt(f"log record of kind {type(record).__name__.lower()!r}: {problem}")
    return record
    return record


def seal(body: bytes) -> bytes:
    """The end of a record: without it a flipped bit in `parent` would take an acknowledged step out of the lineage."""
    return b',"digest":"' + xxhash.xxh3_128_hexdigest(body).encode() + b'"}\n'


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


@dataclass(frozen=True)
class Ignored:
    """A slot without effect, and why."""

    slot: int
    entry: Entry
    reason: str


@dataclass(frozen=True)
class View:
    """What the first `next_slot` slots of the log say. Immutable; `after` and `extend` return a new one."""

    next_slot: int = 0
    generation: int = 0  # 0: nobody has started yet
    holder: Start | None = None  # the last start that counted
    head: Commit | None = None
    commits: Mapping[str, Commit] = field(default_factory=dict)  # every commit that counted, by attempt, in slot order
    starts: tuple[Start, ...] = ()  # every start that counted, in slot order
    pins: Mapping[str, Pin] = field(default_factory=dict)  # by pin name
    retired: frozenset[str] = frozenset()
    requests: tuple[tuple[int, Request], ...] = ()  # (slot, request)
    ignored: tuple[Ignored, ...] = ()

    def after(self, entry: Entry) -> View:
        """The view once `entry` stands in slot `next_slot`."""
        return self.extend((entry,))

    def extend(self, entries: Iterable[Entry]) -> View:
        """The view once `entries` stand in the slots from `next_slot` on."""
        return _Fold(self).apply(entries).view()

    def lineage(self) -> tuple[Commit, ...]:
        """The head and its parents, oldest first. Retired ones are among them: ask `retired`."""
        return self.lineage_of(self.head.attempt) if self.head else ()

    def lineage_of(self, attempt: str) -> tuple[Commit, ...]:
        """The commit of `attempt` and its parents, oldest first; raises KeyError if it never counted."""
        chain: list[Commit] = []
        following: str | None = attempt
        while following is not None:
            chain.append(self.commits[following])
            following = chain[-1].parent
        return tuple(reversed(chain))

    def outside(self) -> tuple[Commit, ...]:
        """The commits that counted and are not in the lineage (left behind by going back), in slot order."""
        inside = {commit.attempt for commit in self.lineage()}
        return tuple(commit for attempt, commit in self.commits.items() if attempt not in inside)


def replay(entries: Iterable[Entry]) -> View:
    """The view of a whole log; `entries` are the contents of slots 0, 1, 2, ..., None for a void slot."""
    return View().extend(entries)


class _Fold:
    """A View being extended: copied once, not once per record."""

    def __init__(self, view: View) -> None:
        self.next_slot, self.generation = view.next_slot, view.generation
        self.holder, self.head = view.holder, view.head
        self.commits, self.pins, self.retired = dict(view.commits), dict(view.pins), set(view.retired)
        self.starts, self.requests, self.ignored = list(view.starts), list(view.requests), list(view.ignored)

    def view(self) -> View:
        return View(
            self.next_slot, self.generation, self.holder, self.head, MappingProxyType(self.commits), tuple(self.starts),
            MappingProxyType(self.pins), frozenset(self.retired), tuple(self.requests), tuple(self.ignored)
        )  # fmt: skip

    def apply(self, entries: Iterable[Entry]) -> _Fold:
        for entry in entries:
            if reason := self._why_not(entry):
                self.ignored.append(Ignored(self.next_slot, entry, reason))
            else:
                self._count(entry)
            self.next_slot += 1
        return self

    def _why_not(self, entry: Entry) -> str | None:
        if entry is None:
            return "void: its writer stopped half-way"
        if isinstance(entry, Unknown):
            return f"of a kind this version does not know: {entry.kind:.100}"
        if isinstance(entry, Request):
            return None
        if isinstance(entry, Start):
            return self._why_not_start(entry)
        if entry.generation != self.generation:
            return f"of generation {entry.generation} while {self.generation} was current"
        return self._why_not_commit(entry) if isinstance(entry, Commit) else None

    def _why_not_start(self, start: Start) -> str | None:
        if start.generation != self.generation + 1:
            return f"starts generation {start.generation} after {self.generation}"
        if start.base is not None and start.base not in self.commits:
            return f"based on {start.base}, which was never committed"
        return None

    def _why_not_commit(self, commit: Commit) -> str | None:
        head = self.head.attempt if self.head else None
        if commit.parent != head:
            return f"its parent is {commit.parent} while {head} was the head"
        if self.head is not None and commit.step <= self.head.step:
            return f"step {commit.step} is not above the head's, {self.head.step}"
        if commit.attempt in self.commits:
            return f"{commit.attempt} was committed before"
        return None

    def _count(self, record: Entry) -> None:
        if isinstance(record, Start):
            self.generation, self.holder = record.generation, record
            self.head = self.commits[record.base] if record.base is not None else None
            self.starts.append(record)
        elif isinstance(record, Commit):
            self.head = record
            self.commits[record.attempt] = record
        elif isinstance(record, Pin):
            self.pins[record.name] = record
        elif isinstance(record, Retire):
            self.retired.update(record.attempts)
        elif isinstance(record, Request):
            self.requests.append((self.next_slot, record))


def decide_start(
    view: View,
    *,
    nonce: str,
    run_id: str | None,
    reason: str,
    base: str | None = HEAD,
    takeover: bool = False,
    holder_gone: bool = False,
    expected_generation: int | None = None,
    host: str = "",
    pid: int = 0,
    boot_id: str = "",
    unix_s: float = 0.0,
    addresses: Iterable[str] = (),
    members: Iterable[Any] = (),
) -> Start:
    """The start that takes the next generation, going on from the head, from an older attempt, or (None) from nothing.

    `expected_generation`: the generation the caller knows as current; pass it to go back to an older step as the
    holder, or so that the loser of a race between two starts gives up instead of fencing the winner.

    Raises Fenced if a newer generation than expected has started, or if a holder with another explicit run id is not
    known to be gone and `takeover` is False (a run id of None never conflicts); NotFound if `base` is not a commit of
    this run or its bytes were retired.
    """
    if expected_generation is not None:
        _check_fence(view, expected_generation, None)
    _check_holder(view, run_id, takeover or holder_gone)
    if base == HEAD:
        base = view.head.attempt if view.head else None
    elif base is not None:
        _check_base(view, base)
    return Start(
        generation=view.generation + 1, nonce=nonce, run_id=run_id, reason=reason, base=base, host=host, pid=pid,
        boot_id=boot_id, unix_s=unix_s, addresses=tuple(addresses), members=tuple(members)
    )  # fmt: skip


def decide_commit(
    view: View,
    *,
    generation: int,
    holder_nonce: str,
    nonce: str,
    step: int,
    attempt: str,
    manifest_digest: str,
    manifest_bytes: int,
    content_digest: str,
    metrics: Mapping[str, float],
    world: int,
    unix_s: float,
    nbytes: int,
) -> Commit:
    """The commit of `attempt` on top of the head, for the holder of `generation` (whose start has `holder_nonce`).

    Raises Fenced if that holder is no longer the current one; Incompatible if `step` is not above the head's, or if
    the attempt was committed before.
    """
    _check_fence(view, generation, holder_nonce)
    head = view.head
    if head is not None and step <= head.step:
        raise Incompatible(
            f"step {step} has already been passed: the head of this run is step {head.step}. Steps only grow within a "
            f"lineage; to train step {step} again, first go back with restore(state, step=N) for some N below {step}"
        )
    if attempt in view.commits:
        raise Incompatible(f"attempt {attempt} was committed before; restore(state, step=...) can go back to it")
    return Commit(
        generation=generation, nonce=nonce, step=step, attempt=attempt, parent=head.attempt if head else None,
        manifest_digest=manifest_digest, manifest_bytes=manifest_bytes, content_digest=content_digest,
        metrics=dict(metrics), world=world, unix_s=unix_s, nbytes=nbytes
    )  # fmt: skip


def decide_pin(view: View, *, generation: int, holder_nonce: str, nonce: str, attempt: str, name: str) -> Pin:
    """The pin of a committed attempt under `name`. Raises Fenced; NotFound if it is no commit or was retired."""
    _check_fence(view, generation, holder_nonce)
    _check_base(view, attempt)
    return Pin(generation=generation, nonce=nonce, attempt=attempt, name=name)


def decide_retire(view: View, *, generation: int, holder_nonce: str, nonce: str, attempts: Iterable[str]) -> Retire:
    """The record that must stand before the bytes of `attempts` are deleted.

    Raises Fenced; Incompatible if the head or a pinned attempt is among them.
    """
    _check_fence(view, generation, holder_nonce)
    leaving = tuple(sorted(set(attempts)))
    kept = {pin.attempt: f"pinned as {pin.name!r}" for pin in view.pins.values()}
    if view.head is not None:
        kept[view.head.attempt] = "the newest step of this run"
    for attempt in leaving:
        if attempt in kept:
            raise Incompatible(f"{attempt} cannot be deleted: it is {kept[attempt]}. Nothing was deleted")
    return Retire(generation=generation, nonce=nonce, attempts=leaving)


def _check_holder(view: View, run_id: str | None, may_take: bool) -> None:
    holder = view.holder
    if holder is None or may_take or run_id is None or holder.run_id is None or holder.run_id == run_id:
        return
    raise Fenced(
        f"this run is held by run id {holder.run_id!r} (generation {holder.generation}, {_who(holder)}), yours is "
        f"{run_id!r}. Nothing was changed. Stop that job first, or take the run from it with takeover=True"
    )


def _check_base(view: View, attempt: str) -> None:
    if attempt not in view.commits:
        raise NotFound(f"{attempt} is not a commit of this run; `ckpt ls` lists what there is")
    if attempt in view.retired:
        raise NotFound(f"{attempt} was deleted by retention; `ckpt ls` lists what there is")


def _check_fence(view: View, generation: int, holder_nonce: str | None) -> None:
    """Whether `generation` is current and, where a nonce is given, its start is the one with that nonce."""
    holder = view.holder
    if view.generation == generation and (holder_nonce is None or (holder and holder.nonce == holder_nonce)):
        return
    started = f", started by {_who(holder)}: {holder.reason}" if holder else ""
    raise Fenced(
        f"this process works for generation {generation}, but the current one is {view.generation}{started}. Nothing "
        "was appended and every committed step is as it was; stop this process, the newer one has the run"
    )


def _who(start: Start) -> str:
    return f"pid {start.pid} on host {start.host!r}"
