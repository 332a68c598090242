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

from ckpt.adapt import PerRank, Rng, Shard
from ckpt.checkpointer import Checkpointer, Every, SaveHandle, follow, restore
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
from ckpt.load import load
from ckpt.records import Commit

__all__ = [
    "Checkpointer",
    "CkptError",
    "Commit",
    "Corrupt",
    "DeadlineExceeded",
    "Every",
    "Fenced",
    "Incompatible",
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
