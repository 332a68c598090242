"""Worlds: sets of real processes, one per rank, that stay alive between operations.

Owns starting them, telling them what to do (an operation is a JSON object), and ending them, also when one of them
fails. Imports no torch, so that the process that only conducts stays small.
"""

import json
import multiprocessing
import multiprocessing.context
import os
import signal
import socket
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn, Self

Reply = dict[str, Any]

_GRACE_S = 10.0


class WorldFailed(RuntimeError):
    """A rank raised, died, or did not answer in time; the message names it and the operation."""


class World:
    """The ranks of one world size; use it as a context manager."""

    def __init__(self, size: int, config: dict[str, int], layout: str, *, seed: int, timeout_s: float = 900.0) -> None:
        self.size = size
        self._timeout_s = timeout_s
        self._processes = []
        self._connections: list[Connection] = []
        context = _context()
        port = _free_port()
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, size, port, {"config": config, "layout": layout, "seed": seed})
            process = context.Process(target=_serve, args=arguments, name=f"rank {rank} of {size}")
            process.start()
            theirs.close()  # so that a rank which dies is seen as the end of its stream
            self._processes.append(process)
            self._connections.append(ours)
        try:
            self._collect("start")
        except BaseException:
            self.close()  # nobody else can: the caller gets no World
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, operation: str, **arguments: Any) -> list[Reply]:
        """Carry out one operation on all ranks; their replies in the order of ranks."""
        message = json.dumps({"operation": operation, "arguments": arguments}).encode()
        for rank, connection in enumerate(self._connections):
            try:
                connection.send_bytes(message)
            except OSError:
                self._fail(f"{operation}: rank {rank} of {self.size} is gone")
        return self._collect(operation)

    def kill(self) -> None:
        """End all ranks by SIGKILL, as a node that loses its workers would."""
        for process in self._processes:
            process.kill()
            process.join()

    def close(self) -> None:
        """End all ranks: they leave when their stream ends; whoever does not is killed."""
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + _GRACE_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

    def _collect(self, operation: str) -> list[Reply]:
        replies: dict[int, Reply] = {}
        deadline = time.monotonic() + self._timeout_s
        while len(replies) < self.size:
            pending = [c for rank, c in enumerate(self._connections) if rank not in replies]
            ready = wait(pending, max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = [rank for rank in range(self.size) if rank not in replies]
                self._fail(f"{operation}: no answer from ranks {missing} of {self.size} in {self._timeout_s:.0f} s")
            for connection in ready:
                rank = self._connections.index(connection)
                replies[rank] = self._receive(rank, operation)
        return [replies[rank] for rank in range(self.size)]

    def _receive(self, rank: int, operation: str) -> Reply:
        try:
            reply: Reply = json.loads(self._connections[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self._fail(f"{operation}: rank {rank} of {self.size} died")
        if "error" in reply:
            self._fail(f"{operation}: rank {rank} of {self.size} raised\n{reply['error']}")
        return reply

    def _fail(self, message: str) -> NoReturn:
        for process in self._processes:
            process.kill()
        raise WorldFailed(message)


def _context() -> multiprocessing.context.ForkServerContext:
    """Processes forked from one that has imported torch and nothing else: ten imports at a time would take a minute.

    The server ignores our `sys.path` (python/cpython#117378), so the folder of `worker` goes through the environment.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    here = str(Path(__file__).resolve().parent)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", here)]
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *paths])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["worker", "torch.distributed.fsdp", "torch.distributed.checkpoint"])
    return context


def _serve(connection: Connection, rank: int, size: int, port: int, state: dict[str, Any]) -> None:
    """Run one rank until its stream ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the conductor ends us
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        import worker

        ours = worker.start(**state)
        _answer(connection, {})
        while True:
            message = json.loads(connection.recv_bytes())
            _answer(connection, getattr(ours, message["operation"])(**message["arguments"]))
    except EOFError:
        worker.stop()
    except Exception:
        with suppress(EOFError):
            _answer(connection, {"error": traceback.format_exc()})
        raise SystemExit(1) from None


def _answer(connection: Connection, reply: Reply) -> None:
    try:
        connection.send_bytes(json.dumps(reply).encode())
    except OSError as error:  # the conductor has gone
        raise EOFError from error


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
