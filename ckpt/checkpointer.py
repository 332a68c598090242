"""The public door: `Checkpointer` for a training run that saves, and the readers that never write.

Owns the defaults, the loop, signals and progress; saving and restoring themselves are in `saver` and `restorer`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import msgspec

from ckpt.agreement import Signal, on_first, require_equal, together
from ckpt.errors import CkptError, Corrupt, DeadlineExceeded, Incompatible, NotFound
from ckpt.holder import Holder, find_commit
from ckpt.log import View
from ckpt.process import OnSigterm, StepBar
from ckpt.ranks import Ranks, connect
from ckpt.records import Commit
from ckpt.restorer import Relaxed, StepReader, restore_step
from ckpt.run import RunDirectory
from ckpt.saver import Saver, step_number

log = logging.getLogger("ckpt")


@dataclass(frozen=True)
class Every:
    """When a save is due: every `steps` completed steps, or when `seconds` have passed since the last save.

    Rank 0's clock decides for all.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("Every(steps=...) or Every(seconds=...): one of the two")
        if (self.steps if self.steps is not None else self.seconds or 0) <= 0:
            raise ValueError("Every: the interval must be positive")

    def due(self, step: int, since_save_s: float) -> bool:
        if self.steps is not None:
            return step > 0 and step % self.steps == 0
        assert self.seconds is not None
        return since_save_s >= self.seconds


@dataclass(frozen=True)
class SaveHandle:
    """A save that was asked for."""

    commit: Commit

    def wait(self, timeout_s: float | None = None) -> Commit:
        """Its commit, once it is durable."""
        return self.commit

    def wait_copied(self) -> None:
        """Return once the state may be changed again."""

    def done(self) -> bool:
        return True

    def exception(self) -> BaseException | None:
        return None


class Checkpointer:
    """Saves and restores the state of a training run under one address, on all ranks together.

    `url` is a directory that all nodes see. With several ranks, `torch.distributed` must be initialised first;
    every method is then collective unless it says otherwise. `commit_timeout_s` bounds every wait for other ranks,
    in a save as between two iterations of `steps`: raise it, like the process group's own, where one rank evaluates
    for longer than that while the others wait.

    Errors (all `CkptError`): `Fenced` when a newer start of the run has taken over, `SaveFailed` and
    `StorageError` when a save does not commit, `Corrupt`, `Incompatible`, `NotFound`, `DeadlineExceeded`.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        every: Every | None = None,
        run_id: str | None = None,
        takeover: bool = False,
        strict_fencing: bool = True,
        commit_timeout_s: float = 600,
    ) -> None:
        self._every = every or Every(steps=1000)
        self._ranks: Ranks = connect(commit_timeout_s)
        self._holder: Holder | None = None
        job = _run_id(run_id)

        def open_first() -> RunDirectory:
            run = RunDirectory.open(url, create=True)
            _check_fencing(run, strict_fencing)
            self._holder = Holder(run, run_id=job, takeover=takeover)
            return run

        try:
            self._run = _open_on_all(self._ranks, url, open_first)
        except BaseException:
            self._ranks.close()
            raise
        self.url = self._run.url
        self._saver = Saver(self._ranks, self._run, self._holder)
        self._metrics: dict[str, float] = {}
        self._saved_at = time.monotonic()
        self._last_saved: int | None = None
        self._stop_asked = False
        self._by_hand = OnSigterm(self._ask_to_stop)
        self._closed = False

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._closed = True  # nothing collective: other ranks may be gone, and those that wait shall learn it
            with contextlib.suppress(Exception):
                self._ranks.close()
        self._by_hand.__exit__()

    # Saving

    def save(
        self, step: int, state: Any, *, metrics: Mapping[str, float] | None = None, blocking: bool = False
    ) -> SaveHandle:
        """Save `state` as `step`, the number of completed steps; returns when it is durable and committed.

        `metrics` are kept with the step. Raises on every rank if it fails on any; older steps are as they were.
        """
        self._check_open()
        commit = self._saver.save(step, state, {**self._metrics, **(metrics or {})})
        self._metrics.clear()
        self._saved_at, self._last_saved = time.monotonic(), commit.step
        return SaveHandle(commit)

    def report(self, **metrics: float) -> None:
        """Metrics of the current step, stored with it if it is saved; those of rank 0 count. Not collective."""
        self._metrics.update(metrics)

    def due(self, step: int) -> bool:
        """Whether `every` asks for a save after `step` completed steps; the same on every rank."""
        mine = self._every.due(step, time.monotonic() - self._saved_at)
        if self._every.steps is not None:
            return mine
        return Signal.decode(self._ranks.maximum(self._signal(step, due=mine).encode()), step).due

    def stop_requested(self, step: int) -> bool:
        """Whether any rank was asked to stop by SIGTERM since the first call; the same on every rank.

        From its first call on, SIGTERM no longer ends the process: save, and leave the loop.
        """
        self._by_hand.__enter__()
        return Signal.decode(self._ranks.maximum(self._signal(step).encode()), step).stop

    # Restoring

    def restore(
        self,
        state: Any,
        *,
        step: int | None = None,
        required: bool = False,
        fallback: bool = False,
        strict: bool = True,
        only: Sequence[str] | None = None,
        rename: Mapping[str, str] | None = None,
        cast: bool = False,
    ) -> int | None:
        """Fill `state` in place with the newest step (or `step`), whatever the world size was; returns the step.

        None, and nothing touched, only if the run has no step at all (`NotFound` with `required`). A damaged step is
        `Corrupt`; with `fallback` an older one is taken instead, and logged. Going back to an older step is recorded:
        the run goes on from there, also if it dies before its next save. Everything in the state must be in the step
        and the other way round, in shape and dtype, or it is one `Incompatible` error; `strict=False` skips what is
        missing on either side, `only` restores just keys at or below these paths, `rename` maps stored key prefixes
        to those of the state (optimizers name parameters below `optim/state/` and `optim/group_of/` too), `cast`
        converts dtypes.
        """
        self._check_open()
        relaxed = Relaxed(strict, _paths(only), rename, cast)
        require_equal(self._ranks, "restore", (step, required, fallback, relaxed))
        number = None if step is None else step_number(step)
        chosen = _choose(self._ranks, lambda: self._begin(number), self._run, required or step is not None)
        if chosen is None:
            return None
        done = _restore_or_fall_back(self._ranks, self._run, chosen, state, relaxed, fallback, self._lineage)
        on_first(self._ranks, lambda: self._go_on_from(done.attempt))
        self._saved_at, self._last_saved = time.monotonic(), done.step
        return done.step

    def _begin(self, step: int | None) -> Commit | None:
        """On rank 0: take the run, adopt what was left complete, and choose."""
        assert self._holder is not None
        holder = self._holder
        if holder.start is None:
            holder.take("restore")
            if step is None:
                holder.adopt()
        else:
            holder.run.log.read()
        if step is None and not holder.view.lineage():
            return None
        return find_commit(holder.view, step)

    def _go_on_from(self, attempt: str) -> bytes:
        """On rank 0, once `attempt` is restored: record it if the run goes back to it."""
        assert self._holder is not None
        head = self._holder.view.head
        if head is None or head.attempt != attempt:
            self._holder.take(f"back to {attempt}", base=attempt)
        return b""

    def _lineage(self) -> list[Commit]:
        return _lineage(self._holder.view) if self._holder else []

    # The loop

    def steps(self, total: int, state: Any, *, required: bool = False, fallback: bool = False) -> Iterator[int]:
        """Yield the index of each step still to run, `total` in all: restores first, saves as `every` says.

        Also saves at the end, and on SIGTERM: all ranks then finish one agreed step, save it, and the loop ends
        early (exit with the usual code 143 if `stopped`). Leaving the loop by `break` does not save. `required` and
        `fallback` as in `restore`.
        """
        require_equal(self._ranks, "steps", (total, self._every))
        first = self.restore(state, required=required, fallback=fallback) or 0
        self._stop_asked = self.stopped = False
        with OnSigterm(self._ask_to_stop), StepBar(first, total, self._ranks.rank) as advance:
            pending = None
            for step in range(first, total):
                yield step
                done = step + 1
                heard = pending() if pending else None
                advance(done)
                if heard is not None and heard.stop:
                    self._save_if_new(done, state)
                    log.warning("stopped after step %d on request; the step is saved", done)
                    self.stopped = True
                    return
                if (heard is not None and heard.due) or self._due_by_steps(done) or done == total:
                    self._save_if_new(done, state)
                self._metrics.clear()  # of this step, whether it was saved or not
                pending = self._begin_signal(done) if done < total else None

    stopped = False
    """Whether `steps` ended early because a stop was requested."""

    def _due_by_steps(self, done: int) -> bool:
        return self._every.steps is not None and self._every.due(done, 0)

    def _save_if_new(self, step: int, state: Any) -> None:
        if self._last_saved != step:
            self.save(step, state)

    def _begin_signal(self, step: int) -> Callable[[], Signal]:
        due = self._every.seconds is not None and self._every.due(step, time.monotonic() - self._saved_at)
        read = self._ranks.begin_maximum(self._signal(step, due=due and self._ranks.rank == 0).encode())
        return lambda: Signal.decode(read(), step)

    def _signal(self, step: int, *, due: bool = False) -> Signal:
        return Signal(step, due=due and self._ranks.rank == 0, stop=self._stop_asked)

    def _ask_to_stop(self) -> None:
        self._stop_asked = True

    # Looking

    def latest_step(self) -> int | None:
        """The newest step of the run, or None. Not collective; reads the log."""
        steps = self.all_steps()
        return steps[-1] if steps else None

    def all_steps(self) -> list[int]:
        """The steps that can be restored, ascending. Not collective; reads the log."""
        return [commit.step for commit in _lineage(RunDirectory.open(self.url).log.read())]

    # Ending

    def wait_until_finished(self, timeout_s: float | None = None) -> None:
        """Return once every save is durable; raise if one failed."""
        self._check_open()

    def close(self) -> None:
        """Wait until every save is durable, then let go of the run. Collective; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._by_hand.__exit__()
            self._ranks.close()

    def _check_open(self) -> None:
        if self._closed:
            raise CkptError(f"this Checkpointer of {self.url} is closed; make a new one")


# Readers


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
        run = _open_on_all(ranks, url, lambda: RunDirectory.open(url))
        relaxed = Relaxed(strict, _paths(only), rename, cast)
        require_equal(ranks, "restore", (step, fallback, relaxed))
        chosen = _choose(ranks, lambda: find_commit(run.log.read(), step), run, True)
        assert chosen is not None
        return _restore_or_fall_back(ranks, run, chosen, state, relaxed, fallback, lambda: _lineage(run.log.view)).step
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
    while True:
        head = _head(url)
        if head is not None and head.attempt != seen and (after is None or head.step > after):
            seen = head.attempt
            yield head
            deadline = time.monotonic() + timeout_s
        elif time.monotonic() > deadline:
            raise DeadlineExceeded(f"no new step in {os.fspath(url)} for {timeout_s:g} s")
        else:
            time.sleep(min(poll_s, max(deadline - time.monotonic(), 0.0)))


def _head(url: str | os.PathLike[str]) -> Commit | None:
    try:
        lineage = _lineage(RunDirectory.open(url).log.read())
    except NotFound:
        return None
    return lineage[-1] if lineage else None


def _lineage(view: View) -> list[Commit]:
    return [commit for commit in view.lineage() if commit.attempt not in view.retired]


def _choose(ranks: Ranks, choose: Callable[[], Commit | None], run: RunDirectory, required: bool) -> Commit | None:
    """The commit that rank 0 chooses, on every rank."""

    def act() -> bytes:
        commit = choose()
        if commit is None and required:
            raise NotFound(f"there is no checkpoint in {run.url} yet. `ckpt ls {run.url}` shows what it holds.")
        return msgspec.msgpack.encode(commit)

    return msgspec.msgpack.decode(on_first(ranks, act), type=Commit | None)


def _restore_or_fall_back(
    ranks: Ranks,
    run: RunDirectory,
    commit: Commit,
    state: Any,
    relaxed: Relaxed,
    fallback: bool,
    lineage: Callable[[], list[Commit]],
) -> Commit:
    """Restore `commit`; where that is damaged and the caller allows it, the newest older one that is not."""
    while True:
        try:
            data = on_first(ranks, lambda commit=commit: StepReader(run, commit).manifest_data)  # type: ignore[misc]
            restore_step(StepReader(run, commit, data), ranks, state, relaxed)
            return commit
        except Corrupt as error:
            if not fallback:
                raise
            older = _choose(ranks, lambda commit=commit: _older(lineage(), commit), run, False)  # type: ignore[misc]
            if older is None:
                raise
            if ranks.rank == 0:
                log.warning("step %d is damaged, falling back to step %d: %s", commit.step, older.step, error)
            commit = older


def _open_on_all(ranks: Ranks, url: str | os.PathLike[str], open_first: Callable[[], RunDirectory]) -> RunDirectory:
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


def _check_fencing(run: RunDirectory, strict: bool) -> None:
    if run.store.capabilities.fences:
        return
    if strict:
        raise Incompatible(
            f"{run.url}: this store cannot make a file exclusively and whole, so two writers could not be kept apart. "
            "If you promise that one job writes at a time, pass strict_fencing=False."
        )
    log.warning("%s cannot keep two writers apart; one job at a time is your promise", run.url)


def _run_id(given: str | None) -> str | None:
    """The name of this job: as given, or where its launcher gave it one of its own."""
    if given is not None and not (isinstance(given, str) and given.isprintable() and len(given) <= 256):
        raise Incompatible(f"run_id is a printable string of at most 256 characters, not {given!r:.100}")
    found = given or os.environ.get("CKPT_RUN_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    return found if found and found != "none" else None


def _paths(only: Sequence[str] | None) -> tuple[str, ...] | None:
    return (only,) if isinstance(only, str) else None if only is None else tuple(only)
