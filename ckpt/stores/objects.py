"""A store in a bucket: S3 and what speaks like it, GCS, Azure, or any other fsspec file system.

Objects have no directories, no links and no rename. What makes one durable is the answer to its put; a record is one
put that refuses to replace anything, and the log rests on that alone, so it is probed before the first write. Large
files go up in parts, several at a time, each sent again if need be; one appears when it is complete, or never.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Final

from ckpt.errors import CkptError, Corrupt, NotFound, StorageError
from ckpt.store import (
    AlreadyExists,
    Capabilities,
    DataWriter,
    Names,
    OutcomeUnknown,
    Usage,
    check_path,
    is_component,
)
from ckpt.stores.bucket import Bucket, Upload

PROBE: Final = "probe-"


class ObjectStore:
    """The objects below `prefix` of a bucket. Several processes and threads may use one place at the same time."""

    def __init__(self, bucket: Bucket, prefix: str = "") -> None:
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._capabilities: Capabilities | None = None

    @property
    def url(self) -> str:
        return f"{self._bucket.url}/{self._prefix}".rstrip("/")

    @property
    def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            self._capabilities = Capabilities(exclusive_create=self._probe(), atomic_create=True)
        return self._capabilities

    def _probe(self) -> bool:
        """Whether a second create of one name is refused. That one of several at once wins is left to `ckpt doctor`."""
        path = f"{PROBE}{secrets.token_hex(8)}"
        try:
            for expected in (True, False):
                try:
                    self.create(path, b"")
                except AlreadyExists:
                    if not expected:
                        return True
                except OutcomeUnknown as error:
                    raise StorageError(f"could not find out what {self.url} can do: {error}") from error
            return False
        finally:
            self.delete(path)

    def create(self, path: str, data: bytes) -> None:
        self._bucket.create(self._key(path), data)

    def put(self, path: str, data: bytes) -> None:
        self._bucket.put(self._key(path), data)

    def read(self, path: str, offset: int = 0, nbytes: int | None = None, *, limit_bytes: int) -> bytes:
        where = f"read {self.url}/{path}"
        if nbytes is not None and nbytes > limit_bytes:
            raise Corrupt(f"{where}: {nbytes} bytes where at most {limit_bytes} are expected")
        wanted = limit_bytes + 1 if nbytes is None else nbytes  # one more than allowed tells that there is more
        data = self._bucket.get(self._key(path), offset, offset + wanted) if wanted else b""
        if nbytes is None and len(data) > limit_bytes:
            raise Corrupt(f"{where}: more bytes than expected, where at most {limit_bytes} are")
        if nbytes is not None and len(data) != nbytes:
            raise Corrupt(f"{where}: cut off; {nbytes} bytes from offset {offset} expected, got {len(data)}")
        return data

    def size(self, path: str) -> int:
        return self._bucket.size(self._key(path))

    def list(self, directory: str) -> Names:
        """As every store's; a directory without a file does not exist here."""
        prefix = self._below(directory)
        found = [each.key.removeprefix(prefix).rstrip("/") for each in self._bucket.list(prefix, deep=False)]
        if not found:
            raise NotFound(f"list {self.url}/{directory}: there is nothing below it")
        return sorted(name for name in found if is_component(name) and not name.startswith(PROBE))

    def exists(self, path: str) -> bool:
        key = self._prefix + "/".join(check_path(path, root_allowed=True))
        found = self._bucket.list(key.rstrip("/"), deep=False)
        return any(each.key.rstrip("/") == key.rstrip("/") for each in found)

    def delete(self, path: str) -> None:
        key = self._key(path)
        self._bucket.abort_uploads(f"{key}/")
        keys = [each.key for each in self._bucket.list(f"{key}/", deep=True)]
        self._remove(f"{key}/", [*keys, key])

    def make_directory(self, path: str) -> None:
        check_path(path, root_allowed=True)  # there are none: a file brings its own

    def sync_directory(self, path: str) -> None:
        check_path(path, root_allowed=True)  # what was answered is durable

    def write_data(self, path: str, nbytes: int) -> DataWriter:
        upload, part_bytes = self._bucket.upload(self._key(path), nbytes)
        return PartWriter(upload, nbytes, part_bytes)

    def usage(self, directory: str) -> Usage:
        found = self._bucket.list(self._below(directory), deep=False)
        if not found:
            raise NotFound(f"look into {self.url}/{directory}: there is nothing below it")
        return Usage(sum(each.nbytes for each in found), max(each.unix_s for each in found))

    def clear(self, directory: str, ours: Callable[[str], bool]) -> Names:
        prefix = f"{self._key(directory)}/"
        self._bucket.abort_uploads(prefix)
        names = [each.key.removeprefix(prefix) for each in self._bucket.list(prefix, deep=True)]
        self._remove(prefix, [prefix + name for name in names if ours(name)])
        return sorted(name for name in names if not ours(name))

    def _remove(self, prefix: str, keys: Sequence[str]) -> None:
        """Delete `keys`, the MANIFEST below `prefix` first."""
        manifest = f"{prefix}MANIFEST"
        if manifest in keys:
            self._bucket.delete([manifest])
        self._bucket.delete([key for key in keys if key != manifest])

    def local_path(self, path: str) -> str | None:
        check_path(path, root_allowed=True)
        return None

    def _key(self, path: str) -> str:
        return self._prefix + "/".join(check_path(path))

    def _below(self, directory: str) -> str:
        components = check_path(directory, root_allowed=True)
        return self._prefix + "".join(f"{component}/" for component in components)


class PartWriter:
    """Collects what is written into parts and sends each, in the thread that completes it, once it is full.

    Written in about the order of the file by a few threads, it holds a part or two for each of them.
    """

    in_order = True

    def __init__(self, upload: Upload, nbytes: int, part_bytes: int) -> None:
        self._upload, self._nbytes, self._part_bytes = upload, nbytes, part_bytes
        self._open: dict[int, bytearray] = {}
        self._missing: dict[int, int] = {}
        self._spare: list[bytearray] = []  # memory that was touched before
        self._lock = threading.Lock()

    def write(self, at: int, memory: memoryview) -> None:
        done = 0
        while done < len(memory):
            index, first = divmod(at + done, self._part_bytes)
            nbytes = min(self._part_bytes - first, len(memory) - done)
            with self._lock:
                if index not in self._open:
                    size = min(self._part_bytes, self._nbytes - index * self._part_bytes)
                    again = self._spare and size == self._part_bytes
                    self._open[index] = self._spare.pop() if again else bytearray(size)
                    self._missing[index] = size
                part = self._open[index]
            part[first : first + nbytes] = memory[done : done + nbytes]
            with self._lock:
                self._missing[index] -= nbytes
                full = self._missing[index] == 0
                if full:
                    del self._open[index], self._missing[index]
            if full:
                self._upload.part(index, part)
                if len(part) == self._part_bytes:
                    with self._lock:
                        self._spare.append(part)
            done += nbytes

    def finish(self, nbytes: int | None = None) -> None:
        last = self._shortened(nbytes) if nbytes is not None else None
        if self._open:
            raise StorageError(f"parts {sorted(self._open)[:8]} of a data file were not written whole")
        try:
            if last is not None:
                self._upload.part(*last)
            self._upload.complete()
        except BaseException:
            self.abandon()
            raise

    def _shortened(self, nbytes: int) -> tuple[int, bytearray] | None:
        """The last part, where the file ends in the middle of what was announced for it."""
        index, size = divmod(nbytes, self._part_bytes)
        part, missing = self._open.get(index), self._missing.get(index, 0)
        if part is None or len(part) - missing != size:
            return None
        del self._open[index], self._missing[index], part[size:]
        return index, part

    def abandon(self) -> None:
        try:
            self._upload.abort()
        except CkptError:
            return  # `delete` of the attempt has it aborted later
