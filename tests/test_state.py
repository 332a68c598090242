"""What a state may hold: tensors, modules and values come back bit for bit and exact in type, under readable keys."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import pytest
import torch
from states import Box, bits, keys, model, round_trip, stored_bytes, stored_chunks
from torch import nn

import ckpt
from ckpt import Incompatible
from ckpt.adapt.values import DTYPES
from ckpt.sharding import ITEMSIZE


def filled(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Every bit pattern that fits, so that NaN payloads and negative zeros count too."""
    count = math.prod(shape)
    if dtype == "bool":
        return (torch.arange(count) % 2 == 1).view(shape)
    raw = torch.randint(0, 256, (count * ITEMSIZE[dtype],), dtype=torch.uint8, generator=torch.Generator())
    return raw.view(DTYPES[dtype]).view(shape)


# Tensors


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_every_dtype_in_every_shape(tmp_path: Path, dtype: str) -> None:
    source = {
        "matrix": filled(dtype, (5, 7)),
        "scalar": filled(dtype, ()),
        "empty": filled(dtype, (3, 0, 2)),
        "none": filled(dtype, (0,)),
        "columns": filled(dtype, (5, 8))[:, ::2],
        "turned": filled(dtype, (4, 6)).t(),
        "expanded": filled(dtype, (3, 1)).expand(3, 4),
        "large": filled(dtype, (300, 301)),
        "inside": Box({"small": filled(dtype, (3,)), "large": filled(dtype, (60, 60))}),
    }
    target = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in source.items() if isinstance(t, torch.Tensor)}
    target["inside"] = Box()
    round_trip(tmp_path, source, target)
    inside = target.pop("inside").value
    assert {name: bits(tensor) for name, tensor in target.items()} == {name: bits(source[name]) for name in target}
    assert bits(inside) == bits(source["inside"].value)
    assert bits(ckpt.load(tmp_path, keys=["matrix"])["matrix"]) == bits(source["matrix"])


def test_the_list_of_dtypes_is_complete() -> None:
    """torch's dtypes but for the quantized, the shell and the sub-byte ones."""
    left_out = ("qint", "quint", "bits", "float4", "uint1", "int1")
    small = {f"{sign}int{n}" for sign in ("", "u") for n in range(1, 8)}
    found = {str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype)}
    assert {name for name in found if not name.startswith(left_out) or name in ITEMSIZE} - small == set(ITEMSIZE)


@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.zeros(5, 4, 3, 2).permute(3, 2, 1, 0),
        torch.zeros(4, 6, 8, 10)[::2, ::2, ::2, ::2],
        torch.zeros(2, 3, 4, 5, requires_grad=True),
    ],
    ids=["channels_last", "permuted", "strided", "leaf"],
)
def test_targets_keep_their_memory_format(tmp_path: Path, target: torch.Tensor) -> None:
    source, stride, place = torch.randn(2, 3, 4, 5), target.stride(), target.data_ptr()
    round_trip(tmp_path, {"t": source.contiguous(memory_format=torch.channels_last)}, {"t": target})
    assert bits(target) == bits(source)
    assert (target.stride(), target.data_ptr()) == (stride, place)


def test_lazy_views_are_stored_by_value(tmp_path: Path) -> None:
    z = torch.randn(4, dtype=torch.complex64)
    source = {"conj": z.conj(), "neg": z.conj().imag}
    target = {"conj": torch.zeros_like(z), "neg": torch.zeros(4)}
    round_trip(tmp_path, source, target)
    assert torch.equal(target["conj"], z.conj())
    assert torch.equal(target["neg"], -z.imag)


# Modules


class Odd(nn.Module):
    """Buffers of both kinds and extra state."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("kept", torch.full((2,), float(seed)))
        self.register_buffer("my_extra_state", torch.full((2,), float(seed)))
        self.register_buffer("left_out", torch.full((2,), float(seed)), persistent=False)
        self.extra: Any = {"seed": seed, ("a", 1): {3}}

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_buffers_and_extra_state(tmp_path: Path) -> None:
    source, target = nn.Sequential(Odd(1)), nn.Sequential(Odd(2))
    source[0].norm(torch.randn(8, 3))
    round_trip(tmp_path, {"model": source}, {"model": target})
    assert bits(target.state_dict()) == bits(source.state_dict())
    assert target[0].extra == {"seed": 1, ("a", 1): {3}}
    assert target[0].my_extra_state.tolist() == [1.0, 1.0]
    assert target[0].left_out.tolist() == [2.0, 2.0]
    assert "model/0.left_out" not in keys(tmp_path)


def test_extra_state_may_be_a_large_tensor(tmp_path: Path) -> None:
    source, target = Odd(1), Odd(2)
    source.extra = torch.randn(2000)
    round_trip(tmp_path, {"model": source}, {"model": target})
    assert bits(target.extra) == bits(source.extra)


class Tied(nn.Module):
    def __init__(self, seed: int, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(64, 32)
        self.head = nn.Linear(32, 64, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    source, target = Tied(0, tied=True), Tied(1, tied=True)
    round_trip(tmp_path, {"model": source}, {"model": target})
    assert stored_chunks(tmp_path) == ["model/embed.weight"]
    assert stored_bytes(tmp_path) < 2 * source.embed.weight.nbytes + 4096
    assert target.head.weight is target.embed.weight
    assert bits(target.state_dict()) == bits(source.state_dict())
    loaded = ckpt.load(tmp_path)
    assert loaded["model/embed.weight"] is loaded["model/head.weight"]
    assert bits(ckpt.load(tmp_path, keys=["model/head.weight"])["model/head.weight"]) == bits(source.head.weight)


def test_saved_tied_into_untied_gives_equal_copies(tmp_path: Path) -> None:
    source, target = Tied(0, tied=True), Tied(1, tied=False)
    round_trip(tmp_path, {"model": source}, {"model": target})
    assert bits(target.embed.weight) == bits(target.head.weight) == bits(source.embed.weight)
    assert target.embed.weight.data_ptr() != target.head.weight.data_ptr()


def test_saved_untied_but_equal_into_tied(tmp_path: Path) -> None:
    source, target = Tied(0, tied=False), Tied(1, tied=True)
    with torch.no_grad():
        source.head.weight.copy_(source.embed.weight)
    round_trip(tmp_path, {"model": source}, {"model": target})
    assert len(stored_chunks(tmp_path)) == 2
    assert bits(target.state_dict()) == bits(source.state_dict())


def test_saved_untied_and_different_into_tied(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="tied to, or shares memory with, another tensor") as caught:
        round_trip(tmp_path, {"model": Tied(0, tied=False)}, {"model": Tied(1, tied=True)})
    assert "partly overwritten" in str(caught.value)


def _rows(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"x": tensor, "y": tensor[:2]}


def _turned(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"x": tensor, "y": tensor.t()}


def _sides(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"x": tensor[:, :2], "y": tensor[:, 2:]}


def _halves(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"x": tensor.view(-1)[:5000], "y": tensor.view(-1)[5000:]}


VIEWS = {"rows": _rows, "turned": _turned, "sides": _sides, "halves": _halves}


@pytest.mark.parametrize("views", VIEWS)
def test_targets_in_one_memory(tmp_path: Path, views: str) -> None:
    """Those that share elements hold what is stored or are refused; those that only lie together never are."""
    source = torch.arange(10000.0).view(100, 100)
    target = torch.zeros(100, 100)
    round_trip(tmp_path / "same", VIEWS[views](source), VIEWS[views](target))
    assert torch.equal(target, source)

    apart = {name: torch.rand(view.shape) for name, view in VIEWS[views](source).items()}
    target = VIEWS[views](torch.zeros(100, 100))
    if views in ("rows", "turned"):
        with pytest.raises(Incompatible, match="the checkpoint holds different values"):
            round_trip(tmp_path / "apart", apart, target)
    else:
        round_trip(tmp_path / "apart", apart, target)
        assert all(torch.equal(target[name], apart[name]) for name in apart)


def test_the_same_tensor_in_two_members_is_stored_once(tmp_path: Path) -> None:
    net, other = model(0), model(1)
    round_trip(tmp_path, {"model": net, "alias": net[0].weight}, {"model": other, "alias": other[0].weight})
    assert sum(key.endswith(("alias", "0.weight")) for key in stored_chunks(tmp_path)) == 1
    assert bits(other[0].weight) == bits(net[0].weight)


# Values

VALUES: dict[str, Any] = {
    "none": None,
    "flags": (True, False),
    "numbers": [1, -(2**80), 0.1, math.inf, -0.0, 1 + 2j],
    "text": "naïve \ud800 \N{SNOWMAN}",
    "bytes": b"\x00\xff",
    "containers": [(), [], {}, set(), {1, "a"}, frozenset({2}), Counter("aab"), deque([1], maxlen=3)],
    "dicts": {1: {2: 3}, (4, 5): None, "6": OrderedDict(b=1, a=2), "d": defaultdict(int, x=1)},
    "torch": [torch.float16, torch.Size([2, 3]), torch.device("cpu")],
    "small tensor": {"t": [torch.arange(3), torch.ones(())]},
}


def test_values_are_exact_in_type_and_replaced_in_place(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"epoch": 0, "deep": [1, {"x": 0, "w": torch.zeros(2)}]}
    saved = {**VALUES, "inner": {"epoch": 7, "deep": [(2,), {"x": {3: 4}, "w": torch.ones(2)}]}}
    small = {"t": [torch.zeros(3, dtype=torch.int64), torch.zeros(())]}
    target = {**dict.fromkeys(VALUES), "small tensor": small, "inner": inner}
    deep = inner["deep"]
    round_trip(tmp_path, saved, target)
    assert bits({name: target[name] for name in VALUES}) == bits(VALUES)
    assert target["inner"] is inner
    assert inner["deep"] is deep
    assert (inner["epoch"], deep[0], deep[1]["x"]) == (7, (2,), {3: 4})
    assert deep[1]["w"].tolist() == [1.0, 1.0]


def test_large_tensors_in_a_value_are_stored_as_tensors_under_readable_keys(tmp_path: Path) -> None:
    big, other = torch.randn(40, 50), torch.randn(2000)
    value = {
        "shadow": {"layer.weight": big, "again": big},
        "history": deque([other, None]),
        "by number": {7: other + 1},
        "set": {other + 2},
    }
    target = Box()
    round_trip(tmp_path, {"ema": Box(value)}, {"ema": target})
    assert {"ema/shadow/layer.weight", "ema/history/0", "ema/by%20number/#0"} <= keys(tmp_path)
    assert len(stored_chunks(tmp_path)) == 4  # the tensor that is there twice is stored once
    result = target.value
    assert bits(result["set"].pop()) == bits(value["set"].pop())
    assert isinstance(result["history"], deque)
    assert bits(list(result["history"])) == bits(list(value["history"]))
    assert bits([result["shadow"], result["by number"]]) == bits([value["shadow"], value["by number"]])
    assert result["shadow"]["layer.weight"] is result["shadow"]["again"]


# Keys

NAMES = ["a", "a.b", "a/b", "/", "@", "%", "#", "%2F", "a@0", " ", "", ".", "..", "ä", "\N{SNOWMAN}", "0", ".pad/0"]


def test_any_string_is_a_key_and_none_collide(tmp_path: Path) -> None:
    def build(fill: bool) -> dict[str, Any]:
        flat = {name: torch.full((2,), float(n if fill else -1)) for n, name in enumerate(NAMES)}
        nested = {name: {inner: torch.zeros(1) - fill * n for n, inner in enumerate(NAMES)} for name in NAMES}
        return {"flat": flat, "nested": nested, "values": {name: n * fill for n, name in enumerate(NAMES)}}

    target = build(False)
    round_trip(tmp_path, build(True), target)
    assert bits(target) == bits(build(True))
    found = [key for key in keys(tmp_path) if key.startswith(("flat", "nested"))]
    assert len(found) == len(NAMES) + len(NAMES) ** 2
    assert all(key.isascii() and " " not in key for key in found)


def test_a_dot_and_a_nest_differ(tmp_path: Path) -> None:
    source = {"s": {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}}
    target = {"s": {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}}}
    round_trip(tmp_path, source, target)
    assert bits(target) == bits(source)
    assert keys(tmp_path) == {"s/a.b", "s/a/b"}


def test_a_state_may_be_a_list(tmp_path: Path) -> None:
    net, other = model(0), model(1)
    target = [other, [0, torch.zeros(2)]]
    round_trip(tmp_path, [net, [5, torch.ones(2)]], target)
    assert bits(other.state_dict()) == bits(net.state_dict())
    assert bits(target[1]) == bits([5, torch.ones(2)])
    assert {"0/0.weight", "1/0", "1/1"} <= keys(tmp_path)


def test_an_empty_state_can_be_saved(tmp_path: Path) -> None:
    round_trip(tmp_path, {}, {})
    assert ckpt.load(tmp_path) == {}


# What restore may overlook


def test_only_restores_what_is_named(tmp_path: Path) -> None:
    net, other = model(0), model(1)
    kept = bits(other[3].state_dict())
    round_trip(
        tmp_path, {"model": net, "n": 1}, {"model": other, "n": 2, "absent": 3}, only=["model/0", "model/1.bias"]
    )
    assert bits(other[0].state_dict()) == bits(net[0].state_dict())
    assert bits(other[3].state_dict()) == kept


def test_only_a_part_of_what_is_restored_as_a_whole_is_refused(tmp_path: Path) -> None:
    target = Box()
    with pytest.raises(Incompatible, match=r"ema is restored as a whole .* pass only=\['ema'\]"):
        round_trip(tmp_path, {"ema": Box({"w": torch.ones(2000)})}, {"ema": target}, only=["ema/w"])
    assert target.value is None


def test_a_mistyped_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="only='modle' names nothing in the checkpoint"):
        round_trip(tmp_path, {"model": model(0)}, {"model": model(1)}, only=["modle"])


def test_rename_maps_stored_prefixes(tmp_path: Path) -> None:
    net, other = model(0), model(1)
    source, target = {"net": {"body": net}, "n": 1}, {"model": other, "count": 0}
    round_trip(tmp_path, source, target, rename={"net/body": "model", "n": "count"})
    assert bits(other.state_dict()) == bits(net.state_dict())
    assert target["count"] == 1


def test_rename_onto_one_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="rename= gives two stored tensors or values the same name"):
        round_trip(
            tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}, {"c": torch.ones(1)}, rename={"a": "c", "b": "c"}
        )


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("float32", "bfloat16"),
        ("float16", "float64"),
        ("uint8", "int32"),
        ("bool", "int64"),
        ("complex128", "complex64"),
    ],
)
def test_cast_converts(tmp_path: Path, stored: str, wanted: str) -> None:
    source = torch.arange(600).to(DTYPES[stored]).view(20, 30)
    target = torch.zeros(20, 30, dtype=DTYPES[wanted])
    round_trip(tmp_path, {"t": source}, {"t": target}, cast=True)
    assert bits(target) == bits(source.to(DTYPES[wanted]))


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        *[("complex64", "float32"), ("complex64", "int32"), ("complex64", "bool"), ("float32", "complex64")],
        *[("float32", "int64"), ("float32", "bool"), ("int32", "float32"), ("bool", "float32")],
        *[("int64", "int32"), ("int8", "uint8"), ("uint8", "bool")],
    ],
)
def test_cast_refuses_what_would_lose_values(tmp_path: Path, stored: str, wanted: str) -> None:
    target = torch.full((4,), 7).to(DTYPES[wanted])
    before = bits(target)
    with pytest.raises(
        Incompatible, match=f"t: {stored} in the checkpoint, {wanted} in the state, which cast=True does"
    ):
        round_trip(tmp_path, {"t": torch.ones(4, dtype=DTYPES[stored])}, {"t": target}, cast=True)
    assert bits(target) == before


def test_not_strict_skips_what_is_missing_on_either_side(tmp_path: Path) -> None:
    target = {"both": torch.zeros(2), "new": torch.full((2,), 9.0), "value": 5, "box": Box("kept")}
    round_trip(tmp_path, {"both": torch.ones(2), "old": torch.ones(2), "n": 1}, target, strict=False)
    assert target["both"].tolist() == [1.0, 1.0]
    assert target["new"].tolist() == [9.0, 9.0]
    assert (target["value"], target["box"].value) == (5, "kept")


def test_not_strict_still_refuses_another_shape(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match=r"t: shape \[2\] in the checkpoint, \[3\] in the state"):
        round_trip(tmp_path, {"t": torch.ones(2)}, {"t": torch.zeros(3)}, strict=False)
