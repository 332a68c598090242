"""A store in a directory of a POSIX file system: local disk, tmpfs, NFS, Lustre.

What makes an object durable, in this order: data, fsync; link() or rename() to its name; fsync of the directory that
holds the name; and each directory was fsynced in its parent when it was made. `create` is exclusive because link()
is, and whole because what is linked is already complete. File systems without hard links get O_EXCL instead: still
exclusive, but no longer whole (`Capabilities.atomic_create` is False there).

Temporary names start with ".tmp-"; `list` never shows them, so leftovers of a crash are harmless.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from ckpt import direct
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

TEMPORARY_PREFIX: Final = ".tmp-"
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
# After these the name was certainly not made; after any other error it may have been.
_CERTAIN = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ENAMETOOLONG,
    }
)
_HINTS = {
    errno.ENOSPC: "the disk is full: free space or save elsewhere",
    errno.EDQUOT: "the quota is used up: free space or save elsewhere",
    errno.EROFS: "the file system is mounted read-only, often after an I/O error: see dmesg",
    errno.EACCES: "no permission: check the owner and mode of the directory",
    errno.EIO: "the device failed: see dmesg",
    errno.ESTALE: "the NFS server no longer knows this file: check the mount",
    errno.EISDIR: "there is a directory where a file is expected",
    errno.ENXIO: "there is a pipe or a device where a file is expected",
    errno.ELOOP: "there is a symbolic link where none is expected; links inside a run's directory are not followed",
}


class PosixStore:
    """The tree below `root`. Several processes and threads may use one root, and one instance, at the same time."""

    def __init__(self, root: str) -> None:
        self._root = os.path.abspath(root)
        self._made: set[str] = set()  # directories known to be durable
        self._hard_links: bool | None = None  # None: not probed yet

    @property
    def url(self) -> str:
        return self._root

    @property
    def capabilities(self) -> Capabilities:
        if self._hard_links is None:
            self._hard_links = self._probe_hard_links()
        return Capabilities(exclusive_create=True, atomic_create=self._hard_links is not False)

    def create(self, path: str, data: bytes) -> None:
        target, parent = self._target(path)
        if not self.capabilities.atomic_create:
            self._create_in_place(target, parent, data)
            return
        with _temporary(parent, data) as temporary:
            try:
                os.link(temporary, target, follow_symlinks=False)
            except FileExistsError as error:
                raise AlreadyExists(f"create {target}: it already exists. Nothing was changed") from error
            except OSError as error:
                raise _failed("create", target, error, OutcomeUnknown) from error
            _sync_name(parent, "create", target)

    def put(self, path: str, data: bytes) -> None:
        target, parent = self._target(path)
        with _temporary(parent, data) as temporary:
            try:
                os.rename(temporary, target)
            except OSError as error:
                raise _failed("put", target, error, OutcomeUnknown) from error
            _sync_name(parent, "put", target)

    def read(self, path: str, offset: int = 0, nbytes: int | None = None, *, limit_bytes: int) -> bytes:
        target = self._below(path)
        with _reported("read", target), _closing(direct.open_read(target)) as fd:
            available = max(os.fstat(fd).st_size - offset, 0)
            wanted = available if nbytes is None else nbytes
            if wanted > limit_bytes:
                raise Corrupt(f"read {target}: {wanted} bytes where at most {limit_bytes} are expected")
            data = _read_exactly(fd, offset, wanted)
        if len(data) != wanted:
            raise Corrupt(f"read {target}: cut off; {wanted} bytes from offset {offset} expected, got {len(data)}")
        return data

    def size(self, path: str) -> int:
        target = self._below(path)
        with _reported("size", target):
            return os.stat(target, follow_symlinks=False).st_size

    def list(self, directory: str) -> Names:
        target = self._without_links(check_path(directory, root_allowed=True), entered=True)
        with _reported("list", target):
            return sorted(name for name in os.listdir(target) if is_component(name))

    def exists(self, path: str) -> bool:
        target = self._directory(path)
        try:
            with _reported("look up", target):
                os.lstat(target)
        except NotFound:
            return False
        return True

    def delete(self, path: str) -> None:
        target = self._below(path)  # never the root
        self._made.difference_update([made for made in tuple(self._made) if f"{made}/".startswith(f"{target}/")])
        with contextlib.suppress(NotFound), _reported("delete", target):
            if os.path.isdir(target) and not os.path.islink(target):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(target, "MANIFEST"))
                shutil.rmtree(target)
            else:
                os.unlink(target)
            _fsync_directory(os.path.dirname(target))

    def make_directory(self, path: str) -> None:
        self._make_durable(self._directory(path))

    def sync_directory(self, path: str) -> None:
        target = self._directory(path)
        with _reported("sync directory", target):
            _fsync_directory(target)

    def write_data(self, path: str, nbytes: int) -> DataWriter:
        target, _ = self._target(path)
        with _reported("write", target, StorageError):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(target)  # begun by somebody who was lost
            return _DataFile(target, direct.create(target, nbytes))

    def usage(self, directory: str) -> Usage:
        target = self._without_links(check_path(directory, root_allowed=True), entered=True)
        with _reported("look into", target):
            nbytes = sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(target))
            return Usage(nbytes, os.stat(target, follow_symlinks=False).st_mtime)

    def clear(self, directory: str, ours: Callable[[str], bool]) -> Names:
        target = self._below(directory)
        if os.path.islink(target):
            return [os.path.basename(target)]
        try:
            with _reported("clear", target):
                names = os.listdir(target)
        except NotFound:
            return []
        stay = sorted(name for name in names if not ours(name) or _is_directory(os.path.join(target, name)))
        if not stay:
            self.delete(directory)
            return []
        with _reported("clear", target):
            for name in sorted(set(names) - set(stay)):  # capitals, and so the MANIFEST, come first
                os.unlink(os.path.join(target, name))
        return stay

    def local_path(self, path: str) -> str | None:
        return self._directory(path)

    def _directory(self, path: str) -> str:
        return self._without_links(check_path(path, root_allowed=True))

    def _below(self, path: str) -> str:
        return self._without_links(check_path(path))

    def _without_links(self, components: Sequence[str], entered: bool = False) -> str:
        """The path of `components`; refuses a link in place of a directory on the way, which would lead elsewhere.

        `entered`: the last component is a directory to look into, too.
        """
        target = self._root
        for number, component in enumerate(components, 1):
            target = os.path.join(target, component)
            if (entered or number < len(components)) and os.path.islink(target):
                error = OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                raise StorageError(_message("open", target, error)) from error
        return target

    def _target(self, path: str) -> tuple[str, str]:
        target = self._below(path)
        parent = os.path.dirname(target)
        self._make_durable(parent)
        return target, parent

    def _make_durable(self, directory: str) -> None:
        """Make `directory`, and see to it that every name from the root's down to it lasts.

        One that another process has just made may not be durable yet, so those are fsynced too, once per instance.
        """
        if directory in self._made:
            return
        parent = os.path.dirname(directory)
        if directory != self._root:
            self._make_durable(parent)
        else:
            _make_ancestors(parent)
        with _reported("make directory", directory, StorageError):
            made = _mkdir(directory)
            try:
                _fsync_directory(parent)
            except PermissionError:
                if made or directory != self._root:
                    raise  # an old root in a directory that we may not open was made durable by whoever made it
        self._made.add(directory)

    def _create_in_place(self, target: str, parent: str, data: bytes) -> None:
        try:
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileExistsError as error:
            raise AlreadyExists(f"create {target}: it already exists. Nothing was changed") from error
        except OSError as error:
            raise _failed("create", target, error, OutcomeUnknown) from error
        try:
            _write_and_close(fd, data)
        except OSError as error:  # the name stays, incomplete: others may have gone past it
            raise OutcomeUnknown(_message("create", target, error)) from error
        _sync_name(parent, "create", target)

    def _probe_hard_links(self) -> bool | None:
        """Whether link() works here; None where nothing can be written, so that it does not matter yet."""
        name = os.path.join(self._root, TEMPORARY_PREFIX + secrets.token_hex(8))
        try:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        except OSError:
            return None
        try:
            os.link(name, name + "-link", follow_symlinks=False)
            os.unlink(name + "-link")
        except OSError as error:
            return error.errno not in _NO_HARD_LINKS
        finally:
            with contextlib.suppress(OSError):
                os.unlink(name)
        return True


class _DataFile:
    """A file that is written past the page cache, in any order."""

    in_order = False

    def __init__(self, path: str, fd: int) -> None:
        self._path, self._fd = path, fd

    def write(self, at: int, memory: memoryview) -> None:
        with _reported("write", self._path, StorageError):
            direct.write_all(self._fd, memory, at)

    def finish(self, nbytes: int | None = None) -> None:
        with _reported("write", self._path, StorageError):
            try:
                if nbytes is not None:
                    os.ftruncate(self._fd, nbytes)
                os.fsync(self._fd)
                _fsync_directory(os.path.dirname(self._path))
            finally:
                os.close(self._fd)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)


def _make_ancestors(directory: str) -> None:
    """Make what is missing above the root; what is there already is not ours and is left alone."""
    if os.path.isdir(directory):
        return
    _make_ancestors(os.path.dirname(directory))
    with _reported("make directory", directory, StorageError):
        _mkdir(directory)
        _fsync_directory(os.path.dirname(directory))


def _is_directory(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _mkdir(directory: str) -> bool:
    try:
        os.mkdir(directory)
    except FileExistsError:
        if not os.path.isdir(directory):
            raise NotADirectoryError(errno.ENOTDIR, "exists and is not a directory", directory) from None
        return False
    return True


@contextlib.contextmanager
def _temporary(directory: str, data: bytes) -> Iterator[str]:
    """The path of a new, complete, fsynced file in `directory`; its name is removed at the end if it still exists."""
    path = os.path.join(directory, TEMPORARY_PREFIX + secrets.token_hex(8))
    try:
        with _reported("write", path, StorageError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            _write_and_close(os.open(path, flags, 0o666), data)
        yield path
    finally:
        with contextlib.suppress(OSError):  # a leftover is harmless
            os.unlink(path)


def _write_and_close(fd: int, data: bytes) -> None:
    try:
        rest = memoryview(data)
        while rest:
            written = os.write(fd, rest)
            if written <= 0:
                raise OSError(errno.EIO, "a write made no progress")
            rest = rest[written:]
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_exactly(fd: int, offset: int, nbytes: int) -> bytes:
    """Bytes [offset, offset + nbytes), fewer only where the file ends."""
    pieces: list[bytes] = []
    missing = nbytes
    while missing > 0 and (piece := os.pread(fd, min(missing, 1 << 30), offset + nbytes - missing)):
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def _fsync_directory(directory: str) -> None:
    with _closing(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system has no such thing
                raise


def _sync_name(directory: str, operation: str, target: str) -> None:
    """fsync `directory` after a name was made in it; if that fails the name is there and may not last."""
    try:
        _fsync_directory(directory)
    except OSError as error:
        raise OutcomeUnknown(_message(operation, target, error)) from error


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _reported(operation: str, path: str, missing: type[CkptError] = NotFound) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise missing(f"{operation} {path}: there is no such file or directory") from error
    except OSError as error:
        raise StorageError(_message(operation, path, error)) from error


def _failed(operation: str, path: str, error: OSError, otherwise: type[StorageError]) -> StorageError:
    return (StorageError if error.errno in _CERTAIN else otherwise)(_message(operation, path, error))


def _message(operation: str, path: str, error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, "unknown error")
    hint = _HINTS.get(error.errno or 0)
    return f"{operation} {path}: {error.strerror} ({name})" + (f"; {hint}" if hint else "")
