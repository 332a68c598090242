"""Elastic membership for training runs: nodes come and go, the run goes on.

    agent       the torchrun process of a node; it starts the node's workers
    member      an agent that works; a spare is one that waits
    membership  the members of one generation in order of rank, written once, in the start record of the run's log
    generation  number of a membership; what a worker of an older one does no longer counts
    leader      the agent that wrote the newest membership; others follow it
    candidate   an agent that gathers others while there is no leader

In workers: `current`, `leave`, `phase`, and `batches` for data that does not mind the number of ranks. In agents:
hooks, see `elastic.hooks`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckpt.board import Place
from ckpt.errors import Incompatible

if TYPE_CHECKING:
    from elastic.data import Batch, Batches, batches

__all__ = ["Batch", "Batches", "Current", "batches", "current", "leave", "phase"]

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


def leave(reason: str, deadline_s: float = 60.0) -> None:
    """Have the node of this worker taken out of the job, as planned; returns at once, and training goes on until then.

    All ranks stop at a step on which they agree, and save it; the others go on from exactly that step. What has not
    stopped after `deadline_s` is killed. For a node that is known to end soon, or that misbehaves. `Incompatible` where
    no elastic agent started this process.
    """
    if not 0 <= deadline_s < 1e9:
        raise ValueError(f"deadline_s is a number of seconds, not {deadline_s!r:.100}")
    if (place := Place.of()) is None:
        raise Incompatible("no elastic agent started this process, so there is no job to leave; exit to end it")
    place.leave(reason, deadline_s)


@contextmanager
def phase(limit_s: float) -> Iterator[None]:
    """What is done in here may take `limit_s` without a step: an evaluation, a first step that compiles.

    A worker in `checkpointer.steps` that makes no step for much longer than it used to is taken for hung. Without an
    elastic agent this does nothing.
    """
    if not 0 < limit_s < 1e9:
        raise ValueError(f"limit_s is a number of seconds above 0, not {limit_s!r:.100}")
    if (place := Place.of()) is None:
        yield
        return
    with place.phase(limit_s):
        yield
