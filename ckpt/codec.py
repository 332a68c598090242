"""Values to bytes and back, exactly in type. Owns the wire form of values; knows neither torch, numpy nor files.

The wire form is MessagePack, one value, nothing before or after it. It never changes; new kinds take new codes.

    native    nil  true/false  int (-2**63 .. 2**64-1)  float 64  str (UTF-8)  bin
              array   a list
              map     a dict whose keys are all str, in the dict's order

    every other kind is Ext(code, payload); the payload of every Ext is again one MessagePack value of this form:

    code  type         payload
    0     extension    [tag str, value]             what it means is up to the tag, see ckpt.adapt.values
    1     int          bin                          beyond the native range: two's complement, big-endian
    2     str          bin                          with lone surrogates: UTF-8, each surrogate as three bytes
    3     complex      [real float, imaginary float]
    4     bytearray    bin
    5     tuple        [item, ...]
    6     set          [item, ...]                  ascending by the bytes of the encoded item
    7     frozenset    [item, ...]                  likewise
    8     dict         [[key, value], ...]          with any key that is not a native str; in the dict's order
    9     OrderedDict  [[key, value], ...]
    10    Counter      [[key, value], ...]
    11    defaultdict  [factory, [[key, value], ...]]   factory: nil or a str of int float list dict set str bool tuple
    12    deque        [maxlen or nil, [item, ...]]
    13    range        [start int, stop int, step int]
    14    slice        [start, stop, step]

Values nest at most 100 deep: a list, a dict or an Ext opens one level, the arrays and pairs inside a payload do not.
A writer uses the shortest MessagePack form of each number and length. Equal values written in the same order give equal
bytes on every rank. Shared references are written out at each place; cycles are refused.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import msgspec

from ckpt.errors import CkptError, Corrupt, Incompatible

MAX_DEPTH = 100

ExtendEncode = Callable[[object], tuple[str, object] | None]
ExtendDecode = Callable[[str, object], object]

_EXTENSION, _BIG_INT, _SURROGATE_STR, _DICT = 0, 1, 2, 8
_SURROGATE = re.compile("[\ud800-\udfff]")
_FACTORIES: dict[str, type] = {t.__name__: t for t in (int, float, list, dict, set, str, bool, tuple)}
COLLISIONS_LIMIT = 1000  # keys of one table with the hash of another one
_NATIVE_SCALARS = frozenset({type(None), bool, int, float, str, bytes})

_pack = msgspec.msgpack.Encoder().encode


def encode(value: object, extend: ExtendEncode | None = None) -> bytes:
    """The bytes of `value`.

    `extend` is asked about every object whose type is not exactly one of the codec's: it returns (tag, payload) with an
    encodable payload, or None. Raises Incompatible, naming the place inside the value, for an object that cannot be
    stored, a cycle, or nesting beyond MAX_DEPTH.
    """
    writer = _Writer(extend)
    try:
        return _pack(writer.tree(value))
    except (RecursionError, ValueError, OverflowError) as error:
        raise Incompatible(f"cannot store {writer.where()}: {error}") from error


def decode(data: bytes, extend: ExtendDecode | None = None) -> object:
    """The value whose bytes are `data`, in fresh objects.

    `extend` gets (tag, payload) of every extension. Raises Corrupt if `data` is not exactly one value of this form, or
    holds an extension and there is no `extend`. Runs no code named by
    `data`; memory is linear in its length. A CkptError that `extend` raises passes through.
    """
    try:
        return _Reader(extend).value(_parse(data), 0)
    except CkptError:
        raise
    except (TypeError, ValueError, OverflowError, RecursionError, MemoryError, msgspec.MsgspecError) as error:
        raise Corrupt(f"stored value is not valid: {error}") from error


class _Writer:
    """Turns a value into what msgspec packs as is; remembers where it stands for the error message."""

    def __init__(self, extend: ExtendEncode | None) -> None:
        self.extend = extend
        self.path: list[tuple[str, object]] = []
        self.above: set[int] = set()

    def where(self) -> str:
        return "value" + "".join(template.format(reprlib.repr(key)) for template, key in self.path)

    def tree(self, value: object) -> object:
        scalar = _SCALARS.get(type(value))
        if scalar is not None:
            return scalar(value)
        if id(value) in self.above:
            self.refuse(value, "it contains itself; break the cycle")
        if len(self.above) >= MAX_DEPTH:
            self.refuse(value, f"it lies more than {MAX_DEPTH} levels deep; flatten the value")
        self.above.add(id(value))
        result = self._container(value)
        self.above.remove(id(value))
        return result

    def _container(self, value: object) -> object:
        kind = _BY_TYPE.get(type(value))
        if kind is not None:
            return _ext(kind.code, kind.write(self, value))
        if type(value) is list:
            return self.items(value)
        if type(value) is dict:
            return self._dict(value)
        return _ext(_EXTENSION, self._extension(value))

    def _dict(self, value: dict[object, object]) -> object:
        if all(type(key) is str and not _SURROGATE.search(key) for key in value):
            return {key: self.child("[{}]", key, item) for key, item in value.items()}
        return _ext(_DICT, self.pairs(value))

    def _extension(self, value: object) -> object:
        try:
            extension = self.extend(value) if self.extend else None
        except Incompatible as error:
            self.refuse(value, str(error))
        if extension is None:
            self.refuse(value, "wrap it in an object with state_dict() and load_state_dict(), or leave it out")
        tag, payload = extension
        return [tag, self.child(f".<{tag}>", None, payload)]

    def child(self, template: str, key: object, value: object) -> object:
        self.path.append((template, key))
        result = self.tree(value)
        self.path.pop()
        return result

    def items(self, values: Iterable[object]) -> list[object]:
        return [self.child("[{}]", index, item) for index, item in enumerate(values)]

    def members(self, values: Iterable[object]) -> list[object]:
        return [msgspec.Raw(item) for item in sorted(_pack(self.child(".member", None, item)) for item in values)]

    def pairs(self, values: Mapping[Any, object]) -> list[object]:
        return [[self.child(".key", None, key), self.child("[{}]", key, item)] for key, item in values.items()]

    def refuse(self, value: object, reason: str) -> NoReturn:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise Incompatible(f"cannot store {self.where()} of type {kind}: {reason}")


class _Tagged(NamedTuple):
    """An Ext as parsed. A tuple, which MessagePack arrays never become here, so it is not mistaken for a value."""

    code: int
    payload: memoryview


_parse = msgspec.msgpack.Decoder(ext_hook=_Tagged).decode


class _Reader:
    """Turns what msgspec parsed into the value it stands for, checking every shape on the way."""

    def __init__(self, extend: ExtendDecode | None) -> None:
        self.extend = extend

    def value(self, tree: object, depth: int) -> object:
        kind = type(tree)
        if kind in _NATIVE_SCALARS:
            return tree
        if depth > MAX_DEPTH:
            raise Corrupt(f"stored value nests deeper than {MAX_DEPTH} levels")
        if isinstance(tree, _Tagged):
            return self._tagged(tree, depth)
        if isinstance(tree, list):
            return self.items(tree, depth)
        if isinstance(tree, dict):
            return {_text(key): self.value(item, depth + 1) for key, item in tree.items()}
        raise Corrupt(f"stored value holds a MessagePack {kind.__name__}, which this format does not use")

    def _tagged(self, tree: _Tagged, depth: int) -> object:
        if tree.code == _EXTENSION:
            return self._extension(_parse(tree.payload), depth)
        read = _READ.get(tree.code)
        if read is None:
            raise Corrupt(f"stored value holds Ext code {tree.code}; known are 0 to {max(_READ)}")
        return read(self, _parse(tree.payload), depth)

    def _extension(self, body: object, depth: int) -> object:
        tag, payload = _array(body, 2)
        if self.extend is None:
            raise Corrupt(f"stored value holds extension {tag!r:.80}, and no reader for extensions was given")
        return self.extend(_text(tag), self.value(payload, depth + 1))

    def items(self, body: object, depth: int) -> list[object]:
        return [self.value(item, depth + 1) for item in _array(body)]

    def distinct(self, body: object, depth: int) -> set[object]:
        items = self.items(body, depth)
        _spread(items)
        result = set(items)
        if len(result) != len(items):
            raise Corrupt("stored set repeats an item")
        return result

    def dict(self, body: object, depth: int) -> dict[object, object]:
        pairs = [_array(pair, 2) for pair in _array(body)]
        keys = [self.value(key, depth + 1) for key, _ in pairs]
        _spread(keys)
        result = {key: self.value(item, depth + 1) for key, (_, item) in zip(keys, pairs, strict=True)}
        if len(result) != len(pairs):
            raise Corrupt("stored dict repeats a key")
        return result


def _spread(keys: list[object]) -> None:
    """Refuse keys that were chosen to have few hashes: the time to put them in a table grows with their square."""
    if len(keys) > COLLISIONS_LIMIT and len(keys) - len(set(map(hash, keys))) > COLLISIONS_LIMIT:
        raise Corrupt(f"stored value has {len(keys)} keys, most of which have the same hashes")


def _expect(body: object, kind: type) -> Any:
    if type(body) is not kind:
        raise Corrupt(f"stored value holds {type(body).__name__} where {kind.__name__} was expected")
    return body


def _array(body: object, length: int | None = None) -> list[object]:
    items: list[object] = _expect(body, list)
    if length is not None and len(items) != length:
        raise Corrupt(f"stored value holds an array of {len(items)} items where {length} were expected")
    return items


def _text(body: object) -> str:
    text: str = _expect(body, str)
    return text


def _ext(code: int, body: object) -> object:
    return msgspec.msgpack.Ext(code, _pack(body))


def _same(value: object) -> object:
    return value


def _write_int(value: int) -> object:
    if -(2**63) <= value < 2**64:
        return value
    return _ext(_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def _write_str(value: str) -> object:
    if _SURROGATE.search(value):
        return _ext(_SURROGATE_STR, value.encode("utf-8", "surrogatepass"))
    return value


def _write_defaultdict(writer: _Writer, value: defaultdict[object, object]) -> object:
    factory = value.default_factory
    name = getattr(factory, "__name__", None)
    if factory is not None and (type(name) is not str or _FACTORIES.get(name) is not factory):
        writer.refuse(value, f"its default_factory must be None or one of {', '.join(_FACTORIES)}")
    return [name, writer.pairs(value)]


def _read_int(reader: _Reader, body: object, depth: int) -> int:
    return int.from_bytes(_expect(body, bytes), "big", signed=True)


def _read_str(reader: _Reader, body: object, depth: int) -> str:
    data: bytes = _expect(body, bytes)
    return data.decode("utf-8", "surrogatepass")


def _read_complex(reader: _Reader, body: object, depth: int) -> complex:
    real, imag = (_expect(part, float) for part in _array(body, 2))
    return complex(real, imag)


def _read_defaultdict(reader: _Reader, body: object, depth: int) -> defaultdict[object, object]:
    name, pairs = _array(body, 2)
    if name is not None and _text(name) not in _FACTORIES:
        raise Corrupt(f"stored defaultdict names the factory {name!r:.80}; known are {', '.join(_FACTORIES)}")
    return defaultdict(None if name is None else _FACTORIES[_text(name)], reader.dict(pairs, depth))


def _read_deque(reader: _Reader, body: object, depth: int) -> deque[object]:
    maxlen, items = _array(body, 2)
    limit: int | None = None if maxlen is None else _expect(maxlen, int)
    if limit is not None and limit < len(_array(items)):
        raise Corrupt(f"stored deque of maxlen {limit} holds {len(_array(items))} items")
    return deque(reader.items(items, depth), limit)


def _read_range(reader: _Reader, body: object, depth: int) -> range:
    start, stop, step = (_expect(reader.value(part, depth + 1), int) for part in _array(body, 3))
    return range(start, stop, step)


def _read_slice(reader: _Reader, body: object, depth: int) -> slice:
    start, stop, step = (reader.value(part, depth + 1) for part in _array(body, 3))
    return slice(start, stop, step)


@dataclass(frozen=True)
class _Kind:
    """One row of the table of Ext codes: `write` gives the payload of a value, `read` the value of a payload."""

    code: int
    type: type
    write: Callable[[_Writer, Any], object]
    read: Callable[[_Reader, Any, int], object]


_KINDS = (
    _Kind(3, complex, lambda w, v: [v.real, v.imag], _read_complex),
    _Kind(4, bytearray, lambda w, v: bytes(v), lambda r, b, d: bytearray(_expect(b, bytes))),
    _Kind(5, tuple, _Writer.items, lambda r, b, d: tuple(r.items(b, d))),
    _Kind(6, set, _Writer.members, _Reader.distinct),
    _Kind(7, frozenset, _Writer.members, lambda r, b, d: frozenset(r.distinct(b, d))),
    _Kind(9, OrderedDict, _Writer.pairs, lambda r, b, d: OrderedDict(r.dict(b, d))),
    _Kind(10, Counter, _Writer.pairs, lambda r, b, d: Counter(r.dict(b, d))),
    _Kind(11, defaultdict, _write_defaultdict, _read_defaultdict),
    _Kind(12, deque, lambda w, v: [v.maxlen, w.items(v)], _read_deque),
    _Kind(13, range, lambda w, v: w.items((v.start, v.stop, v.step)), _read_range),
    _Kind(14, slice, lambda w, v: w.items((v.start, v.stop, v.step)), _read_slice),
)

_BY_TYPE: dict[type, _Kind] = {kind.type: kind for kind in _KINDS}
_READ: dict[int, Callable[[_Reader, Any, int], object]] = {
    _BIG_INT: _read_int,
    _SURROGATE_STR: _read_str,
    _DICT: _Reader.dict,
    **{kind.code: kind.read for kind in _KINDS},
}
_SCALARS: dict[type, Callable[[Any], object]] = {
    **dict.fromkeys(_NATIVE_SCALARS, _same),
    int: _write_int,
    str: _write_str,
}
