"""The few operations the protocol needs from a place that keeps bytes, and what such a place must say about itself.

A path is relative to the store's root: components of `[a-z0-9._-]` (or FORMAT.json, MANIFEST) with no leading dot,
joined by "/"; the root itself is "". Anything else is refused, not cleaned. The root of a store is a run's directory.

Retry, limits and injected faults are wrappers with this same interface; a store itself never retries.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from ckpt.errors import StorageError

FILES_IN_CAPITALS: Final = frozenset({"FORMAT.json", "MANIFEST"})
COMPONENT_LIMIT: Final = 160
REQUESTS: Final = 16  # under way at a time, where a store is reached by requests
_COMPONENT = re.compile(r"[a-z0-9_-][a-z0-9._-]*")

Names: TypeAlias = list[str]


class AlreadyExists(StorageError):
    """`create` found something under this path. Nothing was changed."""


class OutcomeUnknown(StorageError):
    """The operation may or may not have happened, or may not last. Read back before deciding anything."""


@dataclass(frozen=True)
class Capabilities:
    """What a store was found to do (probed, not believed).

    `exclusive_create`: of any number of racing creators of a path exactly one succeeds.
    `atomic_create`: what `create` makes appears whole or not at all. Where this is False, a creator that dies leaves
    an incomplete object, a reader may see one that is still being written, and one writer at a time is the operator's
    promise.
    """

    exclusive_create: bool
    atomic_create: bool

    @property
    def fences(self) -> bool:
        """Whether the log alone keeps two writers apart."""
        return self.exclusive_create and self.atomic_create


@dataclass(frozen=True)
class Usage:
    """What lies below a path: bytes, and when (by the store's clock) the newest of it was written."""

    nbytes: int
    unix_s: float


class DataWriter(Protocol):
    """A large file of known size while it is being written, under a name that is the writer's own.

    `in_order`: it takes the bytes best in the order of the file; what comes early is held in memory until then.
    """

    @property
    def in_order(self) -> bool: ...

    def write(self, at: int, memory: memoryview) -> None:
        """Write `memory` at byte `at`: whole pages, from page-aligned memory, which is not needed afterwards.

        From any thread; each byte once.
        """

    def finish(self, nbytes: int | None = None) -> None:
        """Return once the file is there, whole and durable; with `nbytes`, less than was announced."""

    def abandon(self) -> None:
        """End the work on it; what is there of it is never read. Does not raise."""


class Store(Protocol):
    """A tree of files. Every operation raises StorageError (never a bare OSError) with operation, path and cause."""

    @property
    def url(self) -> str:
        """What a person would type to name this store's root."""

    @property
    def capabilities(self) -> Capabilities:
        """What this store can do; the first use may create and remove a temporary file."""

    def create(self, path: str, data: bytes) -> None:
        """Make `path` with `data`, or raise AlreadyExists: exclusive, and durable when it returns.

        Not idempotent: after a lost reply a retry raises AlreadyExists, so compare what stands there with what was
        written. Raises OutcomeUnknown when it cannot tell; any other StorageError means that nothing was made.
        Missing parent directories are made.
        """

    def put(self, path: str, data: bytes) -> None:
        """Make or replace `path` as a whole; durable when it returns. Idempotent; may be retried after any error.

        Only for names that are one's own: two writers of one path overwrite each other. Missing parents are made.
        """

    def read(self, path: str, offset: int = 0, nbytes: int | None = None, *, limit_bytes: int) -> bytes:
        """Bytes [offset, offset + nbytes), or from `offset` to the end.

        Raises NotFound if there is no such file, and Corrupt if it is shorter than what is asked for or if that is
        more than `limit_bytes`; nothing larger is read into memory. Idempotent.
        """

    def size(self, path: str) -> int:
        """Size of a file in bytes. Raises NotFound."""

    def list(self, directory: str) -> Names:
        """Names of the files and directories in `directory`, sorted. Raises NotFound.

        Whatever `create` made before the call began is in it. Names outside the grammar, and so temporary files left
        by a crash, are not.
        """

    def exists(self, path: str) -> bool:
        """Whether there is a file or directory of this name."""

    def delete(self, path: str) -> None:
        """Remove a file, or a directory with all that is in it; durable when it returns. Idempotent.

        A directory's MANIFEST goes first, so what is half deleted never looks complete.
        """

    def make_directory(self, path: str) -> None:
        """Make a directory and its missing parents; durable when it returns. Idempotent."""

    def sync_directory(self, path: str) -> None:
        """Make the names in a directory durable, whoever made them."""

    def write_data(self, path: str, nbytes: int) -> DataWriter:
        """Begin a file of `nbytes`, or of fewer, in place of what stands there; missing parents are made.

        Only for names that are one's own. Durable once `finish` has returned.
        """

    def usage(self, directory: str) -> Usage:
        """How much lies directly in `directory`. Raises NotFound."""

    def clear(self, directory: str, ours: Callable[[str], bool]) -> Names:
        """Delete the files in `directory` whose name is `ours`, MANIFEST first, and the directory if nothing is left.

        Returns the names that stay. A link is never followed: it stays, and what it leads to. Idempotent.
        """

    def local_path(self, path: str) -> str | None:
        """The file's path on this machine for pread, or None if the store is reached by requests."""


def by_requests(store: Store) -> bool:
    """Whether each operation is a request to a server, so that many at a time are faster than one."""
    return store.local_path("") is None


def check_path(path: str, *, root_allowed: bool = False) -> tuple[str, ...]:
    """The components of a store path; raises StorageError if any breaks the grammar."""
    if path == "" and root_allowed:
        return ()
    components = tuple(path.split("/"))
    for component in components:
        if not is_component(component):
            raise StorageError(
                f"refused the path {path!r:.300}: {component!r:.200} is not a name of [a-z0-9._-] without a leading dot"
            )
    return components


def is_component(name: str) -> bool:
    """Whether `name` may be one component of a store path."""
    return name in FILES_IN_CAPITALS or (len(name) <= COMPONENT_LIMIT and _COMPONENT.fullmatch(name) is not None)
