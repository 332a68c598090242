"""Marks in the life of a run, told to whoever injects faults into it (`elastic chaos`).

A no-op unless HOLDFAST_EVENTS names the socket of a listener. A process that is at a mark goes on once the listener
lets it: held there, it can be killed, cut off or frozen in exactly this phase. Ends a process' wait, and nothing else,
if the listener is gone. No torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import Any

VARIABLE = "HOLDFAST_EVENTS"
LIMIT_BYTES = 8 << 20
HELD_LIMIT_S = 120.0
FAIL = b"fail"


class Injected(RuntimeError):
    """A fault that was asked for: the program fails here as if it had a bug."""


def watched() -> bool:
    """Whether anybody listens; ask before computing facts that are dear."""
    return VARIABLE in os.environ


def point(name: str, **facts: Any) -> None:
    """Say that this process is at `name`; returns when it may go on, after 120 s at most.

    `facts` are plain JSON values. Raises Injected where the listener wants this process to fail.
    """
    if VARIABLE not in os.environ:
        return
    told = {"name": name, "generation": int(os.environ.get("ELASTIC_GENERATION", 0)), **facts}
    data = json.dumps(told).encode() + b"\n"
    answer = b""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(HELD_LIMIT_S)
        channel.connect(os.environ[VARIABLE])
        channel.sendall(data)
        answer = channel.recv(len(FAIL))
    if answer == FAIL:
        raise Injected(f"a fault was injected at {name} {facts.get('step', '')}".rstrip())
