"""The command `elastic chaos`: runs a scenario, and says how it ended."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import click

from ckpt.console import Json, columns, output, say
from ckpt.errors import Incompatible, NotFound
from elastic.chaos.conduct import Look, Tell, conduct
from elastic.chaos.faults import FAULTS
from elastic.chaos.ground import abilities
from elastic.chaos.judge import judge
from elastic.chaos.scenario import S3, Scenario, draw, parse
from elastic.chaos.store_faults import DiskFull, StoreErrors
from elastic.chaos.trace import recorded, replay
from elastic.chaos.watch import Screen
from elastic.report import document, page

EXIT_TERMINATED = 143
REMEDIES = {
    "s3": "the extra holdfast[s3], and moto_server on PATH (pipx install 'moto[server]')",
    "strace": "root, and strace", "disk": "root, and e2fsprogs", "tc": "root, and iproute2",
}  # fmt: skip
RANDOM, REPLAY = "random", "replay"
REPORT = "report.json"
RANDOM_HEAL_S = {"node-loss": 3.0, "maintenance": 3.0, "link-cut": 8.0, "freeze": 8.0, "slow-link": 8.0}


def shipped() -> dict[str, Scenario]:
    """The scenarios that come with the library, by name."""
    found = sorted(files("elastic.chaos").joinpath("scenarios").iterdir(), key=lambda file: file.name)
    named = ((file.name.removesuffix(".toml"), file.read_text()) for file in found if file.name.endswith(".toml"))
    return {name: parse(text, name) for name, text in named}


def scenario_of(name: str, seed: int, minutes: float, can: frozenset[str]) -> Scenario:
    """The scenario of this name or in this file; `random` is drawn. NotFound if there is none such."""
    if name == RANDOM:
        shares = {kind: fault.share for kind, fault in FAULTS.items() if fault.share and fault.needs <= can}
        shares.pop("bit-rot", None)  # it ends a run that was not written to fall back
        return draw(f"{RANDOM}-{seed}", minutes, shares, RANDOM_HEAL_S, Random(seed).random)
    if name.startswith(f"{REPLAY}:"):
        return replay_of(Path(name.removeprefix(f"{REPLAY}:")), seed, minutes, can)
    if Path(name).suffix == ".toml" and Path(name).is_file():
        return parse(Path(name).read_text(), Path(name).stem)
    if name in (known := shipped()):
        return known[name]
    raise NotFound(f"no scenario {name!r}: a TOML file, {RANDOM}, {REPLAY}, or one of {', '.join(known)}")


def replay_of(file: Path, seed: int, minutes: float, can: frozenset[str]) -> Scenario:
    """A stretch of the trace in `file`, drawn with the seed."""
    if not file.is_file():
        raise NotFound(f"no trace {file}: `elastic chaos replay TRACE.json -- SCRIPT`")
    kinds = {kind for kind, fault in FAULTS.items() if fault.needs <= can}
    events = json.loads(file.read_text())
    return replay(f"{REPLAY}-{seed}", recorded(events), minutes, kinds, Random(seed).random)


def listing() -> Json:
    """What faults and scenarios there are, what each needs, and what this machine lacks of it."""
    can = abilities()
    faults = [
        {
            "kind": kind,
            "stands_for": fault.stands_for,
            "share_percent": fault.share,
            "promise": fault.promise,
            "needs": sorted(fault.needs),
            "lacks": sorted(fault.needs - can),
        }
        for kind, fault in FAULTS.items()
    ]
    scenarios = [
        {"name": name, "title": scenario.title, "nodes": scenario.nodes, "lacks": sorted(needs(scenario) - can)}
        for name, scenario in shipped().items()
    ]
    return {"faults": faults, "scenarios": scenarios}


def needs(scenario: Scenario) -> frozenset[str]:
    """What a scenario asks of the ground."""
    store = frozenset({"boxes", "disk"} if scenario.store_mb else {"s3"} if scenario.store == S3 else ())
    return store.union(*(FAULTS[fault.kind].needs for fault in scenario.faults if fault.kind in FAULTS))


def _print_listing(found: Json) -> None:
    promises = list(dict.fromkeys(one["promise"] for one in found["faults"]))
    table = columns("fault", "share", "stands for", "promise", "", right="share promise")
    for one in found["faults"]:
        share = "" if one["share_percent"] is None else f"{one['share_percent']:g} %"
        number = str(promises.index(one["promise"]) + 1)
        table.add_row(one["kind"], share, one["stands_for"], number, _lacks(one))
    say(table)
    say("\nshare: of the causes that Meta published (arXiv 2407.21783, table 5). What is promised:")
    table = columns("", "", right="")
    table.show_header = False
    for place, promise in enumerate(promises, 1):
        table.add_row(str(place), promise)
    say(table)
    say("")
    table = columns("scenario", "nodes", "", "", right="nodes")
    for one in found["scenarios"]:
        table.add_row(one["name"], str(one["nodes"]), one["title"], _lacks(one))
    say(table)


def _lacks(found: Json) -> str:
    return f"needs {', '.join(found['lacks'])}" if found["lacks"] else ""


def show_listing(as_json: bool) -> None:
    output(listing(), as_json, _print_listing)


def run(
    name: str, command: Sequence[str], *, seeds: range, nodes: int | None, minutes: float, folder: str | None,
    reference: bool, as_processes: bool, as_json: bool,
) -> int:  # fmt: skip
    """Run, judge, write the report, for each seed; 0 if no oracle is red. What is there already is not run again."""
    can = abilities(boxes=not as_processes)
    if name == REPLAY:
        name, command = f"{REPLAY}:{command[0]}", command[1:]
    place = Path(folder) if folder else Path(tempfile.mkdtemp(prefix=f"chaos-{time.strftime('%m%d-%H%M%S')}-"))
    found = []
    for seed in seeds:
        scenario = checked(scenario_of(name, seed, minutes, can), nodes, can)
        here = place / f"seed-{seed}" if len(seeds) > 1 else place
        click.echo(f"{scenario.name}: {scenario.title}; everything goes to {here}", err=True)
        if len(seeds) > 1 and (report := here / REPORT).exists():
            found.append(json.loads(report.read_text()))
            continue
        try:
            with Screen() as screen:
                done = execute(scenario, command, here, seed=seed, can=can, reference=reference,
                               tell=screen.tell, look=screen.look)  # fmt: skip
            found.append(done)
        except asyncio.CancelledError:
            return EXIT_TERMINATED
    if len(seeds) > 1:
        output(summary(found), as_json, _print_summary)
    else:
        short = {key: found[0][key] for key in ("passed", "figures", "oracles")}
        output(short | {"folder": str(place)}, as_json, _print)
    return 0 if all(one["passed"] for one in found) else 1


def checked(scenario: Scenario, nodes: int | None, can: frozenset[str]) -> Scenario:
    """The scenario on so many nodes. NotFound if it asks for what there is not."""
    if unknown := sorted({fault.kind for fault in scenario.faults} - FAULTS.keys()):
        raise NotFound(f"no fault {', '.join(unknown)}: `elastic chaos --list` shows what there is")
    if lacks := sorted(needs(scenario) - can):
        found = "; ".join(f"{name}: {REMEDIES.get(name, 'root on Linux')}" for name in lacks)
        raise NotFound(f"{scenario.name} needs what is not there: {found}")
    for fault in (FAULTS[one.kind] for one in scenario.faults):
        if issubclass(fault, DiskFull) and not scenario.store_mb:
            raise Incompatible(f"{scenario.name}: {fault.kind} needs a disk of its own for the run: set store_mb")
        if issubclass(fault, StoreErrors) != (scenario.store == S3) and fault.storage:
            raise Incompatible(f'{scenario.name}: {fault.kind} and store = "{scenario.store}" do not go together')
    return scenario if nodes is None else scenario.with_nodes(nodes)


def execute(
    scenario: Scenario, command: Sequence[str], folder: Path, *, seed: int, can: frozenset[str],
    reference: bool = False, tell: Tell = lambda text: None, look: Look = lambda glance: None,
) -> Json:  # fmt: skip
    """Run the scenario once, judge it, and write report.json and report.html into `folder`; the report."""
    evidence = conduct(scenario, command, folder, seed=seed, can=can, reference=reference, tell=tell, look=look)
    judgements = judge(evidence)
    found = document(evidence, judgements)
    style = files("elastic").joinpath("report.css").read_text()
    (folder / "report.html").write_text(page(evidence, judgements, style))
    (folder / REPORT).write_text(json.dumps(found, allow_nan=False))
    return found


def summary(reports: Sequence[Json]) -> Json:
    """What many runs come to: faults by kind, and how they were survived."""
    faults = [fault for report in reports for fault in report["faults"]]
    took = sorted(fault["recovered_at"] - fault["at"] for fault in faults if fault["recovered_at"] is not None)
    return {
        "runs": len(reports),
        "passed": sum(report["passed"] for report in reports),
        "failed_seeds": [report["seed"] for report in reports if not report["passed"]],
        "faults": dict(sorted(Counter(fault["kind"] for fault in faults).items())),
        "steps": sum(report["figures"]["steps"] for report in reports),
        "steps_computed_again": sum(report["figures"]["steps_computed_again"] for report in reports),
        "median_recovery_s": round(took[len(took) // 2], 2) if took else None,
        "worst_recovery_s": round(took[-1], 2) if took else None,
    }


def _print_summary(found: Json) -> None:
    say(f"{found['passed']} of {found['runs']} runs passed")
    if found["failed_seeds"]:
        say(f"failed: seeds {', '.join(map(str, found['failed_seeds']))}")
    table = columns("fault", "injected", right="injected")
    for kind, number in found["faults"].items():
        table.add_row(kind, str(number))
    say(table)
    say(f"{found['steps_computed_again']} of {found['steps']} steps computed again; "
        f"recovery {found['median_recovery_s']} s in the median, {found['worst_recovery_s']} s at worst")  # fmt: skip


def _print(found: dict[str, Any]) -> None:
    table = columns("", "oracle", "evidence")
    for one in found["oracles"]:
        table.add_row(one["verdict"], one["oracle"], one["evidence"])
    say(table)
    figures = found["figures"]
    worst = "-" if figures["worst_recovery_s"] is None else f"{figures['worst_recovery_s']:g} s"
    again = figures["steps_computed_again"]
    say(f"goodput {figures['goodput']:.0%}, worst recovery {worst}, {again} steps computed again")
    say(f"{'passed' if found['passed'] else 'FAILED'}: {found['folder']}/report.html")
