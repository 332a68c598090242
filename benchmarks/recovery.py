"""How long a killed worker keeps a job from training: stock torchrun + DCP beside elastic + ckpt, cold and warm.

    python benchmarks/recovery.py                20 kills each, 2 nodes of one worker
    python benchmarks/recovery.py --kills 4
    python benchmarks/recovery.py --write        also update benchmarks/RESULTS.md

They take turns: a fresh job, and --kills-a-job kills of one worker by SIGKILL, on each node in turn, each after a
random part of some steps. "Recovered" is the time from the kill to the next step that the whole job has completed. A
job that has not completed one within the limit has failed, and a fresh one takes its place.
"""

import argparse
import contextlib
import datetime
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import machine
from results import write_section

HERE = Path(__file__).resolve().parent
LIBRARIES = {
    "elastic": "elastic + ckpt",
    "warm": "elastic + ckpt, warm workers",
    "stock": "stock torchrun + DCP",
}
PRELOAD = "torch,torch.distributed.checkpoint,torch.distributed.checkpoint.state_dict,torch.nn.parallel,ckpt"
LIMIT_S = 120.0
FIRST_STEPS = 5  # before a kill


class NotInTime(RuntimeError):
    """The job did not get so far."""


class Job:
    """The agents of one job, a node each, in a folder of its own. Use as a context manager: nothing is left of it."""

    def __init__(self, library: str, nodes: int, folder: Path) -> None:
        self.nodes, self.folder = nodes, folder
        folder.mkdir()
        self._ram = Path(tempfile.mkdtemp(prefix="holdfast-recovery-", dir="/dev/shm"))
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        backend = ("c10d", f"127.0.0.1:{port}") if library == "stock" else ("elastic", str(folder / "run"))
        self._agents = [self._start(library, backend, node) for node in range(nodes)]

    def _start(self, library: str, backend: tuple[str, str], node: int) -> subprocess.Popen[bytes]:
        ram = self._ram / str(node)
        ram.mkdir()
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE.parent),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "CKPT_RAM_DIR": str(ram),
            "CKPT_KEEPER_GRACE_S": "30",
            "ELASTIC_QUARANTINE_FAILURES": "0",  # every kill is on purpose
        }
        job = [str(HERE / "recovery_job.py"), "stock" if library == "stock" else "elastic", str(self.folder)]
        command = [
            sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", backend[0], "--rdzv-endpoint", backend[1],
            "--rdzv-id", "recovery", "--max-restarts", "1000000", "--nnodes", str(self.nodes), "--nproc-per-node", "1",
            *job,
        ]  # fmt: skip
        if library == "warm":
            command = [
                sys.executable, "-c", "from elastic.cli import main; main()", "run", "--preload", PRELOAD,
                "--run-id", "recovery", "--nodes", str(self.nodes), "--workers", "1", backend[1], "--", *job,
            ]  # fmt: skip
        with open(self.folder / f"agent{node}.log", "ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def steps(self) -> list[dict[str, Any]]:
        """What every worker has completed, in order of time."""
        found = []
        for path in self.folder.glob("*.jsonl"):
            lines = path.read_text().splitlines(keepends=True)
            found += [json.loads(line) for line in lines if line.endswith("\n")]
        return sorted(found, key=lambda event: float(event["at"]))

    def completed_after(self, at: float, steps: int = 1) -> tuple[float, dict[int, int]]:
        """Wait for steps that all ranks have completed after `at`, in new processes: when, and pids by rank."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            by_rank: dict[int, dict[int, list[float]]] = {}
            for event in self.steps():
                by_rank.setdefault(event["rank"], {}).setdefault(event["pid"], []).append(event["at"])
            newest = {rank: max(pids.items(), key=lambda item: item[1][0]) for rank, pids in by_rank.items()}
            ready = [times[steps - 1] for _, times in newest.values() if len(times) >= steps and times[0] > at]
            if len(ready) == self.nodes:
                return max(ready), {rank: pid for rank, (pid, _) in newest.items()}
            if all(agent.poll() is not None for agent in self._agents):
                raise NotInTime("every agent has ended")
            time.sleep(0.01)
        raise NotInTime(f"no step within {LIMIT_S:g} s")

    def await_standbys(self) -> None:
        """Wait until every agent has one that is ready."""
        deadline = time.monotonic() + LIMIT_S
        while not {agent.pid for agent in self._agents} <= standbys():
            if time.monotonic() > deadline:
                raise NotInTime(f"no standbys within {LIMIT_S:g} s")
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self._agents:
            agent.kill()
            agent.wait()
        for pid in ours(str(self._ram)):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._ram)
        shutil.rmtree(self.folder)


def standbys() -> set[int]:
    """The parents of all that are ready, on this machine."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                name, _, rest = (entry / "stat").read_text().partition(" (")[2].rpartition(") ")
                if name == "elastic-standby":
                    found.add(int(rest.split()[1]))
    return found


def ours(ram: str) -> list[int]:
    """Workers and keepers, by the memory directory that was given to them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"CKPT_RAM_DIR={ram}/".encode() in environment:
                found.append(int(entry.name))
    return found


def kill_and_wait(
    job: Job, kills: int, chance: random.Random, say: Callable[[str], None], *, warm: bool
) -> list[float | None]:
    """The seconds from each kill to the next completed step; None ends the list: it did not recover.

    `warm`: a kill waits for the standbys.
    """
    found: list[float | None] = []
    _, pids = job.completed_after(0.0, FIRST_STEPS)
    for number in range(kills):
        if warm:
            job.await_standbys()
        time.sleep(chance.random() * 0.5)
        at = time.time()
        os.kill(pids[number % job.nodes], signal.SIGKILL)
        try:
            recovered, _ = job.completed_after(at)
            found.append(recovered - at)
            say(f"{found[-1]:.2f} s")
            _, pids = job.completed_after(at, FIRST_STEPS)
        except NotInTime as error:
            say(str(error))
            return [*found[:number], None]
    return found


def measure(given: argparse.Namespace, folder: Path) -> dict[str, list[float | None]]:
    chance = random.Random(given.seed)
    found: dict[str, list[float | None]] = {library: [] for library in LIBRARIES}
    turn = 0
    while any(len(times) < given.kills for times in found.values()):
        turn += 1
        for library, times in found.items():
            kills = min(given.kills_a_job, given.kills - len(times))
            if kills:
                with Job(library, given.nodes, folder / f"{library}{turn}") as job:
                    say = lambda text, name=library: print(f"{name}: {text}", flush=True)  # noqa: E731
                    try:
                        times += kill_and_wait(job, kills, chance, say, warm=library == "warm")
                    except NotInTime as error:  # before the first kill
                        raise SystemExit(f"{library}: the job does not train: {error}") from None
    return found


def report(found: dict[str, list[float | None]], given: argparse.Namespace, notes: list[str]) -> str:
    lines = [
        "## Recovery from a killed worker",
        "",
        f"`python benchmarks/recovery.py --kills {given.kills} --write`; {notes[0]}",
        "",
        f"{given.nodes} nodes of one worker on one machine, gloo, a small model, a save after every step; seconds from "
        f"SIGKILL of one worker to the next step that all have completed. Failed: none within {LIMIT_S:g} s. To reach: "
        "all recover, in no longer than stock's successful runs, and in half of that with warm workers, whose kills "
        "wait until the standbys are ready.",
        *[f"\n{note}" for note in notes[1:]],
        "",
        "| | recovered | median s | lowest - highest s |",
        "| --- | ---: | ---: | ---: |",
    ]
    for library, name in LIBRARIES.items():
        times = sorted(one for one in found[library] if one is not None)
        spread = f"{statistics.median(times):.2f} | {times[0]:.2f} - {times[-1]:.2f}" if times else "- | -"
        lines.append(f"| {name} | {len(times)} of {len(found[library])} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kills-a-job", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    busy = machine.busy()
    folder = Path(tempfile.mkdtemp(prefix="recovery-", dir=machine.default_folder()))
    try:
        notes = [f"{datetime.date.today()}; {machine.describe(folder)}.", *([busy] if busy else [])]
        section = report(measure(given, folder), given, notes)
    finally:
        shutil.rmtree(folder)
    print(section)
    if given.write:
        write_section("recovery", section)


if __name__ == "__main__":
    main()
