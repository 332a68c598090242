"""What a run looks like while it runs: a table at a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

QUIET_S = 15.0  # without a line, where there is no terminal


@dataclass(frozen=True)
class Glance:
    """The state of a run at one instant. `nodes`: of each, its name, what it does, and the last step of its ranks."""

    seconds: float
    step: int
    generation: int
    leader: str
    awaits: str
    nodes: tuple[tuple[str, str, int], ...]

    def line(self) -> str:
        states: dict[str, list[str]] = {}
        for name, state, _ in self.nodes:
            states.setdefault(state, []).append(name)
        who = "; ".join(f"{', '.join(names)}: {state}" for state, names in states.items())
        return f"{self.seconds:6.1f} s  step {self.step}, generation {self.generation}; {who}; waits for {self.awaits}"


class Screen:
    """Where a run is told of, on stderr. A context manager: the table goes when it is left, what was told stays."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console or Console(stderr=True), clock
        self._live: Live | None = None
        self._said = clock()
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, text: str) -> None:
        """A line that stays."""
        self._said = self._clock()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def look(self, glance: Glance) -> None:
        """How it is now; called a few times a second."""
        if self._live is not None:
            self._live.update(drawn(glance))
        elif self._clock() - self._said > QUIET_S:
            self.tell(glance.line())


def drawn(glance: Glance) -> Group:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("node", "", "step"):
        table.add_column(name, justify="right" if name == "step" else "left")
    for name, state, step in glance.nodes:
        style = {"works": "green", "ended with 0": "dim"}.get(state, "yellow")
        table.add_row(f"{name} leads" if name == glance.leader else name, Text(state, style), str(step or "–"))
    head = f"{glance.seconds:6.1f} s  step {glance.step}, generation {glance.generation}; waits for {glance.awaits}"
    return Group(Text(head, "bold"), table)
