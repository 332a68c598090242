"""The n-th file operation of a keeper below a run's directory fails, as disks do. Armed from its start by
`keeper_site`; a file says which one fails, and how, and goes away once it has (unless it shall go on failing).

    an errno     the operation is refused
    "short"      a write takes half of what it is given
    "lost"       a write says that it is done, and is not
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "HOLDFAST_TEST_IO"
OPERATIONS = ("open", "write", "pwrite", "posix_fallocate", "fsync", "link", "rename", "unlink", "mkdir", "rmdir")


def arm_keeper() -> None:
    import ckpt.run

    ckpt.run._UNKNOWN_WAIT_S = 0.01  # type: ignore[misc]
    root, plan = os.environ[VARIABLE].split("|")
    folders: dict[int, str] = {}
    state = {"count": 0, "plan": ""}

    def fault() -> Any:
        """What the operation that is about to begin shall meet."""
        try:
            text = Path(plan).read_text()
        except FileNotFoundError:
            return None
        if text != state["plan"]:
            state["plan"], state["count"] = text, 0
        wanted = json.loads(text)
        state["count"] += 1
        if state["count"] < wanted["n"]:
            return None
        Path(f"{plan}.met").touch()
        if not wanted["sticky"]:
            os.unlink(plan)
        return wanted["fault"]

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            where = folders.get(arguments[0], "") if isinstance(arguments[0], int) else os.fspath(arguments[0])
            inside = f"{where}/".startswith(f"{root}/") and inside_now[0]
            if inside:
                inside_now[0] = False
                found = fault()
                inside_now[0] = True
                if isinstance(found, int):
                    raise OSError(found, os.strerror(found), where)
                if found is not None and name in ("write", "pwrite"):
                    nbytes = len(arguments[1])
                    if found == "lost":
                        return nbytes
                    half = max(1, nbytes // 2)
                    return original(arguments[0], memoryview(arguments[1])[:half], *arguments[2:], **options)
            result = original(*arguments, **options)
            if name == "open":
                folders[result] = where if inside else ""
            return result

        setattr(os, name, wrapper)

    inside_now = [True]
    for name in OPERATIONS:
        wrap(name)
