"""Messages between processes: whole, in order, from whom they may come, and never waited for without end."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckpt.wire
from ckpt.errors import DeadlineExceeded
from ckpt.wire import Channel, Codec, Line, WireError, dial_tcp, serve_tcp, serve_unix

TOKEN = bytes(range(32))
KEYS = (b"a" * 32, b"b" * 32)


class Said(msgspec.Struct, frozen=True):
    text: str


def run(job: Awaitable[Any]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(30):
            return await job

    return asyncio.run(limited())


# Frames


@given(st.lists(st.text(max_size=300)), st.integers(1, 50), st.booleans())
def test_any_cut_of_the_stream_gives_the_same_messages(texts: list[str], cut: int, sealed: bool) -> None:
    sender, receiver = Codec(Said, KEYS if sealed else None), Codec(Said, KEYS[::-1] if sealed else None)
    stream, heard = b"".join(sender.encode(Said(text)) for text in texts), []
    for at in range(0, len(stream), cut):
        receiver.feed(stream[at : at + cut])
        while (message := receiver.next()) is not None:
            heard.append(message.text)
    assert heard == texts


@given(st.data())
def test_no_changed_byte_of_a_sealed_frame_passes(data: st.DataObject) -> None:
    frame = bytearray(Codec(Said, KEYS).encode(Said("sixteen characters")))
    at = data.draw(st.integers(4, len(frame) - 1))  # a changed size only delays, or is refused
    frame[at] ^= 1 << data.draw(st.integers(0, 7))
    receiver = Codec(Said, KEYS[::-1])
    receiver.feed(bytes(frame))
    with pytest.raises(WireError, match="token"):
        receiver.next()


def test_a_replayed_or_reordered_frame_does_not_pass() -> None:
    sender = Codec(Said, KEYS)
    first, second = sender.encode(Said("1")), sender.encode(Said("2"))
    for stream in (first + first, second + first):
        receiver = Codec(Said, KEYS[::-1])
        receiver.feed(stream)
        with pytest.raises(WireError, match="token"):
            [receiver.next(), receiver.next()]


@pytest.mark.parametrize("stream", [struct.pack("<I", 1 << 31), b"\3\0\0\0abc", b"\2\0\0\0\x92\x01"])
def test_what_is_no_message_is_refused(stream: bytes) -> None:
    receiver = Codec(Said)
    receiver.feed(stream)
    with pytest.raises(WireError, match=r"limit|understood"):
        receiver.next()


def test_a_message_over_the_limit_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckpt.wire, "MESSAGE_LIMIT_BYTES", 10)
    with pytest.raises(WireError, match="limit"):
        Codec(Said).encode(Said("x" * 20))


# On one node


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[Path]:
    """A server in a thread that answers every message, and tells what a descriptor that came along holds."""
    folder = tmp_path / ("deep" * 40)  # more than the 108 bytes of a socket's address
    folder.mkdir()
    path, ready, ended = folder / "socket", threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def handle(channel: Channel) -> None:
        while (message := await channel.receive()) is not None:
            fd = channel.take_fd()
            text = os.pread(fd, 100, 0).decode() if fd is not None else message.text
            if fd is not None:
                os.close(fd)
            await channel.send(Said(text))

    async def serve() -> None:
        server = serve_unix(str(path), Said, handle)
        ready.set()
        await ended.wait()
        server.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    yield path
    loop.call_soon_threadsafe(ended.set)
    thread.join(10)
    loop.close()


def test_messages_and_descriptors_arrive(echo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the file")
    line = Line.connect(str(echo), Said)
    line.send(Said("ä" * 3_000_000), timeout_s=20)
    assert line.receive(20).text == "ä" * 3_000_000
    before = len(os.listdir("/proc/self/fd"))  # both ends are open by now
    for _ in range(20):
        with (tmp_path / "file").open() as file:
            line.send(Said("look"), fd=file.fileno(), timeout_s=20)
        assert line.receive(20).text == "in the file"
    assert len(os.listdir("/proc/self/fd")) == before
    line.close()


def test_waits_end(echo: Path) -> None:
    line = Line.connect(str(echo), Said)
    with pytest.raises(DeadlineExceeded):
        line.receive(0.05)
    waiting = threading.Thread(target=lambda: heard.append(line.receive(20)))
    heard: list[Any] = []
    waiting.start()
    line.shutdown()
    waiting.join(10)
    assert heard == [None]
    line.close()


def test_a_peer_that_takes_nothing_is_given_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        line = Line.connect(str(tmp_path / "s"), Said)
        with pytest.raises(DeadlineExceeded, match="took nothing"):
            line.send(Said("x" * 10_000_000), timeout_s=0.2)
        line.close()


def test_a_closed_channel_wakes_who_waits_for_it() -> None:
    async def job() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        channel = Channel(ours, Codec(Said))
        waiting = asyncio.create_task(channel.receive())
        await asyncio.sleep(0)
        channel.close()
        assert await waiting is None
        theirs.close()

    run(job())


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_another_user_is_turned_away_by_both_ends(echo: Path) -> None:
    """The folder would already keep other users out; here it is open, and its owner is asked for."""
    for folder in [echo, *list(echo.parents)[:3]]:
        folder.chmod(0o777)
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "from ckpt.wire import Line\n"
        "socket, directory = sys.argv[1].rsplit('/', 1)[::-1]\n"
        "os.chdir(directory); os.setuid(65534)\n"
        "Line.connect('./' + socket, dict)"
    )
    root = str(Path(ckpt.__file__).parent.parent)
    ended = subprocess.run([sys.executable, "-c", program, str(echo), root], capture_output=True, text=True, timeout=60)
    assert "WireError" in ended.stderr
    assert "of user 0 is at the other end, not one of user 65534" in ended.stderr
    line = Line.connect(str(echo), Said)  # ours still works
    line.send(Said("me"), timeout_s=10)
    assert line.receive(10).text == "me"
    line.close()


# Between nodes


async def over_tcp(client: Callable[[int], Awaitable[Any]]) -> tuple[Any, list[str]]:
    heard: list[str] = []

    async def handle(channel: Channel) -> None:
        while (message := await channel.receive()) is not None:
            heard.append(message.text)
            await channel.send(message)

    server = serve_tcp("127.0.0.1", 0, TOKEN, Said, handle)
    try:
        return await client(server.port), heard
    finally:
        server.close()


def test_both_ends_that_know_the_token_talk() -> None:
    async def client(port: int) -> list[str]:
        channel = await dial_tcp("127.0.0.1", port, TOKEN, Said)
        answers = []
        for text in ("one", "two", "x" * 5_000_000):
            await channel.send(Said(text))
            answers.append((await channel.receive()).text)
        channel.close()
        return answers

    answers, heard = run(over_tcp(client))
    assert answers == heard == ["one", "two", "x" * 5_000_000]


def test_a_client_without_the_token_is_turned_away() -> None:
    async def client(port: int) -> None:
        with pytest.raises(WireError, match="does not know the token"):
            await dial_tcp("127.0.0.1", port, b"x" * 32, Said)

    assert run(over_tcp(client))[1] == []


def test_a_server_that_only_answers_back_is_found_out() -> None:
    """It has not the token; it reflects what it is sent."""

    async def job() -> None:
        async def reflect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1000):
                writer.write(data[-32:] * 2)

        server = await asyncio.start_server(reflect, "127.0.0.1", 0)
        with pytest.raises(WireError, match="does not know the token"):
            await dial_tcp("127.0.0.1", server.sockets[0].getsockname()[1], TOKEN, Said)
        server.close()

    run(job())


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n" * 10, ckpt.wire.MAGIC + b"c" * 32 + b"p" * 32])
def test_strangers_are_turned_away(sent: bytes) -> None:
    async def client(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        try:
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    answer, heard = run(over_tcp(client))
    assert heard == []
    assert len(answer) in (0, 64)


def test_a_stranger_who_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckpt.wire, "HANDSHAKE_LIMIT_S", 0.2)
    monkeypatch.setattr(ckpt.wire, "STRANGERS_LIMIT", 2)

    async def client(port: int) -> list[bytes]:
        pairs = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        ends = [await reader.read() for reader, _ in pairs]
        for _, writer in pairs:
            writer.close()
        return ends

    assert run(over_tcp(client))[0] == [b""] * 4
