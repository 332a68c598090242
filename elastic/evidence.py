"""What was seen of a run, as plain values that go to JSON and come back. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Verdict = Literal["green", "red", "not judged"]


@dataclass(frozen=True)
class Mark:
    """A process was at a mark, `at` seconds after the run began. `generation`: of the membership it was started in."""

    at: float
    name: str
    node: str
    pid: int
    generation: int
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.facts.get("step", -1))

    @property
    def rank(self) -> int:
        return int(self.facts.get("rank", -1))


@dataclass
class Injection:
    """A fault that happened. `what`: what was done, to whom; `generation` and `step` are what the run had reached."""

    kind: str
    nodes: list[str]
    at: float
    what: str
    generation: int
    step: int
    restarts: bool  # whether the run can only go on in a new generation
    healed_at: float | None = None
    recovered_at: float | None = None
    storage: bool = False  # done to what the run is stored on
    live: bool = False  # done to the state in the memory of a worker
    met: int | None = None  # how often it was met, where that is counted


@dataclass
class Life:
    """A node from its start to its end. `code` of its agent; `taken`: why nobody expects that code."""

    node: str
    began: float
    ended: float | None = None
    code: int | None = None
    taken: str = ""


@dataclass(frozen=True)
class Judgement:
    """What one oracle says. `evidence`: what it counted, or what is wrong."""

    oracle: str
    verdict: Verdict
    evidence: str


@dataclass
class Evidence:
    """Everything that the oracles and the report go by."""

    scenario: dict[str, Any]
    command: list[str]
    seed: int
    ground: str
    marks: list[Mark] = field(default_factory=list)
    faults: list[Injection] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)  # faults whose trigger never came
    lives: list[Life] = field(default_factory=list)
    seconds: float = 0.0
    timed_out: bool = False
    left: list[str] = field(default_factory=list)  # what outlived the run
    looked_for: list[str] = field(default_factory=list)  # kinds of things that could have
    damage: list[str] = field(default_factory=list)  # what `ckpt check` found afterwards
    checked_steps: list[int] = field(default_factory=list)
    reference: dict[int, dict[str, float]] = field(default_factory=dict)  # metrics of the undisturbed run, by step

    def named(self, *names: str) -> list[Mark]:
        """The marks of these names, in the order in which they were heard."""
        return [mark for mark in self.marks if mark.name in names]

    def as_json(self) -> dict[str, Any]:
        """As JSON has it, without echoes and addresses, which are long and judged already."""
        long = ("echo", "memory")
        short = [replace(mark, facts={k: v for k, v in mark.facts.items() if k not in long}) for mark in self.marks]
        return {name: _finite(value) for name, value in asdict(replace(self, marks=short)).items()}


def passed(judgements: Iterable[Judgement]) -> bool:
    """Whether no oracle is red, and some are green."""
    verdicts = {one.verdict for one in judgements}
    return "red" not in verdicts and "green" in verdicts


def _finite(value: Any) -> Any:
    """With null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
