"""A pickle that its owner vouches for, unpickled in a child process without network, and written again as plain data.

Run as `python -m ckpt.interop.trusted IN OUT`. The child may run whatever the pickle says, so the parent believes
nothing of it: it reads OUT by the same safe door as any other file. Objects become their state dict or their
attributes where they have them, and are left out otherwise.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ckpt.errors import CkptError, DeadlineExceeded, Incompatible

TIMEOUT_S = 3600
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "HOME", "LANG", "TMPDIR")
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_REPORT_LIMIT_BYTES = 64 * 1024


def unpickle_apart(source: Path, into: Path) -> list[str]:
    """Write the plain data in the pickle `source` to the file `into`; what a person should know of it."""
    command = [sys.executable, "-m", "ckpt.interop.trusted", str(source), str(into)]
    env = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    try:
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"{source}: unpickling it took more than {TIMEOUT_S} s; nothing was imported") from None
    if done.returncode or not into.exists():
        why = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise Incompatible(f"{source}: unpickling it failed: {why[0][:500]}. What it is made of must be importable")
    try:
        notes = json.loads(done.stdout[-_REPORT_LIMIT_BYTES:].splitlines()[-1])
        return [str(note)[:300] for note in notes][:100]
    except (ValueError, IndexError, TypeError):
        return ["the child process said nothing that can be read"]


def leave_network() -> bool:
    """Move this process to a network of its own that leads nowhere; whether the system let it."""
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.unshare(_CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0)


def plain(node: Any, path: str, dropped: list[str], depth: int = 0) -> Any:
    """`node` in the types that are read without pickle."""
    import torch

    if isinstance(node, torch.Tensor):
        return node.detach()
    if node is None or type(node) in (bool, int, float, str, bytes, complex):
        return node
    if depth > 50:
        dropped.append(path)
        return None
    if isinstance(node, dict):
        items = {name: plain(item, f"{path}/{str(name)[:80]}", dropped, depth + 1) for name, item in node.items()}
        return {name: item for name, item in items.items() if isinstance(name, str | int | float | tuple)}
    if isinstance(node, list | tuple | set | frozenset):
        made = [plain(item, f"{path}/{i}", dropped, depth + 1) for i, item in enumerate(node)]
        return made if isinstance(node, list) else tuple(made)
    if callable(getattr(node, "state_dict", None)):
        return plain(node.state_dict(), path, dropped, depth + 1)
    if type(node).__module__ == "numpy":
        return torch.as_tensor(node) if getattr(node, "shape", ()) else node.item()
    if hasattr(node, "__dict__") and not callable(node):
        return plain(vars(node), path, dropped, depth + 1)
    dropped.append(f"{path} ({type(node).__name__})")
    return None


def main(source: str, into: str) -> None:
    notes = [] if leave_network() else ["this system lets no process leave the network: the pickle ran with it"]
    import torch  # only now: the process has one thread until here, as a new user namespace needs

    try:
        loaded = torch.load(source, map_location="cpu", weights_only=False, mmap=True)
    except RuntimeError:  # from before torch 1.6
        loaded = torch.load(source, map_location="cpu", weights_only=False)
    dropped: list[str] = []
    torch.save(plain(loaded, "", dropped), into)
    notes += [f"{path or 'the file'}: left out, it is neither data nor has a state_dict()" for path in dropped]
    print("\n" + json.dumps(notes), flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except CkptError as error:
        sys.exit(str(error))
