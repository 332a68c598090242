"""What users want told of the membership: objects with any of these methods, called in the agent's process.

    pre_join()                   before this node joins; raising, or taking too long, keeps the node out
    on_membership(Event)         a generation begins in which this node works
    on_worker_failure(Failure)   a worker of this node ended by itself, and not well
    on_leave(reason)             this agent ends

Found under the entry point group `elastic.hooks`, in ELASTIC_HOOKS=module:object,..., or given to `add_hooks`. A class
or function is called first. All but `pre_join` run on one thread of their own: they delay nobody, and a hook that
raises or takes longer than ELASTIC_HOOK_LIMIT_S is named in the log and left to itself.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import logging
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from ckpt.errors import Incompatible

log = logging.getLogger("elastic")

GROUP = "elastic.hooks"
WAITING_LIMIT = 1000
DEVICE_LIMIT_S = 60.0
DEVICE_CHECK = (
    "import torch; n = torch.cuda.device_count(); assert n, 'no CUDA device can be used';\n"
    "for i in range(n): x = torch.ones(1024, device=f'cuda:{i}'); assert float((x + x).sum()) == 2048, f'cuda:{i}'"
)


@dataclass(frozen=True)
class Event:
    """A generation begins: names of the nodes in order of rank, this node's rank, and what changed."""

    generation: int
    members: tuple[str, ...]
    rank: int
    reason: str
    joined: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        """How many nodes work."""
        return len(self.members)


@dataclass(frozen=True)
class Failure:
    """How a worker ended: `exit_code`, or the `signal` that killed it.

    `error_file`: the file in which it said why, if it did (`torch.distributed.elastic.multiprocessing.errors.record`);
    torchrun removes it when the workers start again.
    """

    pid: int
    exit_code: int | None
    signal: int | None
    error_file: str | None = None


class Excluded(Exception):
    """A `pre_join` hook keeps this node out."""


_added: list[Any] = []


def add_hooks(hooks: Any) -> None:
    """Register an object with hooks, before the agent starts in this process."""
    _added.append(hooks)


@dataclass
class Hooks:
    """All registered hooks by name, and the thread on which they run."""

    named: tuple[tuple[str, Any], ...] = ()
    limit_s: float = 60.0
    _waiting: queue.Queue[tuple[str, tuple[Any, ...]] | None] = field(
        default_factory=lambda: queue.Queue(WAITING_LIMIT)
    )
    _thread: threading.Thread | None = None

    def pre_join(self) -> None:
        """Ask all hooks, in order. Raises Excluded, which names the hook."""
        for name, hooks in (("the device check", _DeviceCheck()), *self.named):
            if (act := getattr(hooks, "pre_join", None)) is not None and (problem := self._bounded(act, ())):
                raise Excluded(f"{name}: pre_join {problem}; this node does not join")

    def tell(self, hook: str, *arguments: Any) -> None:
        """Have `hook` of every object called, in the background."""
        if not self.named:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="elastic-hooks", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait((hook, arguments))
        except queue.Full:
            log.warning("hooks are %d calls behind: %s was not called", WAITING_LIMIT, hook)

    def finish(self, timeout_s: float) -> None:
        """Give the hooks that were told so long to come to their end."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._waiting.put(None, timeout=timeout_s)
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (call := self._waiting.get()) is not None:
            hook, arguments = call
            for name, hooks in self.named:
                if (act := getattr(hooks, hook, None)) is not None and (problem := self._bounded(act, arguments)):
                    log.error("%s: %s %s", name, hook, problem)

    def _bounded(self, act: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
        """Call it on a thread that may be left behind; what was wrong, or nothing."""
        problems: list[str] = []

        def run() -> None:
            try:
                act(*arguments)
            except BaseException as error:  # also SystemExit: a hook does not end the agent
                problems.append(f"raised {type(error).__name__}: {error}")

        thread = threading.Thread(target=run, name="elastic-hook", daemon=True)
        thread.start()
        thread.join(self.limit_s)
        if thread.is_alive():
            return f"did not return within {self.limit_s:g} s"
        return problems[0] if problems else ""


class _DeviceCheck:
    """Whether CUDA devices that are there work, tried in a process of its own: a broken one can hang its user."""

    def pre_join(self) -> None:
        if glob.glob("/dev/nvidia[0-9]*"):
            command = [sys.executable, "-c", DEVICE_CHECK]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEVICE_LIMIT_S)
            if done.returncode != 0:
                raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])


def load(described: str, limit_s: float) -> Hooks:
    """The hooks of all sources; `described` is that of ELASTIC_HOOKS. Raises Incompatible for one that is not there."""
    found: list[tuple[str, Any]] = [(f"hooks {_name(hooks)}", hooks) for hooks in _added]
    for point in entry_points(group=GROUP):
        found.append((f"hooks {point.name}", _loaded(point.value, point.load)))
    for text in filter(None, (part.strip() for part in described.split(","))):
        found.append((f"hooks {text}", _loaded(text, lambda text=text: _imported(text))))  # type: ignore[misc]
    made = ((name, _loaded(name, hooks) if callable(hooks) else hooks) for name, hooks in found)
    return Hooks(tuple(made), limit_s)


def _loaded(text: str, load_it: Callable[[], Any]) -> Any:
    try:
        return load_it()
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise Incompatible(f"hooks {text!r} cannot be loaded: {what}. Expected module:object") from error


def _imported(text: str) -> Any:
    module, _, names = text.partition(":")
    found: Any = importlib.import_module(module)
    for name in filter(None, names.split(".")):
        found = getattr(found, name)
    return found


def _name(hooks: Any) -> str:
    return getattr(hooks, "__qualname__", type(hooks).__qualname__)


def changes(
    before: Iterable[str], after: Iterable[str], names: dict[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the nodes that joined, and of those that left."""
    old, new = list(before), list(after)
    joined = tuple(names.get(node, node) for node in new if node not in old)
    return joined, tuple(names.get(node, node) for node in old if node not in new)
