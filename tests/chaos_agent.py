"""Stands for an agent where faults themselves are tested: starts one worker, answers datagrams, and makes marks.

No torch: a node of it is there in a tenth of a second.
"""

from __future__ import annotations

import array
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PORT = 9009
EVENTS = Path(__file__).parent.parent / "ckpt" / "events.py"
BALLAST_BYTES = 64 << 20


def events() -> Any:
    """`ckpt.events`, without the rest of ckpt."""
    spec = importlib.util.spec_from_file_location("events", EVENTS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def work() -> None:
    """Make a step every 20 ms, with memory in use; each says what it saw of the disk, its memory and the clock."""
    ballast = bytearray(os.urandom(4096)) * (BALLAST_BYTES // 4096)
    live = array.array("f", [1.5])
    events_module.point("save", step=0, rank=0, memory=[("live", live.buffer_info()[0], 4, "float32")])
    with tempfile.TemporaryFile() as file:
        for step in range(1, 1_000_000):
            ballast[step % BALLAST_BYTES] = 1
            began = time.monotonic()
            try:
                os.fsync(file.fileno())
                failed = 0
            except OSError as error:
                failed = error.errno
            facts = {"failed": failed, "fsync_s": time.monotonic() - began, "live": live[0], "unix_s": time.time()}
            events_module.point("step", step=step, rank=0, **facts)
            time.sleep(0.02)


def answer() -> None:
    """Send every datagram back."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        channel.bind(("0.0.0.0", PORT))
        while True:
            data, sender = channel.recvfrom(64)
            channel.sendto(data, sender)


if __name__ == "__main__":
    events_module = events()
    if sys.argv[1:] == ["worker"]:
        work()
    else:
        worker = subprocess.Popen(
            [sys.executable, __file__, "worker"], env={**os.environ, "LOCAL_RANK": "0"}, start_new_session=True
        )
        name = os.environ["HOLDFAST_CHAOS_NODE"].partition("/")[0]
        events_module.point("join", generation=1, leads=name == "n1")
        if sys.argv[1:] == ["answers"]:
            answer()
        worker.wait()
        time.sleep(3600)
