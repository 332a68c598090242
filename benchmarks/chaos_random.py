"""What comes of faults that are drawn by their published frequencies: many runs, judged, added up.

    python benchmarks/chaos_random.py --seeds 100 --folder DIR
    python benchmarks/chaos_random.py --seeds 100 --folder DIR --write    also update benchmarks/RESULTS.md

Each run trains `tests/chaos_script.py` on three nodes in namespaces for half a minute of faults. What is in DIR already
is not run again, so a range can be run in parts. No time decides whether a run passed: the machine may be busy.
"""

import argparse
import datetime
import json
from dataclasses import replace
from pathlib import Path

import machine
from results import write_section

from ckpt.console import Json
from elastic.chaos.command import REPORT, execute, scenario_of, summary
from elastic.chaos.ground import abilities

SCRIPT = Path(__file__).resolve().parent.parent / "tests" / "chaos_script.py"
MINUTES, STEPS, EVERY, LIMIT_S = 0.5, 700, 10, 900.0


def report_of(seed: int, folder: Path) -> Json:
    """The report of this seed's run, which is run if there is none yet."""
    if (there := folder / REPORT).exists():
        return dict(json.loads(there.read_text()))
    can = abilities()
    drawn = scenario_of("random", seed, MINUTES, can)
    patient = replace(drawn, limit_s=LIMIT_S, promise=replace(drawn.promise, recovery_s=LIMIT_S))
    return execute(patient, [str(SCRIPT), str(STEPS), str(EVERY)], folder, seed=seed, can=can)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    reports = []
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        report = report_of(seed, arguments.folder / f"seed-{seed}")
        red = [one for one in report["oracles"] if one["verdict"] == "red"]
        print(f"seed {seed}: {len(report['faults'])} faults, {'FAILED' if red else 'passed'} {red or ''}", flush=True)
        reports.append(report)
    section = told(summary(reports), arguments.seed)
    print(section)
    if arguments.write:
        write_section("chaos_random", section)


def told(found: Json, first: int) -> str:
    last, faults = first + found["runs"] - 1, found["faults"]
    kinds = ", ".join(f"{number} x `{kind}`" for kind, number in sorted(faults.items(), key=lambda item: -item[1]))
    failed = f"; failed: seeds {', '.join(map(str, found['failed_seeds']))}" if found["failed_seeds"] else ""
    return "\n".join(
        [
            "## Faults drawn by their published frequencies",
            "",
            f"`python benchmarks/chaos_random.py --seed {first} --seeds {found['runs']} --folder DIR --write`,",
            f"{datetime.date.today()}, {machine.describe(machine.default_folder())}.",
            f"Three nodes in namespaces, {MINUTES:g} minutes of faults a run, a save every {EVERY} steps.",
            "",
            f"- {found['passed']} of {found['runs']} runs (seeds {first} to {last}) passed every oracle{failed}.",
            f"- {sum(faults.values())} faults: {kinds}.",
            f"- {found['steps_computed_again']} of {found['steps']} steps were computed again.",
            f"- From a fault to the next step that only a recovered run makes: {found['median_recovery_s']} s in the",
            f"  median, {found['worst_recovery_s']} s at worst, on a machine that did other work, too.",
        ]
    )


if __name__ == "__main__":
    main()
