"""A pytest plugin, found by itself where this library is installed: the fixture `chaos`.

def test_my_script_survives_a_lost_node(chaos):
    report = chaos("node-loss", ["train.py", "--steps", "100"])
    assert report["figures"]["steps_computed_again"] < 10
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from elastic.chaos.scenario import Scenario


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "prove: the full-size proof of something that is tried in small, too")


@pytest.fixture
def chaos(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a script through a scenario: its name, a TOML file, or a `Scenario`. The report, as in report.json.

    The test fails if an oracle is red, and is skipped where the scenario needs what this machine cannot do. `seed`,
    `nodes` and `reference` as in `elastic chaos`; `processes=True` does without namespaces.
    """

    def run(
        scenario: str | Scenario, command: Sequence[str], *, seed: int = 0, nodes: int | None = None,
        reference: bool = False, processes: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        from elastic.chaos.command import execute, needs, scenario_of
        from elastic.chaos.ground import abilities

        can = abilities(boxes=not processes)
        chosen = scenario_of(scenario, seed, 1.0, can) if isinstance(scenario, str) else scenario
        chosen = chosen if nodes is None else chosen.with_nodes(nodes)
        if lacks := needs(chosen) - can:
            pytest.skip(f"{chosen.name} needs {', '.join(sorted(lacks))}")
        folder = tmp_path / "chaos"
        report = execute(chosen, command, folder, seed=seed, can=can, reference=reference, tell=print)
        red = [f"{one['oracle']}: {one['evidence']}" for one in report["oracles"] if one["verdict"] == "red"]
        for log in sorted(folder.glob("*.log")) if red else []:
            print(f"==== {log.name}\n{log.read_text(errors='replace')[-4000:]}")
        assert not red, "; ".join(red)
        return report

    return run
