"""What the ranks must agree on, and how they tell each other that one of them failed.

One 16-byte all-reduce (the largest value of each byte) carries a Signal. A field and its complement travel
together, so that ranks which differ see it: the two maxima then no longer add up.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import xxhash

from ckpt import errors
from ckpt.errors import CkptError, Incompatible
from ckpt.ranks import Ranks

T = TypeVar("T")
_WIRE = struct.Struct(">????II?3x")  # flags, step, its complement, a flag
_ALL_ONES = 0xFFFFFFFF


@dataclass(frozen=True)
class Signal:
    """What one rank says, or what all together said: a flag is set if any rank set it."""

    step: int
    failed: bool = False
    layout_changed: bool = False
    due: bool = False
    stop: bool = False
    busy: bool = False

    def encode(self) -> bytes:
        flags, step = (self.failed, self.layout_changed, self.due, self.stop), self.step & _ALL_ONES
        return _WIRE.pack(*flags, step, step ^ _ALL_ONES, self.busy)  # in every step: one call

    @staticmethod
    def any_failed(data: bytes) -> bool:
        """Whether any rank set `failed`, at whatever step each of them is."""
        return bool(data[0])

    @classmethod
    def decode(cls, data: bytes, step: int) -> Signal:
        """The merged signal; `CkptError` if the ranks were not at one step."""
        failed, layout_changed, due, stop, low, complement, busy = _WIRE.unpack(data)
        if low ^ complement != _ALL_ONES:
            raise Incompatible(
                f"the ranks are not at the same step: this one is at {step}, another at step "
                f"{low} or so. Call save, restore and steps on every rank alike."
            )
        return cls(step, failed, layout_changed, due, stop, busy)


def disagreements(ranks: Ranks, digests: Sequence[bytes | None]) -> list[int]:
    """Indices at which ranks brought different digests (8 bytes each; None: this rank has none to compare)."""
    if not digests:
        return []
    merged = ranks.maximum(b"".join(word(d) if d is not None else bytes(16) for d in digests))
    words = [merged[at : at + 16] for at in range(0, len(merged), 16)]
    return [i for i, found in enumerate(words) if any(found) and not is_one(found)]


def word(digest: bytes) -> bytes:
    """8 bytes as they travel through `Ranks.maximum`: with their complement, for `is_one`."""
    return digest + bytes(255 - b for b in digest)


def is_one(merged: bytes) -> bool:
    """Whether every rank brought the word of the same 8 bytes."""
    return all(a + b == 255 for a, b in zip(merged[:8], merged[8:], strict=True))


def require_equal(ranks: Ranks, what: str, value: object) -> None:
    """`Incompatible` on every rank unless all brought an equal `value` (compared by its repr)."""
    if disagreements(ranks, [digest8(f"{what} {value!r}".encode())]):
        raise Incompatible(f"the ranks call {what} differently; this one with {value!r}. Call it on every rank alike.")


def digest8(data: bytes | memoryview) -> bytes:
    return xxhash.xxh3_64_digest(data)


class _Failure(msgspec.Struct):
    kind: str
    message: str


def together(ranks: Ranks, act: Callable[[], T]) -> T:
    """Run `act` on every rank; if it raises on any, raise on all: one's own error, or the failed ranks named."""
    result: T | None = None
    failure: BaseException | None = None
    try:
        result = act()
    except BaseException as error:
        failure = error
    raise_together(ranks, failure)
    return result  # type: ignore[return-value]


def raise_together(ranks: Ranks, failure: BaseException | None, otherwise: type[CkptError] = CkptError) -> None:
    """Raise on every rank if any rank brings a failure: one kind of error, that of the lowest rank that failed.

    On the other ranks an error that is none of ours becomes `otherwise`.
    """
    if ranks.maximum(bytes([failure is not None])) == b"\x00":
        return
    said = [_decode(data) for data in ranks.gather(_encode(failure) if failure else b"")]
    failed = [rank for rank, found in enumerate(said) if found]
    first = said[failed[0]]
    assert first is not None
    if failure is not None and (type(failure).__name__ == first.kind or not isinstance(failure, Exception)):
        raise failure
    others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
    raise _error(first.kind, f"rank {failed[0]}{others}: {first.message}", otherwise) from failure


def on_first(ranks: Ranks, act: Callable[[], bytes]) -> bytes:
    """Run `act` on rank 0 and give its result to all; if it raises there, every rank raises the same."""
    if ranks.rank:
        answer = ranks.share(b"")
        if answer[:1] == b"E":
            failure = msgspec.msgpack.decode(answer[1:], type=_Failure)
            raise _error(failure.kind, failure.message)
        return answer[1:]
    try:
        result = act()
    except Exception as error:
        ranks.share(b"E" + _encode(error))
        raise
    ranks.share(b"R" + result)
    return result


def _encode(error: BaseException) -> bytes:
    return msgspec.msgpack.encode(_Failure(type(error).__name__, str(error) or repr(error)))


def _decode(data: bytes) -> _Failure | None:
    return msgspec.msgpack.decode(data, type=_Failure) if data else None


def _error(kind: str, message: str, otherwise: type[CkptError] = CkptError) -> CkptError:
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, CkptError):
        return known(message)
    return otherwise(f"{kind}: {message}")
