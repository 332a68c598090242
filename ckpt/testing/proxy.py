"""A proxy in front of an object store that fails now and then, as networks and stores do. Which request meets which
fault follows from the seed and the order of the requests.

    status 500, 503, 429   answered instead of the server
    reset                  the connection is reset before the request is passed on
    lost                   the server does it, and the answer never arrives
    cut                    the connection ends in the middle of the answer
    stall                  the answer does not come, and the connection stays open
    trickle                the answer comes so slowly that it never ends
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

QUICK = ("500", "503", "429", "reset", "lost", "cut")
ALL = (*QUICK, "stall", "trickle")
_TRICKLE_S = 0.5  # between two bytes


class Proxy:
    """Passes requests on to `server`; a share `rate` of them, while `failing`, meets one of `faults`."""

    def __init__(self, server: str, seed: int, rate: float, faults: Sequence[str] = QUICK) -> None:
        parsed = urlsplit(server)
        self._server = parsed.hostname or "", parsed.port or 80
        self._random, self._rate, self._faults = random.Random(seed), rate, faults
        self.failing = True  # may be changed at any time
        self.met: Counter[str] = Counter()
        self.url = ""

    def fail(self, rate: float, faults: Sequence[str]) -> None:
        """From now on such a share of the requests meets one of `faults`."""
        self._rate, self._faults = rate, faults

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self.connection, "127.0.0.1", 0, limit=1 << 20)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await stop.wait()
        server.close()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end: for `asyncio.start_server`."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._request(reader, writer):
                pass
        writer.transport.abort()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; whether the connection goes on."""
        head = await reader.readuntil(b"\r\n\r\n")
        lower = head.lower()
        if b"\r\nexpect: 100-continue" in lower:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(_length(lower))
        fault = self._random.choice(self._faults) if self.failing and self._random.random() < self._rate else ""
        self.met[fault] += 1
        if fault in ("500", "503", "429"):
            text = (
                f"<?xml version='1.0'?><Error><Code>Injected{fault}</Code><Message>injected</Message></Error>".encode()
            )
            writer.write(f"HTTP/1.1 {fault} Injected\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
            await writer.drain()
            return True
        if fault == "reset":
            return False
        if fault == "stall":
            await asyncio.sleep(3600)
        answer = await self._pass_on(_closing(head), body)
        if fault == "lost":
            return False
        if fault == "cut":
            writer.write(answer[: len(answer) // 2])
            await writer.drain()
            return False
        if fault == "trickle":
            for at in range(len(answer)):
                writer.write(answer[at : at + 1])
                await asyncio.sleep(_TRICKLE_S)
        writer.write(answer)
        await writer.drain()
        return False

    async def _pass_on(self, head: bytes, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*self._server)
        try:
            writer.write(head + body)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return 0


def _closing(head: bytes) -> bytes:
    """The head of the request, with which the server closes the connection after its answer."""
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith((b"connection:", b"expect:"))]
    return b"\r\n".join([*lines[:-2], b"Connection: close", b"", b""])


@contextmanager
def faulty(server: str, seed: int, rate: float, faults: Sequence[str] = QUICK) -> Iterator[Proxy]:
    """A proxy on a thread of its own for as long as the context lasts."""
    proxy, ready, loop = Proxy(server, seed, rate, faults), threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    def run() -> None:
        loop.run_until_complete(proxy.serve(ready, stop))
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run, name="proxy")
    thread.start()
    assert ready.wait(30)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
