"""Walk a state, tell its members apart, and collect or bind each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ckpt.adapt.fsdp1 import Fsdp1Module, Fsdp1Optimizer
from ckpt.adapt.modules import Names, held_by, is_fsdp1, module_state
from ckpt.adapt.optimizers import OptimizerMember, ParameterNames
from ckpt.adapt.state import (
    Bound,
    Collected,
    Member,
    ModuleMember,
    Path,
    RankMember,
    Saved,
    StatefulMember,
    TensorMember,
    ValueMember,
    component,
    key_of,
)
from ckpt.adapt.wrappers import PerRank, Rng, Shard
from ckpt.errors import Incompatible

State = dict[str, Any] | list[Any]


def collect_state(state: State, rank: int, world: int) -> Collected:
    """All that this rank holds of `state`. `Incompatible`, naming the key, for what cannot be stored."""
    out = Collected()
    for member in _members(state, rank, world):
        member.collect(out)
    return out


def bind_state(state: State, saved: Saved, rank: int, world: int, only: tuple[str, ...] | None = None) -> Bound:
    """What to read into `state` from a checkpoint that holds `saved`. Touches nothing of the state."""
    out = Bound()
    for member in _members(state, rank, world):
        if selected(key_of(member.path), only):
            member.bind(saved, out)
        elif only is not None and (inside := [p for p in only if p.startswith(key_of(member.path) + "/")]):
            if not isinstance(member, ModuleMember | Fsdp1Module):
                raise Incompatible(
                    f"only={inside}: {key_of(member.path)} is restored as a whole or not at all. Nothing was touched; "
                    f"pass only=[{key_of(member.path)!r}]."
                )
            member.bind(saved, out)
    if only is not None:
        out.locals = [local for local in out.locals if selected(local.key, only)]
        out.wanted = [wanted for wanted in out.wanted if selected(wanted.key, only)]
        out.missing = [key for key in out.missing if selected(key, only)]
    return out


def selected(key: str, only: tuple[str, ...] | None) -> bool:
    """Whether `key` is one of `only`, or lies below one of them: at a `/`, or at a `.` inside a module's names."""
    return only is None or any(key == p or key.startswith((p + "/", p + "." if "/" in p else p + "/")) for p in only)


def _members(state: State, rank: int, world: int) -> list[Member]:
    if not isinstance(state, dict | list):
        raise Incompatible(f'a state is a dict or a list, not {type(state).__name__}: {{"model": model, ...}}')
    try:
        found = list(_walk(state, (), rank, world))
    except RecursionError:
        raise Incompatible("a state cannot contain itself, nor nest hundreds of levels deep") from None
    names = _parameter_names(found)
    fsdp1 = [(path, obj) for path, obj in found if isinstance(obj, nn.Module) and is_fsdp1(obj)]
    members = [
        _optimizer(obj, path, names, fsdp1) if isinstance(obj, Optimizer) else _member(obj, path) for path, obj in found
    ]
    return sorted(members, key=lambda member: member.path)


class _Value:
    def __init__(self, value: object, put: Callable[[object], None]) -> None:
        self.value, self.put = value, put


def _walk(node: Any, path: Path, rank: int, world: int) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) for each leaf of the nest; values come as `_Value`, which knows how to replace them."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    if isinstance(node, dict) and not all(isinstance(name, str) for name in node):
        raise Incompatible(f"{key_of(path) or 'the state'}: keys of a state are strings, got {list(node)[:4]}")
    for name, item in items:
        at = (*path, component(name) if isinstance(name, str) else str(name))
        item = held_by(item)
        while isinstance(item, PerRank) and isinstance(item.obj, nn.Module | Optimizer | torch.Tensor | Shard):
            at, item = (*at, f"#{rank}of{world}"), item.obj
        if _is_leaf(item):
            yield at, item
        elif isinstance(item, dict | list) and item and _holds_state(item, at):
            yield from _walk(item, at, rank, world)
        else:
            yield at, _Value(item, _putter(node, name))


def _putter(container: Any, name: Any) -> Callable[[object], None]:
    def put(value: object) -> None:
        container[name] = filled(container[name], value)

    return put


def filled(old: Any, new: Any) -> Any:
    """`new`, in the memory of `old` where that is a container of the same type: whoever else holds it sees it too."""
    if type(old) is not type(new):
        return new
    if isinstance(new, dict):
        items = {key: filled(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        for key, value in items.items():
            old[key] = value
    elif isinstance(new, list):
        kept = [filled(a, b) for a, b in zip(old, new, strict=False)]
        old[:] = kept + new[len(kept) :]
    elif isinstance(new, set):
        old.clear()
        old.update(new)
    elif isinstance(new, bytearray):
        old[:] = new
    elif type(new).__name__ == "ndarray" and (old.shape, old.dtype) == (new.shape, new.dtype) and old.flags.writeable:
        old[...] = new
    else:
        return new
    return old


def _is_leaf(item: Any) -> bool:
    return isinstance(item, torch.Tensor | Shard | PerRank | Rng | nn.Module | Optimizer) or _is_stateful(item)


def _is_stateful(item: Any) -> bool:
    return not isinstance(item, type) and hasattr(item, "state_dict") and hasattr(item, "load_state_dict")


def _holds_state(item: Any, at: Path) -> bool:
    """Whether a nest holds anything but values; a nest of values alone is one value, exact in type."""
    if isinstance(item, dict):
        return any(_is_leaf(v) or _holds_state(v, at) for v in item.values())
    if isinstance(item, list):
        return any(_is_leaf(v) or _holds_state(v, at) for v in item)
    if isinstance(item, tuple) and any(_is_leaf(v) or _holds_state(v, at) for v in item):
        raise Incompatible(
            f"{key_of(at)}: a tuple in a state cannot hold tensors or stateful objects: use a list or a dict"
        )
    return False


def _member(item: Any, path: Path) -> Member:
    if isinstance(item, _Value):
        return ValueMember(path, item.value, item.put)
    if isinstance(item, torch.Tensor | Shard):
        return TensorMember(path, item)
    if isinstance(item, nn.Module):
        return Fsdp1Module(path, item) if is_fsdp1(item) else ModuleMember(path, item)
    if isinstance(item, Rng):
        return RankMember(path, item.state_dict, item.load_state_dict, "reseed", last=True)
    if isinstance(item, PerRank):
        return _per_rank(item, path)
    if hasattr(item, "__iter__"):  # loaders and samplers may stand at another place on every rank
        counts_its_own = isinstance(item, DataLoader)  # of its rank's batches: no common place, even where equal
        return RankMember(path, item.state_dict, item.load_state_dict, "error" if counts_its_own else "equal")
    return StatefulMember(path, item)


def _per_rank(item: PerRank, path: Path) -> Member:
    if isinstance(item.obj, Rng):
        return RankMember(path, item.obj.state_dict, item.obj.load_state_dict, item.on_resize, last=True)
    if _is_stateful(item.obj):
        return RankMember(path, item.obj.state_dict, item.obj.load_state_dict, item.on_resize)

    def put(value: object) -> None:
        item.obj = filled(item.obj, value)

    return RankMember(path, lambda: item.obj, put, item.on_resize)


def _optimizer(optimizer: Optimizer, path: Path, names: ParameterNames, fsdp1: list[tuple[Path, nn.Module]]) -> Member:
    if type(optimizer).state_dict is not Optimizer.state_dict:
        return StatefulMember(path, optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for module_path, module in fsdp1:
        if held & {id(parameter) for parameter in module.parameters()}:
            return Fsdp1Optimizer(path, optimizer, module_path, module)
    return OptimizerMember(path, optimizer, names)


def _parameter_names(leaves: list[tuple[Path, Any]]) -> ParameterNames:
    paths: dict[int, list[Path]] = {}
    declared: dict[int, Shard] = {}
    for path, item in leaves:
        if isinstance(item, nn.Module):
            for name, parameter in _named_parameters(item):
                paths.setdefault(id(parameter), []).append((*path, component(name)))
        elif isinstance(item, Shard):
            declared[id(item.tensor)] = item
            paths.setdefault(id(item.tensor), []).append(path)
        elif isinstance(item, torch.Tensor):
            paths.setdefault(id(item), []).append(path)
    return ParameterNames({key: tuple(sorted(set(found))) for key, found in paths.items()}, declared)


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(canonical name, parameter) as optimizers hold it, under all of its names, those outside the state dict too.

    FSDP2 may have left its unsharded parameters in the module; the hooks of a state dict bring back the sharded
    ones. That of FSDP1 runs collectives, and `Fsdp1Optimizer` has names of its own.
    """
    if not is_fsdp1(module):
        yield from ((name, value) for name, _, value in module_state(module) if isinstance(value, nn.Parameter))
    names = Names(module)
    yield from ((names.canonical(name), p) for name, p in module.named_parameters(remove_duplicate=False))
