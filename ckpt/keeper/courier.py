"""A worker's side of the keeper: starts it, tells it what is copied, and hears how it ended. One thread, no torch.

A keeper that dies is started again and told everything that it has not answered yet.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import ckpt
from ckpt import errors
from ckpt.errors import CkptError, DeadlineExceeded, SaveFailed
from ckpt.keeper.orders import (
    Abort,
    Complete,
    Copied,
    Freed,
    Goodbye,
    Hello,
    Layouts,
    Listen,
    Listening,
    Order,
    Outcome,
    Progress,
    Replicas,
    Settle,
    Settled,
    ToKeeper,
    ToWorker,
)
from ckpt.keeper.ram import Claim, RamTier, runs_on_this_node
from ckpt.run import RunDirectory
from ckpt.wire import Line

log = logging.getLogger("ckpt")

START_LIMIT_S = 30.0
AGAIN_S = 0.5  # between two processes that do not start
STARTS_LIMIT = 5  # keepers lost in a row without any answer
SEND_LIMIT_S = 10.0
POLL_S = 0.5
LOG_TAIL_BYTES = 2000


class Pending:
    """One save of this rank on its way. Filled by the copying threads, resolved by the courier."""

    def __init__(self, order: Order, layouts: Layouts, ring: int | None, said: Callable[[ToKeeper], None]) -> None:
        self.order, self.layouts, self.ring = order, layouts, ring
        self.outcome: Outcome | None = None
        self.complete = False  # all ranks' parts are whole in RAM
        self.told = False  # its failure was raised to the caller
        self.copied_at = self.resolved_at = 0.0  # by the monotonic clock
        self._said = said
        self._copied_runs, self._freed_runs = 0, 0
        self._end: Copied | Abort | None = None
        self._copy_ended = False
        self._changed = threading.Condition()

    @property
    def attempt(self) -> str:
        return self.order.job.attempt

    def progress(self, runs: int) -> None:
        self._copied_runs = runs
        self._said(Progress(self.attempt, self.order.rank, runs))

    def copied(self, replicas: Replicas) -> None:
        self._finish_copy(Copied(self.attempt, self.order.rank, replicas))

    def abort(self, error: BaseException) -> None:
        kind = type(error).__name__ if isinstance(error, CkptError) else SaveFailed.__name__
        self._finish_copy(Abort(self.attempt, self.order.rank, kind, f"{type(error).__name__}: {error}"))

    def _finish_copy(self, end: Copied | Abort) -> None:
        self._end, self.copied_at = end, time.monotonic()
        self._said(end)  # before anybody goes on: what is copied then outlives this process
        with self._changed:
            self._copy_ended = True
            self._changed.notify_all()

    def wait_copied(self) -> None:
        """Return once nothing of the state is read any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._copy_ended)

    def place_of(self, run: int) -> bool:
        """Wait for the place of this run in the ring, if there is one; False if the attempt ended meanwhile."""
        places = self.order.ring
        with self._changed:
            self._changed.wait_for(lambda: not places or run < self._freed_runs + places or self.outcome is not None)
            return self.outcome is None

    def freed(self, runs: int) -> None:
        with self._changed:
            self._freed_runs = max(self._freed_runs, runs)
            self._changed.notify_all()

    def resolve(self, outcome: Outcome) -> None:
        with self._changed:
            if self.outcome is None:
                self.outcome, self.resolved_at = outcome, time.monotonic()
            self._changed.notify_all()

    def wait(self, timeout_s: float | None) -> Outcome:
        """How it ended. `DeadlineExceeded` if it did not within `timeout_s`; it goes on then."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.outcome is not None, timeout_s):
                raise DeadlineExceeded(f"{self.attempt} is not durable after {timeout_s:g} s; it is still being saved.")
        assert self.outcome is not None
        return self.outcome

    def replay(self, send: Callable[..., None]) -> None:
        """Say again to a new keeper what the lost one may not have heard."""
        send(self.layouts)
        send(self.order, fd=self.ring)
        if self.order.ring and self._freed_runs:
            why = "the keeper was lost while this state streamed through it; there was no room to hold it in memory."
            send(Abort(self.attempt, self.order.rank, SaveFailed.__name__, why))
            return
        send(Progress(self.attempt, self.order.rank, self._copied_runs))
        if self._end is not None:
            send(self._end)


def error_of(outcome: Outcome) -> CkptError:
    """The error that an outcome without a commit stands for."""
    kind = getattr(errors, outcome.kind, SaveFailed)
    return kind(outcome.message) if issubclass(kind, CkptError) else SaveFailed(outcome.message)


class Courier:
    """Speaks to this node's keeper for one rank. `close` ends it; nothing else blocks for long but `settle`."""

    def __init__(self, ram: RamTier, url: str, rank: int, resolved: Callable[[Pending], None]) -> None:
        self.ram = ram
        self._url, self._rank, self._resolved = url, rank, resolved
        self._pending: dict[str, Pending] = {}
        self._line: Line | None = None
        self._users: Claim | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        self._lock = threading.RLock()
        self._answers: deque[Settled | Listening] = deque()
        self._answered = threading.Condition(self._lock)
        self._question: Settle | Listen | None = None
        self._starts = 0
        self._problem = ""

    def begin(self, order: Order, layouts: Layouts, ring: int | None) -> Pending:
        """Announce a snapshot; the keeper is started if there is none. Returns at once."""
        pending = Pending(order, layouts, ring, self._send)
        with self._lock:
            self._pending[pending.attempt] = pending
            if self._line is not None:
                self._try(lambda line: self._introduce(line, pending))
            self.start()
        return pending

    def start(self) -> None:
        """See to it that there is a keeper, in the background."""
        with self._lock:
            if self._thread is None:
                self._problem = ""
                self._thread = threading.Thread(target=self._run, name="ckpt-courier", daemon=True)
                self._thread.start()

    def settle(self, timeout_s: float, *, lost: bool = False) -> None:
        """Return once what earlier workers of this run left on this node is committed or gone.

        `lost`: a node is, with its keeper; nobody waits for what only that had.
        """
        if self.ram.exists():
            self._ask(Settle(lost), timeout_s)

    def listen(self, host: str, token: bytes, timeout_s: float) -> int:
        """Make this node's keeper the coordinator for other nodes; its port."""
        answer = self._ask(Listen(host, token), timeout_s)
        assert isinstance(answer, Listening)
        if answer.problem:
            raise SaveFailed(answer.problem)
        return answer.port

    def _ask(self, question: Settle | Listen, timeout_s: float) -> Settled | Listening:
        self.start()
        with self._answered:
            self._answers.clear()
            self._question = question
            if self._line is not None:
                self._try(lambda line: line.send(question, timeout_s=SEND_LIMIT_S))
            self._answered.wait_for(lambda: self._answers or self._problem, timeout_s)
            self._question = None
            if self._answers:
                return self._answers.popleft()
        waited = f"the keeper of this node did not answer {type(question).__name__} within {timeout_s:g} s"
        raise DeadlineExceeded(self._problem or waited)

    def close(self, goodbye: bool) -> None:
        """Let go of the keeper; with `goodbye` it need not expect this worker back."""
        with self._answered:
            if self._pending:  # a keeper that is being started must hear of them first
                self._answered.wait_for(lambda: self._line is not None or self._thread is None, START_LIMIT_S)
            self._closing = True
            if self._line is not None:
                if goodbye:
                    self._try(lambda line: line.send(Goodbye(), timeout_s=SEND_LIMIT_S))
                self._line.shutdown()
        if self._thread is not None:
            self._thread.join(timeout=START_LIMIT_S)
        if self._users is not None:
            self._users.release()
        for pending in self._pending.values():
            why = "the Checkpointer was closed before this save was durable; the keeper goes on with it."
            pending.resolve(Outcome(pending.attempt, kind=DeadlineExceeded.__name__, message=why))
        self._pending.clear()

    # The thread

    def _run(self) -> None:
        while not self._closing:
            try:
                line = self._connect()
                if line is None:
                    return
                self._listen(line)
            except Exception as error:  # whatever it is: nobody waits for a thread that has ended
                self._give_up(error)
                if not isinstance(error, CkptError | OSError):
                    raise
                return
            with self._lock:
                self._line = None
                line.close()

    def _listen(self, line: Line) -> None:
        """Take messages until the keeper is gone."""
        try:
            with self._lock:
                self._line = line
                line.send(Hello(self._rank, os.getpid()), timeout_s=SEND_LIMIT_S)
                for pending in self._pending.values():
                    pending.replay(lambda message, fd=None: line.send(message, fd=fd, timeout_s=SEND_LIMIT_S))
                if self._question is not None:
                    line.send(self._question, timeout_s=SEND_LIMIT_S)
                self._answered.notify_all()
            while not self._closing:
                try:
                    message = line.receive(POLL_S)
                except DeadlineExceeded:
                    continue
                if message is None:
                    return
                self._starts = 0
                self._hear(message)
        except (CkptError, OSError) as error:
            if not self._closing:
                log.warning("rank %d lost its keeper: %s", self._rank, error)

    def _hear(self, message: ToWorker) -> None:
        if isinstance(message, Settled | Listening):
            with self._answered:
                self._answers.append(message)
                self._answered.notify_all()
            return
        pending = self._pending.get(message.attempt)
        if pending is None:
            return
        match message:
            case Freed():
                pending.freed(message.runs)
            case Complete():
                pending.complete = True
                self._resolved(pending)
            case Outcome():
                self._resolve(pending, message)

    def _resolve(self, pending: Pending, outcome: Outcome) -> None:
        self._pending.pop(pending.attempt, None)
        pending.resolve(outcome)
        self._resolved(pending)

    def _give_up(self, error: Exception) -> None:
        """This thread ends, and what waits for it fails; what comes after finds no thread, and starts another one."""
        message = f"the keeper of this node could not be started: {error}{self._tail()}"
        with self._answered:
            self._problem, self._thread, lost = message, None, list(self._pending.values())
            if self._line is not None:
                self._line.shutdown()
                self._line = None
            self._answered.notify_all()
        for pending in lost:
            self._resolve(pending, Outcome(pending.attempt, kind="SaveFailed", message=message))

    def _send(self, message: ToKeeper) -> None:
        with self._lock:
            if self._line is not None:
                self._try(lambda line: line.send(message, timeout_s=SEND_LIMIT_S))

    def _introduce(self, line: Line, pending: Pending) -> None:
        line.send(pending.layouts, timeout_s=SEND_LIMIT_S)
        line.send(pending.order, fd=pending.ring, timeout_s=SEND_LIMIT_S)

    def _try(self, act: Callable[[Line], None]) -> None:
        assert self._line is not None
        try:
            act(self._line)
        except (CkptError, OSError):
            self._line.shutdown()  # the thread notices, and says it again to the next keeper
            self._line = None

    # Starting it

    def _connect(self) -> Line | None:
        """A line to the keeper, started if need be; None if this courier is closed meanwhile."""
        self._starts += 1
        if self._starts > STARTS_LIMIT:
            raise SaveFailed(f"it was lost {STARTS_LIMIT} times in a row")
        deadline, problem = time.monotonic() + START_LIMIT_S, "it did not answer"
        while time.monotonic() < deadline and not self._closing:
            self.ram.make()
            if self._users is None:
                self._users = Claim.take(self.ram.file("users"), shared=True)
            if self._users is not None:
                try:
                    return Line.connect(self.ram.file("socket"), ToWorker)
                except (CkptError, OSError) as error:
                    problem = str(error)
                    try:
                        self._start_keeper()
                    except SaveFailed as failed:
                        problem = str(failed)
                        time.sleep(AGAIN_S)
            time.sleep(0.02)
        if self._closing:
            return None
        raise SaveFailed(f"{problem} within {START_LIMIT_S:g} s")

    def _start_keeper(self) -> None:
        """Start one unless another worker of this node is at it; and those of other runs that were lost."""
        starting = Claim.take(self.ram.file("starting"))
        if starting is None:
            return
        try:
            self.ram.write(self.ram.file("run"), self._url.encode())
            for tier in runs_on_this_node(self.ram.root):
                if os.path.exists(tier.file("run")) and not _has_keeper(tier):
                    self._spawn(tier)
            deadline = time.monotonic() + START_LIMIT_S
            while not _has_keeper(self.ram) and time.monotonic() < deadline and not self._closing:
                time.sleep(0.01)
        finally:
            starting.release()

    def _spawn(self, tier: RamTier) -> None:
        try:
            _spawn(tier)
        except (subprocess.SubprocessError, OSError) as error:
            if tier.name == self.ram.name:
                raise SaveFailed(f"its process did not start: {error}") from error
            log.warning("the keeper of another run in %s could not be started: %s", tier.root, error)

    def _tail(self) -> str:
        with contextlib.suppress(OSError):
            data = Path(self.ram.file("log")).read_bytes()[-LOG_TAIL_BYTES:]
            return "\nIts log ends:\n" + data.decode(errors="replace") if data else ""
        return ""


def settle_what_was_left(run: RunDirectory, limit_s: float, *, lost: bool = False) -> None:
    """Return once all that workers left of `run` in this node's memory is committed or given up.

    Blocking; `DeadlineExceeded` after `limit_s`, any other `CkptError` or `OSError` if the keeper cannot be had.
    """
    tier = RamTier.of(run)
    if not tier.exists():
        return
    courier = Courier(tier, run.url, -1, lambda pending: None)
    try:
        courier.settle(limit_s, lost=lost)
    finally:
        courier.close(goodbye=False)


def _has_keeper(tier: RamTier) -> bool:
    lock = Claim.take(tier.file("lock"))
    if lock is not None:
        lock.release()
    return lock is None


def _spawn(tier: RamTier) -> None:
    """Start the keeper of `tier` in a session of its own. Returns when it is on its way."""
    package = str(Path(ckpt.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    with open(tier.file("log"), "ab") as out:
        subprocess.run(
            [sys.executable, "-m", "ckpt.keeper", tier.root, tier.name],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd="/",
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            timeout=START_LIMIT_S,
            check=True,
        )
