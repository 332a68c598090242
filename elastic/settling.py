"""What the workers left in memory: this node's keeper brings it to an end, before a new generation fences it."""

from __future__ import annotations

import logging

from ckpt.errors import CkptError
from ckpt.keeper.courier import settle_what_was_left
from ckpt.run import RunDirectory

log = logging.getLogger("elastic")


def settle(run: RunDirectory, limit_s: float, *, lost: bool) -> None:
    """Return once all that was left is committed or given up, or after `limit_s`, with a warning. Blocking.

    `lost`: a node of the generation is, with its keeper: nobody waits for what only that had. May be asked again while
    it is under way, to say so.
    """
    try:
        settle_what_was_left(run, limit_s, lost=lost)
    except (CkptError, OSError) as error:
        log.warning("what the workers left in memory may be lost: %s", error)
