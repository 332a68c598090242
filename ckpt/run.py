"""A run's directory: which format it has, where things lie in it, and its log as something to read and append to.

What a record means and what may be appended is decided in `ckpt.log`; here slots are read, created and, when the
answer was lost, read back.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

import msgspec

from ckpt.errors import CkptError, Corrupt, Fenced, Incompatible, NotFound, StorageError
from ckpt.log import View
from ckpt.manifest import Digest, digest, strong_digest
from ckpt.records import (
    RECORD_LIMIT_BYTES,
    Commit,
    Entry,
    Pin,
    Record,
    Request,
    Retire,
    Start,
    Unpin,
    decode_record,
    encode_record,
    is_incomplete,
    is_name,
    parse_attempt,
    parse_slot,
    slot_name,
)
from ckpt.signing import Chain, signing_key
from ckpt.store import REQUESTS, AlreadyExists, OutcomeUnknown, Store, by_requests
from ckpt.stores import open_store

FORMAT_NAME: Final = "holdfast"
FORMAT_MAJOR: Final = 1
FORMAT_MINOR: Final = 0
FORMAT_PATH: Final = "FORMAT.json"
FORMAT_LIMIT_BYTES: Final = 4096
LOG: Final = "log"
STEPS: Final = "steps"

_TRIES_LIMIT = 100  # lost slots in a row; each means that somebody else appended
_UNKNOWN_LIMIT = 12  # creates of unknown outcome, 40 s of waiting in all; what stands there is read after each
_UNKNOWN_WAIT_S = 8.0
_LOOK_S = 0.05
_STALE_LOOKS, _STALE_LOOK_S = 60, 0.5
_WINDOW = 256  # slots that are read at once: a gap behind them ends it

RecordT = TypeVar("RecordT", Start, Commit, Pin, Unpin, Retire, Request)


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """The content of FORMAT.json. `nonce` tells a run's directory from another one at the same place."""

    name: str
    major: int
    minor: int
    nonce: str


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory that exists and that this version can read."""

    store: Store
    format: Format
    log: RunLog

    @classmethod
    def open(cls, url: str | os.PathLike[str], create: bool = False) -> RunDirectory:
        """The run at `url`; with `create`, a new one where there is none (any number of processes may race).

        Raises NotFound if there is none, Incompatible if it is another program's or of another major version, Corrupt
        if FORMAT.json is damaged or lost, StorageError if the store fails.
        """
        return cls.at(open_store(url), create=create)

    @classmethod
    def at(cls, store: Store, create: bool = False) -> RunDirectory:
        """`open` for a store that is already there."""
        found = _read_format(store)  # before anything is made in a directory that is not ours
        if create:
            store.make_directory(LOG)
            store.make_directory(STEPS)
        found = found or _missing_format(store, create)
        return cls(store, found, RunLog(store, chain=Chain(signing_key(), found.nonce)))

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def digest(self) -> Digest:
        """What vouches for the files of this run: where records are signed, a digest that nobody can match."""
        return strong_digest if self.log.signs else digest

    def check_unchanged(self) -> None:
        """Raise Fenced if another run stands in this place by now: its log is not the one that we read."""
        found = _read_format(self.store)
        if found is None or found.nonce != self.nonce:
            raise Fenced(
                f"{self.url} was {'replaced by another run' if found else 'removed'} since this process opened it. "
                "Nothing was written there; stop this job, or start it again to begin with what is there now"
            )

    @property
    def nonce(self) -> str:
        return self.format.nonce

    def attempt_path(self, attempt: str, *names: str) -> str:
        """Store path of an attempt's directory, or of a file in it. Raises ValueError if it is no attempt's name."""
        if parse_attempt(attempt) is None:
            raise ValueError(f"{attempt!r} is not an attempt's name, <step>.<nonce>")
        return "/".join((STEPS, attempt, *names))

    def attempts(self) -> list[str]:
        """Names of all attempts that have a directory, committed or not, by step."""
        try:
            names = self.store.list(STEPS)
        except NotFound:
            return []
        parsed = ((parse_attempt(name), name) for name in names)
        return [name for key, name in sorted((key, name) for key, name in parsed if key is not None)]


class RunLog:
    """The log of the run in `store`. One user at a time: a thread that needs it too opens its own.

    On a store whose creates are not atomic, a slot that stays incomplete for `settle_s` is void. Where `chain` has a
    key, records are signed, and others refused.
    """

    def __init__(
        self,
        store: Store,
        *,
        chain: Chain = Chain(),  # noqa: B008
        settle_s: float = 2.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store, self._chain = store, chain
        self._settle_s = settle_s
        self._sleep = sleep
        self._view = View()

    @property
    def view(self) -> View:
        """What was read last; touches no storage."""
        return self._view

    @property
    def signs(self) -> bool:
        """Whether what this log appends is signed, and what it reads verified."""
        return self._chain.key is not None

    def read(self) -> View:
        """Read what was appended since, to the end of the log. Raises Corrupt for a gap or a damaged record."""
        self._read_new()
        return self._view

    def append(self, decide: Callable[[View], RecordT]) -> RecordT:
        """Append what `decide` makes of the log's end; the record is durable when this returns.

        `decide` is called again whenever somebody else took the slot, so it must be free of effects and keep to one
        nonce. What it raises passes through: then nothing was appended. Raises ValueError for a record that would be
        invalid or without effect, OutcomeUnknown if the store cannot tell, StorageError if it failed or if the slot
        was lost 100 times.
        """
        tried: set[str] = set()
        unknown: list[OutcomeUnknown] = []
        for _ in range(_TRIES_LIMIT):
            standing = self._read_back(tried)
            if standing is not None:
                return cast(RecordT, standing)
            if len(unknown) == _UNKNOWN_LIMIT:
                url, tries, last = self._store.url, len(unknown), unknown[-1]
                raise OutcomeUnknown(
                    f"append to the log of {url}: gave up after {tries} tries, the last one failed with: {last}. "
                    f"The record does not stand there, and may yet: `ckpt ls {url}` shows it once the store works"
                ) from last
            if unknown:
                self._sleep(min(_LOOK_S * 2 ** len(unknown), _UNKNOWN_WAIT_S))
            record = decide(self._view)
            following = _view_with(self._view, record)
            slot = self._view.next_slot
            data = encode_record(record, self._chain.sign)
            tried.add(record.nonce)
            try:
                self._store.create(_slot_path(slot), data)
            except AlreadyExists:
                continue
            except OutcomeUnknown as error:
                unknown.append(error)
                continue
            self._view, self._chain = following, self._chain.after(data)
            return record
        raise StorageError(f"append to the log of {self._store.url}: lost the next slot {_TRIES_LIMIT} times in a row")

    def _read_back(self, tried: set[str]) -> Entry:
        """Read to the end; the record with one of the nonces `tried`, made durable, if it stands there after all."""
        try:
            entries = self._read_new()
            mine = [entry for entry in entries if entry is not None and entry.nonce in tried]
            if mine:
                self._store.sync_directory(LOG)
        except CkptError as error:
            if not tried:
                raise
            raise OutcomeUnknown(
                f"append to the log of {self._store.url}: the record may or may not stand there; reading it "
                f"back failed: {error}. `ckpt ls {self._store.url}` shows it once the store works"
            ) from error
        if tried and not entries:
            self._sleep(_LOOK_S)  # the slot is taken, or may be, and this machine does not see it yet
        return mine[0] if mine else None

    def _read_new(self) -> list[Entry]:
        slots = range(self._view.next_slot, self._end() or self._end_though_empty())
        entries, chain = list[Entry](), self._chain
        with ExitStack() as stack:
            read: Callable[..., Iterable[bytes | None]] = map
            if len(slots) > 1 and by_requests(self._store):
                read = stack.enter_context(ThreadPoolExecutor(REQUESTS)).map
            for first in range(0, len(slots), _WINDOW):
                window = slots[first : first + _WINDOW]
                for slot, data in zip(window, read(self._slot, window), strict=True):
                    entry, chain = self._entry(slot, data, chain)
                    entries.append(entry)
        self._view, self._chain = self._view.extend(entries), chain
        return entries

    def _end(self) -> int:
        """One past the last slot. Raises Corrupt if slots that were read before are gone."""
        try:
            names = self._store.list(LOG)
        except NotFound:
            names = []
        end = max((slot + 1 for slot in map(parse_slot, names) if slot is not None), default=0)
        known = self._view.next_slot
        if end < known and not self._store.exists(_slot_path(known - 1)):
            raise Corrupt(f"the log of {self._store.url} had {known} records and now has {end}: was the run deleted?")
        return end

    def _end_though_empty(self) -> int:
        """The end of a log in which no record is seen. Raises Corrupt if there are steps: a record stands before them.

        NFS may show an old listing for half a minute, and so a part of a run that has just begun.
        """
        try:
            attempts = sum(parse_attempt(name) is not None for name in self._store.list(STEPS))
        except NotFound:
            attempts = 0
        looks = 1 if by_requests(self._store) else _STALE_LOOKS
        while attempts:
            if end := self._end():
                return end
            if not looks:
                raise Corrupt(
                    f"{self._store.url}: all records of its log are missing, although there are {attempts} attempts in "
                    f"{STEPS}/. Copy the whole directory again, or move {STEPS}/ away to begin anew"
                )
            looks -= 1
            self._sleep(_STALE_LOOK_S)
        return 0

    def _slot(self, slot: int) -> bytes | None:
        path = _slot_path(slot)
        try:
            return self._settled(path)
        except NotFound as error:
            raise Corrupt(
                f"{self._store.url}: {path} is missing although later records exist. Copy the whole directory again"
            ) from error
        except Corrupt as error:
            raise Corrupt(f"{self._store.url}: {path}: {error}") from error

    def _entry(self, slot: int, data: bytes | None, chain: Chain) -> tuple[Entry, Chain]:
        if data is None:
            return None, chain
        try:
            return decode_record(data), chain.after(data)
        except Corrupt as error:
            raise Corrupt(f"{self._store.url}: {_slot_path(slot)}: {error}") from error

    def _settled(self, path: str) -> bytes | None:
        """The bytes of a slot; None if it is void. On an atomic store nothing is: what is cut off is damaged."""
        data = self._store.read(path, limit_bytes=RECORD_LIMIT_BYTES)
        if not is_incomplete(data) or self._store.capabilities.atomic_create:
            return data
        for _ in range(max(1, round(self._settle_s / _LOOK_S))):
            self._sleep(_LOOK_S)
            data = self._store.read(path, limit_bytes=RECORD_LIMIT_BYTES)
            if not is_incomplete(data):
                return data
        return None


def _slot_path(slot: int) -> str:
    return f"{LOG}/{slot_name(slot)}"


def _view_with(view: View, record: Record) -> View:
    following = view.after(record)
    if len(following.ignored) > len(view.ignored):
        raise ValueError(f"a record without effect was proposed: {following.ignored[-1].reason}")
    return following


def _read_format(store: Store) -> Format | None:
    try:
        data = store.read(FORMAT_PATH, limit_bytes=FORMAT_LIMIT_BYTES)
    except NotFound:
        return None
    try:
        return _decode_format(data)
    except CkptError as error:
        raise type(error)(f"{store.url}/{FORMAT_PATH}: {error}") from error


def _decode_format(data: bytes) -> Format:
    try:
        fields: Any = msgspec.json.decode(data)
        if not isinstance(fields, dict) or fields.get("name") != FORMAT_NAME:
            raise Incompatible("this directory belongs to another program. Choose another one; nothing was changed")
        found = msgspec.convert(fields, Format)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Corrupt(f"cannot be read ({error}). If the run is new and empty, remove this file and retry") from error
    if found.major != FORMAT_MAJOR:
        raise Incompatible(
            f"written in format {found.major}.{found.minor}; this version of holdfast reads {FORMAT_MAJOR}.x. "
            "Nothing was changed; use the version that wrote it, or a newer one"
        )
    if not is_name(found.nonce):
        raise Corrupt(f"its nonce {found.nonce!r:.100} is not a name of [a-z0-9._-]")
    return found


def _missing_format(store: Store, create: bool) -> Format:
    if RunLog(store)._end() > 0:
        raise Corrupt(f"{store.url}: {FORMAT_PATH} is missing although there is a log. Copy the whole directory again")
    if not create:
        raise NotFound(f"no checkpoint at {store.url}: it holds no {FORMAT_PATH}. Is the path right?")
    proposed = Format(name=FORMAT_NAME, major=FORMAT_MAJOR, minor=FORMAT_MINOR, nonce=secrets.token_hex(8))
    for waited_s in (0.2, 1.0, 5.0, None):
        try:
            store.create(FORMAT_PATH, msgspec.json.encode(proposed) + b"\n")
        except AlreadyExists:
            store.sync_directory("")
        except OutcomeUnknown:
            if waited_s is None:
                raise
            time.sleep(waited_s)
        if found := _read_format(store):
            return found
    raise StorageError(f"{store.url}: {FORMAT_PATH} was created and is not there")
