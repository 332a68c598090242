"""The public door of a training run that saves.

Owns the defaults, the loop, signals and progress; saving and restoring themselves are in `saver` and `restorer`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal, NoReturn

from ckpt.adapt import collect_state
from ckpt.agreement import Signal, on_first, require_equal, together
from ckpt.arguments import run_id_of, step_number
from ckpt.board import Place
from ckpt.echo import tell_echo
from ckpt.errors import CkptError, Incompatible
from ckpt.events import point, watched
from ckpt.figures import Reporter
from ckpt.handle import SaveHandle
from ckpt.holder import Given, Holder, find_commit
from ckpt.interval import Every
from ckpt.pins import ask_to_delete, checked_name, pin, unpin
from ckpt.process import OnSigterm, StepBar
from ckpt.ranks import Ranks, connect
from ckpt.readers import choose_together, open_on_all, paths, restore_or_fall_back
from ckpt.records import Commit
from ckpt.restorer import Relaxed
from ckpt.resume import RESUME_FROM, asked_back
from ckpt.retention import Best, Keep, rated
from ckpt.run import RunDirectory
from ckpt.saver import Options, Saver

log = logging.getLogger("ckpt")

EXIT_STOPPED = 143
SAVE_WAITS = 2  # for room in memory, and for the commit


class Checkpointer:
    """Saves and restores the state of a training run under one address, on all ranks together.

    `url` is a directory that all nodes see, or the URL of a bucket; without one, $CKPT_URL counts (`ckpt resume` sets
    it). With several ranks, `torch.distributed` must be initialised first; every method is then collective unless it
    says otherwise. `commit_timeout_s` bounds every wait for other ranks, in a save as between two iterations of
    `steps`, and how long a save may take to become durable: raise it, like the process group's own, where one rank
    evaluates for longer than that while the others wait.

    `overlap`: what belongs to a `torch.optim.Optimizer` in the state is copied while training goes on, and the next
    `step()` of that optimizer waits for it. Whoever changes such tensors otherwise calls `handle.wait_copied()` first,
    or passes False: then all is copied before `save` returns.

    `busy`: what `save` does while the store is still taking earlier ones. "wait" for room in memory, so that every
    save is committed; or "skip": the newest state is held in RAM, and the store takes it as soon as it can, leaving
    out what was in between. `skipped` counts those.

    `ram_budget_bytes`: memory on each node for copies of the state, which survive the death of the workers (default:
    half of what is free). Up to three are held; where not even one fits, the copy streams through a small ring.

    `keep`: which steps stay when a newer one is durable, as `Keep(last=3, every=1000)`; without it all of them do.

    `compression`: "zstd" stores the tensors packed, split into byte planes first; "auto" where a sample says that this
    makes the save faster, by the speed of this store. It takes CPU time beside the training. Any reader unpacks.

    `reporters`: called with a `ckpt.figures.SaveFigures` or `SaveFailure` after each save, on rank 0.

    Errors (all `CkptError`): `Fenced` when a newer start of the run has taken over, `SaveFailed` and
    `StorageError` when a save does not commit, `Corrupt`, `Incompatible`, `NotFound`, `DeadlineExceeded`.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        every: Every | None = None,
        keep: Keep | None = None,
        run_id: str | None = None,
        takeover: bool = False,
        strict_fencing: bool = True,
        commit_timeout_s: float = 600,
        overlap: bool = True,
        busy: Literal["wait", "skip"] = "wait",
        ram_budget_bytes: int | None = None,
        compression: Literal["zstd", "auto"] | None = None,
        reporters: Sequence[Reporter] = (),
    ) -> None:
        if busy not in ("wait", "skip"):
            raise ValueError(f'busy is "wait" or "skip", not {busy!r:.100}')
        if compression not in (None, "zstd", "auto"):
            raise ValueError(f'compression is None, "zstd" or "auto", not {compression!r:.100}')
        if keep is not None and not isinstance(keep, Keep):
            raise ValueError(f"keep is a ckpt.Keep, as ckpt.Keep(last=3, every=1000), not {keep!r:.100}")
        place = url if url is not None else os.environ.get("CKPT_URL")
        if not place:
            raise Incompatible("no address: pass one to ckpt.Checkpointer(url), or set CKPT_URL")
        self._every = every or Every(steps=1000)
        self._best = keep.best if keep else None
        self._interval = self._every.interval()
        self._ranks: Ranks = connect(commit_timeout_s)
        self._holder: Holder | None = None
        job = run_id_of(run_id)

        def open_first() -> RunDirectory:
            run = RunDirectory.open(place, create=True)
            given = Given.of(os.environ.get("CKPT_START", ""))
            self._holder = Holder(run, run_id=job, takeover=takeover, strict_fencing=strict_fencing, given=given)
            return run

        try:
            self._run = open_on_all(self._ranks, place, open_first)
        except BaseException:
            self._ranks.close()
            raise
        self.url = self._run.url
        options = Options(
            overlap, busy == "skip", ram_budget_bytes, commit_timeout_s, tuple(reporters), keep, compression or ""
        )
        self._saver = Saver(self._ranks, self._run, self._holder, options)
        self._commit_timeout_s = commit_timeout_s
        self._metrics: dict[str, float] = {}
        self._saved_at = time.monotonic()
        self._last_saved: int | None = None
        self._stop_asked = False
        self._place = Place.of()
        self._by_hand = OnSigterm(self._ask_to_stop)
        self._closed = False
        _open.add(self)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # nothing collective: other ranks may be gone, and those that wait shall learn it
            self._let_go(goodbye=False)

    # Saving

    def save(
        self, step: int, state: Any, *, metrics: Mapping[str, float] | None = None, blocking: bool = False
    ) -> SaveHandle:
        """Have `state` saved as `step`, the number of completed steps; returns when training may go on.

        The handle tells when it is durable and committed; with `blocking` this returns only then. `metrics` are kept
        with the step. Raises on every rank if any cannot begin, or if an earlier save failed since the last call;
        older steps are as they were.
        """
        self._check_open()
        asked = time.monotonic()
        handle = self._saver.save(step, state, {**self._metrics, **(metrics or {})}, must=blocking)
        blocked_s = time.monotonic() - asked
        if self._place is not None:
            self._place.saved(handle.step, blocked_s)
        point("saved", step=handle.step, rank=self._ranks.rank, blocked_s=blocked_s)
        self._metrics.clear()
        self._saved_at = asked
        if not handle.skipped:
            self._last_saved = handle.step
        if blocking:
            handle.wait(self._commit_timeout_s)
        return handle

    @property
    def skipped(self) -> int:
        """How many saves did not come to the store because it was busy (`busy="skip"`)."""
        return self._saver.skipped

    def report(self, **metrics: float) -> None:
        """Metrics of the current step, stored with it if it is saved; those of rank 0 count. Not collective."""
        self._metrics.update(metrics)

    def due(self, step: int) -> bool:
        """Whether `every` asks for a save after `step` completed steps; the same on every rank."""
        mine = self._is_due(step)
        if self._every.steps is not None:
            return mine
        return Signal.decode(self._ranks.maximum(self._signal(step, due=mine).encode()), step).due

    def stop_requested(self, step: int) -> bool:
        """Whether any rank was asked to stop, by SIGTERM or by its launcher; the same on every rank.

        From its first call on, SIGTERM no longer ends the process: save, leave the loop, and end.
        """
        self._by_hand.__enter__()
        self._at(step)
        stop = Signal.decode(self._ranks.maximum(self._signal(step).encode()), step).stop
        self.stopped = self.stopped or stop
        return stop

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
        point("restoring", rank=self._ranks.rank)
        relaxed = Relaxed(strict, paths(only), rename, cast)
        require_equal(self._ranks, "restore", (step, required, fallback, relaxed))
        number = None if step is None else step_number(step)
        self._saver.settle()
        together(self._ranks, lambda: self._saver.wait(self._commit_timeout_s))
        chosen = choose_together(self._ranks, lambda: self._begin(number), self._run, required or step is not None)
        if chosen is None:
            return None
        ram = self._saver.ram if self._saver.ram.exists() else None
        done = restore_or_fall_back(
            self._ranks, self._run, chosen, state, relaxed, fallback, self._lineage, ram, chosen=step is not None
        )
        on_first(self._ranks, lambda: self._go_on_from(done.attempt))
        self._saver.forget_start()
        self._saved_at, self._last_saved = time.monotonic(), done.step
        if watched() and only is None:  # a part of a state is not what was saved
            holds = collect_state(state, self._ranks.rank, self._ranks.size)
            tell_echo("restore", holds, self._ranks.rank, step=done.step, world=self._ranks.size, attempt=done.attempt)
        return done.step

    def _begin(self, step: int | None) -> Commit | None:
        """On rank 0: take the run, adopt what was left complete, and choose."""
        assert self._holder is not None
        holder = self._holder
        back = None
        if holder.start is None:
            if step is None:
                back = asked_back(holder.run.log.read(), os.environ.get(RESUME_FROM))
            holder.take("restore")
            if step is None and back is None:
                holder.adopt()
        else:
            holder.run.log.read()
        if back is not None:
            return back
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
        return self._holder.view.standing() if self._holder else []

    # The loop

    def steps(self, total: int, state: Any, *, required: bool = False, fallback: bool = False) -> Iterator[int]:
        """Yield the index of each step still to run, `total` in all: restores first, saves as `every` says.

        Also saves at the end, and on SIGTERM: all ranks then finish one agreed step, save it, and the loop ends
        early (exit with the usual code 143 if `stopped`). Where an elastic launcher, or another rank's SIGTERM, asks
        for the stop, the process ends there, to be started again. Leaving the loop by `break` does not save.
        `required` and `fallback` as in `restore`.
        """
        require_equal(self._ranks, "steps", (total, self._every))
        restored = self.restore(state, required=required, fallback=fallback)
        first = restored or 0
        if restored is None:  # what cannot be saved is said now, not at the first save
            together(self._ranks, lambda: collect_state(state, self._ranks.rank, self._ranks.size))
        self._stop_asked = self.stopped = False
        place = self._place.watched() if self._place is not None else contextlib.nullcontext()
        with OnSigterm(self._ask_to_stop), place, StepBar(first, total, self._ranks.rank) as advance:
            pending, told = None, watched()
            self._at(first)
            for step in range(first, total):
                began, saving = time.monotonic(), self._saver.saving
                yield step
                done = step + 1
                self._measure(time.monotonic() - began, saving)
                if told:
                    point("step", step=done, rank=self._ranks.rank, world=self._ranks.size, metrics=self._metrics)
                heard = pending() if pending else None
                advance(done)
                self._at(done)
                if heard is not None and heard.failed:
                    self._saver.raise_together()
                if heard is not None and heard.stop:
                    self._stop(done, state)
                    return
                if done == total:
                    self._save_last(done, state)
                elif (heard is not None and heard.due) or self._due_by_steps(done):
                    self._save_if_new(done, state)
                self._metrics.clear()  # of this step, whether it was saved or not
                pending = self._begin_signal(done) if done < total else None

    def _stop(self, done: int, state: Any) -> None:
        """The end of a loop that was asked to stop; of the process, where only the membership changes."""
        self._save_last(done, state)
        log.warning("stopped after step %d on request; the step is saved", done)
        self.stopped = True
        if self._place is not None and not self._stop_asked:
            self._place.pause()
            raise SystemExit(EXIT_STOPPED)

    def _saving(self) -> AbstractContextManager[None]:
        """A save may take as long as it may take; it is no step that hangs."""
        limit_s = SAVE_WAITS * self._commit_timeout_s
        return self._place.phase(limit_s) if self._place is not None else contextlib.nullcontext()

    def _at(self, step: int) -> None:
        if self._place is not None:
            self._place.heed()
            self._place.moved(step)

    def _measure(self, seconds: float, saving: bool) -> None:
        """What a step took, and each save that is durable by now: that is what `Every.auto` goes by."""
        if self._interval is not None:
            self._interval.stepped(seconds, saving=saving)
            for figures in self._saver.finished():
                self._interval.saved(*figures)

    stopped = False
    """Whether `steps` ended early, or `stop_requested` said so, because a stop was requested."""

    def _due_by_steps(self, done: int) -> bool:
        return self._every.steps is not None and self._every.due(done, 0)

    def _is_due(self, step: int) -> bool:
        return (self._interval or self._every).due(step, time.monotonic() - self._saved_at)

    def _save_if_new(self, step: int, state: Any) -> None:
        if self._last_saved != step:
            with self._saving():
                self.save(step, state)

    def _save_last(self, step: int, state: Any) -> None:
        """Nothing comes after it: it must not be left out, and must be durable before the loop ends."""
        with self._saving():
            if self._last_saved != step:
                self.save(step, state, blocking=True)
            else:
                together(self._ranks, lambda: self._saver.wait(self._commit_timeout_s))

    def _begin_signal(self, step: int) -> Callable[[], Signal]:
        due = self._every.steps is None and self._is_due(step)
        failed = self._saver.untold() is not None
        read = self._ranks.begin_maximum(self._signal(step, due=due, failed=failed).encode())
        return lambda: Signal.decode(read(), step)

    def _signal(self, step: int, *, due: bool = False, failed: bool = False) -> Signal:
        stop = self._stop_asked or (self._place is not None and self._place.asked)
        return Signal(step, failed=failed, due=due and self._ranks.rank == 0, stop=stop)

    def _ask_to_stop(self) -> None:
        self._stop_asked = True

    # Looking

    def latest_step(self) -> int | None:
        """The newest step of the run, or None. Not collective; reads the log."""
        steps = self.all_steps()
        return steps[-1] if steps else None

    def all_steps(self) -> list[int]:
        """The steps that can be restored, ascending. Not collective; reads the log."""
        return [commit.step for commit in self._standing()]

    def best_step(self, best: Best | None = None) -> int | None:
        """The step with the best value of a metric, as `restore(state, step=...)` takes it; None if none has one.

        `best` says which metric, else that of `keep`; `Incompatible` without either. Not collective; reads the log.
        """
        rule = best or self._best
        if rule is None:
            raise Incompatible('best by what? Pass best_step(ckpt.Best("val_loss")), or Checkpointer(keep=...) one')
        return next((commit.step for commit in rated(self._standing(), rule)), None)

    def _standing(self) -> list[Commit]:
        return RunDirectory.at(self._run.store).log.read().standing()

    # What stays

    def pin(self, step: int, name: str | None = None) -> None:
        """Never delete `step`, whatever `keep` says, until `unpin`. Collective.

        `name` (default `step-<N>`) is of `[a-z0-9._-]`; pinned again, it moves. `NotFound` if there is no such step.
        """
        self._check_open()
        require_equal(self._ranks, "pin", (step, name))
        self._on_log(lambda: pin(self._run, step_number(step), checked_name(name)))

    def unpin(self, name: str) -> None:
        """Let go of a pin; `keep` counts again for its step. Collective. `NotFound` if there is none of this name."""
        self._check_open()
        require_equal(self._ranks, "unpin", name)
        self._on_log(lambda: unpin(self._run, name))

    def delete(self, step: int) -> None:
        """Have `step` deleted once a newer one has become durable. Collective.

        `Incompatible` for the newest step, a pinned one, and the one that this job went on from.
        """
        self._check_open()
        require_equal(self._ranks, "delete", step)
        self._on_log(lambda: ask_to_delete(self._run, find_commit(self._run.log.read(), step_number(step))))

    def _on_log(self, act: Callable[[], object]) -> None:
        """On rank 0, for all: they return or raise alike."""

        def acted() -> bytes:
            act()
            return b""

        on_first(self._ranks, acted)

    # Ending

    def wait_until_finished(self, timeout_s: float | None = None) -> None:
        """Return once every save is decided; raise if one failed. Each rank waits for itself."""
        self._check_open()
        self._saver.wait(timeout_s)

    def close(self) -> None:
        """Wait until every save is durable, then let go of the run; a second call does nothing.

        Raises if a save failed and nobody was told; the run is let go of all the same.
        """
        if not self._closed:
            try:
                self._saver.wait(self._commit_timeout_s)
            finally:
                self._let_go(goodbye=True)

    def _let_go(self, *, goodbye: bool) -> None:
        self._closed = True
        self._by_hand.__exit__()
        _open.discard(self)
        global _unfinished
        _unfinished = _unfinished or (self.stopped and self._place is not None)
        with contextlib.suppress(Exception):
            self._saver.close(goodbye)
        with contextlib.suppress(Exception):
            self._ranks.close()

    def _check_open(self) -> None:
        if self._closed:
            raise CkptError(f"this Checkpointer of {self.url} is closed; make a new one")


_open: set[Checkpointer] = set()  # also those that nobody refers to any more: their saves are to become durable
_unfinished = False  # stopped on request, under a launcher that takes exit code 0 for the end of the job


@atexit.register
def _finish() -> None:
    """A process that ends without `close` waits for its saves, and exits non-zero if one was not committed.

    One that ends by an error of ours exits with its code: whoever started it then knows whether to start it again.
    """
    ended_by = None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
    for checkpointer in list(_open):
        try:
            checkpointer.close()
        except CkptError as error:
            log.error("%s", error)
            print(f"ckpt: {error}", file=sys.stderr)
            _exit(error.exit_code)
    if isinstance(ended_by, CkptError) and ended_by.exit_code != CkptError.exit_code:
        _exit(ended_by.exit_code)
    if _unfinished and not hasattr(sys, "last_value"):
        _exit(EXIT_STOPPED)


def _exit(code: int) -> NoReturn:
    """End with `code`, whatever the script said."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
