"""What a caller passed, checked: steps, metrics, the name of a job."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping

from ckpt.errors import Incompatible

METRICS_LIMIT_BYTES = 32 * 1024


def step_number(step: object) -> int:
    """`step` as a plain int in [0, 2**63); `Incompatible` for anything else."""
    if not isinstance(step, bool) and hasattr(step, "__index__") and 0 <= (number := operator.index(step)) < 1 << 63:
        return int(number)
    raise Incompatible(f"a step is the number of completed steps, an int of 0 or more, not {step!r:.100}")


def checked_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """`metrics` as floats; `Incompatible` for other types, or for more than a log record may hold."""
    try:
        found = {name: float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise Incompatible(f"metrics are numbers by name: {error}") from error
    if any(not isinstance(name, str) or not name.isprintable() for name in found):
        raise Incompatible(f"names of metrics are printable strings, got {list(found)[:4]!r:.200}")
    if (nbytes := sum(len(name.encode()) + 32 for name in found)) > METRICS_LIMIT_BYTES:
        raise Incompatible(f"{len(found)} metrics take about {nbytes} bytes, the limit is {METRICS_LIMIT_BYTES}")
    return found


def run_id_of(given: str | None) -> str | None:
    """The name of this job: as given, or where its launcher gave it one of its own."""
    if given is not None and not (isinstance(given, str) and given.isprintable() and len(given) <= 256):
        raise Incompatible(f"run_id is a printable string of at most 256 characters, not {given!r:.100}")
    found = given or os.environ.get("CKPT_RUN_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    return found if found and found != "none" else None
