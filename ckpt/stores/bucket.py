"""What an object store answers to single requests, in one form for all of them; and how often it is asked.

`Bucket` is the interface: plain requests under full keys, no directories, no protocol. `Retried` wraps one and asks
again where that is safe. Errors are sorted here, once, by what the caller can do about them:

    NotFound         there is no such object
    AlreadyExists    an exclusive put found one
    Busy             the store refused or did not answer (429, 500, 503, time-out, reset, DNS): asking again may help
    OutcomeUnknown   an exclusive put that was not answered clearly: read back what stands there
    StorageError     anything else: asking again will not help
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, TypeVar

import tenacity

from ckpt.errors import StorageError

log = logging.getLogger("ckpt")

REQUEST_S: Final = 60.0  # one request, from connecting to the last byte of the answer
RETRY_S: Final = 120.0  # all tries of one operation
WAIT_S: Final = 10.0  # at most between two tries

T = TypeVar("T")


class Busy(StorageError):
    """The store did not do it, or did not say; the same request may succeed later."""


@dataclass(frozen=True)
class Found:
    """An object that was listed; `is_prefix`: a common prefix of several, of no size."""

    key: str
    nbytes: int = 0
    unix_s: float = 0.0
    is_prefix: bool = False


Listing: TypeAlias = list[Found]


class Upload(Protocol):
    """An object that is sent in parts of `part_bytes`, the last one shorter; it appears when it is complete."""

    def part(self, index: int, data: bytes | bytearray) -> None:
        """Send part `index`, counted from 0; `data` is not needed afterwards. Idempotent; from any thread."""

    def complete(self) -> None:
        """Make the object of the parts. After an unclear answer it may be there: see `Bucket.size`."""

    def abort(self) -> None:
        """Have the store forget the parts."""


class Bucket(Protocol):
    """The requests. Every method raises the errors above; each is idempotent but for `create`."""

    @property
    def url(self) -> str:
        """What a person would type to name the place."""

    def create(self, key: str, data: bytes) -> None:
        """Put `data` under `key` unless there is something, as far as the store can."""

    def put(self, key: str, data: bytes) -> None: ...

    def get(self, key: str, start: int, stop: int | None) -> bytes:
        """Bytes [start, stop) of an object, fewer where it ends."""

    def size(self, key: str) -> int: ...

    def list(self, prefix: str, *, deep: bool) -> Listing:
        """The objects whose key starts with `prefix`, up to the next "/" unless `deep`, as of now; by key."""

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; those that are not there are no error."""

    def upload(self, key: str, nbytes: int) -> tuple[Upload, int]:
        """Begin to send an object in parts; also how many bytes each of them has."""

    def abort_uploads(self, prefix: str) -> None:
        """Have the store forget all parts of uploads below `prefix` that nobody completed."""


def asked_again(operation: str, key: str, act: Callable[[], T], retry_s: float = RETRY_S) -> T:
    """What `act` returns, tried again while the store is busy, with growing random waits, for `retry_s` in all.

    Only for what is idempotent. The error at the end names operation, key, tries and the last cause.
    """
    began = time.monotonic()
    asking = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Busy),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=WAIT_S),
        stop=tenacity.stop_before_delay(retry_s),
        before_sleep=lambda state: log.info("%s %s: %s; again in %.1f s", operation, key, _cause(state), _next(state)),
        reraise=True,
    )
    try:
        return asking(act)
    except Busy as error:
        seconds, tries = time.monotonic() - began, asking.statistics.get("attempt_number", 1)
        raise StorageError(
            f"{operation} {key}: gave up after {tries} tries in {seconds:.0f} s, the last one failed with: {error}. "
            "Every committed step is as it was; try again when the store answers"
        ) from error


def _cause(state: tenacity.RetryCallState) -> object:
    return state.outcome.exception() if state.outcome else None


def _next(state: tenacity.RetryCallState) -> float:
    return state.next_action.sleep if state.next_action else 0.0


class Retried:
    """A bucket whose idempotent requests are tried again while it is busy. `create` never is."""

    def __init__(self, bucket: Bucket, retry_s: float = RETRY_S) -> None:
        self._bucket, self._retry_s = bucket, retry_s

    @property
    def url(self) -> str:
        return self._bucket.url

    def _again(self, operation: str, key: str, act: Callable[[], T]) -> T:
        return asked_again(operation, f"{self.url}/{key}", act, self._retry_s)

    def create(self, key: str, data: bytes) -> None:
        self._bucket.create(key, data)

    def put(self, key: str, data: bytes) -> None:
        self._again("put", key, lambda: self._bucket.put(key, data))

    def get(self, key: str, start: int, stop: int | None) -> bytes:
        return self._again("get", key, lambda: self._bucket.get(key, start, stop))

    def size(self, key: str) -> int:
        return self._again("look up", key, lambda: self._bucket.size(key))

    def list(self, prefix: str, *, deep: bool) -> Listing:
        return self._again("list", prefix, lambda: self._bucket.list(prefix, deep=deep))

    def delete(self, keys: Sequence[str]) -> None:
        self._again("delete", keys[0] if keys else "", lambda: self._bucket.delete(keys))

    def upload(self, key: str, nbytes: int) -> tuple[Upload, int]:
        upload, part_bytes = self._again("begin upload of", key, lambda: self._bucket.upload(key, nbytes))
        return _RetriedUpload(self, key, upload), part_bytes

    def abort_uploads(self, prefix: str) -> None:
        self._again("abort uploads below", prefix, lambda: self._bucket.abort_uploads(prefix))


class _RetriedUpload:
    """Parts are sent again as they are; a completion whose answer was lost is recognised by what stands there."""

    def __init__(self, bucket: Retried, key: str, upload: Upload) -> None:
        self._bucket, self._key, self._upload = bucket, key, upload
        self._sent: dict[int, int] = {}  # bytes of each part

    def part(self, index: int, data: bytes | bytearray) -> None:
        self._bucket._again(f"send part {index} of", self._key, lambda: self._upload.part(index, data))
        self._sent[index] = len(data)

    def complete(self) -> None:
        asked: list[bool] = []

        def act() -> None:
            if asked and self._is_there():
                return
            asked.append(True)
            self._upload.complete()

        self._bucket._again("complete", self._key, act)

    def _is_there(self) -> bool:
        """The name is our own and was empty before, so an object of this size is what was completed."""
        found = self._bucket.list(self._key, deep=True)
        return any(each.key == self._key and each.nbytes == sum(self._sent.values()) for each in found)

    def abort(self) -> None:
        self._bucket._again("abort the upload of", self._key, self._upload.abort)


def parts_of(nbytes: int, least_bytes: int, most_parts: int) -> int:
    """Bytes of each part so that there are at most `most_parts`: `least_bytes`, or more in whole MiB."""
    needed = -(-nbytes // most_parts)
    return max(least_bytes, -(-needed // (1 << 20)) << 20)
