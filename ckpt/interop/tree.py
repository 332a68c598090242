"""A checkpoint as other libraries see it, a tree of dicts and lists, and as a run stores it: keys and values. Pure.

Into a run: a dict's items become path components. Tensors keep their place; what holds no tensor at all is one value,
at the highest such place below the root (a scheduler's state, a config, a step count). A dict of state and
param_groups is an optimizer (`ckpt.interop.optimizers`). Out of a run it goes the same way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote

from ckpt.adapt.members import selected
from ckpt.adapt.state import Path, component, key_of
from ckpt.errors import Incompatible, NotFound
from ckpt.interop.optimizers import Models, collect_optimizer, is_optimizer, optimizer_tree, optimizers_in
from ckpt.sharding import TensorSpec

WRAPPERS: Final = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
_DEPTH_LIMIT = 64


@dataclass(frozen=True)
class Leaf:
    """A tensor of a tree, wherever its bytes are. Equal leaves are one tensor under several names."""

    spec: TensorSpec


@dataclass
class Content:
    """What a run stores of a tree: tensors by key, other names of them, values; and what a person should know."""

    tensors: dict[str, Leaf] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def content_of(tree: object, prefix: str = "", only: str = "", ordered: bool = True) -> Content:
    """The keys and values of `tree`, or of what lies at `only` in it, below `prefix`. Raises Incompatible, NotFound.

    `ordered`: models in it list their parameters in the order of the module.
    """
    node = _descend(tree, only)
    if not isinstance(node, dict):
        node, prefix = {prefix.rpartition("/")[2] or "data": node}, prefix.rpartition("/")[0]
    elif is_optimizer(node):
        prefix = prefix or "optim"
    root = tuple(prefix.split("/")) if prefix else ()
    out, found = Content(), dict[str, Leaf]()
    node = _unwrapped(node, root, out.notes, 0)
    models = Models(dict(_models(node, root)), ordered)
    for path, item in _members(node, root, models, out.notes):
        _put(found if isinstance(item, Leaf) else out.values, key_of(path), item)
    _tie(found, out)
    return out


def _put(into: dict[str, Any], key: str, item: object) -> None:
    if key in into:
        raise Incompatible(f"two entries of the file would have the name {key}. Choose a part of it with --only")
    into[key] = item


def _descend(tree: object, only: str) -> object:
    for name in only.split("/") if only else ():
        children = tree if isinstance(tree, dict) else {}
        named = {component(str(key)): value for key, value in children.items()}
        if name not in named:
            raise NotFound(f"the file holds nothing at {only!r}; at this level it has {sorted(named)[:20]}")
        tree = named[name]
    return tree


def _unwrapped(node: dict[Any, Any], path: Path, notes: list[str], depth: int) -> dict[Any, Any]:
    """The tree without the prefixes that DDP, torch.compile and FSDP1 put before all names of a model."""
    if depth > _DEPTH_LIMIT:
        raise Incompatible(f"{key_of(path)[:200]}: nested more than {_DEPTH_LIMIT} levels deep")
    if is_optimizer(node):
        return node
    while True:
        leaves = [name for name, item in node.items() if isinstance(item, Leaf)]
        found = next((w for w in WRAPPERS if leaves and all(str(name).startswith(w) for name in leaves)), None)
        if found is None:
            break
        node = {name.removeprefix(found) if isinstance(name, str) else name: item for name, item in node.items()}
        notes.append(f"{key_of(path) or 'the names'}: the prefix {found!r} of a wrapper was taken off all names")
    return {
        name: _unwrapped(item, (*path, component(str(name))), notes, depth + 1) if isinstance(item, dict) else item
        for name, item in node.items()
    }


def _models(node: dict[Any, Any], path: Path) -> Iterator[tuple[Path, dict[str, Leaf]]]:
    """Every dict that holds tensors directly, outside of optimizers: where, and by which names."""
    if is_optimizer(node):
        return
    if leaves := {str(name): item for name, item in node.items() if isinstance(item, Leaf)}:
        yield path, leaves
    for name, item in node.items():
        if isinstance(item, dict):
            yield from _models(item, (*path, component(str(name))))


def _members(node: Any, path: Path, models: Models, notes: list[str], depth: int = 0) -> Iterator[tuple[Path, object]]:
    if isinstance(node, Leaf):
        yield path, node
    elif isinstance(node, dict) and is_optimizer(node):
        collected = collect_optimizer(node, path, models)
        if isinstance(collected, str):
            notes.append(f"{key_of(path)}: {collected}; its tensors were kept as they are, not as an optimizer's state")
            yield from _items(node, path, models, notes, depth)
        else:
            entries, why = collected
            if why:
                notes.append(f"{key_of(path)}: {why}; it was stored by number, for a restore without its model")
            yield from entries
    elif path and not has_leaf(node):
        yield path, node
    elif isinstance(node, dict | list | tuple):
        yield from _items(node, path, models, notes, depth)
    else:
        raise Incompatible(
            f"{key_of(path)}: a {type(node).__name__} with tensors in it has no names for them. "
            "Choose a part of the file with --only"
        )


def _items(node: Any, path: Path, models: Models, notes: list[str], depth: int) -> Iterator[tuple[Path, object]]:
    if depth > _DEPTH_LIMIT:
        raise Incompatible(f"{key_of(path)[:200]}: nested more than {_DEPTH_LIMIT} levels deep")
    for name, item in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _members(item, (*path, component(str(name))), models, notes, depth + 1)


def has_leaf(node: object) -> bool:
    """Whether there is a tensor anywhere below. Iterative: nothing of a hostile file recurses here."""
    waiting, seen = [node], set[int]()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Leaf):
            return True
        if isinstance(item, dict | list | tuple | set | frozenset) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return False


def _tie(found: Mapping[str, Leaf], out: Content) -> None:
    """Equal leaves are stored once, under the name that sorts first."""
    first: dict[Leaf, str] = {}
    for key in sorted(found):
        leaf = found[key]
        if leaf.spec.nbytes and leaf in first:
            out.aliases[key] = first[leaf]
        else:
            first.setdefault(leaf, key)
            out.tensors[key] = leaf


# Out of a run


def tree_of(
    tensors: Mapping[str, Leaf], values: Mapping[str, Callable[[Mapping[str, Leaf]], object]], only: str = ""
) -> dict[str, Any]:
    """The nested dicts that keys stand for, or what lies at `only` in them.

    `values[name](refs)` makes the value with the tensors that were stored apart from it, by their names below it.
    """
    chosen = (only,) if only else None
    names = [name for name in values if selected(name, chosen)]  # in their order
    keys = {key: leaf for key, leaf in tensors.items() if selected(key, chosen)}
    if not names and not keys:
        raise NotFound(f"the step holds nothing at {only!r}; `ckpt show` lists what it holds")
    found: dict[Path, object] = {}
    decoded: dict[str, object] = {}
    inside = set[str]()
    for name in names:
        refs = {key[len(name) + 1 :]: leaf for key, leaf in keys.items() if key.startswith(name + "/")}
        inside.update(f"{name}/{ref}" for ref in refs)
        decoded[name] = values[name](refs)
    plain = {**{key: leaf for key, leaf in keys.items() if key not in inside}, **decoded}
    for where in optimizers_in(decoded):
        held = {key: plain.pop(key) for key in list(plain) if key.startswith(where + "/")}
        found[tuple(where.split("/"))] = made = optimizer_tree(where, held)
        if where == only:
            return made
    found.update({tuple(key.split("/")): item for key, item in plain.items()})
    tree = _nested(found, len(only.split("/")) if only else 0)
    return {name: _with_lists(item) for name, item in tree.items()}


def _nested(found: Mapping[Path, object], stripped: int) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, item in sorted(found.items()):
        parts = [unquote(name) for name in (path[stripped:] or path[-1:])]
        node = tree
        for name in parts[:-1]:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise Incompatible(f"{key_of(path)}: a value of the step stands where this needs a dict")
        if parts[-1] in node:
            raise Incompatible(f"{key_of(path)}: two entries of the step would have this name in the file")
        node[parts[-1]] = item
    return tree


def _with_lists(node: Any) -> Any:
    """Lists in place of the dicts that `_items` made of them: their names are 0, 1, ..."""
    if not isinstance(node, dict):
        return node
    made = {name: _with_lists(item) for name, item in node.items()}
    if made and made.keys() == set(map(str, range(len(made)))):
        return [made[str(index)] for index in range(len(made))]
    return made
