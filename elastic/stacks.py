"""Where the workers of this node are, by the stacks that they are made to write. Blocking; from a thread of its own."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Sequence

from ckpt.board import STACKS_SIGNAL, Worker
from ckpt.owntime import is_waiting
from elastic.messages import Stack

WRITE_LIMIT_S = 3.0
SETTLED_S = 0.3  # no byte more for so long: it is written
TEXT_LIMIT_BYTES = 256 * 1024
FRAME = re.compile(r'File "(.*)", line (\d+) in (.*)')
LIBRARIES = "/lib/python3"


def collect(workers: Sequence[Worker]) -> list[tuple[Worker, str]]:
    """Have all write their stacks, and read them; a worker that cannot is left out."""
    able = [worker for worker in workers if worker.stacks]
    before = {worker.pid: _size(worker) for worker in able}
    for worker in able:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(worker.pid, STACKS_SIGNAL)
    deadline, sizes, since = time.monotonic() + WRITE_LIMIT_S, before, time.monotonic()
    while time.monotonic() < deadline:
        found = {worker.pid: _size(worker) for worker in able}
        if found != sizes:
            sizes, since = found, time.monotonic()
        if time.monotonic() - since > SETTLED_S and all(found[pid] > before[pid] for pid in found):
            break
        time.sleep(0.05)
    texts = [(worker, _read(worker, before[worker.pid])) for worker in able]
    return [(worker, text) for worker, text in texts if text]


def locate(rank: int, text: str) -> Stack:
    """Where the main thread is, which stands last, by what `faulthandler` wrote."""
    frames = FRAME.findall(re.split(r"^(?:Current t|T)hread ", text, flags=re.MULTILINE)[-1])
    waits = any(is_waiting(file, function) for file, _, function in frames)
    own = [frame for frame in frames if LIBRARIES not in frame[0]]  # of the script: that tells more
    file, line, function = next(iter(own or frames), ("?", "?", "?"))
    return Stack(rank, f"{function} ({os.path.basename(file)}:{line})"[:200], waits)


def _size(worker: Worker) -> int:
    with contextlib.suppress(OSError):
        return os.stat(worker.stacks).st_size
    return 0


def _read(worker: Worker, start: int) -> str:
    with contextlib.suppress(OSError), open(worker.stacks, "rb") as file:
        file.seek(start)
        return file.read(TEXT_LIMIT_BYTES).decode(errors="replace")
    return ""
