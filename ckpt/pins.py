"""What anybody may append to a run's log: pins, and requests to delete. No generation is taken, so no job is fenced.

A pin counts from the slot it stands in: a `retire` record that wants the same attempt either stands before it, and the
pin is refused, or is decided again with the pin in view. So a pin that was acknowledged is never deleted.
"""

from __future__ import annotations

import secrets

from ckpt.holder import find_commit
from ckpt.log import decide_pin, decide_unpin
from ckpt.records import Commit, Pin, Request, Unpin, is_name
from ckpt.retention import decide_delete
from ckpt.run import RunDirectory


def pin(run: RunDirectory, step: int, name: str | None = None) -> Pin:
    """Keep `step` under `name` (default `step-<N>`), whatever a rule says; the same name again moves.

    When this returns it holds. `NotFound` if there is no such step (any more).
    """
    nonce, called = secrets.token_hex(8), name or f"step-{step}"
    run.check_unchanged()
    return run.log.append(
        lambda view: decide_pin(view, nonce=nonce, attempt=find_commit(view, step).attempt, name=called)
    )


def checked_name(name: str | None) -> str | None:
    """`name` if a pin may be called so. `ValueError`."""
    if name is None or is_name(name):
        return name
    raise ValueError(f"the name of a pin is of [a-z0-9._-], without a leading dot, not {name!r:.200}")


def unpin(run: RunDirectory, name: str) -> Unpin:
    """Let go of the pin `name`; rules count again for its step. `NotFound` if there is none."""
    nonce = secrets.token_hex(8)
    run.check_unchanged()
    return run.log.append(lambda view: decide_unpin(view, nonce=nonce, name=name))


def ask_to_delete(run: RunDirectory, commit: Commit) -> Request:
    """Ask whoever holds the run to delete the step of `commit`, which happens after the next commit.

    `Incompatible` if it cannot be deleted (the newest, a pinned one, the one that the run went on from), `NotFound` if
    it was deleted already.
    """
    nonce = secrets.token_hex(8)
    run.check_unchanged()
    return run.log.append(lambda view: decide_delete(view, nonce=nonce, attempt=commit.attempt))
