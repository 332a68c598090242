"""The user's state as named tensors and values, for a save and for a restore.

A state is a nested dict or list. Its members become keys: path components, escaped and joined by slashes.
Each kind of member is a small class here with two sides: `collect` (for a save) and `bind` (for a restore).
This package is the only place that knows torch's state dicts, optimizers and DTensor.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Protocol
from urllib.parse import quote

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from ckpt import codec
from ckpt.adapt.fence import is_fenced
from ckpt.adapt.modules import is_extra_state, is_parameter, module_state, set_extra_state
from ckpt.adapt.tensors import Local, empty_like, local_of, storage_of
from ckpt.adapt.values import dtype_from_name, extend_decode, extend_encode
from ckpt.adapt.wrappers import OnResize, Shard
from ckpt.errors import Incompatible
from ckpt.layout import Entry, Layout, Role
from ckpt.sharding import Declared, Sharding, TensorSpec, Whole
from ckpt.slices import Slice

log = logging.getLogger("ckpt")

Path = tuple[str, ...]
_SAFE = "".join(chr(c) for c in range(33, 127) if chr(c) not in "/%@#")
INLINE_ELEMENTS = 1024  # a tensor inside a value up to this size is stored with the value
RANK_VALUE_LIMIT_BYTES = 64 << 20


@lru_cache(maxsize=1 << 16)
def component(name: str) -> str:
    """A path component as it stands in a key: `/`, `%`, `@`, `#`, blanks and non-ASCII escaped as in URLs."""
    return quote(name, safe=_SAFE)


def key_of(path: Path) -> str:
    return "/".join(path)


@dataclass
class Collected:
    """Everything that one rank holds for a save."""

    locals: dict[str, Local] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    values: dict[str, bytes] = field(default_factory=dict)
    rank_values: dict[str, bytes] = field(default_factory=dict)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)  # those whose steps can be fenced
    _seen: dict[object, str] = field(default_factory=dict)
    _fenced: set[int] = field(default_factory=set)
    _unfenced: set[int] = field(default_factory=set)

    def add(self, path: Path, tensor: torch.Tensor | Shard, role: Role) -> None:
        key = key_of(path)
        _refuse_opaque(key, tensor)
        if not isinstance(tensor, Shard) and (tensor.is_conj() or tensor.is_neg()):
            tensor = tensor.resolve_conj().resolve_neg()  # the bytes of a lazy view are not its values
        local = local_of(key, tensor, role)
        stored = self._seen.get(local.identity)
        if stored is not None and stored != key:
            self.aliases[key] = stored
        if stored is not None:
            return
        if key in self.locals:
            raise Incompatible(f"{key}: two different tensors of the state have this name. Rename one of them.")
        self._seen[local.identity] = key
        self.locals[key] = local

    def fence(self, optimizer: torch.optim.Optimizer) -> None:
        """Note what only the steps of `optimizer` write, if these can be held back."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = [v for entries in optimizer.state.values() for v in entries.values() if isinstance(v, torch.Tensor)]
        fenced = is_fenced(optimizer)
        (self._fenced if fenced else self._unfenced).update(map(id, (*parameters, *state)))
        if fenced:
            self.optimizers.append(optimizer)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The local memory of each tensor, by key. Looked at once all are collected."""
        return {key: local.make() for key, local in self.locals.items()}

    def overlappable(self) -> frozenset[str]:
        """Keys of tensors that may be copied while training goes on: their writers are `optimizers` alone."""
        memory = self.tensors
        owners = self._fenced - self._unfenced
        fenced = {
            key for key, local in self.locals.items()
            if id(local.owner) in owners and not memory[key].is_inference()
        }  # fmt: skip
        others = {storage_of(memory[key]) for key in self.locals.keys() - fenced}
        return frozenset(key for key in fenced if storage_of(memory[key]) not in others)

    def add_value(self, path: Path, value: object) -> None:
        """Store `value`; tensors in it that are large or distributed become tensors under `path`."""
        self.values[key_of(path)] = _encode(path, value, self._refer(path, value))

    def add_rank_value(self, path: Path, value: object) -> None:
        data = _encode(path, value, extend_encode)
        if len(data) > RANK_VALUE_LIMIT_BYTES:
            raise Incompatible(
                f"{key_of(path)}: {len(data)} bytes are too many for a value of one rank. "
                "Hold large tensors as members of the state under a key of this rank's own."
            )
        self.rank_values[key_of(path)] = data

    def _refer(self, path: Path, value: object) -> Callable[[object], tuple[str, object] | None]:
        names: dict[int, Path] = {}
        for tensor, at in _named_tensors(value):
            names.setdefault(id(tensor), at)

        def extend(item: object) -> tuple[str, object] | None:
            if isinstance(item, torch.Tensor) and (isinstance(item, DTensor) or item.numel() > INLINE_ELEMENTS):
                name = names.setdefault(id(item), (f"##{len(names)}",))
                self.add((*path, *name), item, "tensor")
                return "tensor_ref", key_of(name)
            return extend_encode(item)

        return extend

    def layout(self) -> Layout:
        # The name that sorts first keeps a tied tensor, whatever order the ranks met the names in.
        entries = (Entry(key, local.spec, local.sharding, local.role) for key, local in self.locals.items())
        return Layout(
            tuple(sorted(entries, key=lambda entry: entry.key)),
            tuple(sorted(self.aliases.items())),
            tuple(self.values),  # in the order of an optimizer's groups: other libraries go by it
            tuple(sorted(self.rank_values)),
        )


def _encode(path: Path, value: object, extend: Callable[[object], tuple[str, object] | None]) -> bytes:
    try:
        return codec.encode(value, extend)
    except Incompatible as error:
        raise Incompatible(f"{key_of(path)}: {error}") from error


def _named_tensors(value: object, at: Path = ()) -> Iterator[tuple[torch.Tensor, Path]]:
    """The tensors inside a value under readable names: by key or index, `#n` where neither serves."""
    if isinstance(value, torch.Tensor):
        yield value, at or ("#0",)
    elif isinstance(value, dict):
        for n, (key, item) in enumerate(value.items()):
            yield from _named_tensors(item, (*at, component(key) if isinstance(key, str) else f"#{n}"))
    elif isinstance(value, list | tuple | deque):
        for n, item in enumerate(value):
            yield from _named_tensors(item, (*at, str(n)))


@dataclass(frozen=True)
class Wanted:
    """A value to be restored. `early`: needed for validation, so applied before anything is read; it must not touch
    the user's objects. `on_resize` is set for a value that each rank has for itself. `last`: after all others.
    """

    key: str
    apply: Callable[[object], None]
    refs: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    on_resize: OnResize | None = None
    last: bool = False
    early: bool = False


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds, by name. Ties are resolved by `stored`."""

    specs: dict[str, TensorSpec]
    aliases: dict[str, str]
    values: frozenset[str]
    rank_values: frozenset[str]

    def stored(self, key: str) -> str:
        return self.aliases.get(key, key)

    def under(self, prefix: str) -> list[str]:
        """Keys of tensors (ties included) below `prefix/`."""
        return _below(self._tensor_keys, prefix)

    def values_under(self, prefix: str) -> list[str]:
        """Names of shared values below `prefix/`."""
        return _below(self._value_names, prefix)

    @cached_property
    def _tensor_keys(self) -> list[str]:
        return sorted((*self.specs, *self.aliases))

    @cached_property
    def _value_names(self) -> list[str]:
        return sorted(self.values)


def _below(names: list[str], prefix: str) -> list[str]:
    return names[bisect_left(names, prefix + "/") : bisect_left(names, prefix + "0")]  # "0" follows "/"


@dataclass
class Bound:
    """Everything that one rank restores: memory to fill, values to set, and what to do when all is read.

    `checks` run after the early values and before anything is read; each returns what does not fit, or None.
    """

    locals: list[Local] = field(default_factory=list)
    wanted: list[Wanted] = field(default_factory=list)
    checks: list[Callable[[], str | None]] = field(default_factory=list)
    finish: list[Callable[[], None]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def tensor(self, path: Path, tensor: torch.Tensor | Shard) -> None:
        key = key_of(path)
        _refuse_opaque(key, tensor)
        local = local_of(key, tensor, "tensor")
        if not isinstance(tensor, Shard | DTensor):
            _refuse_shared_elements(key, tensor)
        self.locals.append(local)

    def allocate(
        self, saved: Saved, key: str, like: torch.Tensor | Shard | None, device: torch.device
    ) -> Callable[[], torch.Tensor]:
        """Fill fresh memory with tensor `key`; `like` gives its layout if it has the same global shape.

        Nothing is allocated before the whole restore has been validated. Returns how to get the tensor.
        """
        spec = saved.specs[saved.stored(key)]
        dtype, made = dtype_from_name(spec.dtype), list[torch.Tensor]()
        sharding, fresh = _fresh(spec, dtype, like, device)

        def whole_tensor() -> torch.Tensor:
            if not made:
                made.append(fresh())
            return made[0]

        def local() -> torch.Tensor:
            tensor = whole_tensor()
            return tensor._local_tensor if isinstance(tensor, DTensor) else tensor

        self.locals.append(Local(key, spec, sharding, "tensor", local, object()))
        return whole_tensor


def _refuse_opaque(key: str, tensor: torch.Tensor | Shard) -> None:
    """Nested tensors, and those without memory: made of other tensors (subclasses), lazy, freed, or fake."""
    outer = tensor.tensor if isinstance(tensor, Shard) else tensor
    if is_lazy(outer):
        raise Incompatible(f"{key}: this lazy {type(outer).__name__} has no shape yet. Run the model once first.")
    if isinstance(outer, DTensor) or outer.layout != torch.strided or outer.device.type == "meta":
        return
    if outer.is_nested or (outer.numel() and not outer.data_ptr()):
        raise Incompatible(
            f"{key}: this {type(outer).__name__} has no plain memory of its own. Store the tensors it is made of, or "
            "put it behind an object with state_dict() and load_state_dict()."
        )


def _refuse_shared_elements(key: str, tensor: torch.Tensor) -> None:
    if any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise Incompatible(f"{key}: an expanded tensor cannot be restored into. Pass tensor.contiguous() instead.")
    reach = 0  # a stride beyond all that the smaller ones reach: no element lies on another
    for stride, n in sorted((stride, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if stride <= reach and tensor.numel():
            raise Incompatible(
                f"{key}: elements of this tensor overlap: it cannot be restored into. Pass tensor.contiguous() instead."
            )
        reach += stride * (n - 1)
    if tensor.is_conj() or tensor.is_neg():
        raise Incompatible(f"{key}: a lazy conjugate cannot be restored into. Pass the tensor behind it instead.")


def _fresh(
    spec: TensorSpec, dtype: torch.dtype, like: torch.Tensor | Shard | None, device: torch.device
) -> tuple[Sharding, Callable[[], torch.Tensor]]:
    if isinstance(like, DTensor) and tuple(like.shape) == spec.shape:
        distributed = like
        return local_of("", like, "tensor").sharding, lambda: empty_like(distributed, dtype)
    if isinstance(like, Shard) and like.global_shape == spec.shape:
        declared = like
        box = Slice(like.offset, tuple(like.tensor.shape))
        return Declared(box), lambda: empty_like(declared.tensor, dtype, device)
    return Whole(), lambda: torch.zeros(spec.shape, dtype=dtype, device=device)


class Member(Protocol):
    """One member of the state."""

    path: Path

    def collect(self, out: Collected) -> None: ...

    def bind(self, saved: Saved, out: Bound) -> None: ...


@dataclass
class TensorMember:
    path: Path
    tensor: torch.Tensor | Shard

    def collect(self, out: Collected) -> None:
        parameter = isinstance(self.tensor, Shard) or is_parameter(self.tensor)
        out.add(self.path, self.tensor, "parameter" if parameter else "tensor")

    def bind(self, saved: Saved, out: Bound) -> None:
        out.tensor(self.path, self.tensor)


@dataclass
class ModuleMember:
    path: Path
    module: nn.Module

    def collect(self, out: Collected) -> None:
        for name, _, value in sorted(module_state(self.module), key=lambda item: item[0]):
            path = (*self.path, component(name))
            if isinstance(value, torch.Tensor) and not is_extra_state(name):
                out.add(path, value, "parameter" if is_parameter(value) else "buffer")
            else:
                out.add_value(path, value)

    def bind(self, saved: Saved, out: Bound) -> None:
        for name, key, value in sorted(module_state(self.module), key=lambda item: item[0]):
            path = (*self.path, component(name))
            if isinstance(value, torch.Tensor) and not is_extra_state(name):
                out.tensor(path, value)
            else:
                _want(saved, out, path, lambda v, key=key: set_extra_state(self.module, key, v))  # type: ignore[misc]


@dataclass
class ValueMember:
    """A plain value in a dict or list of the state. Restoring fills a container of the same type, else replaces it."""

    path: Path
    value: object
    put: Callable[[object], None]

    def collect(self, out: Collected) -> None:
        out.add_value(self.path, self.value)

    def bind(self, saved: Saved, out: Bound) -> None:
        _want(saved, out, self.path, self.put)


@dataclass
class StatefulMember:
    """Anything with `state_dict` and `load_state_dict`: schedulers, scalers, samplers, EMA helpers."""

    path: Path
    obj: Any

    def collect(self, out: Collected) -> None:
        out.add_value(self.path, self.obj.state_dict())

    def bind(self, saved: Saved, out: Bound) -> None:
        current = self.obj.state_dict() if saved.under(key_of(self.path)) else {}
        _want(saved, out, self.path, self.obj.load_state_dict, current)


@dataclass
class RankMember:
    """A PerRank value, the random generators, or a data loader."""

    path: Path
    get: Callable[[], object]
    put: Callable[[Any], None]
    on_resize: OnResize
    last: bool = False

    def collect(self, out: Collected) -> None:
        out.add_rank_value(self.path, self.get())

    def bind(self, saved: Saved, out: Bound) -> None:
        key = key_of(self.path)
        if key not in saved.rank_values:
            out.missing.append(key)
            return
        out.wanted.append(Wanted(key, self.put, on_resize=self.on_resize, last=self.last))


def _want(saved: Saved, out: Bound, path: Path, apply: Callable[[Any], None], current: object = None) -> None:
    """Restore the value at `path` and the tensors that were stored apart from it."""
    key = key_of(path)
    if key not in saved.values:
        out.missing.append(key)
        return
    live = {key_of(at): tensor for tensor, at in _named_tensors(current)}
    refs = {}
    for ref in saved.under(key):
        like = live.get(ref[len(key) + 1 :])
        device = like.device if like is not None else torch.device("cpu")
        refs[ref[len(key) + 1 :]] = out.allocate(saved, ref, like, device)
    out.wanted.append(Wanted(key, apply, refs))


def decode_value(data: bytes, refs: Mapping[str, Callable[[], torch.Tensor]]) -> object:
    """A stored value, with the tensors that were stored apart from it back in their places."""

    def extend(tag: str, payload: object) -> object:
        if tag == "tensor_ref":
            if not isinstance(payload, str) or payload not in refs:
                raise Incompatible(f"a value refers to tensor {payload!r}, which was not stored with it")
            return refs[payload]()
        return extend_decode(tag, payload)

    return codec.decode(data, extend)
