"""The listener: hears every mark of the run, in one order, and holds processes at marks until a fault is injected."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

from ckpt.events import FAIL, LIMIT_BYTES
from elastic.evidence import Mark

NODE_VARIABLE = "HOLDFAST_CHAOS_NODE"


class Hold:
    """Stops the first process that is at a mark which `wanted` accepts. Release it, or nothing goes on there."""

    def __init__(self, wanted: Callable[[Mark], bool]) -> None:
        self.wanted = wanted
        self.caught: asyncio.Future[Mark] = asyncio.get_running_loop().create_future()
        self.released = asyncio.Event()


class Listener:
    """The socket that HOLDFAST_EVENTS names. Lives on one event loop."""

    def __init__(self, path: Path, began: float) -> None:
        self.path, self._began = path, began
        self.marks: list[Mark] = []
        self.generation = 0  # the newest in which an agent works, or a rank has made a step
        self.leader = ""  # the node whose agent leads it
        self.last_step = 0  # the highest that a rank has completed
        self.steps: dict[str, int] = {}  # by node, the last one
        self._holds: list[Hold] = []
        self._fails: list[Callable[[Mark], bool]] = []
        self._heard = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path, limit=LIMIT_BYTES, backlog=512)
        self.path.chmod(0o777)  # workers may run as another user

    async def close(self) -> None:
        """Let go of everybody; marks are no-ops from here on."""
        for hold in self._holds:
            hold.released.set()
        if self._server is not None:
            self._server.close()
        self.path.unlink(missing_ok=True)

    def hold(self, wanted: Callable[[Mark], bool]) -> Hold:
        self._holds.append(hold := Hold(wanted))
        return hold

    def fail(self, wanted: Callable[[Mark], bool]) -> None:
        """From now on every process at such a mark fails there with an exception."""
        self._fails.append(wanted)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds; it is asked after every mark."""
        while not condition():
            self._heard.clear()
            await self._heard.wait()

    def named_since(self, at: float) -> Iterator[Mark]:
        """The marks heard after `at` seconds, newest first."""
        return takewhile(lambda mark: mark.at > at, reversed(self.marks))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):
            line = await reader.readline()
            channel: socket.socket = writer.get_extra_info("socket")
            pid, _, _ = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if line.endswith(b"\n"):
                writer.write(await self._take(json.loads(line), pid))
                await writer.drain()
        writer.close()

    async def _take(self, facts: dict[str, object], pid: int) -> bytes:
        environment = environment_of(pid)
        mark = Mark(
            at=time.monotonic() - self._began,
            name=str(facts.pop("name")),
            node=environment.get(NODE_VARIABLE, "").partition("/")[0],
            pid=pid,
            generation=int(str(facts.get("generation", 0))),
            facts=facts,
        )
        self.marks.append(mark)
        if mark.name == "step":
            self.last_step = max(self.last_step, mark.step)
            self.steps[mark.node] = mark.step
            self.generation = max(self.generation, mark.generation)
        if mark.name == "join" and mark.generation >= self.generation:
            self.generation = mark.generation
            self.leader = mark.node if mark.facts["leads"] else self.leader
        self._heard.set()
        for hold in self._holds:
            if not hold.caught.done() and hold.wanted(mark):
                hold.caught.set_result(mark)
                await hold.released.wait()
        return FAIL if any(wanted(mark) for wanted in self._fails) else b""


def environment_of(pid: int) -> dict[str, str]:
    """The environment with which a process was started; empty if it is gone."""
    with contextlib.suppress(OSError):
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return dict(os.fsdecode(entry).partition("=")[::2] for entry in entries if b"=" in entry)
    return {}
