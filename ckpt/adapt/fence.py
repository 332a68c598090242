"""What keeps a copy that goes on while training does from seeing the next step's numbers.

Parameters and optimizer state change in `Optimizer.step()`, which says so in advance: the fence stands in its step
pre-hook and lets it begin when the copy has ended. `torch.optim.Optimizer` calls these hooks for every subclass, around
closures and behind learning-rate schedulers alike.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

WAITS_LIMIT = 8  # saves without a step between them, whose copies may still go on


def is_fenced(optimizer: Optimizer) -> bool:
    """Whether every step of `optimizer` passes its pre-hooks: not one that is captured into a CUDA graph."""
    hooked = getattr(type(optimizer).step, "hooked", False)
    return hooked is True and not any(group.get("capturable") for group in optimizer.param_groups)


class Fence:
    """Stands before the steps of optimizers while a copy reads what they write."""

    def __init__(self) -> None:
        self._guarded: dict[int, tuple[weakref.ref[Optimizer], _Gate, RemovableHandle]] = {}

    def guard(self, optimizers: Iterable[Optimizer], wait: Callable[[], None]) -> None:
        """The next step of each of `optimizers` calls `wait` first, once."""
        for optimizer in optimizers:
            known = self._guarded.get(id(optimizer))
            if known is None or known[0]() is not optimizer:
                gate = _Gate()
                known = weakref.ref(optimizer), gate, optimizer.register_step_pre_hook(gate)
                self._guarded[id(optimizer)] = known
            known[1].shut(wait)

    def close(self) -> None:
        """Take the hooks away again. What was guarded is not any more."""
        for optimizer, gate, handle in self._guarded.values():
            gate.open()
            if optimizer() is not None:
                handle.remove()
        self._guarded.clear()


class _Gate:
    """A step pre-hook. A copy of an optimizer, or a pickle, takes along a gate that is open for ever."""

    def __init__(self) -> None:
        self._waits: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        # Not as a decorator: this imports the compiler, which an optimizer in this process has done already.
        self._pass = torch.compiler.disable(self._wait)  # type: ignore[no-untyped-call]

    def shut(self, wait: Callable[[], None]) -> None:
        with self._lock:
            self._waits.append(wait)
            oldest = self._waits.pop(0) if len(self._waits) > WAITS_LIMIT else None
        if oldest is not None:
            oldest()

    def open(self) -> None:
        with self._lock:
            self._waits.clear()

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pass()

    def _wait(self) -> None:
        with self._lock:
            waits, self._waits = self._waits, []
        for wait in waits:
            wait()

    def __reduce__(self) -> tuple[type[_Gate], tuple[()]]:
        return _Gate, ()


class Versions:
    """Version counters of tensors: an alarm for writes in place, blind under fused and some foreach updates."""

    def __init__(self, seen: dict[str, tuple[torch.Tensor, int]]) -> None:
        self._seen = seen

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Versions:
        return cls({key: (tensor, tensor._version) for key, tensor in tensors.items()})

    def changed(self) -> list[str]:
        """Keys of tensors that were written to since, sorted."""
        return sorted(key for key, (tensor, version) in self._seen.items() if tensor._version != version)
