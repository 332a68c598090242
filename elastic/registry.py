"""A run's records where nodes share no storage: in the memory of the agent on one host, as `tcp://host:port` names it.

The same few operations, and the same promises between racing creators, as of any store; no checkpoint can be kept here.
They last as long as that agent; without it no generation can begin. An agent that is started there again has other
records, and nobody takes them for these.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec

from ckpt.errors import CkptError, Corrupt, Fenced, Incompatible, NotFound, StorageError
from ckpt.run import RunDirectory
from ckpt.signing import signing_key
from ckpt.store import AlreadyExists, Capabilities, DataWriter, Names, OutcomeUnknown, Usage, check_path
from ckpt.wire import Channel, Server, WrongToken, dial_tcp, serve_tcp

log = logging.getLogger("elastic")

SCHEME = "tcp://"
RECORDS_LIMIT_BYTES = 256 << 20
CALL_LIMIT_S = 10.0
APPEAR_LIMIT_S = 300.0  # for the agent of that host to be started
APPEAR_WAIT_S = 0.5
_ADDRESS = re.compile(r"tcp://(\[[0-9a-fA-F:.]+\]|[^/:\[\]]+):(\d{1,5})/?")
_ERRORS = {kind.__name__: kind for kind in (AlreadyExists, NotFound, Corrupt, StorageError)}


class RegistryLost(Fenced):
    """The records that this job had are gone: all its agents must be started again."""

    exit_code = 75  # EX_TEMPFAIL


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """One operation of a store: `create`, `put`, `read`, `size`, `list`, `exists` or `delete`."""

    operation: str
    path: str
    data: bytes = b""
    offset: int = 0
    nbytes: int | None = None
    limit_bytes: int = 0


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What came of it. `instance`: of these records, and of no others. `error`: name of its type, if there was one."""

    instance: str
    value: bytes | int | bool | list[str] | None = None
    error: str = ""
    reason: str = ""


class Records:
    """Files in memory. One thread."""

    def __init__(self, limit_bytes: int = RECORDS_LIMIT_BYTES) -> None:
        self.instance = secrets.token_hex(8)
        self._files: dict[str, bytes] = {}
        self._limit_bytes = limit_bytes

    def answer(self, ask: Ask) -> Answer:
        """Do what is asked. Does not raise."""
        acts: dict[str, Callable[[Ask], Any]] = {
            "create": self._create,
            "put": self._put,
            "read": self._read,
            "size": lambda ask: len(self._file(ask.path)),
            "list": self._list,
            "exists": lambda ask: ask.path in self._files or self._holds(ask.path),
            "delete": self._delete,
        }
        try:
            if (act := acts.get(ask.operation)) is None:
                raise StorageError(f"{ask.operation!r:.50} is no operation of a registry")
            check_path(ask.path, root_allowed=ask.operation in ("list", "exists"))
            return Answer(self.instance, act(ask))
        except CkptError as error:
            return Answer(self.instance, error=type(error).__name__, reason=str(error))

    def _create(self, ask: Ask) -> None:
        if ask.path in self._files:
            raise AlreadyExists(f"create {ask.path}: it exists already. Nothing was changed")
        self._put(ask)

    def _put(self, ask: Ask) -> None:
        if sum(map(len, self._files.values())) + len(ask.data) > self._limit_bytes:
            raise StorageError(
                f"put {ask.path}: the registry is full, at {self._limit_bytes} bytes. Nothing was changed"
            )
        self._files[ask.path] = ask.data

    def _read(self, ask: Ask) -> bytes:
        data = self._file(ask.path)[ask.offset :]
        nbytes = len(data) if ask.nbytes is None else ask.nbytes
        if nbytes > ask.limit_bytes:
            raise Corrupt(f"read {ask.path}: {nbytes} bytes, expected at most {ask.limit_bytes}")
        if nbytes > len(data):
            raise Corrupt(
                f"read {ask.path}: cut off; {nbytes} bytes from {ask.offset} on were expected, got {len(data)}"
            )
        return data[:nbytes]

    def _list(self, ask: Ask) -> Names:
        start = f"{ask.path}/" if ask.path else ""
        found = {path.removeprefix(start).partition("/")[0] for path in self._files if path.startswith(start)}
        if not found:
            raise NotFound(f"list {ask.path}: there is no such directory")
        return sorted(found)

    def _delete(self, ask: Ask) -> None:
        for path in [path for path in self._files if path == ask.path or path.startswith(f"{ask.path}/")]:
            del self._files[path]

    def _holds(self, directory: str) -> bool:
        return any(path.startswith(f"{directory}/" if directory else "") for path in self._files)

    def _file(self, path: str) -> bytes:
        if (data := self._files.get(path)) is None:
            raise NotFound(f"read {path}: there is no such file")
        return data


class Registry:
    """The records, served from a thread of their own."""

    def __init__(self, host: str, port: int, token: bytes) -> None:
        """Raises OSError if the address cannot be listened at."""
        self._records = Records()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="elastic-registry", daemon=True)
        self._thread.start()
        try:
            self._server = self._run(self._listen(host, port, token))
        except OSError:
            self._end()
            raise

    async def _listen(self, host: str, port: int, token: bytes) -> Server:
        return serve_tcp(host, port, token, Ask, self._serve)

    async def _serve(self, channel: Channel) -> None:
        while (ask := await channel.receive()) is not None:
            await channel.send(self._records.answer(ask))

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """End it: the records are gone. Idempotent."""
        if self._thread.is_alive():
            self._run(self._stop())
            self._end()

    async def _stop(self) -> None:
        self._server.close()
        await asyncio.sleep(0)  # for what is cancelled

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class RegistryStore:
    """The store at `tcp://host:port`: records only. Any thread, one call at a time."""

    capabilities = Capabilities(exclusive_create=True, atomic_create=True)

    def __init__(self, host: str, port: int, token: bytes) -> None:
        self._host, self._port, self._token = host, port, token
        self._loop = asyncio.new_event_loop()
        self._channel: Channel | None = None
        self._instance: str | None = None
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"{SCHEME}{self._host}:{self._port}"

    def create(self, path: str, data: bytes) -> None:
        self._call(Ask("create", path, data))

    def put(self, path: str, data: bytes) -> None:
        self._call(Ask("put", path, data))

    def read(self, path: str, offset: int = 0, nbytes: int | None = None, *, limit_bytes: int) -> bytes:
        return bytes(self._call(Ask("read", path, b"", offset, nbytes, limit_bytes)))

    def size(self, path: str) -> int:
        return int(self._call(Ask("size", path)))

    def list(self, directory: str) -> Names:
        return list(map(str, self._call(Ask("list", directory))))

    def exists(self, path: str) -> bool:
        return bool(self._call(Ask("exists", path)))

    def delete(self, path: str) -> None:
        self._call(Ask("delete", path))

    def make_directory(self, path: str) -> None:
        check_path(path, root_allowed=True)

    def sync_directory(self, path: str) -> None:
        check_path(path, root_allowed=True)

    def write_data(self, path: str, nbytes: int) -> DataWriter:
        self._refuse()

    def usage(self, directory: str) -> Usage:
        self._refuse()

    def clear(self, directory: str, ours: Callable[[str], bool]) -> Names:
        self._refuse()

    def local_path(self, path: str) -> str | None:
        check_path(path, root_allowed=True)
        return None

    def _refuse(self) -> NoReturn:
        raise StorageError(
            f"{self.url} keeps the records of a job, and no checkpoints. Give ckpt.Checkpointer a directory or a bucket"
        )

    def close(self) -> None:
        """End the connection. Idempotent."""
        with self._lock:
            self._drop()
            self._loop.close()

    def _call(self, ask: Ask) -> Any:
        with self._lock:
            answer = self._loop.run_until_complete(self._ask(ask))
            if self._instance not in (None, answer.instance):
                raise RegistryLost(
                    f"{self.url}: the agent there was started again and knows nothing of this job. Start all its "
                    "agents again; they go on from the newest checkpoint"
                )
            self._instance = answer.instance
        if answer.error:
            raise _ERRORS.get(answer.error, StorageError)(f"{self.url}: {answer.reason}")
        return answer.value

    async def _ask(self, ask: Ask) -> Answer:
        asked = False
        try:
            async with asyncio.timeout(CALL_LIMIT_S):
                if self._channel is None:
                    self._channel = await dial_tcp(self._host, self._port, self._token, Answer)
                asked = True
                await self._channel.send(ask)
                if (answer := await self._channel.receive()) is None:
                    raise ConnectionError("the connection was closed")
                return answer  # type: ignore[no-any-return]
        except WrongToken as error:
            self._drop()
            raise Incompatible(
                f"{self.url} belongs to another job: it has another --rdzv-id (`elastic run --run-id`), or another "
                "CKPT_SIGNING_KEY. Take a port of its own for each job"
            ) from error
        except (CkptError, OSError, TimeoutError) as error:
            self._drop()
            unknown = asked and ask.operation == "create"
            raise (OutcomeUnknown if unknown else StorageError)(
                f"{ask.operation} {ask.path} at {self.url}: {str(error) or f'no answer within {CALL_LIMIT_S:g} s'}"
            ) from error

    def _drop(self) -> None:
        if self._channel is not None:
            channel, self._channel = self._channel, None
            channel.close()


def serves(url: str) -> bool:
    """Whether `url` names a registry, no store."""
    return url.startswith(SCHEME)


def open_run(url: str, run_id: str | None, *, create: bool = False) -> RunDirectory:
    """The run's records at `url`, a store's or a registry's. Raises as `RunDirectory.open`."""
    if not serves(url):
        return RunDirectory.open(url, create=create)
    host, port = address_of(url)
    return RunDirectory.at(RegistryStore(host, port, token_of(url, run_id)), create=create)


def join_run(url: str, run_id: str | None) -> tuple[RunDirectory, Registry | None]:
    """For an agent: the records at the registry `url`, which it serves itself if that is an address of its host.

    Waits until there is one. Raises Incompatible for an address that cannot be used, or another job's; StorageError if
    nobody serves it in time.
    """
    host, port = address_of(url)
    registry = _served(host, port, token_of(url, run_id))
    deadline = time.monotonic() + APPEAR_LIMIT_S
    while True:
        try:
            return open_run(url, run_id, create=True), registry
        except StorageError as error:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{error}. Nobody serves {url}: start an agent on that host, or give all agents the address of one"
                ) from error
        time.sleep(APPEAR_WAIT_S)


def _served(host: str, port: int, token: bytes) -> Registry | None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.bind((address[0], 0))  # only an address of this host can be bound
    except OSError:
        return None
    try:  # at all addresses: the host's own name often leads to its loopback
        registry = Registry("::" if family == socket.AF_INET6 else "0.0.0.0", port, token)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise StorageError(f"{SCHEME}{host}:{port} cannot be listened at: {error}. Choose another port") from error
        return None  # another agent of this host has it
    log.info("this agent keeps the job's records at %s%s:%d: it must live as long as the job", SCHEME, host, port)
    return registry


def address_of(url: str) -> tuple[str, int]:
    """Host and port. Raises Incompatible for what is no tcp://host:port."""
    found = _ADDRESS.fullmatch(url)
    if found is None or not 0 < int(found[2]) < 1 << 16:
        raise Incompatible(f"{url!r:.300} is no address of a registry: expected tcp://host:port")
    return found[1].strip("[]"), int(found[2])


def token_of(url: str, run_id: str | None) -> bytes:
    """What agents and commands prove to know: the signing key, else the job's run id."""
    key = signing_key() or (run_id or "").encode()
    if not key:
        raise Incompatible(
            f"{url} is open to whoever knows the job's run id, and there is none: give all agents, and commands, the "
            "same --rdzv-id (`elastic run --run-id`), one that is hard to guess; or CKPT_SIGNING_KEY"
        )
    return hmac.digest(key, b"elastic registry", "sha256")
