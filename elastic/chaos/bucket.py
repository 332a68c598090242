"""A bucket for a run: an S3 server, and before it a proxy that lets requests fail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ckpt.testing.proxy import Proxy
from elastic.chaos.cgroups import GroundError
from elastic.chaos.held import Held
from elastic.chaos.nodes import Hub

NAME = "store"
PORT = 9000
PROGRAM = "moto_server"
START_LIMIT_S = 60.0
URL = "s3://bucket/run"
HOLD = 'trap "" TERM; "$@" & cat > /dev/null; kill -9 $!'  # ends with its input, so with this process
LISTENER = """
import array, socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
server = socket.create_server(("0.0.0.0", int(sys.argv[2])), backlog=512)
socket.send_fds(channel, [b"x"], [server.fileno()])
"""


class Bucket:
    """`URL` on a server of its own (moto, in memory), which nodes reach through a proxy.

    With a `hub` the proxy has a network namespace and a cable of its own, else it listens on loopback.
    """

    def __init__(self, hub: Hub | None, seed: int) -> None:
        self._hub, self._seed = hub, seed
        self._held: Held | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._proxy: Proxy | None = None
        self._serving: asyncio.Server | None = None
        self._direct = self.endpoint = ""

    async def open(self) -> None:
        """GroundError if there is no server, or it does not answer in time."""
        if (program := shutil.which(PROGRAM)) is None:
            raise GroundError(f"no {PROGRAM} on PATH: pip install 'moto[server]', best in a venv of its own")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self._server = subprocess.Popen(
            ["sh", "-c", HOLD, "sh", program, "-H", "127.0.0.1", "-p", str(port)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._direct = f"http://127.0.0.1:{port}"
        await self._answers(port)
        await asyncio.to_thread(self._make_bucket)
        self._proxy = Proxy(self._direct, self._seed, 0.0)
        listener = await asyncio.to_thread(self._listener)
        self._serving = await asyncio.start_server(self._proxy.connection, sock=listener, limit=1 << 20)

    @property
    def environment(self) -> dict[str, str]:
        """With which nodes reach it."""
        return _environment(self.endpoint)

    @contextmanager
    def reached(self) -> Iterator[str]:
        """In this context this process reaches it, past the proxy, at the URL that it yields."""
        before = {name: os.environ.get(name) for name in _environment("")}
        os.environ.update(_environment(self._direct))
        try:
            yield URL
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def fail(self, share: float, faults: Sequence[str]) -> None:
        """From now on such a share of the requests meets one of `faults` of the proxy."""
        assert self._proxy is not None
        self._proxy.fail(share, faults)

    @property
    def met(self) -> int:
        """How many requests met a fault."""
        return sum(number for fault, number in self._proxy.met.items() if fault) if self._proxy is not None else 0

    def unfinished(self) -> list[str]:
        """The keys of uploads that were begun and neither ended nor given up."""
        import s3fs

        with self.reached():
            found = s3fs.S3FileSystem(skip_instance_cache=True).call_s3("list_multipart_uploads", Bucket="bucket")
        return [upload["Key"] for upload in found.get("Uploads", [])]

    def away(self, yes: bool) -> None:
        """Cut its cable, or plug it in again."""
        if self._hub is None:
            raise GroundError("the bucket has no cable of its own without namespaces, so root")
        (self._hub.cut if yes else self._hub.heal)(NAME)

    async def close(self) -> None:
        """Idempotent."""
        if self._serving is not None:
            self._serving.close()
            self._serving = None
        server, self._server, held, self._held = self._server, None, self._held, None
        if server is not None:
            assert server.stdin is not None
            server.stdin.close()
            await asyncio.to_thread(server.wait)
        if held is not None:
            await asyncio.to_thread(held.close)

    async def _answers(self, port: int) -> None:
        assert self._server is not None
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            with contextlib.suppress(OSError):
                (await asyncio.open_connection("127.0.0.1", port))[1].close()
                return
            if time.monotonic() > deadline or self._server.poll() is not None:
                raise GroundError(f"{PROGRAM} does not answer")
            await asyncio.sleep(0.05)

    def _make_bucket(self) -> None:
        import s3fs

        with self.reached():
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")

    def _listener(self) -> socket.socket:
        if self._hub is None:
            listener = socket.create_server(("127.0.0.1", 0), backlog=512)
            self.endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
            return listener
        self._held = Held("net")
        pid = self._held.open()
        self._hub.plug(NAME, pid)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            subprocess.run(
                ["nsenter", "-t", str(pid), "-n", sys.executable, "-I", "-S", "-c", LISTENER,
                 str(theirs.fileno()), str(PORT)],
                pass_fds=[theirs.fileno()], check=True, timeout=START_LIMIT_S,
            )  # fmt: skip
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        self.endpoint = f"http://{self._hub.address(NAME)}:{PORT}"
        return socket.socket(fileno=fds[0])


def _environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "holdfast",
        "AWS_SECRET_ACCESS_KEY": "holdfast",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }
