"""Nodes for tests of the faults themselves, with stand-ins for agents. No torch."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from servers import INSTALLED

from elastic.chaos.ground import Ground, abilities, outlived
from elastic.chaos.scenario import Scenario

TESTS = Path(__file__).parent
# What `make servers` installed, at the end: a server's folder has a Python, too.
os.environ["PATH"] += "".join(f"{os.pathsep}{INSTALLED / name}" for name in ("python/bin", "tools/bin"))
CAN = abilities()
DEADLINE_S = 30.0


@asynccontextmanager
async def ground_of(
    folder: Path, can: frozenset[str], nodes: int = 2, command: Sequence[str] = (), **more: Any
) -> AsyncIterator[Ground]:
    """Nodes with stand-in agents, which see what `command` names; nothing is left of them. `more`: of the scenario."""
    scenario = replace(Scenario("faults", "faults themselves", (), nodes=nodes + 1), **more)
    ground = Ground(scenario, folder, command, can, 0, time.monotonic())
    agent = [sys.executable, "-S", str(TESTS / "chaos_agent.py"), *(["answers"] if "boxes" in can else [])]
    ground.place = replace(ground.place, command=agent, keep=(*ground.place.keep, str(TESTS.parent)))
    try:
        await ground.open()
        for _ in range(nodes):
            await ground.add()
        await soon(lambda: len({mark.node for mark in ground.listener.marks if mark.name == "step"}) == nodes)
        yield ground
    finally:
        await ground.close()
    assert not outlived(ground)


async def soon(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.01)
