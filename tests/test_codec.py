"""The value codec: exact types, equal bytes for equal values, typed errors for everything else."""

from __future__ import annotations

import ast
import contextlib
import enum
import itertools
import math
import random
import struct
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt import codec
from ckpt.adapt.values import DTYPES, dtype_from_name, dtype_name, extend_decode, extend_encode
from ckpt.codec import MAX_DEPTH, decode, encode
from ckpt.errors import Corrupt, Incompatible

Ext = msgspec.msgpack.Ext
pack = msgspec.msgpack.encode


def through(value: Any) -> Any:
    return decode(encode(value, extend_encode), extend_decode)


# ---------------------------------------------------------------- strict comparison


def same(a: Any, b: Any) -> bool:
    """Equal in type and content, recursively; nan equals nan, -0.0 differs from 0.0, order of dicts counts."""
    if type(a) is not type(b):
        return False
    for kind, compare in _COMPARE.items():
        if isinstance(a, kind):
            return bool(compare(a, b))
    return bool(a == b)


def _float(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or struct.pack(">d", a) == struct.pack(">d", b)


def _sequence(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def _mapping(a: Any, b: Any) -> bool:
    return getattr(a, "default_factory", None) is getattr(b, "default_factory", None) and _sequence(
        list(itertools.chain(*a.items())), list(itertools.chain(*b.items()))
    )


def _set(a: Any, b: Any) -> bool:
    return sorted(map(encode, a)) == sorted(map(encode, b))


def _array(a: Any, b: Any) -> bool:
    return bool(a.dtype.str == b.dtype.str and a.shape == b.shape and a.tobytes() == b.tobytes())


def _tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


_COMPARE: dict[Any, Any] = {
    (np.ndarray, np.generic): _array,
    torch.Tensor: _tensor,
    bool: lambda a, b: a is b,
    float: _float,
    complex: lambda a, b: _float(a.real, b.real) and _float(a.imag, b.imag),
    dict: _mapping,
    deque: lambda a, b: a.maxlen == b.maxlen and _sequence(a, b),
    (set, frozenset): _set,
    (list, tuple): _sequence,
    (range, slice): lambda a, b: _sequence((a.start, a.stop, a.step), (b.start, b.stop, b.step)),
}


# ---------------------------------------------------------------- round trips

numbers = st.one_of(st.integers(), st.integers(-(2**200), 2**200), st.sampled_from([2**63, 2**64, -(2**63) - 1]))
text = st.text(st.characters(exclude_categories=()), max_size=8)
hashable_leaves = st.one_of(
    st.none(), st.booleans(), numbers, st.floats(), st.complex_numbers(), text, st.binary(max_size=8)
)
ranges = st.builds(range, numbers, numbers, numbers.filter(bool))
leaves = st.one_of(hashable_leaves, st.builds(bytearray, st.binary(max_size=8)), ranges)
keys = st.recursive(
    hashable_leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)),
    max_leaves=4,
)
factories = st.sampled_from([None, int, float, list, dict, set, str, bool, tuple])


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, max_size=4)
    dicts = st.dictionaries(keys, inner, max_size=4)
    return st.one_of(
        lists,
        lists.map(tuple),
        st.builds(deque, lists, st.sampled_from([None, 4, 2, 0])),
        st.builds(slice, inner, inner, inner),
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
        dicts,
        dicts.map(OrderedDict),
        dicts.map(Counter),
        st.builds(defaultdict, factories, dicts),
        st.sets(keys, max_size=4),
        st.frozensets(keys, max_size=4),
    )


values = st.recursive(leaves, _containers, max_leaves=20)


@given(values)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_round_trip_is_exact(value: Any) -> None:
    data = encode(value)
    assert same(decode(data), value)
    assert encode(decode(data)) == data


@pytest.mark.parametrize(
    "value",
    [
        {1: "int", "1": "str", (1,): "tuple", b"1": "bytes", None: 0, 2.5: 1},
        {True: 0},
        [True, 1, 1.0, 1 + 0j],
        [math.inf, -math.inf, math.nan, -0.0, 5e-324],
        [2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**5000, 127, 128, -128, -129, 255, 256],
        ["", "\0", "\ud800", "a\udfffb", "\U0001f600"],
        {"\ud800": 1, "b": 2},
        {"b": 1, "a": 2},
        [(), set(), frozenset(), {}, [], b"", bytearray(), deque(), Counter(), OrderedDict(), range(0), slice(None)],
        deque([1, 2, 3], maxlen=3),
        defaultdict(list, {(1, 2): [3]}),
        Counter({"x": -1, 3: 2.5}),
        slice((1, 2), None, "s"),
        range(2**80, 0, -(2**70)),
        [torch.float16, torch.device("cuda", 3), torch.device("cpu"), torch.Size([2, 0, -1]), torch.Size([])],
        [torch.strided, torch.sparse_csr, torch.channels_last, torch.preserve_format],
        {torch.float8_e5m2: torch.bool},
        [np.dtype("float32"), np.dtype(">i8"), np.dtype(bool), np.dtype("complex128")],
    ],
)
def test_round_trip_of_chosen_values(value: Any) -> None:
    assert same(through(value), value)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (2, 3, 4)])
def test_tensors_of_every_dtype(name: str, shape: tuple[int, ...]) -> None:
    dtype = DTYPES[name]
    raw = torch.randint(0, 2, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    value = raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)
    assert same(through(value), value)
    assert dtype_from_name(dtype_name(dtype)) is dtype


def test_tensor_views_keep_their_elements() -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    for view in (base.t(), base[1:, ::2], base[2], torch.view_as_complex(base.reshape(4, 3, 2)).conj(), base[:, :0]):
        assert same(through(view), view.contiguous())
    result = through(torch.nn.Parameter(torch.ones(2)))
    assert type(result) is torch.Tensor
    assert not result.requires_grad
    assert result.resize_(100).shape == (100,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensor_comes_back_on_the_cpu() -> None:
    value = torch.arange(6, device="cuda").reshape(2, 3).t()
    assert same(through(value), value.cpu().contiguous())


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("item", ["b1", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8", "c16"])
def test_arrays_of_every_kind(order: str, item: str) -> None:
    flat = np.arange(12).astype(order + item)
    for value in (flat, flat.reshape(3, 4).T, flat[::-2], flat[:0], flat[:1].reshape(()), flat.reshape(2, 6)[:, :0]):
        result = through(value)
        assert same(result, value)
        assert result.flags.writeable
    assert same(through(flat[3]), flat[3])


def test_numpy_scalars_keep_their_type() -> None:
    for value in (
        np.float64(0.1),
        np.float32("nan"),
        np.int8(-1),
        np.uint64(2**64 - 1),
        np.bool_(True),
        np.complex64(1j),
    ):
        assert same(through({value: [value]}), {value: [value]}) or np.isnan(value)
        assert type(through(value)) is type(value)


def test_works_without_numpy() -> None:
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import torch; from ckpt.codec import *; from ckpt.adapt.values import *\n"
        "from ckpt.errors import Incompatible\n"
        "data = encode({1: torch.arange(3, dtype=torch.bfloat16)}, extend_encode)\n"
        "assert torch.equal(decode(data, extend_decode)[1].float(), torch.arange(3.0))\n"
        "try: encode(open, extend_encode); raise SystemExit(2)\n"
        "except Incompatible: pass\n"
        "try: extend_decode('numpy.dtype', '<f4'); raise SystemExit(3)\n"
        "except Incompatible as error: assert 'pip install numpy' in str(error)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(codec.__file__).parent.parent)


# ---------------------------------------------------------------- what training really stores


def _optimizer(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)


def _sequential(optimizer: torch.optim.Optimizer) -> Any:
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [3])


SCHEDULERS: dict[str, Any] = {
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 5, 5, 8], gamma=0.5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2.0, total_steps=20),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "SequentialLR": _sequential,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_goes_on_as_if_never_stopped(name: str) -> None:
    def rates(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
        result = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            result.append(optimizer.param_groups[0]["lr"])
        return result

    optimizer = _optimizer()
    scheduler = SCHEDULERS[name](optimizer)
    rates(optimizer, scheduler, 4)
    state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    stored = through(state)
    assert same(stored, state)
    fresh_optimizer = _optimizer(0.123)
    fresh = SCHEDULERS[name](fresh_optimizer)
    fresh_optimizer.load_state_dict(stored["optimizer"])
    fresh.load_state_dict(stored["scheduler"])
    expected = rates(optimizer, scheduler, 8)
    assert rates(fresh_optimizer, fresh, 8) == expected
    assert len(set(expected)) > 1


def test_plateau_scheduler_keeps_inf() -> None:
    make = torch.optim.lr_scheduler.ReduceLROnPlateau
    state = make(_optimizer(), patience=0).state_dict()
    assert state["best"] == math.inf
    optimizer = _optimizer()
    fresh = make(optimizer, patience=0)
    fresh.load_state_dict(through(state))
    assert same(fresh.state_dict(), state)
    for loss in (1.0, 2.0):
        fresh.step(loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_numpy_generators(kind: Any) -> None:
    generator = np.random.Generator(kind(7))
    generator.random(5)
    generator.integers(0, 9, dtype=np.int32)
    state = generator.bit_generator.state
    stored = through(state)
    assert same(stored, state)
    fresh = np.random.Generator(kind(8))
    fresh.bit_generator.state = stored
    assert fresh.random(5).tobytes() == generator.random(5).tobytes()


def test_global_generators() -> None:
    python, legacy, torch_state = through((random.getstate(), np.random.get_state(), torch.get_rng_state()))
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    random.setstate(python)
    np.random.set_state(legacy)
    torch.set_rng_state(torch_state)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


# ---------------------------------------------------------------- determinism and the frozen form


def test_sets_give_equal_bytes_in_every_process() -> None:
    code = (
        "import sys; from ckpt.codec import encode\n"
        "sys.stdout.write(encode([{'a', 'bc', (1, 'x'), None, 2.5}, frozenset(map(str, range(50)))]).hex())"
    )
    root = Path(codec.__file__).parent.parent
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1


@given(st.lists(keys, max_size=6), st.randoms())
@settings(deadline=None)
def test_set_bytes_do_not_depend_on_insertion(items: list[Any], rng: random.Random) -> None:
    first = set(items)
    shuffled = list(first)
    rng.shuffle(shuffled)
    assert encode(first) == encode(set(shuffled))


FROZEN = [
    ([None, True, -1, 300, 1.5, "é", b"\1"], "97c0c3ffcd012ccb3ff8000000000000a2c3a9c40101"),
    ({"a": [], "b": {}}, "82a16190a16280"),
    (2**64, "c70b01c409010000000000000000"),
    (-(2**63) - 1, "c70b01c409ff7fffffffffffffff"),
    ("\ud800", "c70502c403eda080"),
    (1 - 2j, "c7130392cb3ff0000000000000cbc000000000000000"),
    (bytearray(b"\2"), "c70304c40102"),
    ((1, "a"), "d6059201a161"),
    ({2, 1}, "c70306920102"),
    (frozenset({"b", "a"}), "c7050792a161a162"),
    ({1: 2}, "d60891920102"),
    (OrderedDict(a=1), "c705099192a16101"),
    (Counter("aa"), "c7050a9192a16102"),
    (defaultdict(int, a=1), "c70a0b92a3696e749192a16101"),
    (deque([1], 3), "d60c92039101"),
    (range(1, 9, 2), "d60d93010902"),
    (slice(None, 2), "d60e93c002c0"),
    (torch.bfloat16, "c7160092ab746f7263682e6474797065a862666c6f61743136"),
    (torch.tensor([1, -1], dtype=torch.int16), "c71d0092ac746f7263682e74656e736f7293a5696e7431369102c4040100ffff"),
    (np.float32(1), "c7190092ac6e756d70792e7363616c617292a33c6634c4040000803f"),
    (np.array([[1]], dtype=">u2"), "c71b0092ad6e756d70792e6e64617272617993a33e7532920101c4020001"),
]


@pytest.mark.parametrize(("value", "frozen"), FROZEN, ids=lambda item: item if isinstance(item, str) else "")
def test_wire_form_never_changes(value: Any, frozen: str) -> None:
    assert encode(value, extend_encode).hex() == frozen
    assert same(decode(bytes.fromhex(frozen), extend_decode), value)


def test_docstring_lists_every_code() -> None:
    assert codec.__doc__ is not None
    rows = [line.split() for line in codec.__doc__.splitlines() if line[:8].strip().isdigit()]
    assert [int(row[0]) for row in rows] == [0, *sorted(codec._READ)]
    names = {kind.code: kind.type.__name__ for kind in codec._KINDS}
    assert all(row[1] == names.get(int(row[0]), row[1]) for row in rows)


def test_codec_is_pure() -> None:
    tree = ast.parse(Path(codec.__file__).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
        )
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not imported & {"torch", "numpy", "os", "time", "threading", "logging"}


# ---------------------------------------------------------------- what cannot be stored


class Colour(enum.IntEnum):
    RED = 1


class Name(str):
    __slots__ = ()


class Opaque:
    pass


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [
        lambda: 0, Opaque(), Opaque, Colour.RED, Name("a"), Point(1, 2), (i for i in range(1)), memoryview(b""), int,
        sys, type("Sub", (OrderedDict,), {})(), type("Sub", (float,), {})(1.0), NotImplemented, ..., np.str_("a"),
        np.datetime64("2020-01-01"), np.longdouble(1), np.array([object()]), np.zeros(1, [("a", "i4")]), np.dtype("O"),
        np.dtype("(2,)i4"), np.array(["a"]), np.ma.masked_array([1]), torch.qint8, torch.zeros(2).to_sparse(),
        torch.zeros(1, device="meta"), type("Sub", (torch.Tensor,), {})(), torch.Generator(),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_refuses(value: Any) -> None:
    for inside, path in ((value, "value "), ({"a": [0, 1, (value,)]}, "value['a'][2][0] ")):
        with pytest.raises(Incompatible) as caught:
            encode(inside, extend_encode)
        assert path in str(caught.value)
        assert type(value).__qualname__ in str(caught.value)


def test_np_float64_is_not_taken_for_a_float() -> None:
    with pytest.raises(Incompatible, match=r"numpy\.float64"):
        encode([np.float64(1)])


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [0, {Point(1, 2): 0}]}, r"value\['a'\]\[1\]\.key "),
        ({1: OrderedDict(b=Opaque())}, r"value\[1\]\['b'\] "),
        ({"s": frozenset({Colour.RED})}, r"value\['s'\]\.member "),
        (slice(0, Opaque()), r"value\[1\] "),
        ([defaultdict(lambda: 0)], r"value\[0\] of type collections.defaultdict: its default_factory"),
        ([defaultdict(Counter)], r"value\[0\] of type collections.defaultdict: its default_factory"),
        ({"a": {0: Opaque()}}, r"state_dict\(\) and load_state_dict\(\)"),
        ({"m": torch.zeros(1, device="meta")}, r"value\['m'\] of type torch.Tensor: .*meta tensors"),
    ],
)
def test_error_names_the_place(value: Any, path: str) -> None:
    with pytest.raises(Incompatible, match=path):
        encode(value, extend_encode)


def test_distributed_tensor_is_refused() -> None:
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(Incompatible, match="keep it as an entry of the state"):
        encode([torch.ones(1).as_subclass(DTensor)], extend_encode)


def test_cycles_and_depth() -> None:
    cycle: list[Any] = []
    cycle.append({"a": (cycle,)})
    with pytest.raises(Incompatible, match=r"value\[0\]\['a'\]\[0\] of type builtins.list: it contains itself"):
        encode(cycle)
    with pytest.raises(Incompatible, match="contains itself"):
        encode(Opaque(), lambda obj: ("x", obj))
    with pytest.raises(Incompatible, match="100 levels"):
        encode(Opaque(), lambda obj: ("x", Opaque()))
    for wrap in (lambda v: [v], lambda v: {0: v}, lambda v: (v,), lambda v: deque([v]), lambda v: {"a": v}):
        deep: Any = 2**70
        for _ in range(MAX_DEPTH):
            deep = wrap(deep)
        assert same(through(deep), deep)
        with pytest.raises(Incompatible, match="100 levels"):
            encode(wrap(deep))
    endless: list[Any] = []
    for _ in range(100_000):
        endless = [endless]
    with pytest.raises(Incompatible, match="100 levels"):
        encode(endless)


def test_shared_references_are_written_twice() -> None:
    shared = [1]
    assert through([shared, shared]) == [[1], [1]]


# ---------------------------------------------------------------- hostile bytes

RICH = {
    "scalars": [None, True, 1, -(2**70), 1.5, 1j, "a", "\ud800", b"b", bytearray(b"c")],
    1: (range(3), slice(1, None), deque([1], 2), defaultdict(int, a=1), Counter("ab"), OrderedDict(z=1)),
    (2, "k"): [{"s", 2, (3,)}, frozenset({1.5})],
    "torch": [torch.float16, torch.device("cuda", 1), torch.Size([2]), torch.strided, torch.channels_last],
    "tensors": [torch.ones(2, 1, dtype=torch.bfloat16), torch.zeros(0), torch.tensor(True)],
    "numpy": [np.dtype(">f4"), np.int16(3), np.arange(3, dtype="<u2").reshape(1, 3), np.float64(0.5)],
}


def decodes_or_is_corrupt(data: bytes) -> None:
    with contextlib.suppress(Corrupt):
        decode(data, extend_decode)


def test_every_truncation_is_corrupt() -> None:
    data = encode(RICH, extend_encode)
    assert same(decode(data, extend_decode), RICH)
    for end in range(len(data)):
        with pytest.raises(Corrupt):
            decode(data[:end], extend_decode)
    with pytest.raises(Corrupt):
        decode(data + b"\xc0", extend_decode)


def test_every_changed_byte_decodes_or_is_corrupt() -> None:
    data = bytearray(encode(RICH, extend_encode))
    for index, byte in itertools.product(range(len(data)), range(256)):
        kept, data[index] = data[index], byte
        decodes_or_is_corrupt(bytes(data))
        data[index] = kept


@given(st.binary(max_size=200))
@settings(max_examples=1000, deadline=None)
def test_any_bytes_decode_or_are_corrupt(data: bytes) -> None:
    decodes_or_is_corrupt(data)


wire = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.text(max_size=4),
        st.binary(max_size=9),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 9)), inner, max_size=3),
        st.builds(lambda code, body: Ext(code, pack(body)), st.integers(-2, 16), inner),
        st.builds(
            lambda tag, body: Ext(0, pack([tag, body])),
            st.sampled_from(["torch.tensor", "torch.device", "torch.Size", "numpy.ndarray", "numpy.dtype", "x"]),
            st.one_of(inner, st.tuples(st.sampled_from(["int8", "|i1", "O"]), st.lists(st.integers(0, 2**40)), inner)),
        ),
    ),
    max_leaves=12,
)


@given(wire)
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_well_formed_messagepack_of_wrong_shape(tree: Any) -> None:
    decodes_or_is_corrupt(pack(tree))


def _nested_ext(code: int, levels: int) -> bytes:
    data = pack([])
    for _ in range(levels):
        data = pack(Ext(code, b"\x91" + data))
    return data


HOSTILE = {
    "empty": b"",
    "never used byte": b"\xc1",
    "list bomb": b"\x91" * 1_000_000 + b"\xc0",
    "map bomb": b"\x81\xa0" * 1_000_000 + b"\xc0",
    "101 lists": b"\x91" * 101 + b"\x90",
    "tuple bomb": _nested_ext(5, 5_000),
    "huge array": b"\xdd\xff\xff\xff\xff\xc0",
    "huge map": b"\xdf\xff\xff\xff\xff\xc0",
    "huge str": b"\xdb\xff\xff\xff\xff\xc0",
    "huge bin": b"\xc6\xff\xff\xff\xff\xc0",
    "huge ext": b"\xc9\xff\xff\xff\xff\x05\xc0",
    "huge arrays in huge arrays": b"\xdd\x0f\xff\xff\xff" * 90,
    "bad utf-8": b"\xa1\xff",
    "timestamp": b"\xd6\xff\0\0\0\0",
    "int key in a map": b"\x81\1\2",
    "array key in a map": b"\x81\x91\1\2",
    "ext key in a map": b"\x81\xc7\x01\x05\x90\xc0",
    "unknown code": pack(Ext(15, b"\xc0")),
    "negative code": pack(Ext(-2, b"\xc0")),
    "empty payload": pack(Ext(5, b"")),
    "trailing bytes in a payload": pack(Ext(5, b"\x90\xc0")),
    "unhashable member": pack(Ext(6, pack([[]]))),
    "repeated member": pack(Ext(6, pack([1, 1]))),
    "equal members": pack(Ext(6, pack([1, True]))),
    "unhashable key": pack(Ext(8, pack([[[], 1]]))),
    "repeated key": pack(Ext(8, pack([[1, 1], [1, 2]]))),
    "members of one hash": pack(
        Ext(7, pack([Ext(1, pack((i * (2**61 - 1) * 8).to_bytes(10, "big", signed=True))) for i in range(1, 3000)]))
    ),
    "pair of three": pack(Ext(8, pack([[1, 1, 1]]))),
    "bad surrogate": pack(Ext(2, pack(b"\xff"))),
    "complex of ints": pack(Ext(3, pack([1, 2]))),
    "factory eval": pack(Ext(11, pack(["eval", []]))),
    "unhashable factory": pack(Ext(11, pack([[], []]))),
    "deque beyond maxlen": pack(Ext(12, pack([1, [1, 2]]))),
    "negative maxlen": pack(Ext(12, pack([-1, []]))),
    "huge maxlen": pack(Ext(12, pack([2**64 - 1, []]))),
    "bool maxlen": pack(Ext(12, pack([True, []]))),
    "zero step": pack(Ext(13, pack([0, 1, 0]))),
    "unknown tag": pack(Ext(0, pack(["os.system", "true"]))),
    "tag is no str": pack(Ext(0, pack([[], "true"]))),
    "dtype by attribute": pack(Ext(0, pack(["torch.dtype", "nn"]))),
    "device": pack(Ext(0, pack(["torch.device", "moon:1"]))),
    "tensor too short": pack(Ext(0, pack(["torch.tensor", ["int8", [2], b"1"]]))),
    "tensor of negative size": pack(Ext(0, pack(["torch.tensor", ["int8", [-1, -1], b"1"]]))),
    "tensor of bool size": pack(Ext(0, pack(["torch.tensor", ["int8", [True], b"1"]]))),
    "empty tensor, huge shape": pack(Ext(0, pack(["torch.tensor", ["int8", [0, 2**62, 2**62], b""]]))),
    "tensor of many dims": pack(Ext(0, pack(["torch.tensor", ["int8", [2**62] * 100_000, b"1"]]))),
    "object array": pack(Ext(0, pack(["numpy.ndarray", ["|O", [1], b"12345678"]]))),
    "structured array": pack(Ext(0, pack(["numpy.ndarray", ["i4,f4", [1], b"12345678"]]))),
    "array too long": pack(Ext(0, pack(["numpy.ndarray", ["<i4", [1], b"12345678"]]))),
    "empty array, huge shape": pack(Ext(0, pack(["numpy.ndarray", ["<i4", [0, 2**62, 2**62], b""]]))),
    "scalar of no bytes": pack(Ext(0, pack(["numpy.scalar", ["<f8", b""]]))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes(name: str) -> None:
    with pytest.raises(Corrupt):
        decode(HOSTILE[name], extend_decode)


def test_huge_declared_lengths_allocate_nothing() -> None:
    code = (
        "import resource; from ckpt.codec import decode; from ckpt.errors import Corrupt\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "for head in (0xdd, 0xdf, 0xdb, 0xc6, 0xc9):\n"
        "    for size in (b'\\x07\\xff\\xff\\xff', b'\\xff\\xff\\xff\\xff'):\n"
        "        try: decode((bytes([head]) + size) * 50)\n"
        "        except Corrupt as error: assert 'Memory' not in repr(error.__cause__), error.__cause__\n"
        "        else: raise SystemExit(2)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(codec.__file__).parent.parent)


def test_extension_without_a_reader_is_corrupt() -> None:
    with pytest.raises(Corrupt, match=r"torch\.dtype"):
        decode(encode(torch.float32, extend_encode))


def test_unknown_dtype_names() -> None:
    with pytest.raises(Corrupt, match="nope"):
        dtype_from_name("nope")
    with pytest.raises(Incompatible, match="qint8"):
        dtype_name(torch.qint8)
