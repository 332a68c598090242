"""Every error that ckpt raises on purpose. A caller that acts differently gets a type of its own.

    CkptError
    ├── NotFound          no checkpoint, or no such step, under this address      exit 10
    ├── Corrupt           bytes are not what the log or a digest says             exit 12
    ├── Incompatible      state and checkpoint (or ranks among themselves) differ exit 13
    ├── Fenced            a newer generation of this run has started              exit 11
    ├── StorageError      the store refused or failed an operation                exit 1
    ├── SaveFailed        a save did not commit; nothing older was touched        exit 1
    └── DeadlineExceeded  a wait ran out; says who was missing                    exit 1

A message says what was expected and got, where, what still works, and what to run next.
"""

from __future__ import annotations


class CkptError(Exception):
    """Base of all errors of this library. `exit_code` is what the commands exit with."""

    exit_code = 1


class NotFound(CkptError):
    """There is no checkpoint, or no such step, at this address."""

    exit_code = 10


class Fenced(CkptError):
    """A newer generation owns the run; this process may no longer commit."""

    exit_code = 11


class Corrupt(CkptError):
    """Stored bytes disagree with the log, the manifest or their digest."""

    exit_code = 12


class Incompatible(CkptError):
    """The state cannot be stored, or what is stored does not fit the state."""

    exit_code = 13


class StorageError(CkptError):
    """The store refused or failed an operation."""


class SaveFailed(CkptError):
    """A save did not become a commit. Every older step is as it was."""


class DeadlineExceeded(CkptError):
    """A wait with a deadline ran out."""
