"""The command `elastic chaos`: runs a scenario, and says how it ended."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import click

from ckpt.console import Json, columns, output, say
from ckpt.errors import NotFound
from elastic.chaos.conduct import conduct
from elastic.chaos.faults import FAULTS
from elastic.chaos.ground import abilities
from elastic.chaos.judge import judge, passed
from elastic.chaos.report import document, page
from elastic.chaos.scenario import Scenario, draw, parse

EXIT_TERMINATED = 143
RANDOM = "random"
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
    if Path(name).suffix == ".toml" and Path(name).is_file():
        return parse(Path(name).read_text(), Path(name).stem)
    if name in (known := shipped()):
        return known[name]
    raise NotFound(f"no scenario {name!r}: a TOML file, {RANDOM}, or one of {', '.join(known)}")


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
    disk = frozenset({"boxes", "disk"} if scenario.store_mb else ())
    return disk.union(*(FAULTS[fault.kind].needs for fault in scenario.faults if fault.kind in FAULTS))


def _print_listing(found: Json) -> None:
    table = columns("fault", "stands for", "of all causes", "promise", "here", right="")
    for one in found["faults"]:
        share = "" if one["share_percent"] is None else f"{one['share_percent']:g} %"
        lacks = f"needs {', '.join(one['lacks'])}" if one["lacks"] else "yes"
        table.add_row(one["kind"], one["stands_for"], share, one["promise"], lacks)
    say(table)
    say("")
    table = columns("scenario", "nodes", "", "here", right="nodes")
    for one in found["scenarios"]:
        lacks = f"needs {', '.join(one['lacks'])}" if one["lacks"] else "yes"
        table.add_row(one["name"], str(one["nodes"]), one["title"], lacks)
    say(table)


def show_listing(as_json: bool) -> None:
    output(listing(), as_json, _print_listing)


def run(
    name: str, command: Sequence[str], *, seed: int, nodes: int | None, minutes: float, folder: str | None,
    reference: bool, as_processes: bool, as_json: bool,
) -> int:  # fmt: skip
    """Run, judge, write the report; 0 if no oracle is red."""
    can = frozenset[str]() if as_processes else abilities()
    scenario = scenario_of(name, seed, minutes, can)
    if nodes is not None:
        scenario = scenario.with_nodes(nodes)
    if unknown := sorted({fault.kind for fault in scenario.faults} - FAULTS.keys()):
        raise NotFound(f"no fault {', '.join(unknown)}: `elastic chaos --list` shows what there is")
    if lacks := needs(scenario) - can:
        raise NotFound(f"{scenario.name} needs {', '.join(sorted(lacks))}, which is not there: root on Linux is needed")
    place = Path(folder) if folder else Path(tempfile.mkdtemp(prefix=f"chaos-{time.strftime('%m%d-%H%M%S')}-"))
    click.echo(f"{scenario.name}: {scenario.title}; everything goes to {place}", err=True)
    try:
        evidence = conduct(
            scenario, command, place, seed=seed, can=can, reference=reference,
            tell=lambda text: click.echo(text, err=True),
        )  # fmt: skip
    except asyncio.CancelledError:
        return EXIT_TERMINATED
    judgements = judge(evidence)
    found = document(evidence, judgements)
    (place / "report.json").write_text(json.dumps(found))
    style = files("elastic.chaos").joinpath("report.css").read_text()
    (place / "report.html").write_text(page(evidence, judgements, style))
    output({key: found[key] for key in ("passed", "figures", "oracles")} | {"folder": str(place)}, as_json, _print)
    return 0 if passed(judgements) else 1


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
