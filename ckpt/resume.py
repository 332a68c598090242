"""`ckpt resume`: from which step a run goes on, and how often its command is started again.

Pure decisions (`choose`, `judge`) and the loop around a child process (`Supervisor`). The command learns the run's
address from CKPT_URL; where it shall go back to an older step, CKPT_RESUME_FROM names the attempt and the generation in
which that was asked for, so that it is done once, however often the command or its workers start again.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import tenacity

from ckpt.errors import Corrupt, Fenced, Incompatible, NotFound
from ckpt.log import View
from ckpt.records import Commit, parse_attempt

RESUME_FROM: Final = "CKPT_RESUME_FROM"
TRIES: Final = 3  # starts in a row that commit nothing, before the failure counts as one that will not go away
WAIT_S: Final = 60.0  # at most between two starts
HOPELESS: Final = {
    2: "it was called in a wrong way",
    NotFound.exit_code: "it found no checkpoint where it needs one",
    Fenced.exit_code: "a newer job has taken the run",
    Corrupt.exit_code: "the checkpoint is damaged",
    Incompatible.exit_code: "its state does not fit the checkpoint",
}
_ASKED_TO_STOP = (128 + signal.SIGTERM, 128 + signal.SIGINT)


@dataclass(frozen=True)
class Choice:
    """Where a run goes on: `commit` (None: from nothing), whether that is behind its head, and why."""

    commit: Commit | None
    back: bool
    why: str
    newest_attempt: int | None  # step of the newest attempt of any kind

    @property
    def behind(self) -> int:
        """Steps that were begun and are computed again."""
        at = self.commit.step if self.commit else 0
        return max((self.newest_attempt or 0) - at, 0)


def choose(
    view: View,
    attempts: Sequence[str],
    is_whole: Callable[[Commit], bool],
    *,
    step: int | None = None,
    before: int | None = None,
    allow_older: bool = False,
) -> Choice:
    """The step to go on from: the newest, or `step`, or the newest below `before`.

    `attempts` are all that have a directory. Where the step is not `is_whole`, the newest older one that is, if
    `allow_older`; else Corrupt. NotFound where a step is asked for that is not there. A `step` that was left behind by
    going back, and not passed again, may be asked for, too: that is how one undoes it.
    """
    lineage = view.standing()
    left = [commit for commit in view.standing_outside() if commit.step == step]
    if left and not any(commit.step == step for commit in lineage):
        lineage = [commit for commit in view.lineage_of(left[-1].attempt) if commit.attempt not in view.retired]
    newest = max((key[0] for key in map(parse_attempt, attempts) if key is not None), default=None)
    wanted = [c for c in lineage if (step is None or c.step == step) and (before is None or c.step < before)]
    if not wanted:
        if step is None and before is None:
            return Choice(None, False, "there is no checkpoint yet: it starts from nothing", newest)
        what = f"no step {step}" if step is not None else f"no step before {before}"
        known = ", ".join(str(commit.step) for commit in lineage[-8:]) or "none"
        raise NotFound(f"there is {what} in this run; newest steps: {known}. `ckpt ls` lists all")
    for commit in reversed(lineage[: lineage.index(wanted[-1]) + 1]):
        if is_whole(commit):
            return Choice(commit, commit is not view.head, _why(commit, wanted[-1], view.head), newest)
        if not allow_older:
            raise Corrupt(
                f"step {commit.step} is damaged (`ckpt check --step {commit.step}` says where). Nothing was started. "
                "--allow-older takes the newest older step that is whole"
            )
    raise Corrupt(f"step {wanted[-1].step} and all older ones are damaged; `ckpt check --all` says where")


def _why(commit: Commit, wanted: Commit, head: Commit | None) -> str:
    if commit is not wanted:
        return f"the newest that is whole: step {wanted.step} is damaged"
    return "the newest that was committed" if commit is head else "as asked; newer steps are left behind"


@dataclass(frozen=True)
class Verdict:
    """What follows from one start that has ended: end with `code`, or (None) start again; and why."""

    code: int | None
    why: str


def judge(code: int, *, stopped: bool, progressed: bool, failures: int, allow_older: bool = False) -> Verdict:
    """What to do after an exit with `code` (128 + n: killed by signal n).

    `stopped`: a signal was passed on to the command. `progressed`: a step was committed since it was started;
    `failures` starts before this one ended without that, in a row.
    """
    if code == 0:
        return Verdict(0, "it ended well")
    if stopped or code in _ASKED_TO_STOP:
        return Verdict(code, "it was asked to stop")
    if code in HOPELESS and not (code == Corrupt.exit_code and allow_older):
        return Verdict(code, f"{HOPELESS[code]} (exit {code}): starting again would not help")
    if not progressed and failures + 1 >= TRIES:
        return Verdict(
            code,
            f"it failed {failures + 1} times in a row (exit {code}) before it committed a step: this failure does not "
            "go away by itself",
        )
    return Verdict(None, f"it failed (exit {code})" + (" after new steps" if progressed else ""))


def environment(url: str, choice: Choice, generation: int) -> dict[str, str]:
    """What the command gets on top of this process's environment."""
    found = {"CKPT_URL": url}
    if choice.back and choice.commit is not None:
        found[RESUME_FROM] = f"{choice.commit.attempt}@{generation}"
    return found


def asked_back(view: View, asked: str | None) -> Commit | None:
    """The commit that `asked` (of CKPT_RESUME_FROM) wants the run to go back to; None once that was done.

    Raises Incompatible if it cannot be read, NotFound if there is no such commit (any more).
    """
    if not asked:
        return None
    attempt, _, number = asked.partition("@")
    if parse_attempt(attempt) is None or not number.isdecimal():
        raise Incompatible(f"{RESUME_FROM} is <attempt>@<generation>, as `ckpt resume` sets it, not {asked!r:.200}")
    if any(start.base == attempt and start.generation > int(number) for start in view.starts):
        return None
    if attempt not in view.commits or attempt in view.retired:
        raise NotFound(f"{RESUME_FROM} asks for {attempt}, which is not in this run; `ckpt ls` lists what there is")
    return view.commits[attempt]


@dataclass
class Supervisor:
    """Starts a command until it ends well, cannot be helped, or is stopped; signals go on to it.

    `before(failed)` is called before each start, and returns the environment for it; `failed`: the code of the one
    before if that committed nothing. `progress()` is a number that grows with each commit; `tell` is told what
    happens. At most `restarts` starts after the first, with growing random waits in between while nothing is committed.
    """

    command: Sequence[str]
    before: Callable[[int | None], dict[str, str]]
    progress: Callable[[], int]
    tell: Callable[[str], None]
    restarts: int
    allow_older: bool = False
    _failed: int | None = None
    _failures: int = 0  # in a row, without a commit
    _child: subprocess.Popen[bytes] | None = None
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> int:
        """The exit code to end with. Raises CkptError where `before` does, OSError where the command cannot start."""
        starting = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda verdict: verdict.code is None),
            wait=lambda state: random.uniform(0, min(WAIT_S, 2.0**self._failures)),
            sleep=tenacity.sleep_using_event(self._stop),
            stop=tenacity.stop_after_attempt(self.restarts + 1),
            retry_error_callback=lambda state: Verdict(self._failed, "the budget of restarts is used up"),
        )
        with self._signals_passed_on():
            verdict: Verdict = starting(self._once)
        self.tell(verdict.why)
        return verdict.code or 0

    def _once(self) -> Verdict:
        if self._stop.is_set():
            return Verdict(_ASKED_TO_STOP[0], "it was asked to stop")
        extra, at = self.before(self._failed if self._failures else None), self.progress()
        self._child = subprocess.Popen(self.command, env={**os.environ, **extra})
        if self._stop.is_set():
            self._child.terminate()
        returned = self._child.wait()
        self._failed = returned if returned >= 0 else 128 - returned
        progressed = self.progress() > at
        verdict = judge(
            self._failed,
            stopped=self._stop.is_set(),
            progressed=progressed,
            failures=self._failures,
            allow_older=self.allow_older,
        )
        self._failures = 0 if progressed else self._failures + 1
        if verdict.code is None:
            self.tell(f"{verdict.why}; it is started again")
        return verdict

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        def passed_on(number: int, frame: Any) -> None:
            self._stop.set()
            if self._child is not None and self._child.poll() is None:
                self._child.send_signal(number)

        before = {number: signal.signal(number, passed_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
