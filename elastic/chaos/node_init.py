"""The first process of a node in namespaces of its own: makes its folders, starts its agent, collects what dies.

Run as a script, without site-packages: `python -I -S node_init.py SPEC`. It says on standard output `ready` (namespaces
and folders are made), `started` and `ended CODE` of the agent; it does on standard input `go` (start the agent). At
the end of its input it ends, and the kernel kills all that was started here: the power is off.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from typing import Any

TMPFS = ("/dev/shm", "/tmp")


def make_folders(spec: dict[str, Any]) -> None:
    """Own /dev/shm and /tmp, through which only the folders `keep` are still seen; own hosts file and boot id."""
    kept = [(path, os.open(path, os.O_PATH)) for path in spec["keep"] if _below_tmpfs(path)]
    os.makedirs(spec["own"], exist_ok=True)
    for name, text in spec["files"].items():
        own = os.path.join(spec["own"], os.path.basename(name))
        with open(own, "w") as file:
            file.write(text)
        mount("--bind", own, name)
    for path in TMPFS:
        mount("-t", "tmpfs", "-o", f"size={spec['tmpfs_mb']}m,mode=1777", "tmpfs", path)
    for path, fd in kept:
        inside = f"/proc/self/fd/{fd}"
        if os.path.isdir(inside):
            os.makedirs(path, exist_ok=True)
        elif not os.path.exists(path):  # else it is the user's own, in a folder that was kept
            os.makedirs(os.path.dirname(path), exist_ok=True)
            open(path, "x").close()
        subprocess.run(["mount", "--no-canonicalize", "--bind", inside, path], check=True, pass_fds=[fd])


def _below_tmpfs(path: str) -> bool:
    return any(path.startswith(f"{root}/") for root in TMPFS)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def start_agent(spec: dict[str, Any]) -> int:
    with open(spec["log"], "ab") as log:
        return subprocess.Popen(
            spec["command"], env=spec["environment"], cwd=spec["folder"], stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, start_new_session=True,
        ).pid  # fmt: skip


def serve(spec: dict[str, Any]) -> None:
    """Until the input ends: start the agent when told, collect every process that ends."""
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    say("ready")
    agent = 0
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if 0 in readable:
            told = os.read(0, 64)
            if not told:
                return
            agent = agent or start_agent(spec)
            say("started")
        with contextlib.suppress(BlockingIOError):
            os.read(woken, 4096)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == agent:
                    say(f"ended {os.waitstatus_to_exitcode(ended[1])}")


def say(what: str) -> None:
    os.write(1, f"{what}\n".encode())


def main(path: str) -> int:
    with open(path) as file:
        spec = json.load(file)
    socket.sethostname(spec["name"])
    make_folders(spec)
    serve(spec)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
