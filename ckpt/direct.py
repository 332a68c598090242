"""Plain files, past the page cache: created and written for a save, read when what is wanted is not in memory.

Knows nothing of tensors and imports no torch, so that a background process can use it. Offsets, sizes and memory of
direct I/O are whole pages of `ALIGN_BYTES`; every function falls back to ordinary I/O where a file system refuses it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat

from ckpt.plan import ALIGN_BYTES

_CACHESTAT = 451  # system call of Linux 6.5, one number on every architecture that torch runs on
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})

_IDLE_LIMIT = 8  # writes in a row that do not reach the next page

_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = (("at", ctypes.c_uint64), ("nbytes", ctypes.c_uint64))


class _Pages(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recent"))


def create(path: str, nbytes: int) -> int:
    """Create the file `path`, with room for `nbytes`, and return a descriptor to write it by direct I/O.

    FileExistsError if there is one; other OSErrors as they come. Where the file system refuses direct I/O the
    descriptor is an ordinary one, and where it cannot preallocate the file starts empty.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.open(path, flags & ~os.O_EXCL, 0o666)  # the refused open may have made the file
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if nbytes and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            os.close(fd)
            raise
    return fd


def open_read(path: str, follow: bool = False) -> int:
    """A descriptor of the file `path` for ordinary reads; only with `follow` of one that a link leads to.

    OSError for a pipe or a terminal: those could wait.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        os.close(fd)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENXIO
        raise OSError(number, os.strerror(number), path)
    return fd


def write_all(fd: int, memory: memoryview, at: int) -> None:
    """Write all of `memory` at byte `at`: whole pages, from page-aligned memory, where `fd` does direct I/O."""
    done = idle = 0
    while done < len(memory):
        reached = done + os.pwrite(fd, memory[done:], at + done)
        if reached < len(memory):
            reached -= reached % ALIGN_BYTES  # direct I/O goes on from a page border
        idle = idle + 1 if reached <= done else 0
        if idle == _IDLE_LIMIT:
            raise OSError(errno.EIO, "writes make no progress")
        done = max(done, reached)


def open_cold(path: str) -> int:
    """Open `path` to read it by direct I/O, or by ordinary I/O where the file system refuses that."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags)


def is_cached(fd: int, at: int, nbytes: int) -> bool | None:
    """Whether half or more of bytes [at, at + nbytes) are in the page cache; None where that cannot be told.

    None where the file system refuses reads that do not wait (`RWF_NOWAIT`: overlayfs, NFS) and finds nothing: its
    own cache may then lie elsewhere. Never waits for the disk. The probe brings at most one page into the cache: the
    file's first, or the range's first where `cachestat` is not to be had.
    """
    pages = _cached_pages(fd, at, nbytes)
    if pages is None:
        return _is_at_hand(fd, at)
    needed = -(-(at + nbytes) // mmap.PAGESIZE) - at // mmap.PAGESIZE
    if 2 * pages >= needed:
        return True
    return None if _is_at_hand(fd, 0) is None else False


def _cached_pages(fd: int, at: int, nbytes: int) -> int | None:
    """Pages of the range that are in the page cache; None before Linux 6.5 and for files of other users."""
    found = _Pages()
    if _libc.syscall(_CACHESTAT, fd, ctypes.byref(_Range(at, nbytes)), ctypes.byref(found), 0):
        return None
    return int(found.cached)


def _is_at_hand(fd: int, at: int) -> bool | None:
    """Whether the byte at `at` can be read without waiting; None where the file system does not say."""
    try:
        return bool(os.preadv(fd, [bytearray(1)], at, os.RWF_NOWAIT))
    except OSError as error:  # of a read that would wait, or of one that fails: the read itself will say so
        return None if error.errno in _UNSUPPORTED else False
