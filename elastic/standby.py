"""An interpreter that has imported what workers import, and waits to become one. Run as a script, by `elastic.warm`.

    python -u standby.py FD preload=MODULES SCRIPT ARGUMENTS...         or  -m MODULE ARGUMENTS...

On FD, a socket, it says READY once MODULES (with commas between) are imported. It is sent the worker's environment as
JSON in a memory file, with its stdout and stderr; it answers TAKEN, leads a session of its own, and is the worker. It
ends when the socket does. While it waits its name in `ps` is NAME. Imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Iterator

PRELOAD = "preload="
READY, TAKE, TAKEN = b"r", b"t", b"k"
NAME = "elastic-standby"
LOWEST = 19


def main(control: socket.socket, modules: list[str], command: list[str]) -> None:
    """Wait, then run `command` as `python` would."""
    if not sys.flags.safe_path:  # before what is imported: as for a worker
        sys.path[0] = os.getcwd() if command[0] == "-m" else os.path.dirname(os.path.realpath(command[0]))
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # at a terminal all get it; the agent says what follows
    with _low_priority():
        for module in modules:
            _import(module)
    name = _rename(NAME)
    control.sendall(READY)
    _await_environment(control)
    _rename(name)
    os.setsid()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, on_interrupt)
    control.sendall(TAKEN)
    control.close()
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise SystemExit(f"elastic: {module} cannot be imported ahead ({what}): workers start cold") from error


def _await_environment(control: socket.socket) -> None:
    """Take over environment, stdout and stderr; SystemExit when the agent is gone."""
    said, descriptors, _, _ = socket.recv_fds(control, len(TAKE), 3)
    if said != TAKE:
        raise SystemExit(0)
    with open(descriptors[0], "rb") as file:
        environment = json.load(file)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, standard in zip(descriptors[1:], (1, 2), strict=True):
        os.dup2(descriptor, standard)
        os.close(descriptor)


@contextlib.contextmanager
def _low_priority() -> Iterator[None]:
    """What is done in here leaves the processors to others, if that can be taken back: not every user may."""
    allowed: list[int] = []

    def attempt() -> None:  # a priority is a thread's
        before = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, 0, LOWEST)
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, before)
            allowed.append(before)

    probe = threading.Thread(target=attempt)
    probe.start()
    probe.join()
    for _ in allowed:
        os.setpriority(os.PRIO_PROCESS, 0, LOWEST)
    yield
    for before in allowed:
        for thread in os.listdir("/proc/self/task"):  # also those that the imports have started
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, int(thread), before)


def _rename(name: str) -> str:
    """Be called `name` in `ps`; the name before."""
    with open("/proc/self/comm", "r+") as file:
        before = file.read().strip()
        file.seek(0)
        file.write(name)
    return before


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2].removeprefix(PRELOAD).split(","), sys.argv[3:])
