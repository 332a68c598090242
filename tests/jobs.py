"""Real multi-process jobs for the tests: N ranks over gloo on loopback, each running one function.

A worker is a module-level function `fn(rank, world, *args)`; what it returns or raises comes back to the test.
`Pool` keeps its processes, so that a test does not pay for importing torch; every task gets a process group of
its own. `run_job` starts fresh processes, for tests that kill them. Every job has a deadline, and no process
outlives the call or the pool.
"""

from __future__ import annotations

import importlib
import os
import pickle
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEADLINE_S = 120
NO_GROUP = 97  # the exit code of a rank that did not find the others


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: its result, the exception it raised, or the signal that killed it."""

    returncode: int | None
    result: Any = None
    error: BaseException | None = None
    output: str = ""


class Pool:
    """Up to `size` ranks that run one task after the other."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        self._workers = [_Worker(Path(self._folder.name)) for _ in range(size)]

    def run(self, fn: Callable[..., Any], world: int, *args: Any, deadline_s: float = DEADLINE_S) -> list[Outcome]:
        """Run `fn(rank, world, *args)` on `world` ranks; how each ended, in order of rank.

        Where the ranks did not find each other, before anything of the task ran, fresh ones try it once more.
        """
        call = pickle.dumps((fn.__module__, fn.__qualname__, args))
        outcomes = self._run(call, world, deadline_s)
        if any(outcome.returncode == NO_GROUP for outcome in outcomes):
            outcomes = self._run(call, world, deadline_s)
        return outcomes

    def _run(self, call: bytes, world: int, deadline_s: float) -> list[Outcome]:
        self._count += 1
        name = f"task-{self._count}"
        for rank, worker in enumerate(self._workers[:world]):
            if not worker.lives:
                worker.close()
                self._workers[rank] = _Worker(Path(self._folder.name))
            self._workers[rank].begin(name, rank, world, call)
        deadline = time.monotonic() + deadline_s
        return [worker.end(deadline) for worker in self._workers[:world]]

    def results(self, fn: Callable[..., Any], world: int, *args: Any, deadline_s: float = DEADLINE_S) -> list[Any]:
        """`run` where every rank must succeed; their results."""
        return _results(self.run(fn, world, *args, deadline_s=deadline_s))

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._folder.cleanup()


def run_job(fn: Callable[..., Any], world: int, *args: Any, deadline_s: float = DEADLINE_S) -> list[Outcome]:
    """`Pool.run` in fresh processes that end with the call."""
    pool = Pool(world)
    try:
        return pool.run(fn, world, *args, deadline_s=deadline_s)
    finally:
        pool.close()


def _results(outcomes: list[Outcome]) -> list[Any]:
    for rank, outcome in enumerate(outcomes):
        if outcome.error is not None or outcome.returncode is not None:
            raise AssertionError(
                f"rank {rank} of {len(outcomes)} failed ({outcome.returncode}): {outcome.error!r}\n{outcome.output}"
            )
    return [outcome.result for outcome in outcomes]


class _Worker:
    """One process that runs tasks named on its standard input, and says when each is done."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import jobs; jobs.main()"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            cwd=folder,
        )

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def begin(self, name: str, rank: int, world: int, call: bytes) -> None:
        self._answer = self._folder / f"{name}.{rank}.done"
        (self._folder / f"{name}.{rank}.call").write_bytes(call)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._folder / name} {rank} {world}\n".encode())
        self._process.stdin.flush()

    def end(self, deadline: float) -> Outcome:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            ready = selector.select(max(0.0, deadline - time.monotonic()))
        if not ready:
            self._kill()
            return Outcome(-signal.SIGKILL, error=TimeoutError("the test's deadline"), output=self._output())
        if not self._process.stdout.readline():
            return Outcome(self._process.wait(), output=self._output())
        result, error = pickle.loads(self._answer.read_bytes())
        return Outcome(None, result, error, self._output())

    def _output(self) -> str:
        self._log.seek(0)
        return self._log.read()[-20_000:]

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        self._kill()
        self._log.close()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def main() -> None:
    """Entry of a worker process."""
    import torch

    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the task prints goes to its log
    for line in sys.stdin:
        path, rank, world = line.split()
        answer = Path(f"{path}.{rank}.done")
        answer.write_bytes(pickle.dumps(_run_task(path, int(rank), int(world))))
        out.write("done\n")
        out.flush()


def _run_task(path: str, rank: int, world: int) -> tuple[Any, BaseException | None]:
    import torch.distributed as dist

    module, name, args = pickle.loads(Path(f"{path}.{rank}.call").read_bytes())
    try:
        dist.init_process_group("gloo", init_method=f"file://{path}.rendezvous", rank=rank, world_size=world)
    except RuntimeError:
        traceback.print_exc()
        os._exit(NO_GROUP)
    try:
        return getattr(importlib.import_module(module), name)(rank, world, *args), None
    except Exception as error:
        traceback.print_exc()
        return None, error
    finally:
        close_checkpointers()
        dist.destroy_process_group()


def close_checkpointers() -> None:
    """Let go of every Checkpointer that is open in this process, as its end would."""
    if module := sys.modules.get("ckpt.checkpointer"):
        for checkpointer in list(module._open):
            checkpointer._let_go(goodbye=True)
