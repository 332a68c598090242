"""The public doors that never write: `restore` and `follow`; and how a step is chosen, read, and read again from older.

Owns what `Checkpointer.restore` and a reader have in common.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from ckpt.agreement import on_first, require_equal, together
from ckpt.errors import Corrupt, DeadlineExceeded, Incompatible, NotFound
from ckpt.holder import find_commit, instead_of
from ckpt.keeper.ram import RamTier
from ckpt.ranks import Ranks, connect
from ckpt.records import Commit
from ckpt.restorer import Relaxed, StepReader, restore_step
from ckpt.run import RunDirectory
from ckpt.stores import open_store

log = logging.getLogger("ckpt")


def restore(
    url: str | os.PathLike[str],
    state: Any,
    *,
    step: int | None = None,
    fallback: bool = False,
    strict: bool = True,
    only: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    cast: bool = False,
    timeout_s: float = 600,
) -> int:
    """Fill `state` from a run without becoming its writer: for evaluation, or a warm start from another run.

    Collective where there are several ranks. Arguments and errors as in `Checkpointer.restore`; `NotFound` if the
    run has no step.
    """
    ranks = connect(timeout_s)
    try:
        run = open_on_all(ranks, url, lambda: RunDirectory.open(url))
        relaxed = Relaxed(strict, paths(only), rename, cast)
        require_equal(ranks, "restore", (step, fallback, relaxed))
        chosen = choose_together(ranks, lambda: find_commit(run.log.read(), step), run, True)
        assert chosen is not None
        done = restore_or_fall_back(
            ranks, run, chosen, state, relaxed, fallback, lambda: run.log.view.standing(), chosen=step is not None
        )
        return done.step
    finally:
        ranks.close()


def follow(
    url: str | os.PathLike[str], *, after: int | None = None, timeout_s: float = 3600, poll_s: float = 1.0
) -> Iterator[Commit]:
    """Yield the newest commit whenever there is a new one above step `after`, for evaluation beside a training run.

    Steps that appear faster than they are taken are skipped but for the newest. `DeadlineExceeded` after `timeout_s`
    without a new one. Never writes; the run need not exist yet.
    """
    seen: str | None = None
    deadline = time.monotonic() + timeout_s
    store, run = open_store(url), None
    while True:
        with contextlib.suppress(NotFound):
            run = run or RunDirectory.at(store)
        standing = run.log.read().standing() if run is not None else []
        head = standing[-1] if standing else None
        if head is not None and head.attempt != seen and (after is None or head.step > after):
            seen = head.attempt
            yield head
            deadline = time.monotonic() + timeout_s
        elif time.monotonic() > deadline:
            raise DeadlineExceeded(f"no new step in {os.fspath(url)} for {timeout_s:g} s")
        else:
            time.sleep(min(poll_s, max(deadline - time.monotonic(), 0.0)))


def choose_together(
    ranks: Ranks, choose: Callable[[], Commit | None], run: RunDirectory, required: bool
) -> Commit | None:
    """The commit that rank 0 chooses, on every rank."""

    def act() -> bytes:
        commit = choose()
        if commit is None and required:
            raise NotFound(f"there is no checkpoint in {run.url} yet. `ckpt ls {run.url}` shows what it holds.")
        return msgspec.msgpack.encode(commit)

    return msgspec.msgpack.decode(on_first(ranks, act), type=Commit | None)


def restore_or_fall_back(
    ranks: Ranks,
    run: RunDirectory,
    commit: Commit,
    state: Any,
    relaxed: Relaxed,
    fallback: bool,
    lineage: Callable[[], list[Commit]],
    ram: RamTier | None = None,
    *,
    chosen: bool = False,
) -> Commit:
    """Restore `commit`; where that is damaged and the caller allows it, the newest older one that is not.

    What `ram` holds of it is read there; where that is damaged, everything comes from the store. Where retention has
    deleted it meanwhile, the newest one is restored instead, or `NotFound` says so if the caller had `chosen` it.
    """
    while True:
        reader: StepReader | None = None
        try:
            data = on_first(ranks, lambda commit=commit: StepReader(run, commit).manifest_data)  # type: ignore[misc]
            reader = StepReader(run, commit, data, ram)
            restore_step(reader, ranks, state, relaxed)
            return commit
        except Corrupt as error:
            if ranks.maximum(bytes([reader is not None and reader.used_ram])) != b"\x00":
                log.warning("a copy in RAM is damaged, reading step %d from the store: %s", commit.step, error)
                ram = None
                continue
            newer = choose_together(ranks, lambda commit=commit: instead_of(run, commit, chosen=chosen), run, False)  # type: ignore[misc]
            if newer is not None:
                commit = newer
                continue
            if not fallback:
                raise
            older = choose_together(ranks, lambda commit=commit: _older(lineage(), commit), run, False)  # type: ignore[misc]
            if older is None:
                raise
            if ranks.rank == 0:
                log.warning("step %d is damaged, falling back to step %d: %s", commit.step, older.step, error)
            commit = older


def open_on_all(ranks: Ranks, url: str | os.PathLike[str], open_first: Callable[[], RunDirectory]) -> RunDirectory:
    """The run that rank 0 opens, on every rank; `Incompatible` where another rank finds nothing or another run."""
    opened: list[RunDirectory] = []

    def first() -> bytes:
        opened.append(open_first())
        return opened[0].nonce.encode()

    nonce = on_first(ranks, first).decode()

    def mine() -> RunDirectory:
        try:
            run = opened[0] if opened else RunDirectory.open(url)
        except NotFound as error:
            raise Incompatible(
                f"rank {ranks.rank} does not see the run that rank 0 opened: {error} {_SHARED}"
            ) from error
        if run.nonce != nonce:
            raise Incompatible(f"rank {ranks.rank} finds another run at {run.url} than rank 0. {_SHARED}")
        return run

    return together(ranks, mine)


_SHARED = "All nodes must see one directory (NFS, Lustre, a disk of the only node); nothing was written."


def _older(lineage: list[Commit], commit: Commit) -> Commit | None:
    return max((c for c in lineage if c.step < commit.step), key=lambda c: c.step, default=None)


def paths(only: Sequence[str] | None) -> tuple[str, ...] | None:
    return (only,) if isinstance(only, str) else None if only is None else tuple(only)
