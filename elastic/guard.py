"""The process that kills an agent's workers if the agent dies: torchrun's own are left training.

Run as a script, without site-packages: `python -I -S guard.py AGENT`. It waits on its standard input, which the agent
holds open. At its end without a farewell, every process with ELASTIC_AGENT=AGENT in its environment is killed; but a
keeper lives on, as it is there to store what the workers left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

FAREWELL = b"farewell"
VARIABLE = "ELASTIC_AGENT"
LIMIT_S = 10.0
KEEPER = b"ckpt.keeper"


def processes_of(agent: str) -> list[int]:
    """Processes that were started for `agent`, without this one and without keepers."""
    wanted, found = f"{VARIABLE}={agent}".encode(), []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    environment = file.read().split(b"\0")
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    command = file.read().split(b"\0")
            except OSError:  # gone, or another user's
                continue
            if wanted in environment and KEEPER not in command:
                found.append(int(name))
    return found


def kill_all(agent: str) -> None:
    """SIGKILL until none is left, also those that were being started meanwhile."""
    deadline, quiet = time.monotonic() + LIMIT_S, 0
    while quiet < 3 and time.monotonic() < deadline:
        found = processes_of(agent)
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        quiet = 0 if found else quiet + 1
        time.sleep(0.02)


def main(agent: str) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # it ends with its agent, not before
    said = b""
    while data := os.read(0, 64):
        said += data
    if said != FAREWELL:
        kill_all(agent)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
