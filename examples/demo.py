"""`make demo`: one training run, killed twice in the middle of a save, continued on other numbers of ranks.

`train_gpt.py` runs under torchrun on 4 ranks; while it writes a checkpoint, every process of the job gets SIGKILL. It
is started again on 2 ranks, killed in a save again, and finishes on 3. The demo then compares digests of the restored
state with those of the saved state, and the losses of the steps that had to be computed twice.

Nothing here sleeps to hit a save: the demo follows the training's journal, then watches the run's directory for an
attempt that has bytes in it but no MANIFEST yet. Committed is what `ckpt.Checkpointer.latest_step` says afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from demo_report import Check, Job, Outcome, check_table, draw, judge, outcome_table, tell
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import ckpt

HERE = Path(__file__).resolve().parent
MARK = "HOLDFAST_DEMO_JOB"  # environment variable by which a job's processes are found


class DemoFailed(Exception):
    """The demonstration could not be carried out; says at which step and where to look."""


@dataclass(frozen=True)
class Deadline:
    """A bound on waiting; one of them bounds the whole demo."""

    at: float  # time.monotonic()

    def check(self, waiting_for: str) -> None:
        if time.monotonic() > self.at:
            raise DemoFailed(f"out of time (--timeout-s) while waiting for {waiting_for}")


@dataclass(frozen=True)
class Settings:
    out: Path
    total_steps: int
    save_every: int
    deadline: Deadline

    @property
    def run(self) -> Path:
        return self.out / "run"

    @property
    def plot(self) -> Path:
        return self.out / "loss.png"

    @property
    def temporary(self) -> Path:
        return (self.out / "tmp").resolve()

    def jobs(self) -> list[Job]:
        """4 ranks, killed a third of the way; 2 ranks, killed after two thirds; 3 ranks to the end."""
        saves = self.total_steps // self.save_every
        first, second = (round(saves * part) * self.save_every for part in (1 / 3, 2 / 3))
        return [Job(1, 4, first), Job(2, 2, second), Job(3, 3, None)]

    def journal(self, job: Job) -> Path:
        return self.out / f"job-{job.number}.jsonl"

    def log(self, job: Job) -> Path:
        return self.out / f"job-{job.number}.log"


# ---- processes


def processes_marked(mark: str) -> list[int]:
    """Pids of all live processes that inherited the mark, whatever session or parent they have now."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # gone meanwhile, or not ours
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def send_sigkill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Torchrun:
    """A running job. Leaving the `with` kills whatever is left of it: torchrun puts each worker in its own session."""

    def __init__(self, job: Job, settings: Settings) -> None:
        self.mark = uuid.uuid4().hex
        self.log = settings.log(job)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.world)]
        command += [str(HERE / "train_gpt.py"), str(settings.run), "--journal", str(settings.journal(job))]
        command += ["--steps", str(settings.total_steps), "--save-every", str(settings.save_every)]
        everywhere_alike = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        leftovers = {"TMPDIR": str(settings.temporary)}  # a killed torchrun cannot remove its own
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env=os.environ | everywhere_alike | leftovers | {MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill_all()

    def pids(self) -> list[int]:
        return processes_marked(self.mark)

    def kill_all(self, timeout_s: float = 20.0) -> None:
        """SIGKILL until no process of the job is left."""
        deadline = Deadline(time.monotonic() + timeout_s)
        while pids := self.pids():
            send_sigkill(pids)
            deadline.check(f"processes {pids} to die of SIGKILL")
            time.sleep(0.01)
        self.process.wait(timeout_s)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def failure(self) -> DemoFailed:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = [line for line in lines if line.startswith("[rank0]:")] or lines
        ending = "\n".join(last[-12:])
        return DemoFailed(f"the training ended with exit code {self.process.returncode}; {self.log} ends:\n{ending}")


class JournalReader:
    """Events that `train_gpt.py` appended since the last call; a line still being written waits for the next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0

    def new_events(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield json.loads(line)


# ---- the run's directory, as docs/format.md describes it


def step_of(attempt: Path) -> int:
    return int(attempt.name.partition(".")[0])


def attempts(run: Path) -> list[Path]:
    """Directories of all attempts to save a step, finished or not."""
    return [path for path in (run / "steps").glob("*.*") if path.name.partition(".")[0].isdigit()]


def size_bytes(directory: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat().st_size
    return total


def attempt_under_way(run: Path, step: int, least_bytes: int) -> Path | None:
    """An attempt to save `step`, or a later one, of which so much is written, or all."""
    for path in attempts(run):
        if step_of(path) >= step and (size_bytes(path) >= least_bytes or (path / "MANIFEST").exists()):
            return path
    return None


def committed_bytes(run: Path, step: int | None) -> int:
    sizes = [size_bytes(path) for path in attempts(run) if step_of(path) == step and (path / "MANIFEST").exists()]
    return max(sizes, default=0)


def latest_step(run: Path) -> int | None:
    with ckpt.Checkpointer(str(run)) as reader:  # appends nothing to the log until it saves or restores
        return reader.latest_step()


# ---- one job


def run_job(job: Job, settings: Settings, view: View) -> Outcome:
    outcome = Outcome(job)
    reader = JournalReader(settings.journal(job))
    began = time.monotonic()
    with Torchrun(job, settings) as torchrun:
        if job.kill_in_save_of is None:
            follow_until(settings.total_steps, outcome, torchrun, reader, settings.deadline, view)
            wait_for_end(torchrun, settings.deadline)
        else:
            follow_until(job.kill_in_save_of - 1, outcome, torchrun, reader, settings.deadline, view)
            outcome.committed_before_kill = latest_step(settings.run)
            attempt = kill_in_save(job.kill_in_save_of, outcome, torchrun, settings)
    outcome.seconds = time.monotonic() - began
    for event in reader.new_events():
        outcome.record(event)
    outcome.committed = latest_step(settings.run)
    outcome.committed_bytes = committed_bytes(settings.run, outcome.committed)
    if job.kill_in_save_of is not None:
        outcome.in_mid_save = (outcome.committed or 0) < step_of(attempt)
        outcome.kill = describe_kill(attempt, outcome.in_mid_save)
    return outcome


def follow_until(
    step: int, outcome: Outcome, torchrun: Torchrun, reader: JournalReader, deadline: Deadline, view: View
) -> None:
    """Reads the journal until `step` steps are complete."""
    while outcome.last_step < step:
        ended = torchrun.ended()  # asked before reading: whatever it wrote is there then
        for event in reader.new_events():
            outcome.record(event)
            view.show(outcome)
        if ended and outcome.last_step < step:
            raise torchrun.failure()
        deadline.check(f"step {step} on {outcome.job.world} ranks; see {torchrun.log}")
        time.sleep(0.02)


def kill_in_save(step: int, outcome: Outcome, torchrun: Torchrun, settings: Settings) -> Path:
    """Kills every process of the job when a third of the checkpoint of `step` is written. Returns that attempt."""
    third = max(1, committed_bytes(settings.run, outcome.committed_before_kill) // 3)
    pids = torchrun.pids()  # known beforehand: to find them takes longer than a small save
    while (attempt := attempt_under_way(settings.run, step, third)) is None:
        if torchrun.ended():
            raise torchrun.failure()
        settings.deadline.check(f"the save of step {step}; see {torchrun.log}")
        time.sleep(0.001)
    send_sigkill(pids)
    torchrun.kill_all()
    return attempt


def wait_for_end(torchrun: Torchrun, deadline: Deadline) -> None:
    """The job has to end by itself, with exit code 0."""
    while not torchrun.ended():
        deadline.check(f"the training to end; see {torchrun.log}")
        time.sleep(0.05)
    if torchrun.process.returncode:
        raise torchrun.failure()


def describe_kill(attempt: Path, in_mid_save: bool) -> str:
    if not in_mid_save:
        return f"just after the commit of step {step_of(attempt)}"
    state = "complete, not committed" if (attempt / "MANIFEST").exists() else "no MANIFEST"
    return f"saving step {step_of(attempt)}, {size_bytes(attempt) / 1e6:.0f} MB, {state}"


def check_run(run: Path, deadline: Deadline) -> Check:
    """`ckpt check`: reads every byte of the newest step again and verifies it against its digests."""
    command = [str(Path(sys.executable).with_name("ckpt")), "check", str(run)]
    remaining_s = max(1.0, deadline.at - time.monotonic())
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=remaining_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise DemoFailed(f"out of time (--timeout-s) while waiting for {' '.join(command)}") from error
    seen = f"exit code {result.returncode}"
    if result.returncode:
        seen += ": " + " ".join(result.stderr.split()[-30:])
    return Check("`ckpt check` finds the newest step intact", result.returncode == 0, seen)


# ---- terminal


class View:
    """The terminal: one progress bar, and a line for each thing that happens."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.task = self.progress.add_task("starting", total=total_steps, loss="-")

    def say(self, text: str) -> None:
        self.progress.console.print(text)

    def show(self, outcome: Outcome) -> None:
        loss = outcome.losses.get(outcome.last_step)
        self.progress.update(
            self.task,
            completed=outcome.last_step,
            description=f"{outcome.job.world} ranks",
            loss="-" if loss is None else f"{loss:.3f}",
        )


# ---- main


def demonstrate(settings: Settings, console: Console) -> bool:
    began = time.monotonic()
    prepare(settings)
    view = View(console, settings.total_steps)
    outcomes: list[Outcome] = []
    with view.progress:
        for job in settings.jobs():
            outcome = run_job(job, settings, view)
            outcome.resumed_from = outcome.committed or 0
            if outcomes:
                outcomes[-1].resumed_from = outcome.start_step
            outcomes.append(outcome)
            view.say(tell(outcome))
    checks = judge(outcomes, settings.total_steps, check_run(settings.run, settings.deadline))
    draw(outcomes, settings.plot)
    shutil.rmtree(settings.temporary, ignore_errors=True)
    console.print("", outcome_table(outcomes), "", check_table(checks), "")
    console.print(f"loss plot: {settings.plot}")
    passed = all(check.holds for check in checks)
    verdict = "[bold green]PASS[/]" if passed else f"[bold red]FAIL[/] (logs in {settings.out})"
    worlds = " → ".join(str(outcome.job.world) for outcome in outcomes)
    twice = sum(outcome.steps_lost for outcome in outcomes)
    console.print(
        f"{verdict} ranks {worlds}, {len(outcomes) - 1} kills, {sum(o.in_mid_save for o in outcomes)} of them in "
        f"mid-save; {twice} of {settings.total_steps} steps computed again; {time.monotonic() - began:.0f} s"
    )
    return passed


def prepare(settings: Settings) -> None:
    """An empty place for this demo; removes only what an earlier demo left there."""
    settings.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(settings.run, ignore_errors=True)
    shutil.rmtree(settings.temporary, ignore_errors=True)
    for old in (*settings.out.glob("job-*.jsonl"), *settings.out.glob("job-*.log"), settings.plot):
        old.unlink(missing_ok=True)
    settings.temporary.mkdir()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("demo-out"), help="output directory (demo-out)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=5, metavar="STEPS")
    parser.add_argument("--timeout-s", type=float, default=235.0, help="bound on the whole demo (235)")
    arguments = parser.parse_args()
    if arguments.steps < 6 * arguments.save_every:
        parser.error("--steps has to be 6 times --save-every or more: two kills, each after some commits")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the jobs are killed with us
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    deadline = Deadline(time.monotonic() + arguments.timeout_s)
    settings = Settings(arguments.out, arguments.steps, arguments.save_every, deadline)
    try:
        return 0 if demonstrate(settings, console) else 1
    except DemoFailed as failure:
        console.print("[bold red]FAIL[/]", escape(str(failure)))
        return 1
    except KeyboardInterrupt:
        console.print("[bold red]stopped[/]; every process of the demo is killed")
        return 130


if __name__ == "__main__":
    sys.exit(main())
