"""Sharded checkpoints of a training run that are never lost and never restored wrong in silence.

Glossary, one meaning each:

    step        number of completed training steps
    attempt     one try to save a step; a directory of its own, never overwritten
    commit      the record in the log by which an attempt becomes a step that exists
    generation  number of a (re)start of the run; it fences older starts out
    lineage     the newest commit and its parents: the steps of the run as it stands
    part        what one rank wrote: a data file (safetensors) and the table of its chunks
    chunk       a stored box of one tensor
    replica     an equal copy of a tensor's elements on another rank; written once
    world       all ranks of a job, and who of them holds what

Start at `Checkpointer`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt.adapt import PerRank, Rng, Shard
    from ckpt.checkpointer import Checkpointer
    from ckpt.errors import (
        CkptError,
        Corrupt,
        DeadlineExceeded,
        Fenced,
        Incompatible,
        NotFound,
        SaveFailed,
        StorageError,
    )
    from ckpt.handle import SaveHandle
    from ckpt.interval import Every
    from ckpt.loader import load
    from ckpt.readers import follow, restore
    from ckpt.records import Commit
    from ckpt.retention import Best, Keep

__all__ = [
    "Best",
    "Checkpointer",
    "CkptError",
    "Commit",
    "Corrupt",
    "DeadlineExceeded",
    "Every",
    "Fenced",
    "Incompatible",
    "Keep",
    "NotFound",
    "PerRank",
    "Rng",
    "SaveFailed",
    "SaveHandle",
    "Shard",
    "StorageError",
    "follow",
    "load",
    "restore",
]

_HOMES = {
    "ckpt.adapt": ("PerRank", "Rng", "Shard"),
    "ckpt.checkpointer": ("Checkpointer",),
    "ckpt.handle": ("SaveHandle",),
    "ckpt.interval": ("Every",),
    "ckpt.loader": ("load",),
    "ckpt.readers": ("follow", "restore"),
    "ckpt.records": ("Commit",),
    "ckpt.retention": ("Best", "Keep"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """The public names, each imported at its first use: the keeper and the commands live without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'ckpt' has no attribute {name!r}")
    found = getattr(import_module(_HOME.get(name, "ckpt.errors")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
