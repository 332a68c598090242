"""Example programs as a user runs them: started, read line by line, killed with all their ranks, started again.

A program prints `step N loss X` after each step, X exact. Its standard output is a pipe of one page, so it is never
more than some 130 steps ahead of its reader: a test decides where it dies, not the speed of the machine.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs import ROOT
from keepers import until

from ckpt.errors import NotFound
from ckpt.run import RunDirectory

EXAMPLES = ROOT / "examples"
DEADLINE_S = 240
AHEAD, SPREAD = 130, 30  # steps that a program may be ahead of its reader, and that a kill is drawn from
_LINE = re.compile(r"step (\d+) loss (\S+)$")

Losses = dict[int, str]


class Program:
    """A run of one example on `ranks` processes, under torchrun where they are several."""

    def __init__(self, script: Path, *arguments: str, ranks: int = 1) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        self.log = Path(arguments[0]).with_suffix(f".{script.stem}.log")
        self.losses: Losses = {}
        self.ranks = ranks
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, str(script), *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                pipesize=4096,
                start_new_session=True,
            )

    def read(self, until_step: int | None = None) -> None:
        """Take in what it prints, up to a step or a later one, or to its end."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if found := _LINE.search(line.decode().rstrip()):
                self.losses[int(found[1])] = found[2]
                if until_step is not None and int(found[1]) >= until_step:
                    return
        assert until_step is None, f"it ended before step {until_step}: {self.log.read_text()}"

    def end(self, code: int = 0) -> Losses:
        self.read()
        returned, log = self.process.wait(DEADLINE_S), self.log.read_text()
        if code == 0 and self.ranks > 1 and "SIGABRT" in log:
            return self.losses  # torch's threads over gloo may abort a process that ends; the losses tell the rest
        assert returned == code, f"it ended with {returned}: {log}"
        return self.losses

    def kill(self) -> None:
        """SIGKILL to it and all it started, but for the keepers, which live through that by design."""
        for pid in [*_descendants(self.process.pid), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(DEADLINE_S)
        self.read()


def _descendants(pid: int) -> Iterator[int]:
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            if b"ckpt.keeper" not in Path(f"/proc/{child}/cmdline").read_bytes():
                yield from _descendants(child)
                yield child


@contextmanager
def running(script: Path, *arguments: str, ranks: int = 1) -> Iterator[Program]:
    program = Program(script, *arguments, ranks=ranks)
    try:
        yield program
    finally:
        if program.process.poll() is None:
            program.kill()
        assert program.process.stdout is not None
        program.process.stdout.close()


def committed(url: Path) -> int:
    """The newest step of a run, 0 if there is none."""
    try:
        head = RunDirectory.open(url).log.read().head
    except NotFound:
        return 0
    return head.step if head else 0


def killed_and_resumed(folder: Path, name: str, *, ranks: int = 1, steps: int = 200, kill_after: int = 45) -> None:
    """`after.py`, killed and started again, prints the losses of an undisturbed `before.py`, to the last bit."""
    url, script = folder / "run", EXAMPLES / name
    with (
        running(script / "before.py", str(folder / "plain"), str(steps), ranks=ranks) as undisturbed,
        running(script / "after.py", str(url), str(steps), ranks=ranks) as killed,
    ):
        killed.read(kill_after)
        until("a step is committed", lambda: committed(url), DEADLINE_S)
        assert killed.process.poll() is None
        killed.kill()
        expected = undisturbed.end()
    with running(script / "after.py", str(url), str(steps), ranks=ranks) as resumed:
        losses = resumed.end()
    assert sorted(expected) == list(range(1, steps + 1))
    assert 1 < min(losses) <= max(killed.losses) + 1, "it did not go on from a step that was saved"
    assert {**killed.losses, **losses} == expected
    assert killed.losses.items() <= expected.items()
    assert committed(url) == steps


def killed_often(folder: Path, name: str, seed: int, *, kills: int, ranks: int = 1) -> None:
    """`after.py`, killed again and again, prints the losses of an undisturbed `before.py`.

    Each time some steps after its start, and once it has committed one; that is also how far it gets at most.
    """
    url, script, chance = folder / "run", EXAMPLES / name, random.Random(seed)
    steps = (AHEAD + SPREAD + 20) * (kills + 1)
    print(f"seed {seed}")
    with running(script / "before.py", str(folder / "plain"), str(steps), ranks=ranks) as undisturbed:
        expected = undisturbed.end()
    seen: Losses = {}
    for kill in range(kills):
        before = committed(url)
        with running(script / "after.py", str(url), str(steps), ranks=ranks) as program:
            program.read(1)  # wherever it goes on
            assert kill == 0 or min(program.losses) > 1, "it did not go on from a step that was saved"
            program.read(min(program.losses) + chance.randrange(SPREAD))
            until("a step more is committed", lambda before=before: committed(url) > before, DEADLINE_S)
            assert program.process.poll() is None, f"it ended before kill {kill + 1}"
            program.kill()
            seen |= program.losses
        assert seen.items() <= expected.items()
    with running(script / "after.py", str(url), str(steps), ranks=ranks) as last:
        seen |= last.end()
    assert seen == expected
