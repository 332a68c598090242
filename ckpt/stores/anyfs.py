"""Any fsspec file system of objects; `azure` and `gcs` build on it.

What each of them does beyond fsspec's interface differs, so little is used of it: whole objects are put at once, large
ones are written in the order of the file as fsspec does it. Whether `create` is exclusive is probed like everywhere:
fsspec's own looks first and writes then, which is not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar

import fsspec

from ckpt.errors import CkptError, NotFound, StorageError
from ckpt.store import AlreadyExists, OutcomeUnknown
from ckpt.stores.bucket import REQUEST_S, Busy, Found, Listing, Upload

PART_BYTES: Final = 16 << 20
_BUSY_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_CONNECTION = frozenset(
    # of the standard library, fsspec, aiohttp, and Azure's and Google's clients
    {"OSError", "TimeoutError", "FSTimeoutError", "ClientError", "ServiceRequestError", "ServiceResponseError",
     "IncompleteReadError", "TransportError"}
)  # fmt: skip
_EXISTS_STATUS = frozenset({409, 412})

T = TypeVar("T")


class FsspecBucket:
    """The container or bucket `name` of an fsspec file system, connected at the first request."""

    def __init__(self, protocol: str, name: str) -> None:
        self._protocol, self._name = protocol, name
        self._fs: Any = fsspec.filesystem(protocol, use_listings_cache=False)
        # Clients try again by themselves: within this time, after which theirs is cancelled and it is our turn.
        self._bounded = {"timeout": REQUEST_S} if self._fs.async_impl else {}

    @property
    def url(self) -> str:
        return f"{self._protocol}://{self._name}"

    def create(self, key: str, data: bytes) -> None:
        options = {"mode": "create", **self._bounded}
        self._run("create", key, lambda path: self._fs.pipe_file(path, data, **options), exclusive=True)

    def put(self, key: str, data: bytes) -> None:
        self._run("put", key, lambda path: self._fs.pipe_file(path, data, **self._bounded))

    def get(self, key: str, start: int, stop: int | None) -> bytes:
        size = self.size(key)  # what lies past the end is an error in some, and all of it in others
        end = size if stop is None else min(stop, size)
        if end <= start:
            return b""
        return bytes(self._run("get", key, lambda path: self._fs.cat_file(path, start=start, end=end, **self._bounded)))

    def size(self, key: str) -> int:
        found = self._run("look up", key, lambda path: self._fs.info(path, **self._bounded))
        if found["type"] != "file":
            raise NotFound(f"look up {self.url}/{key}: there is no such object")
        return int(found["size"])

    def list(self, prefix: str, *, deep: bool) -> Listing:
        parent, _, _ = prefix.rpartition("/")
        try:
            found = self._run("list", parent, lambda path: self._listed(path, deep))
        except NotFound:
            return []
        return sorted((each for each in found if each.key.startswith(prefix)), key=lambda each: each.key)

    def _listed(self, path: str, deep: bool) -> Listing:
        details = self._fs.ls(path, detail=True, **self._bounded)
        found = [self._found(each) for each in details if each["name"].strip("/") != path.strip("/")]
        if not deep:
            return found
        below = [self._listed(f"{self._name}/{each.key.rstrip('/')}", deep) for each in found if each.is_prefix]
        return [each for each in found if not each.is_prefix] + [each for group in below for each in group]

    def _found(self, detail: dict[str, Any]) -> Found:
        key = detail["name"].strip("/").removeprefix(f"{self._name}/")
        if detail["type"] == "directory":
            return Found(f"{key}/", is_prefix=True)
        times = [each for each in detail.values() if isinstance(each, datetime)]
        return Found(key, int(detail["size"] or 0), max((each.timestamp() for each in times), default=0.0))

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            try:
                self._run("delete", key, lambda path: self._fs.rm_file(path, **self._bounded))
            except NotFound:
                continue

    def upload(self, key: str, nbytes: int) -> tuple[Upload, int]:
        opened = self._run("begin upload of", key, lambda path: self._fs.open(path, "wb", block_size=PART_BYTES))
        return _Stream(self, key, opened), PART_BYTES

    def abort_uploads(self, prefix: str) -> None:
        """Azure forgets uncommitted parts by itself, after a week; what others do is not known."""

    def _run(self, operation: str, key: str, act: Callable[[str], T], exclusive: bool = False) -> T:
        what = f"{operation} {self.url}/{key}"
        try:
            return act(f"{self._name}/{key}".rstrip("/"))
        except CkptError:
            raise
        except Exception as error:
            raise _sorted(what, error, exclusive) from error


class _Stream:
    """A file that is written in order; a part that comes early waits for those before it."""

    def __init__(self, bucket: FsspecBucket, key: str, file: Any) -> None:
        self._bucket, self._key, self._file = bucket, key, file
        self._next, self._early = 0, dict[int, bytes]()
        self._lock, self._failed = threading.Lock(), False

    def part(self, index: int, data: bytes | bytearray) -> None:
        with self._lock:
            self._early[index] = bytes(data)
            while self._next in self._early and not self._failed:
                self._write(self._early.pop(self._next))
                self._next += 1

    def _write(self, data: bytes) -> None:
        try:
            self._bucket._run("send a part of", self._key, lambda _: self._file.write(data))
        except CkptError as error:
            self._failed = True  # what was sent of it is unknown: it cannot be sent again
            raise StorageError(str(error)) from error

    def complete(self) -> None:
        try:
            self._bucket._run("complete", self._key, lambda _: self._file.close())
        except Busy as error:
            raise StorageError(str(error)) from error

    def abort(self) -> None:
        with self._lock:
            self._failed = True
            if hasattr(self._file, "discard"):
                self._bucket._run("abort the upload of", self._key, lambda _: self._file.discard())
            self._file.closed = True  # nothing of it is sent when it is collected


def _sorted(what: str, error: Exception, exclusive: bool) -> StorageError | NotFound:
    causes = [error, error.__cause__]
    status = next((found for each in causes if isinstance(found := _status(each), int)), 0)
    if isinstance(error, FileExistsError) or (exclusive and status in _EXISTS_STATUS):
        return AlreadyExists(f"{what}: it already exists. Nothing was changed")
    if isinstance(error, FileNotFoundError) or status == 404:
        return NotFound(f"{what}: there is no such object")
    message = f"{what}: {type(error).__name__}: {error}"
    if 400 <= status < 500 and status not in _BUSY_STATUS:
        return StorageError(message)
    names = {kind.__name__ for each in causes for kind in type(each).__mro__}
    if status or (names & _CONNECTION and not isinstance(error, PermissionError)):
        return OutcomeUnknown(message) if exclusive else Busy(message)
    return StorageError(message)


def _status(error: BaseException | None) -> int | None:
    found = [str(getattr(error, name, "")) for name in ("status_code", "status", "code")]
    return next((int(each) for each in found if each.isdigit()), None)
