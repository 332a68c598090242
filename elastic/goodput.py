"""Where the time of a run went. Pure: from instants to seconds of each kind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

What = Literal["step", "saved", "decide", "restoring", "restored"]


@dataclass(frozen=True)
class Instant:
    """Something that rank 0 or an agent was seen at. `step` of a step, `blocked_s` of a save that returned."""

    at: float
    what: What
    step: int = 0
    blocked_s: float = 0.0


@dataclass(frozen=True)
class Span:
    """Seconds [`start`, `stop`) that were spent in one way."""

    kind: str
    start: float
    stop: float


KINDS = ("productive", "recompute", "saving", "detection", "rendezvous", "restore", "ending")


def spans(instants: Iterable[Instant], end: float) -> list[Span]:
    """What each moment up to `end` was spent on; the spans follow one another without a gap.

    A step that is higher than all before was productive, another one is computed again. The time in which `save` did
    not return counts as saving. From the last step of a generation until an agent proposes the next is detection, also
    of a step that was not finished; from there until workers begin to restore is rendezvous, with the start of Python.
    What comes after the last step is the end.
    """
    found: list[Span] = []
    at, highest, blocked, now = 0.0, 0, 0.0, "rendezvous"
    for instant in sorted(instants, key=lambda one: one.at):
        if instant.what == "saved":
            blocked += instant.blocked_s
            continue
        if instant.what == "step":
            kind = "productive" if instant.step > highest else "recompute"
            waited = min(blocked, instant.at - at)
            found += [Span(kind, at, instant.at - waited), Span("saving", instant.at - waited, instant.at)]
            highest, now = max(highest, instant.step), "detection"
        elif instant.what == "restored":
            found.append(Span("restore", at, instant.at))
        else:
            found.append(Span(now, at, instant.at))
            now = "rendezvous"
        at, blocked = instant.at, 0.0
    found.append(Span("ending" if now == "detection" else now, at, max(end, at)))
    return [span for span in found if span.stop > span.start]


def split(found: Iterable[Span]) -> dict[str, float]:
    """Seconds by kind, every kind named."""
    totals = dict.fromkeys(KINDS, 0.0)
    for span in found:
        totals[span.kind] += span.stop - span.start
    return totals
