"""What stock torchrun + DCP survives of the scenarios of workers and agents, beside elastic + ckpt, judged alike.

    python benchmarks/chaos_stock.py                 each scenario 5 times with each, taking turns
    python benchmarks/chaos_stock.py --rounds 1
    python benchmarks/chaos_stock.py --write         also update benchmarks/RESULTS.md

A run is survived if every agent that was not taken away ended with 0 in time, and no committed step was lost. Each run
leaves its report.html below --folder. Needs root for nodes in namespaces.
"""

import argparse
import datetime
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
from results import write_section

from elastic.chaos.command import execute, shipped
from elastic.chaos.ground import abilities
from elastic.chaos.scenario import Scenario

JOB = Path(__file__).with_name("chaos_job.py")
SCENARIOS = ("worker-kill", "worker-error", "hang", "during-recovery", "agent-kill", "leader-loss", "node-loss")
LAUNCHERS = {"elastic": "elastic + ckpt", "torchrun": "stock torchrun + DCP"}
NODES, STEPS, LIMIT_S = 2, 60, 200.0


def scenario_of(name: str, launcher: str) -> Scenario:
    """The shipped scenario on two nodes; `worker-error` is `worker-kill` by an exception."""
    found = shipped()["worker-kill" if name == "worker-error" else name].with_nodes(NODES)
    if name == "worker-error":
        found = replace(found, name=name, faults=tuple(replace(one, kind=name) for one in found.faults))
    faults = tuple(replace(one, node="any") if one.node in ("leader", "follower") else one for one in found.faults)
    if name == "leader-loss":  # whoever it is: torchrun's is the first
        faults = tuple(replace(one, node="n1" if launcher == "torchrun" else "leader") for one in faults)
    promise = replace(found.promise, recovery_s=LIMIT_S)
    environment = {**found.environment, "ELASTIC_HANG_LIMIT_S": "10"}
    return replace(found, faults=faults, promise=promise, limit_s=LIMIT_S, launcher=launcher, environment=environment)


def one(name: str, launcher: str, folder: Path, seed: int) -> dict[str, Any]:
    library = "stock" if launcher == "torchrun" else "elastic"
    scenario = scenario_of(name, launcher)
    report = execute(scenario, [str(JOB), library, str(STEPS)], folder, seed=seed, can=abilities())
    verdicts = {found["oracle"].split(" was not")[0]: found["verdict"] for found in report["oracles"]}
    ended = next(found for found in report["oracles"] if found["oracle"].startswith("every agent that was not"))
    lost = verdicts["no committed step was lost"]
    survived = ended["verdict"] == "green" and lost == "green" and not report["missed"]
    return {"survived": survived, "recovery_s": report["figures"]["worst_recovery_s"], "ended": ended["evidence"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scenarios", nargs="*", default=SCENARIOS)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="holdfast-stock-"))
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for round_ in range(arguments.rounds):
        for name in arguments.scenarios:
            for launcher in LAUNCHERS:
                said = one(name, launcher, folder / f"{name}-{launcher}-{round_}", round_)
                found.setdefault((name, launcher), []).append(said)
                print(f"{name}, {LAUNCHERS[launcher]}: {said}", flush=True)
    section = table(found, arguments.rounds)
    print(section)
    if arguments.write:
        write_section("chaos_stock", section)


def table(found: dict[tuple[str, str], list[dict[str, Any]]], rounds: int) -> str:
    lines = [
        "## The same failures under stock torchrun + DCP",
        "",
        f"`python benchmarks/chaos_stock.py --rounds {rounds} --write`, {datetime.date.today()},",
        f"{machine.describe(machine.default_folder())}.",
        "Two nodes in namespaces, one worker each, a save every second step. Survived: all agents that were not",
        "taken away ended with 0 in time, and no committed step was lost. Seconds: from the fault to the first step",
        f"of the next generation, median of the runs that were survived; a run may take {LIMIT_S:g} s.",
        "",
        "| scenario | " + " | ".join(f"{what}: survived | s" for what in LAUNCHERS.values()) + " |",
        "|---|" + "---|---|" * len(LAUNCHERS),
    ]
    for name in dict.fromkeys(name for name, _ in found):
        cells = []
        for launcher in LAUNCHERS:
            runs = found[name, launcher]
            took = [run["recovery_s"] for run in runs if run["survived"] and run["recovery_s"] is not None]
            seconds = f"{statistics.median(took):.1f}" if took else "–"
            cells += [f"{sum(run['survived'] for run in runs)} of {len(runs)}", seconds]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
