"""Optimizers: torch's state dicts, by name or by number of the parameter, and ours, by the parameter's key. Pure.

A number says which parameter is meant only together with the model: where the file holds both, in its own order, one
group lists the parameters in that order, and every state fits the shape of its parameter. Anything less would be a
guess, and a guess that is wrong trains on in silence: then the numbers stay, as `#<group>.<index>`, like those of an
optimizer whose parameters no member of the state holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote

from ckpt.adapt.optimizers import hyperparameters
from ckpt.adapt.state import Path, component
from ckpt.sharding import TensorSpec

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_LIKELY = ("model", "module", "state_dict", "model_state_dict")


class _Leaf(Protocol):
    @property
    def spec(self) -> TensorSpec: ...


def is_optimizer(node: Mapping[Any, Any]) -> bool:
    """Whether this is the state dict of a torch optimizer."""
    groups = node.get("param_groups")
    return (
        isinstance(node.get("state"), dict)
        and isinstance(groups, list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list | tuple) for group in groups)
    )


@dataclass(frozen=True)
class Models:
    """The models in a file, by path: their tensors by name, in the order of the module's where that is `ordered`."""

    leaves: Mapping[Path, Mapping[str, _Leaf]]
    ordered: bool

    def having(self, names: set[str]) -> Path | str:
        """The one that has all of `names`, or what is wrong."""
        paths = [path for path, leaves in self.leaves.items() if names <= leaves.keys()]
        if len(paths) > 1:
            paths = [path for path in paths if path and path[-1] in _LIKELY] or paths
        if len(paths) == 1:
            return paths[0]
        return "several models in the file could be its own" if paths else "the file holds no model with its parameters"


def collect_optimizer(
    node: Mapping[str, Any], path: Path, models: Models
) -> tuple[list[tuple[Path, object]], str] | str:
    """The entries of an optimizer as a run stores them, and why by number, if so; or why there are none."""
    groups = node["param_groups"]
    listed = [list(group["params"]) for group in groups]
    if len({repr(each) for ids in listed for each in ids}) != sum(map(len, listed)):
        return "it lists a parameter twice"
    named = _names(groups, listed, node["state"], models)
    if isinstance(named, str):
        by_id: dict[Any, Path] = {i: (f"#{g}.{n}",) for g, ids in enumerate(listed) for n, i in enumerate(ids)}
    else:
        by_id = {each: (*named[0], component(name)) for each, name in named[1].items()}
    found: list[tuple[Path, object]] = []
    for index, (group, ids) in enumerate(zip(groups, listed, strict=True)):
        found.append(((*path, "groups", str(index)), hyperparameters(group)))
        found += [((*path, "group_of", *by_id[each]), index) for each in ids]
    for each, entries in node["state"].items():
        if not isinstance(entries, dict) or each not in by_id:
            return f"it has state for {str(each)[:80]!r}, which is in none of its groups"
        base = (*path, "state", *by_id[each])
        for name, item in entries.items():
            if isinstance(item, dict | list | tuple) and any(_is_leaf(inner) for inner in _flat(item)):
                return f"its state {str(name)[:80]!r} holds tensors in lists"
            found.append(((*base, component(str(name))), item))
    return found, named if isinstance(named, str) else ""


def _names(
    groups: Sequence[Mapping[str, Any]], listed: Sequence[Sequence[Any]], state: Mapping[Any, Any], models: Models
) -> tuple[Path, dict[Any, str]] | str:
    """Where the model is, and the name of each parameter in it; or what is missing."""
    ids = [each for group in listed for each in group]
    by_name = all(isinstance(each, str) for each in ids)
    named = [group.get("param_names") for group in groups]
    if by_name or all(isinstance(n, list | tuple) and len(n) == len(i) for n, i in zip(named, listed, strict=True)):
        names = ids if by_name else [str(name) for group in named for name in group or ()]
        where = models.having(set(names))
        return where if isinstance(where, str) else (where, dict(zip(ids, names, strict=True)))
    if len(groups) != 1:
        return f"its {len(groups)} groups name parameters by number, which says nothing about their order in the model"
    if not models.ordered:
        return "it names parameters by number, and the model is in a format that does not keep their order"
    return _by_order(ids, state, models)


def _by_order(ids: Sequence[Any], state: Mapping[Any, Any], models: Models) -> tuple[Path, dict[Any, str]] | str:
    fitting = []
    for path, leaves in models.leaves.items():
        names = _in_order(leaves, len(ids))
        if names is not None and all(_fits(state.get(i), leaves[n]) for i, n in zip(ids, names, strict=True)):
            fitting.append((path, dict(zip(ids, names, strict=True))))
    if len(fitting) > 1:
        fitting = [found for found in fitting if found[0] and found[0][-1] in _LIKELY] or fitting
    if len(fitting) == 1:
        return fitting[0]
    return (
        "it names parameters by number, and no model in the file has as many parameters of these shapes"
        if not fitting
        else "several models in the file could be its own"
    )


def _in_order(leaves: Mapping[str, _Leaf], count: int) -> list[str] | None:
    """The names of the parameters in order, ties once; None unless there are `count`."""
    seen, names = set[_Leaf](), []
    for name, leaf in leaves.items():
        if leaf not in seen:
            names.append(name)
        seen.add(leaf)
    if len(names) != count:
        names = [name for name in names if name.rpartition(".")[2] not in _BUFFERS]
    return names if len(names) == count else None


def _fits(entries: object, parameter: _Leaf) -> bool:
    """Whether every state of a parameter is a number, or has its shape."""
    if entries is None:
        return True
    if not isinstance(entries, dict):
        return False
    return all(not _is_leaf(item) or item.spec.shape in ((), (1,), parameter.spec.shape) for item in entries.values())


def _is_leaf(item: object) -> bool:
    return isinstance(getattr(item, "spec", None), TensorSpec)


def _flat(item: object) -> Iterator[object]:
    if isinstance(item, dict | list | tuple):
        for inner in item.values() if isinstance(item, dict) else item:
            yield from _flat(inner)
    else:
        yield item


# Out of a run


def optimizers_in(values: Mapping[str, object]) -> list[str]:
    """The keys of optimizers, by the values that only they have."""
    found = {name.rpartition("/groups/")[0] for name in values if name.rpartition("/groups/")[2].isdecimal()}
    return sorted(where for where in found if where and any(name.startswith(where + "/group_of/") for name in values))


def optimizer_tree(where: str, held: Mapping[str, object]) -> dict[str, Any]:
    """The state dict with names instead of numbers, as `torch.distributed.checkpoint.state_dict` makes and takes it.

    Names are those in the model where all parameters are of one, else the whole keys with dots; numbers where the
    step has no names. `held` is in the order of the groups, which is how `Optimizer.load_state_dict` goes about it.
    """
    group_of = {key.removeprefix(f"{where}/group_of/"): g for key, g in held.items() if "/group_of/" in key}
    one = len({name.rpartition("/")[0] for name in group_of}) == 1
    names: dict[str, str | int] = {
        key: unquote(key.rpartition("/")[2]) if one else unquote(key.replace("/", ".")) for key in group_of
    }
    if all(key.startswith("#") for key in names):
        names = {key: number for number, key in enumerate(names)}
    groups = {int(key.rpartition("/")[2]): value for key, value in held.items() if key.startswith(f"{where}/groups/")}
    state: dict[str | int, dict[str, object]] = {}
    for key, item in held.items():
        parameter, _, entry = key.removeprefix(f"{where}/state/").rpartition("/")
        if key.startswith(f"{where}/state/") and parameter in names:
            state.setdefault(names[parameter], {})[unquote(entry)] = item
    param_groups = []
    for index, group in sorted(groups.items()):
        mine = [names[key] for key in group_of if group_of[key] == index]
        param_groups.append({**(group if isinstance(group, dict) else {}), "params": mine})
    return {"state": state, "param_groups": param_groups}
