"""Standbys: for each worker of this node a process that has done the imports of the next one, and becomes it.

Owns which standby may stand in for which worker. Losing one costs its imports, never a start. A standby is a child of
the agent, of the agent's session until it is taken; from then on it is a worker like any other: same process id,
signals, output and exit code. Used by `elastic run --preload`; torchrun alone starts every worker cold.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic import standby
from elastic.workers import ERROR_FILE, error_files

log = logging.getLogger("elastic")

TAKE_LIMIT_S = 5.0
OF_A_GENERATION = frozenset(
    {
        "CKPT_BOARD", "CKPT_START", "ELASTIC_GENERATION", "ELASTIC_NODES", "ELASTIC_REASON", "GROUP_RANK",
        "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RANK", "ROLE_RANK", "ROLE_WORLD_SIZE", ERROR_FILE,
        "TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE",
    }
)  # fmt: skip  # what no import may depend on: a standby does not have it


@dataclass(frozen=True)
class Kind:
    """What a standby is made for: a command, and the environment in which it has done its imports."""

    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, command: Sequence[str], environment: Mapping[str, str]) -> Kind | None:
        """None for what no standby can become: it does not start with `python -u SCRIPT` or `python -u -m MODULE`."""
        if len(command) < 3 or command[1] != "-u" or not (command[2] == "-m" or os.path.isfile(command[2])):
            return None
        lasting = sorted((name, value) for name, value in environment.items() if name not in OF_A_GENERATION)
        return cls(tuple(command), tuple(lasting))


class Standby:
    """One process that waits, or is still importing."""

    def __init__(self, kind: Kind, modules: Sequence[str]) -> None:
        self.kind = kind
        self._control, theirs = socket.socketpair()
        preload = standby.PRELOAD + ",".join(modules)
        python, flag, *command = kind.command
        with theirs:
            self.process = subprocess.Popen(
                [python, flag, standby.__file__, str(theirs.fileno()), preload, *command],
                env=dict(kind.environment),
                pass_fds=[theirs.fileno()],
            )

    def is_ready(self) -> bool:
        self._control.setblocking(False)
        with contextlib.suppress(OSError):
            return self._control.recv(1, socket.MSG_PEEK) == standby.READY
        return False

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def take(self, environment: Mapping[str, str], outputs: tuple[int, int]) -> bool:
        """Have it be the worker, with its own stdout and stderr. False: it cannot be, and has been killed."""
        try:
            self._control.settimeout(TAKE_LIMIT_S)
            self._control.recv(len(standby.READY))
            with open(os.memfd_create("elastic-environment"), "w+b") as file:
                file.write(json.dumps(dict(environment)).encode())
                file.seek(0)
                socket.send_fds(self._control, [standby.TAKE], [file.fileno(), *outputs])
                taken = self._control.recv(len(standby.TAKEN)) == standby.TAKEN
        except OSError:
            taken = False
        if taken:
            self._control.close()
        else:
            self.end()
        return taken

    def end(self) -> None:
        self._control.close()
        self.process.kill()
        self.process.wait()


class Standbys:
    """One for each local rank of this node, made anew when it is used up."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = tuple(modules)
        self._waiting: dict[int, Standby] = {}

    def start(
        self, local_rank: int, command: Sequence[str], environment: Mapping[str, str], outputs: tuple[int, int]
    ) -> subprocess.Popen[Any] | None:
        """The worker, if a standby is ready and fits; None: it is to be started cold. Does not raise."""
        found, kind = self._waiting.get(local_rank), Kind.of(command, environment)
        if found is None or found.kind != kind or not found.is_ready():
            return None
        del self._waiting[local_rank]
        if not found.take(environment, outputs):
            log.warning("the standby of local rank %d is lost: its worker starts cold", local_rank)
            return None
        error_files[found.process.pid] = environment.get(ERROR_FILE, "")
        log.info("process %d, a standby, is the worker of local rank %d", found.process.pid, local_rank)
        return found.process

    def prepare(self, local_rank: int, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Have a standby for the next worker like this one; one that is still importing goes on. Does not raise."""
        found, kind = self._waiting.get(local_rank), Kind.of(command, environment)
        if found is not None and found.kind == kind and not found.has_ended():
            return
        if found is not None:
            del self._waiting[local_rank]
            found.end()
        if kind is not None:
            try:
                self._waiting[local_rank] = Standby(kind, self._modules)
            except OSError as error:
                log.warning("no standby for local rank %d: %s", local_rank, error)

    def close(self) -> None:
        """End all that wait."""
        while self._waiting:
            self._waiting.popitem()[1].end()


@contextlib.contextmanager
def warm_workers(modules: Sequence[str]) -> Iterator[None]:
    """In here, torchrun in this process takes its workers from standbys that have imported `modules`."""
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    torchrun: Any = api
    before, standbys = torchrun.get_subprocess_handler, Standbys(modules)

    class Worker(SubprocessHandler):
        """A process of torchrun's that may have been a standby."""

        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen[Any]:
            outputs = (self._stdout.fileno() if self._stdout else 1, self._stderr.fileno() if self._stderr else 2)
            process = standbys.start(self.local_rank_id, args, env, outputs)
            if process is None:
                process = super()._popen(args, env)
                error_files.pop(process.pid, None)  # of an earlier process of this number
            standbys.prepare(self.local_rank_id, args, env)
            return process

    torchrun.get_subprocess_handler = Worker
    try:
        yield
    finally:
        torchrun.get_subprocess_handler = before
        standbys.close()
