"""What a store can be trusted with, found out by trying: `ckpt doctor`.

Works below a name of its own, which it removes, and never touches a run's files. Each trial says what was expected,
what was seen, and what follows for a run.
"""

from __future__ import annotations

import logging
import mmap
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from ckpt.errors import CkptError, NotFound, StorageError
from ckpt.store import AlreadyExists, OutcomeUnknown, Store

log = logging.getLogger("ckpt")

RACERS: Final = 32
FENCING: Final = frozenset({"create", "race", "whole"})


@dataclass(frozen=True)
class Trial:
    """One thing that was tried, and what was seen; those of FENCING keep two jobs apart, the others keep a run."""

    name: str
    what: str
    ok: bool
    seen: str
    seconds: float


@dataclass(frozen=True)
class Diagnosis:
    """All trials of a store, in their order."""

    url: str
    trials: tuple[Trial, ...]

    @property
    def usable(self) -> bool:
        """Whether a run can be kept here at all."""
        return all(trial.ok for trial in self.trials if trial.name not in FENCING)

    @property
    def fences(self) -> bool:
        """Whether two jobs in one run are kept apart by the store alone."""
        return self.usable and all(trial.ok for trial in self.trials)


def examine(store: Store, racers: int = RACERS) -> Diagnosis:
    """Try what the protocol needs of `store`.

    Raises StorageError where the store cannot be reached at all.
    """
    with scratch_folder(store, "doctor") as folder:
        return Diagnosis(store.url, tuple(_trials(store, folder, racers)))


@contextmanager
def scratch_folder(store: Store, name: str) -> Iterator[str]:
    """A new folder in `store` to try things in, removed at the end. StorageError where it cannot be written to."""
    folder = f"{name}-{secrets.token_hex(8)}"
    try:
        store.put(f"{folder}/reach", b"")
    except CkptError as error:
        raise StorageError(f"{store.url} cannot be written to: {error}") from error
    try:
        yield folder
    finally:
        try:
            store.delete(folder)
        except CkptError as error:
            log.warning("%s/%s could not be removed, please do: %s", store.url, folder, error)


def _trials(store: Store, folder: str, racers: int) -> Iterator[Trial]:
    yield _tried("put", "what was put is read back, as a whole and in ranges", lambda: _put(store, folder))
    yield _tried("list", "what was created is listed at once", lambda: _list(store, folder))
    yield _tried("data", "a file of 40 MiB goes up in parts", lambda: _data(store, folder))
    yield _tried("delete", "what was deleted is gone at once", lambda: _delete(store, folder))
    yield _tried("create", "a second create of one name is refused", lambda: _create(store, folder))
    yield _tried("race", f"of {racers} creates at once one wins", lambda: _race(store, folder, racers))
    yield _tried("whole", "what is created appears whole or not at all", lambda: _whole(store))


def _tried(name: str, what: str, act: Callable[[], str]) -> Trial:
    """`act` returns what went wrong, "" for nothing."""
    began = time.monotonic()
    try:
        seen = act()
    except CkptError as error:
        seen = str(error)
    return Trial(name, what, not seen, seen or "so it was", time.monotonic() - began)


def _put(store: Store, folder: str) -> str:
    first, second = secrets.token_bytes(70_000), secrets.token_bytes(50_000)
    for data in (first, second):
        store.put(f"{folder}/put", data)
        if store.read(f"{folder}/put", limit_bytes=len(first)) != data:
            return "other bytes came back than were put"
    if store.read(f"{folder}/put", 1000, 2000, limit_bytes=2000) != second[1000:3000]:
        return "a range that was read is not what lies there"
    return "" if store.size(f"{folder}/put") == len(second) else "its size is not that of what was put"


def _list(store: Store, folder: str) -> str:
    for number in range(3):
        store.create(f"{folder}/list/{number}", b"")
        if (seen := store.list(f"{folder}/list")) != [str(each) for each in range(number + 1)]:
            return f"after {number + 1} creates the list is {seen}: a log could not be read to its end"
    return ""


def _data(store: Store, folder: str) -> str:
    nbytes = 40 << 20
    memory = mmap.mmap(-1, nbytes)  # page-aligned; it goes with its last view
    memory[:] = secrets.token_bytes(1 << 20) * 40
    view = memoryview(memory)
    writer = store.write_data(f"{folder}/data", nbytes)
    try:
        for at in range(0, nbytes, 4 << 20):
            writer.write(at, view[at : at + (4 << 20)])
    except BaseException:
        writer.abandon()
        raise
    writer.finish()
    same = store.read(f"{folder}/data", limit_bytes=nbytes) == view
    return "" if same else "other bytes came back than were sent"


def _delete(store: Store, folder: str) -> str:
    store.put(f"{folder}/delete/one", b"")
    store.delete(f"{folder}/delete")
    try:
        store.size(f"{folder}/delete/one")
    except NotFound:
        return ""
    return "it is still there"


def _create(store: Store, folder: str) -> str:
    store.create(f"{folder}/create", b"first")
    try:
        store.create(f"{folder}/create", b"second")
    except AlreadyExists:
        pass
    else:
        return "the second create was answered like the first"
    held = store.read(f"{folder}/create", limit_bytes=100)
    return "" if held == b"first" else "the second create was refused, and replaced the first all the same"


def _race(store: Store, folder: str, racers: int) -> str:
    ready = threading.Barrier(racers)

    def wins(number: int) -> bool:
        store.exists(f"{folder}/race")  # connected before the start
        ready.wait(60)
        try:
            store.create(f"{folder}/race", str(number).encode())
        except (AlreadyExists, OutcomeUnknown):
            return False
        return True

    with ThreadPoolExecutor(racers) as pool:
        winners = [number for number, won in enumerate(pool.map(wins, range(racers))) if won]
    held = store.read(f"{folder}/race", limit_bytes=100).decode()
    if len(winners) > 1:
        return f"{len(winners)} of {racers} were told that they had created it: two jobs could both take the run"
    return (
        "" if not winners or str(winners[0]) == held else f"{winners[0]} was told that it won, and {held} stands there"
    )


def _whole(store: Store) -> str:
    if store.capabilities.atomic_create:
        return ""
    return "there are no hard links here: a writer that dies leaves an incomplete record, which voids its slot"
