"""The n-th system call with which a process changes something below a folder is its last: it dies instead.

Not strace, whose injections count for each thread apart: a seccomp filter, inherited by every process and thread that
starts under it, has the kernel ask here before each such call (seccomp_unotify(2)). They are counted over all threads
of the process meant, in the order in which they happen; every other call goes on as if nobody had asked.

The processes are those of a `Forge`: one that has imported what a job needs, and forks for each.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from jobs import ROOT

DEADLINE_S = 120

# Name -> (number, where its arguments name what it touches): an int is an argument that holds a descriptor, a pair one
# for a directory and one for a path in it, None in place of a directory: the current one.
Place = int | tuple[int | None, int]
X86_64: dict[str, tuple[int, tuple[Place, ...]]] = {
    "write": (1, (0,)),
    "pwrite64": (18, (0,)),
    "open": (2, ((None, 0),)),
    "openat": (257, ((0, 1),)),
    "fsync": (74, (0,)),
    "fdatasync": (75, (0,)),
    "ftruncate": (77, (0,)),
    "fallocate": (285, (0,)),
    "rename": (82, ((None, 0), (None, 1))),
    "renameat": (264, ((0, 1), (2, 3))),
    "renameat2": (316, ((0, 1), (2, 3))),
    "mkdir": (83, ((None, 0),)),
    "mkdirat": (258, ((0, 1),)),
    "rmdir": (84, ((None, 0),)),
    "link": (86, ((None, 1),)),
    "linkat": (265, ((2, 3),)),
    "unlink": (87, ((None, 0),)),
    "unlinkat": (263, ((0, 1),)),
}
OPENS = {"open": 1, "openat": 2}  # which argument holds the flags
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_AT_FDCWD = -100
_PR_SET_NO_NEW_PRIVS = 38
_SYS_SECCOMP = 317
_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # ioctls of the listener
_CONTINUE = 1
_NOTIFICATION = struct.Struct("=QII iIQ6Q")  # id, thread, flags, number, architecture, instruction, arguments
_ANSWER = struct.Struct("=QqiI")  # id, value, error, flags


def install_filter() -> int:
    """From now on this process and all it starts ask before the calls above; the descriptor that answers."""
    load_number = (0x20, 0, 0, 0)
    numbers = sorted(number for number, _ in X86_64.values())
    tests = [(0x15, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    allow, ask = (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x7FC00000)
    code = b"".join(struct.pack("=HBBI", *each) for each in [load_number, *tests, allow, ask])
    program = ctypes.create_string_buffer(code, len(code))
    described = struct.pack("@HP", len(code) // 8, ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    fd = libc.syscall(_SYS_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, described)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(fd)


@dataclass
class Plan:
    """Who dies at which of its calls below `root`; and what was seen."""

    root: str
    who: str = ""  # "worker" or "keeper"
    n: int = 0
    everybody: bool = False  # the others, too
    calls: Counter[str] = field(default_factory=Counter)
    killed: str = ""  # the call that was not made
    seen: set[int] = field(default_factory=set)


class Forge:
    """Runs functions `fn(path)` in processes forked for each, and kills as it is told. One at a time."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import syscalls; syscalls.main({theirs.fileno()})"],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            text=True,
        )
        theirs.close()
        ours.settimeout(DEADLINE_S)
        said, fds, _, _ = socket.recv_fds(ours, 200, 1)
        ours.close()
        if not fds:
            self._process.wait(DEADLINE_S)
            pytest.skip(f"the kernel does not let us ask before system calls: {said.decode() or 'it failed'}")
        self._listener = fds[0]
        self._wake, self._woken = os.pipe()
        self._thread = threading.Thread(target=self._answer_all, daemon=True)
        self._thread.start()

    def run(self, name: str, plan: Plan) -> list[str]:
        """What `module:function`, given the path of `plan`, said on its standard output until it ended."""
        with self._lock:
            self._plan = plan
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{name} {plan.root}\n")
        self._process.stdin.flush()
        said = []
        while (line := self._line()) and not line.startswith("ended "):
            said.append(line)
        assert line, "the processes' parent is gone"
        assert line == "ended 0" or plan.killed, f"{line}, but nobody was killed: {said}"
        return said

    def _line(self) -> str:
        assert self._process.stdout is not None
        timer = threading.Timer(DEADLINE_S, self._process.kill)
        timer.start()
        try:
            return self._process.stdout.readline().rstrip()
        finally:
            timer.cancel()

    def close(self) -> None:
        """Ends the parent; keepers that still live go on being answered until they end, which is waited for."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(DEADLINE_S)
        self._process.stdout.close()
        self._thread.join(DEADLINE_S)
        os.close(self._listener)

    def _answer_all(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        while True:
            events = poll.poll()[0][1]
            if not events & select.POLLIN:
                return  # nobody is left who could ask
            asked = bytearray(_NOTIFICATION.size)
            with contextlib.suppress(FileNotFoundError):  # it was killed meanwhile
                fcntl.ioctl(self._listener, _RECEIVE, asked)
                self._look_at(*_NOTIFICATION.unpack(asked))
                fcntl.ioctl(self._listener, _SEND, _ANSWER.pack(struct.unpack_from("=Q", asked)[0], 0, 0, _CONTINUE))

    def _look_at(self, _id: int, thread: int, _flags: int, number: int, _arch: int, _ip: int, *arguments: int) -> None:
        with self._lock:
            plan = self._plan
            if plan is None or plan.killed:
                return
            with contextlib.suppress(OSError):  # it was killed, or closed what it named
                name = _NAMES[number]
                if name in OPENS and not arguments[OPENS[name]] & CHANGES:
                    return
                places = [_path(thread, place, arguments) for place in X86_64[name][1]]
                if any(f"{place}/".startswith(f"{plan.root}/") for place in places):
                    _count(plan, thread, f"{name} {' '.join(os.path.relpath(place, plan.root) for place in places)}")


_NAMES = {number: name for name, (number, _) in X86_64.items()}


def _count(plan: Plan, thread: int, call: str) -> None:
    pid = int(Path(f"/proc/{thread}/status").read_text().split("\nTgid:")[1].split()[0])
    plan.seen.add(pid)
    who = "keeper" if b"ckpt.keeper" in Path(f"/proc/{pid}/cmdline").read_bytes() else "worker"
    plan.calls[who] += 1
    if (who, plan.calls[who]) == (plan.who, plan.n):
        plan.killed = call
        for victim in {pid, *(plan.seen if plan.everybody else ())}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)


def _path(thread: int, place: Place, arguments: tuple[int, ...]) -> str:
    if isinstance(place, int):
        return os.readlink(f"/proc/{thread}/fd/{arguments[place]}")
    directory, at = place
    path = _text(thread, arguments[at])
    fd = _AT_FDCWD if directory is None else ctypes.c_int(arguments[directory]).value
    base = os.readlink(f"/proc/{thread}/cwd" if fd == _AT_FDCWD else f"/proc/{thread}/fd/{fd}")
    return os.path.normpath(os.path.join(base, path))


def _text(thread: int, address: int) -> str:
    """The text that ends with a zero at an address of another process."""
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        found = b""
        while b"\0" not in found:
            room = 4096 - (address + len(found)) % 4096  # the next page may be nobody's
            found += os.pread(memory.fileno(), room, address + len(found))
        return os.fsdecode(found.partition(b"\0")[0])


@contextlib.contextmanager
def forge() -> Iterator[Forge]:
    if platform.machine() != "x86_64":
        pytest.skip("the numbers of system calls are known here for x86_64 only")
    made = Forge()
    try:
        yield made
    finally:
        made.close()


def main(channel: int) -> None:
    """The parent of all jobs: imports torch once, then forks for each line of its standard input."""
    with socket.socket(fileno=channel) as line:
        try:
            listener = install_filter()
        except OSError as error:
            line.send(str(error).encode())
            return
        socket.send_fds(line, [b"ready"], [listener])
        os.close(listener)
    import torch

    import ckpt  # noqa: F401

    torch.set_num_threads(1)
    while said := sys.stdin.readline():  # no iteration: what it reads ahead would be read by the children, too
        name, path = said.split()
        module, function = name.split(":")
        child = os.fork()
        if not child:
            getattr(importlib.import_module(module), function)(path)
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(f"ended {status}", flush=True)
