"""Points inside a save at which a process kills itself: before or after the n-th call of a function.

Workers arm themselves. A keeper is armed from its start on, by `keeper_site`, for as long as there is a file that
says so: it removes that file before it dies, so that the keeper after it lives.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

Point = tuple[str, str, int]
"""Name of the call, "before" or "after", and which call of it."""

WORKER = {
    "order": ("ckpt.keeper.courier", "Courier.begin"),
    "copy": ("ckpt.stage", "Copy._copy"),
    "copied": ("ckpt.keeper.courier", "Pending.copied"),
}
KEEPER = {
    "create": ("ckpt.direct", "create"),
    "write": ("ckpt.direct", "write_all"),
    "seal": ("ckpt.keeper.node", "Node._seal"),
    "put": ("ckpt.stores.posix", "PosixStore.put"),
    "commit": ("ckpt.keeper.hub", "commit"),
    "fsync": ("os", "fsync"),
    "rename": ("os", "rename"),
    "link": ("os", "link"),
}
VARIABLE = "HOLDFAST_TEST_POINT"


def arm_worker(point: Point) -> None:
    """From now on this process dies at `point`."""
    _wrap(WORKER, point, lambda: True, die)


def let_keeper_be_armed(file: Path) -> None:
    """Keepers that this process starts from now on heed `file`."""
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = f"{here / 'keeper_site'}:{here}"
    os.environ[VARIABLE] = str(file)


def set_point(file: Path, point: Point, victims: list[int]) -> None:
    """From now on the keeper dies at `point`, and takes the processes `victims` along."""
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps([point, victims]))
    temporary.rename(file)


def arm_keeper() -> None:
    """In a keeper that starts: be ready for the point that is set later."""
    file = os.environ[VARIABLE]

    def fall() -> None:
        _, victims = json.loads(Path(file).read_text())
        os.unlink(file)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        die()

    for name in KEEPER:
        for when in ("before", "after"):
            _wrap(KEEPER, (name, when, 0), lambda: os.path.exists(file), fall, file)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _wrap(
    where: dict[str, tuple[str, str]], point: Point, armed: Callable[[], bool], fall: Callable[[], None], file: str = ""
) -> None:
    name, when, nth = point
    module, path = where[name]
    *holders, attribute = path.split(".")
    owner: Any = importlib.import_module(module)
    for holder in holders:
        owner = getattr(owner, holder)
    call: Callable[..., Any] = getattr(owner, attribute)
    calls, lock = [0], threading.Lock()

    def is_it() -> bool:
        if not armed():
            return False
        wanted = nth
        if file:
            (of, at, wanted), _ = json.loads(Path(file).read_text())
            if (of, at) != (name, when):
                return False
        with lock:
            calls[0] += 1
            return calls[0] == wanted

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        last = is_it()
        if last and when == "before":
            fall()
        result = call(*args, **kwargs)
        if last:
            fall()
        return result

    setattr(owner, attribute, wrapped)
