"""FSDP1 (`FullyShardedDataParallel`) through its sharded state dicts, whose tensors are DTensors.

Its parameters are views of flat ones, so nothing is read in place: the state dict is filled and loaded back. Making
it runs collectives; it is done in the calling thread, on all ranks alike. Everything is stored under the names of the
plain module and optimizer, so a run may move between FSDP1, FSDP2, DDP and one process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from urllib.parse import unquote

import torch
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)

from ckpt.adapt.modules import Names
from ckpt.adapt.optimizers import bind_groups, hyperparameters, state_device
from ckpt.adapt.state import Bound, Collected, Path, Saved, component, key_of
from ckpt.errors import Incompatible


@contextmanager
def _sharded(module: nn.Module) -> Iterator[None]:
    """State dicts of `module` as DTensors; also silences FSDP1's notices that it is deprecated."""
    with (
        warnings.catch_warnings(),
        FullyShardedDataParallel.state_dict_type(
            module, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig()
        ),
    ):
        warnings.simplefilter("ignore")
        yield


def _state_dict(path: Path, module: nn.Module) -> dict[str, Any]:
    with _sharded(module):
        state: dict[str, Any] = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise Incompatible(
                f"{key_of(path)}/{name}: FSDP1 gave a {type(value).__name__}. Give it a device mesh "
                "(FullyShardedDataParallel(..., device_mesh=...)), so that its state dict holds DTensors, or use FSDP2."
            )
    return state


@dataclass
class Fsdp1Module:
    path: Path
    module: nn.Module

    def _entries(self) -> Iterator[tuple[Path, str, torch.Tensor, bool]]:
        names = Names(self.module)
        identity = {names.canonical(n): id(p) for n, p in self.module.named_parameters(remove_duplicate=False)}
        first: dict[int, torch.Tensor] = {}  # a tied parameter comes as a tensor of its own under each name
        for name, value in sorted(_state_dict(self.path, self.module).items(), key=lambda item: item[0]):
            canonical = names.canonical(name)
            if canonical in identity:
                value = first.setdefault(identity[canonical], value)
            yield (*self.path, component(canonical)), name, value, canonical in identity

    def collect(self, out: Collected) -> None:
        for path, _, value, is_parameter in self._entries():
            out.add(path, value, "parameter" if is_parameter else "buffer")

    def bind(self, saved: Saved, out: Bound) -> None:
        filled = {}
        for path, name, value, _ in self._entries():
            filled[name] = value
            out.tensor(path, value)
        out.finish.append(lambda: self._load(filled))

    def _load(self, filled: dict[str, Any]) -> None:
        with _sharded(self.module):
            self.module.load_state_dict(filled)


@dataclass
class Fsdp1Optimizer:
    """An optimizer over the parameters of one FSDP1 module; stored as `optimizers.OptimizerMember` stores any other."""

    path: Path
    optimizer: torch.optim.Optimizer
    module_path: Path
    module: nn.Module

    def _parameter_path(self, name: str) -> Path:
        """Where the state of a parameter is stored: a tied one goes by the first of its names, as everywhere."""
        return (*self.module_path, component(self._first_names[name]))

    @cached_property
    def _first_names(self) -> dict[str, str]:
        names = Names(self.module)
        by_id: dict[int, list[str]] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            by_id.setdefault(id(parameter), []).append(names.canonical(name))
        return {name: min(tied) for tied in by_id.values() for name in tied}

    def collect(self, out: Collected) -> None:
        with _sharded(self.module):
            state = FullyShardedDataParallel.optim_state_dict(self.module, self.optimizer)
        for g, group in enumerate(state["param_groups"]):
            out.add_value((*self.path, "groups", str(g)), hyperparameters(group))
            for name in group["params"]:
                out.add_value((*self.path, "group_of", *self._parameter_path(name)), g)
        for name, entries in state["state"].items():
            for entry, value in entries.items():
                path = (*self.path, "state", *self._parameter_path(name), component(entry))
                if isinstance(value, torch.Tensor):
                    out.add(path, value, "parameter")
                else:
                    out.add_value(path, value)

    def _groups_of_names(self) -> list[list[str]]:
        names = Names(self.module)
        by_id = {id(p): names.canonical(name) for name, p in self.module.named_parameters()}
        return [[by_id[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]

    def bind(self, saved: Saved, out: Bound) -> None:
        like = _state_dict(self.module_path, self.module)
        groups = self._groups_of_names()
        fresh: dict[str, dict[str, Callable[[], Any]]] = {}
        stored: list[list[Path]] = []
        for names, group in zip(groups, self.optimizer.param_groups, strict=True):
            stored.append([self._parameter_path(name) for name in names])
            for name in names:
                base = key_of((*self.path, "state", *self._parameter_path(name)))
                for key in saved.under(base):
                    entry = key[len(base) + 1 :]
                    device = state_device(entry, like[name], group)
                    allocated = out.allocate(saved, key, like[name], device)
                    fresh.setdefault(name, {})[unquote(entry)] = allocated
        bind_groups(self.path, self.optimizer.param_groups, stored, saved, out)
        out.finish.append(partial(self._load, groups, fresh))

    def _load(self, groups: list[list[str]], fresh: dict[str, dict[str, Callable[[], Any]]]) -> None:
        full = {
            "state": {name: {entry: get() for entry, get in entries.items()} for name, entries in fresh.items()},
            "param_groups": [
                {**hyperparameters(group), "params": names}
                for group, names in zip(self.optimizer.param_groups, groups, strict=True)
            ],
        }
        with _sharded(self.module):
            local = FullyShardedDataParallel.optim_state_dict_to_load(self.module, self.optimizer, full)
        self.optimizer.load_state_dict(local)
