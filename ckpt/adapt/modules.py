"""Names of a module's tensors that do not depend on how it is wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_WRAPPERS = {
    # class name -> attribute under which the wrapped module hangs
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
    "AveragedModel": "module",
}

_HOLDERS = {
    # class name -> attribute with the module or optimizer that a framework stands before, itself holding no state
    "AcceleratedOptimizer": "optimizer",
    "LightningOptimizer": "_optimizer",
    "_FabricModule": "_forward_module",
    "_FabricOptimizer": "_optimizer",
}


def held_by(item: Any) -> Any:
    """What a framework's holder stands before; anything else as it is."""
    while attribute := next((_HOLDERS[c.__name__] for c in type(item).__mro__ if c.__name__ in _HOLDERS), None):
        item = getattr(item, attribute)
    return item


def wrapped_by(module: nn.Module) -> str | None:
    """The attribute that holds what `module` wraps, or None if it is no wrapper."""
    return next((_WRAPPERS[c.__name__] for c in type(module).__mro__ if c.__name__ in _WRAPPERS), None)


def is_fsdp1(module: nn.Module) -> bool:
    return any(c.__name__ == "FullyShardedDataParallel" for m in module.modules() for c in type(m).__mro__)


class Names:
    """Canonical names of a module's state: wrappers leave no trace in them."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._wrappers = {id(inner): attribute for inner in module.modules() if (attribute := wrapped_by(inner))}

    def canonical(self, key: str) -> str:
        """`module.layer.weight` of a DDP model as `layer.weight`, at any depth of wrapping.

        Some wrappers strip their own attribute from the keys of a state dict; those keys come out alike.
        """
        if not self._wrappers:
            return key
        kept: list[str] = []
        node: nn.Module | None = self._module
        for component in key.split("."):
            while node is not None and component not in node._modules and (attribute := self._wrappers.get(id(node))):
                node = node._modules[attribute]
            if node is None or component != self._wrappers.get(id(node)):
                kept.append(component)
            node = node._modules.get(component) if node is not None else None
        return ".".join(kept)


def module_state(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """(canonical name, name in the module, object) for each persistent parameter, buffer and extra state."""
    names = Names(module)
    for key, value in module.state_dict(keep_vars=True).items():
        yield names.canonical(key), key, value


def set_extra_state(module: nn.Module, key: str, value: Any) -> None:
    owner = module.get_submodule(key.rpartition(".")[0]) if "." in key else module
    while type(owner).set_extra_state is nn.Module.set_extra_state and (attribute := wrapped_by(owner)):
        owner = owner.get_submodule(attribute)  # a wrapper that left its attribute out of the key
    owner.set_extra_state(value)


def is_extra_state(key: str) -> bool:
    return key.rpartition(".")[2] == "_extra_state"


def is_parameter(value: torch.Tensor) -> bool:
    return isinstance(value, nn.Parameter)
