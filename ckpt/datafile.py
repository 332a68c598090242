"""A data file of a step, open for reading: a file of this machine, or what a store answers to requests."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Protocol

from ckpt import direct
from ckpt.errors import Corrupt, NotFound, StorageError
from ckpt.manifest import BLOCK_BYTES
from ckpt.plan import ALIGN_BYTES
from ckpt.store import Store

STEP_BYTES = 8 * BLOCK_BYTES  # read, then verified while in the cache; smaller steps wait for the interpreter


class DataFile(Protocol):
    """Bytes that are read by range, from any thread. Every read raises Corrupt where the file ends too early."""

    @property
    def name(self) -> str:
        """What a person would call it."""

    @property
    def step_bytes(self) -> int | None:
        """Bytes of one read at most, so that they are still in the CPU's cache when they are verified; None: any."""

    def size(self) -> int: ...

    def read(self, at: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `at` on."""

    def read_cold(self, at: int, nbytes: int, buffer: memoryview) -> int:
        """Bring bytes [at, at + nbytes) into the page-aligned `buffer`, past the page cache; returns where they start.

        `buffer` has room for the whole pages around them.
        """

    def cached(self, at: int, nbytes: int) -> bool | None:
        """Whether ordinary reads of this range need not wait for a disk; None where that cannot be told."""

    def announce(self, at: int, nbytes: int) -> None:
        """This range will be read soon."""

    def close(self) -> None: ...


def open_data(store: Store, path: str) -> DataFile:
    """The data file at `path` of `store`. Raises Corrupt if it is missing, StorageError if it cannot be opened."""
    local = store.local_path(path)
    return LocalFile(local) if local is not None else StoreFile(store, path)


class LocalFile:
    """A file of this machine, open for ordinary reads, and for direct ones once there is one."""

    step_bytes = STEP_BYTES

    def __init__(self, path: str) -> None:
        self.name = path
        self._lock = threading.Lock()
        self.fd = self._open(lambda: direct.open_read(path))
        self._cold_fd: int | None = None

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def read(self, at: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            got = self._preadv(self.fd, into[done:], at + done)
            if got == 0:
                raise self._too_short(at + done, at + len(into))
            done += got

    def read_cold(self, at: int, nbytes: int, buffer: memoryview) -> int:
        first = at % ALIGN_BYTES
        low, needed = at - first, first + nbytes
        pages, done = buffer[: -(-needed // ALIGN_BYTES) * ALIGN_BYTES], 0
        while done < needed:
            try:
                got = self._preadv(self._cold(), pages[done:], low + done)
            except StorageError as error:
                if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EINVAL:
                    raise
                self.read(at, pages[first:needed])  # larger blocks than ours, or no direct I/O after all
                return first
            reached = done + got
            if reached < needed and reached // ALIGN_BYTES * ALIGN_BYTES <= done:
                raise self._too_short(low + reached, at + nbytes)
            done = reached if reached >= needed else reached - reached % ALIGN_BYTES
        return first

    def cached(self, at: int, nbytes: int) -> bool | None:
        return direct.is_cached(self.fd, at, nbytes)

    def announce(self, at: int, nbytes: int) -> None:
        os.posix_fadvise(self.fd, at, nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        os.close(self.fd)
        if self._cold_fd is not None:
            os.close(self._cold_fd)

    def _cold(self) -> int:
        with self._lock:
            if self._cold_fd is None:
                self._cold_fd = self._open(lambda: direct.open_cold(self.name))
            return self._cold_fd

    def _open(self, act: Callable[[], int]) -> int:
        try:
            return act()
        except FileNotFoundError:
            raise Corrupt(f"{self.name}: this data file of a committed step is missing") from None
        except OSError as error:
            raise StorageError(f"open {self.name}: {error.strerror}") from error

    def _preadv(self, fd: int, into: memoryview, at: int) -> int:
        try:
            return os.preadv(fd, [into], at)
        except OSError as error:
            what = f"read {self.name} at byte {at}: {error.strerror}"
            raise (Corrupt if error.errno == errno.EIO else StorageError)(what) from error

    def _too_short(self, end: int, needed: int) -> Corrupt:
        end = min(end, os.fstat(self.fd).st_size)
        return Corrupt(f"{self.name}: ends at byte {end}, its manifest says it has {needed} or more")


class StoreFile:
    """A file of a store without a file system: each read is a request."""

    step_bytes = None

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path
        self.name = f"{store.url}/{path}"

    def size(self) -> int:
        return self._store.size(self._path)

    def read(self, at: int, into: memoryview) -> None:
        try:
            into[:] = self._store.read(self._path, at, len(into), limit_bytes=len(into))
        except NotFound:
            raise Corrupt(f"{self.name}: this data file of a committed step is missing") from None

    def read_cold(self, at: int, nbytes: int, buffer: memoryview) -> int:
        self.read(at, buffer[:nbytes])
        return 0

    def cached(self, at: int, nbytes: int) -> bool:
        return True

    def announce(self, at: int, nbytes: int) -> None:
        pass

    def close(self) -> None:
        pass
