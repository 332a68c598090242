"""Optimizers by the names of their parameters, through our own identity map: no fake step, no hooks fired.

Stored under the optimizer's path:

    state/<parameter>/<name>   tensor, or value where it is none (LBFGS keeps lists)
    group_of/<parameter>       value: index of the parameter's group
    groups/<index>             value: all hyperparameters of a group

A parameter is named by its place in the state: `model/layer.weight` for a module under "model", whatever
wraps it; `#<group>.<index>` where no member of the state holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote

import torch
from torch.distributed.tensor import DTensor

from ckpt.adapt.state import Bound, Collected, Path, Saved, Wanted, component, key_of
from ckpt.adapt.tensors import Local, local_of
from ckpt.adapt.wrappers import Shard
from ckpt.errors import Incompatible
from ckpt.sharding import Whole


@dataclass(frozen=True)
class ParameterNames:
    """Path and declared sharding of each parameter in the state, by identity."""

    paths: dict[int, tuple[Path, ...]]
    declared: dict[int, Shard]

    def all_of(self, parameter: torch.Tensor, group: int, index: int) -> tuple[Path, ...]:
        """Every name of a parameter, the one under which its state is stored first."""
        return self.paths.get(id(parameter), ((f"#{group}.{index}",),))

    def like(self, parameter: torch.Tensor) -> torch.Tensor | Shard:
        return self.declared.get(id(parameter), parameter)


@dataclass
class OptimizerMember:
    path: Path
    optimizer: torch.optim.Optimizer
    names: ParameterNames

    def _parameters(self) -> list[tuple[torch.Tensor, int, int]]:
        groups = self.optimizer.param_groups
        return [(p, g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"])]

    def collect(self, out: Collected) -> None:
        out.fence(self.optimizer)
        for g, group in enumerate(self.optimizer.param_groups):
            out.add_value((*self.path, "groups", str(g)), hyperparameters(group))
        for parameter, g, i in self._parameters():
            name = self.names.all_of(parameter, g, i)[0]
            out.add_value((*self.path, "group_of", *name), g)
            for entry, value in self.optimizer.state.get(parameter, {}).items():
                self._collect_entry(out, parameter, (*self.path, "state", *name, component(str(entry))), value)
        self._refuse_foreign_state()

    def _collect_entry(self, out: Collected, parameter: torch.Tensor, path: Path, value: object) -> None:
        if not isinstance(value, torch.Tensor):
            out.add_value(path, value)
            return
        like = self.names.like(parameter)
        if isinstance(like, Shard) and value.shape == like.tensor.shape and value.dim():
            out.add(path, Shard(value, like.global_shape, like.offset), "parameter")
        else:
            out.add(path, value, "parameter")

    def _refuse_foreign_state(self) -> None:
        known = {id(parameter) for parameter, _, _ in self._parameters()}
        for owner in self.optimizer.state:
            if id(owner) not in known:
                what = f"a tensor of shape {tuple(owner.shape)}" if isinstance(owner, torch.Tensor) else repr(owner)
                raise Incompatible(
                    f"{key_of(self.path)}: optimizer state for {what}, which is in none of its groups. "
                    "Remove that state, or wrap the optimizer in an object with its own state_dict/load_state_dict."
                )

    def bind(self, saved: Saved, out: Bound) -> None:
        stored: list[list[Path]] = [[] for _ in self.optimizer.param_groups]
        for parameter, g, i in self._parameters():
            name = self._stored_name(saved, self.names.all_of(parameter, g, i))
            stored[g].append(name)
            if key_of((*self.path, "group_of", *name)) in saved.values:
                self._bind_state(saved, out, parameter, self.optimizer.param_groups[g], name)
        bind_groups(self.path, self.optimizer.param_groups, stored, saved, out)

    def _stored_name(self, saved: Saved, names: tuple[Path, ...]) -> Path:
        """The first name that the checkpoint knows; for a parameter tied there, the name of the tie."""
        for name in names:
            for candidate in (name, tuple(saved.stored(key_of(name)).split("/"))):
                if key_of((*self.path, "group_of", *candidate)) in saved.values:
                    return candidate
        return names[0]

    def _bind_state(
        self, saved: Saved, out: Bound, parameter: torch.Tensor, group: dict[str, Any], stored: Path
    ) -> None:
        """Fill the state that is there where it fits, allocate the rest, and drop what was not stored."""
        base = key_of((*self.path, "state", *stored))
        current = self.optimizer.state.get(parameter, {})
        fresh: dict[str, Callable[[], Any]] = {}
        values = saved.values_under(base)
        inside_values = tuple(key + "/" for key in values)
        for key in saved.under(base):
            entry = key[len(base) + 1 :]
            if key.startswith(inside_values):
                continue
            live = self._live(current, entry)
            like = self.names.like(parameter)
            fits = live is not None and self._fits(saved, out, key, live, like)
            if fits and live is not None:
                fresh[entry] = partial(_itself, live)
            else:
                fresh[entry] = out.allocate(saved, key, like, state_device(entry, parameter, group))
        for key in values:
            refs = {
                ref[len(key) + 1 :]: out.allocate(saved, ref, self.names.like(parameter), parameter.device)
                for ref in saved.under(key)
            }
            box: dict[str, Any] = {}
            out.wanted.append(Wanted(key, partial(box.__setitem__, "value"), refs))
            fresh[key[len(base) + 1 :]] = partial(box.__getitem__, "value")
        out.finish.append(lambda: self._set_state(parameter, fresh))

    @staticmethod
    def _live(current: dict[Any, Any], entry: str) -> torch.Tensor | None:
        found = next((value for name, value in current.items() if component(str(name)) == entry), None)
        return found if isinstance(found, torch.Tensor) else None

    @staticmethod
    def _fits(saved: Saved, out: Bound, key: str, live: torch.Tensor, like: torch.Tensor | Shard) -> bool:
        declared = isinstance(like, Shard) and live.shape == like.tensor.shape and live.dim() > 0
        target: torch.Tensor | Shard = live
        if declared and isinstance(like, Shard):
            target = Shard(live, like.global_shape, like.offset)
        local: Local = local_of(key, target, "parameter")
        spec = saved.specs[saved.stored(key)]
        if local.spec != spec or (isinstance(like, DTensor) and local.sharding == Whole() and spec.shape):
            return False
        out.locals.append(local)
        return True

    def _set_state(self, parameter: torch.Tensor, fresh: dict[str, Callable[[], Any]]) -> None:
        if not fresh:
            self.optimizer.state.pop(parameter, None)
            return
        names = {component(str(name)): name for name in self.optimizer.state.get(parameter, {})}
        order = [*(name for name in names if name in fresh), *(name for name in fresh if name not in names)]
        self.optimizer.state[parameter] = {names.get(name, unquote(name)): fresh[name]() for name in order}


def bind_groups(
    path: Path, groups: list[dict[str, Any]], parameters: list[list[Path]], saved: Saved, out: Bound
) -> None:
    """Restore the hyperparameters of `groups`; `parameters[g]` are the stored names of those in group g."""
    indices: list[dict[str, Any]] = [{} for _ in groups]  # for each group, the stored group index by parameter
    for found, names in zip(indices, parameters, strict=True):
        for name in names:
            key = key_of((*path, "group_of", *name))
            if key in saved.values:
                out.wanted.append(Wanted(key, partial(found.__setitem__, key), early=True))
            else:
                out.missing.append(key)
    stored: dict[int, Any] = {}
    for key in saved.values_under(key_of((*path, "groups"))):
        out.wanted.append(Wanted(key, partial(stored.__setitem__, int(key.rpartition("/")[2])), early=True))

    for g, group in enumerate(groups):
        out.checks.append(partial(_group_fault, key_of(path), g, indices[g], stored))
        out.finish.append(partial(_set_group, g, group, indices[g], stored))


def _group_fault(where: str, g: int, indices: dict[str, Any], stored: dict[int, Any]) -> str | None:
    chosen = set(indices.values())
    if len({repr(sorted(stored[index].items(), key=str)) for index in chosen}) > 1:
        return (
            f"{where}: group {g} holds parameters that were in groups {sorted(chosen)} of other hyperparameters when "
            "they were saved. Build the groups as they were"
        )
    return None


def _set_group(g: int, group: dict[str, Any], indices: dict[str, Any], stored: dict[int, Any]) -> None:
    chosen = set(indices.values()) or {g} & set(stored)  # a group without parameters goes by its number
    if chosen:
        set_hyperparameters(group, stored[min(chosen)])


def _itself(value: Any) -> Any:
    return value


def state_device(entry: str, parameter: torch.Tensor, group: dict[str, Any]) -> torch.device:
    """Where torch keeps it: step counts on the CPU unless capturable or fused, the rest beside its parameter."""
    on_host = entry in ("step", "mu_product") and not (group.get("capturable") or group.get("fused"))
    return torch.device("cpu") if on_host else parameter.device


_OF_THIS_MACHINE = ("foreach", "fused", "capturable", "differentiable")


def hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def set_hyperparameters(group: dict[str, Any], saved: dict[str, Any]) -> None:
    """As saved, but for the choice of kernels, which belongs to the machine that runs now."""
    for name in set(hyperparameters(group)) - set(saved) - set(_OF_THIS_MACHINE):
        del group[name]
    for name, value in saved.items():
        if name in _OF_THIS_MACHINE and name in group:
            continue
        if isinstance(group.get(name), torch.Tensor):
            with torch.no_grad():
                group[name].copy_(torch.as_tensor(value))
        elif isinstance(value, torch.Tensor) and isinstance(group.get(name), float):
            group[name] = value.item()  # a learning rate is a tensor where the kernels of this machine want one
        else:
            group[name] = value
