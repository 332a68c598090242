"""Typed messages over sockets: between processes of one user on a node, and between nodes that share a token.

A frame is its size (4 bytes, little-endian), a msgpack message, and over TCP the HMAC-SHA256 of both under a key of
this connection and a running number: frames cannot be forged, replayed or reordered. They can be read: what travels
between nodes names tensors and values' digests, and no state. Before the first frame over TCP both ends prove that
they know the token:

    client -> server   MAGIC, 32 random bytes c
    server -> client   32 random bytes s, HMAC(token, "server" c s)
    client -> server   HMAC(token, "client" c s)
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec

from ckpt.errors import CkptError, DeadlineExceeded

log = logging.getLogger("ckpt")

MAGIC = b"holdfast keeper 1\n"
MESSAGE_LIMIT_BYTES = 1 << 30
NONCE_BYTES = MAC_BYTES = 32
HANDSHAKE_LIMIT_S = 10.0
SEND_LIMIT_S = 60.0  # a peer that takes nothing for so long is gone
STRANGERS_LIMIT = 64  # connections that have not yet proved anything
DESCRIPTORS_LIMIT = 4  # received, and not yet taken
BACKLOG = 1024

_SIZE = struct.Struct("<I")
_PEERCRED = struct.Struct("3i")
_READ_BYTES = 1 << 20


class WireError(CkptError):
    """What came over a connection is not what may come, or not from whom it may come."""


class WrongToken(WireError):
    """Who listens there belongs to another run."""


class Codec:
    """Messages to bytes and back, without any I/O. `keys` (to send, to receive) seal every frame."""

    def __init__(self, kind: Any, keys: tuple[bytes, bytes] | None = None) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._keys = keys
        self._sent = self._received = 0
        self._buffer = bytearray()

    def encode(self, message: Any) -> bytes:
        """The frame of `message`, the next one to be sent."""
        data: bytes = msgspec.msgpack.encode(message)
        if len(data) > MESSAGE_LIMIT_BYTES:
            raise WireError(f"a message of {len(data)} bytes; the limit is {MESSAGE_LIMIT_BYTES}")
        frame = _SIZE.pack(len(data)) + data
        if self._keys is not None:
            frame += _seal(self._keys[0], self._sent, frame)
        self._sent += 1
        return frame

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> Any:
        """The next whole message that was fed, or None. `WireError` for anything that is not one."""
        if len(self._buffer) < _SIZE.size:
            return None
        (size,) = _SIZE.unpack_from(self._buffer)
        if size > MESSAGE_LIMIT_BYTES:
            raise WireError(f"a message of {size} bytes was announced; the limit is {MESSAGE_LIMIT_BYTES}")
        end = _SIZE.size + size
        whole = end + (MAC_BYTES if self._keys else 0)
        if len(self._buffer) < whole:
            return None
        frame, mac = bytes(self._buffer[:end]), bytes(self._buffer[end:whole])
        del self._buffer[:whole]
        if self._keys is not None and not hmac.compare_digest(mac, _seal(self._keys[1], self._received, frame)):
            raise WireError("a message was changed on its way, or came from somebody without the token")
        self._received += 1
        try:
            return self._decoder.decode(frame[_SIZE.size :])
        except msgspec.MsgspecError as error:
            raise WireError(f"a message that cannot be understood: {error}") from error


class Channel:
    """One end of a connection on an asyncio loop. One task may send while another one receives."""

    def __init__(self, sock: socket.socket, codec: Codec) -> None:
        self._sock, self._codec = sock, codec
        self._descriptors: deque[int] = deque()
        self._readable: asyncio.Future[None] | None = None
        self._closed = False

    async def send(self, message: Any) -> None:
        """Send one message. `WireError` if the peer does not take it in time."""
        frame = self._codec.encode(message)
        try:
            async with asyncio.timeout(SEND_LIMIT_S):
                await asyncio.get_running_loop().sock_sendall(self._sock, frame)
        except TimeoutError:
            raise WireError(f"the peer took nothing for {SEND_LIMIT_S:g} s") from None

    async def receive(self) -> Any:
        """The next message; None when the peer is gone, or this channel was closed."""
        while (message := self._codec.next()) is None:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    _READ_BYTES, socket.CMSG_SPACE(4 * DESCRIPTORS_LIMIT), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await self._wait_readable()
                if self._closed:
                    return None
                continue
            except OSError:
                return None
            self._descriptors.extend(_descriptors_in(ancillary))
            if flags & socket.MSG_CTRUNC or len(self._descriptors) > DESCRIPTORS_LIMIT:
                raise WireError("more descriptors than messages that could need them")
            if not data:
                return None
            self._codec.feed(data)
        return message

    async def _wait_readable(self) -> None:
        loop = asyncio.get_running_loop()
        readable = self._readable = loop.create_future()
        loop.add_reader(self._sock, _resolve, readable)
        try:
            await readable
        finally:
            self._readable = None
            if not self._closed:
                loop.remove_reader(self._sock)

    def take_fd(self) -> int | None:
        """A descriptor that came along with the messages received so far, in order. The caller closes it."""
        return self._descriptors.popleft() if self._descriptors else None

    def close(self) -> None:
        """Close the connection; a task that waits in `receive` gets None."""
        if self._closed:
            return
        self._closed = True
        if self._readable is not None:
            asyncio.get_running_loop().remove_reader(self._sock)
            _resolve(self._readable)
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._sock.close()


Handle = Callable[[Channel], Awaitable[None]]


class Server:
    """Lets peers in until it is closed; each is served by a task of its own."""

    def __init__(self, sock: socket.socket, open_channel: Callable[[socket.socket], Awaitable[Channel]]) -> None:
        self.port = int(sock.getsockname()[1]) if sock.family != socket.AF_UNIX else 0
        self._sock, self._open_channel = sock, open_channel
        self._strangers = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, handle: Handle) -> Server:
        self._spawn(self._accept(handle))
        return self

    async def _accept(self, handle: Handle) -> None:
        while True:
            try:
                sock, _ = await asyncio.get_running_loop().sock_accept(self._sock)
            except OSError as error:  # out of descriptors, or a peer that went before it was let in
                log.warning("accept: %s", error)
                await asyncio.sleep(0.1)
                continue
            if self._strangers >= STRANGERS_LIMIT:
                sock.close()
                continue
            self._spawn(self._serve(sock, handle))

    async def _serve(self, sock: socket.socket, handle: Handle) -> None:
        sock.setblocking(False)
        self._strangers += 1
        try:
            async with asyncio.timeout(HANDSHAKE_LIMIT_S):
                channel = await self._open_channel(sock)
        except (WireError, OSError, TimeoutError) as error:
            log.warning("a connection was refused: %s", error or "it said nothing")
            sock.close()
            return
        finally:
            self._strangers -= 1
        try:
            await handle(channel)
        except (WireError, OSError) as error:
            log.warning("a connection was closed: %s", error)
        finally:
            channel.close()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        self._sock.close()


def serve_unix(path: str, kind: Any, handle: Handle) -> Server:
    """Let processes of this user in at `path`, which replaces what was there. `kind`: what they may say."""

    async def opened(sock: socket.socket) -> Channel:
        _check_peer(sock)
        return Channel(sock, Codec(kind))

    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX)
    with _short(path) as short:
        sock.bind(short)
    return _listen(sock, opened).start(handle)


def serve_tcp(host: str, port: int, token: bytes, kind: Any, handle: Handle) -> Server:
    """Let whoever knows `token` in at this address; port 0 takes a free one."""

    async def opened(sock: socket.socket) -> Channel:
        _watch(sock)
        return Channel(sock, Codec(kind, await _prove_as_server(sock, token)))

    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return _listen(sock, opened).start(handle)


def _listen(sock: socket.socket, opened: Callable[[socket.socket], Awaitable[Channel]]) -> Server:
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return Server(sock, opened)


async def dial_tcp(host: str, port: int, token: bytes, kind: Any) -> Channel:
    """A channel to a server that knows `token`. `WireError` or `OSError` if there is none in time."""
    loop = asyncio.get_running_loop()
    family, _, _, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    sock = socket.socket(family)
    sock.setblocking(False)
    try:
        async with asyncio.timeout(HANDSHAKE_LIMIT_S):
            await loop.sock_connect(sock, address)
            _watch(sock)
            return Channel(sock, Codec(kind, await _prove_as_client(sock, token)))
    except TimeoutError:
        sock.close()
        raise WireError(f"{host}:{port} did not answer within {HANDSHAKE_LIMIT_S:g} s") from None
    except BaseException:
        sock.close()
        raise


class Line:
    """A blocking connection to the process of this user that listens at a path. Any thread may send; one receives."""

    def __init__(self, sock: socket.socket, kind: Any) -> None:
        sock.setblocking(False)
        self._sock, self._codec = sock, Codec(kind)
        self._lock = threading.Lock()

    @classmethod
    def connect(cls, path: str, kind: Any) -> Line:
        """`OSError` if nobody listens there, `WireError` if it is somebody else's process."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(HANDSHAKE_LIMIT_S)
            with _short(path) as short:
                sock.connect(short)
            _check_peer(sock)
        except BaseException:
            sock.close()
            raise
        return cls(sock, kind)

    def send(self, message: Any, fd: int | None = None, *, timeout_s: float) -> None:
        """Send a message, with a descriptor along. After `DeadlineExceeded` the line is of no more use."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            left = memoryview(self._codec.encode(message))
            while left:
                try:
                    if fd is None:
                        sent = self._sock.send(left, socket.MSG_NOSIGNAL)
                    else:
                        sent = socket.send_fds(self._sock, [left], [fd], socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    _await(self._sock, select.POLLOUT, deadline, f"the peer took nothing for {timeout_s:g} s")
                    continue
                left, fd = left[sent:], None

    def receive(self, timeout_s: float) -> Any:
        """The next message; None when the peer is gone. `DeadlineExceeded` if nothing whole came in time."""
        deadline = time.monotonic() + timeout_s
        while (message := self._codec.next()) is None:
            try:
                data = self._sock.recv(_READ_BYTES)
            except BlockingIOError:
                _await(self._sock, select.POLLIN, deadline, f"no message within {timeout_s:g} s")
                continue
            except ConnectionError:
                return None
            if not data:
                return None
            self._codec.feed(data)
        return message

    def shutdown(self) -> None:
        """End the connection from any thread: whoever sends or receives notices."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Release the descriptor; only for the thread that receives."""
        self.shutdown()
        with self._lock:
            self._sock.close()


def _resolve(waited: asyncio.Future[None]) -> None:
    if not waited.done():
        waited.set_result(None)


def _await(sock: socket.socket, event: int, deadline: float, problem: str) -> None:
    poll = select.poll()
    poll.register(sock, event)
    if not poll.poll(max(deadline - time.monotonic(), 0.0) * 1000) and time.monotonic() >= deadline:
        raise DeadlineExceeded(problem)


# Who is there


def _check_peer(sock: socket.socket) -> None:
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid, uid, _ = _PEERCRED.unpack(data)
    if uid != os.getuid():
        raise WireError(f"process {pid} of user {uid} is at the other end, not one of user {os.getuid()}")


async def _prove_as_server(sock: socket.socket, token: bytes) -> tuple[bytes, bytes]:
    hello = await _read(sock, len(MAGIC) + NONCE_BYTES)
    if not hello.startswith(MAGIC):
        raise WireError("it does not speak this protocol")
    client, server = hello[len(MAGIC) :], secrets.token_bytes(NONCE_BYTES)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, server + _proof(token, b"server", client, server))
    if not hmac.compare_digest(await _read(sock, MAC_BYTES), _proof(token, b"client", client, server)):
        raise WireError("it does not know the token of this run")
    return _proof(token, b"to client", client, server), _proof(token, b"to server", client, server)


async def _prove_as_client(sock: socket.socket, token: bytes) -> tuple[bytes, bytes]:
    loop, client = asyncio.get_running_loop(), secrets.token_bytes(NONCE_BYTES)
    await loop.sock_sendall(sock, MAGIC + client)
    answer = await _read(sock, NONCE_BYTES + MAC_BYTES)
    server = answer[:NONCE_BYTES]
    if not hmac.compare_digest(answer[NONCE_BYTES:], _proof(token, b"server", client, server)):
        raise WrongToken("it does not know the token of this run")
    await loop.sock_sendall(sock, _proof(token, b"client", client, server))
    return _proof(token, b"to server", client, server), _proof(token, b"to client", client, server)


def _proof(token: bytes, role: bytes, client: bytes, server: bytes) -> bytes:
    return hmac.digest(token, role + b"\0" + client + server, "sha256")


def _seal(key: bytes, number: int, frame: bytes) -> bytes:
    return hmac.digest(key, number.to_bytes(8, "little") + frame, "sha256")


async def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not more:
            raise WireError("it went away before it proved anything")
        data += more
    return data


# Sockets


def _watch(sock: socket.socket) -> None:
    """Notice within some 15 s that the other node is gone, and do not wait to fill packets."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 15_000)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> Iterator[int]:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found = array.array("i")
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
            yield from found


@contextlib.contextmanager
def _short(path: str) -> Iterator[str]:
    """A name for `path` that fits the 108 bytes of a socket's address, however long the path is."""
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


OUTBOX_LIMIT = 10_000


class Outbox:
    """Messages on their way through a channel, in order; `tell` never blocks."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._queue: asyncio.Queue[Any] = asyncio.Queue(OUTBOX_LIMIT)
        self._task = asyncio.get_running_loop().create_task(self._send())

    def tell(self, message: Any) -> None:
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self.close()  # it does not read; it will connect again

    async def _send(self) -> None:
        try:
            while True:
                await self._channel.send(await self._queue.get())
        except (CkptError, OSError):
            self._channel.close()

    def close(self) -> None:
        self._task.cancel()
        self._channel.close()
