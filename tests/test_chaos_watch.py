"""What a chaos run shows while it runs, at a terminal and where there is none."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from elastic.chaos.watch import QUIET_S, Glance, Screen

GLANCE = Glance(12.3, 34, 2, "n2", "a step after node-loss", (("n1", "its node was lost", 33), ("n2", "works", 34)))


def shown(terminal: bool) -> str:
    """Half a minute of it: a look each second, and one line that is told."""
    out, now = io.StringIO(), [0.0]
    console = Console(file=out, force_terminal=terminal, width=80)
    with Screen(console, lambda: now[0]) as screen:
        for second in range(31):
            now[0] = float(second)
            screen.look(replace(GLANCE, seconds=float(second)))
            if second == 10:
                screen.tell("  10.0 s  [n1] lost power")
    return out.getvalue()


def test_a_terminal_shows_every_node() -> None:
    said = shown(True)
    assert "n2 leads" in said
    assert "its node was lost" in said
    assert "[n1] lost power" in said, "what is told is no markup"


def test_without_a_terminal_a_line_comes_where_nothing_was_told_for_long() -> None:
    first, second = shown(False).splitlines()
    assert first == "  10.0 s  [n1] lost power"
    assert second.startswith(f"{10 + QUIET_S + 1:6.1f} s  step 34, generation 2; n1: its node was lost; n2: works")
