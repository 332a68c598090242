"""Elastic membership for training runs: nodes come and go, the run goes on.

    agent       the torchrun process of a node; it starts the node's workers
    member      an agent that works; a spare is one that waits
    membership  the members of one generation in order of rank, written once, in the start record of the run's log
    generation  number of a membership; what a worker of an older one does no longer counts
    leader      the agent that wrote the newest membership; others follow it
    candidate   an agent that gathers others while there is no leader

In workers: `current`, and `batches` for data that does not mind the number of ranks. In agents: hooks, see
`elastic.hooks`.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic.data import Batch, Batches, batches

__all__ = ["Batch", "Batches", "Current", "batches", "current"]

FEW_RESTARTS = 1000


@dataclass(frozen=True)
class Current:
    """The membership that this worker belongs to. `nodes`: host names in order of group rank."""

    generation: int
    nodes: tuple[str, ...]
    group_rank: int
    reason: str

    @property
    def group_world(self) -> int:
        """How many nodes work."""
        return len(self.nodes)


def current() -> Current | None:
    """The membership of this process, None where no elastic agent started it.

    Warns once if torchrun was started with a small --max-restarts: every restart of an agent's workers counts.
    """
    generation = os.environ.get("ELASTIC_GENERATION", "")
    if not generation.isdecimal():
        return None
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "")
    if restarts.isdecimal() and int(restarts) < FEW_RESTARTS:
        warnings.warn(
            f"torchrun was started with --max-restarts {restarts}: this node is lost after so many restarts. "
            "Start it with --max-restarts 1000000",
            stacklevel=2,
        )
    nodes = tuple(os.environ.get("ELASTIC_NODES", "").split(","))
    return Current(int(generation), nodes, int(os.environ["GROUP_RANK"]), os.environ.get("ELASTIC_REASON", ""))


def __getattr__(name: str) -> Any:
    """What needs torch, imported at its first use: commands live without it."""
    if name not in ("Batch", "Batches", "batches"):
        raise AttributeError(f"module 'elastic' has no attribute {name!r}")
    from elastic import data

    return getattr(data, name)
