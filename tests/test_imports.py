"""Imports flow one way. The order below is the architecture; a module imports only what stands above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ORDER = [
    "ckpt.errors",
    "ckpt.events",
    "ckpt.arguments",
    "ckpt.interval",
    "ckpt.figures",
    "ckpt.slices",
    "ckpt.sharding",
    "ckpt.layout",
    "ckpt.symbolic",
    "ckpt.codec",
    "ckpt.manifest",
    "ckpt.records",
    "ckpt.signing",
    "ckpt.log",
    "ckpt.retention",
    "ckpt.plan",
    "ckpt.packing",
    "ckpt.direct",
    "ckpt.store",
    "ckpt.stores.posix",
    "ckpt.stores.bucket",
    "ckpt.stores.objects",
    "ckpt.stores.s3",
    "ckpt.stores.anyfs",
    "ckpt.stores.azure",
    "ckpt.stores.gcs",
    "ckpt.stores",
    "ckpt.datafile",
    "ckpt.run",
    "ckpt.holder",
    "ckpt.pins",
    "ckpt.wire",
    "ckpt.owntime",
    "ckpt.board",
    "ckpt.keeper",
    "ckpt.keeper.address",
    "ckpt.keeper.orders",
    "ckpt.keeper.ram",
    "ckpt.keeper.stock",
    "ckpt.keeper.persist",
    "ckpt.keeper.packer",
    "ckpt.keeper.coordinator",
    "ckpt.keeper.hub",
    "ckpt.keeper.node",
    "ckpt.keeper.process",
    "ckpt.keeper.__main__",
    "ckpt.keeper.courier",
    "ckpt.adapt.fence",
    "ckpt.adapt.values",
    "ckpt.adapt.wrappers",
    "ckpt.adapt.tensors",
    "ckpt.adapt.modules",
    "ckpt.adapt.state",
    "ckpt.adapt.optimizers",
    "ckpt.adapt.fsdp1",
    "ckpt.adapt.members",
    "ckpt.adapt",
    "ckpt.echo",
    "ckpt.buffers",
    "ckpt.reading",
    "ckpt.stage",
    "ckpt.ranks",
    "ckpt.agreement",
    "ckpt.exchange",
    "ckpt.handle",
    "ckpt.process",
    "ckpt.saver",
    "ckpt.resume",
    "ckpt.restorer",
    "ckpt.loader",
    "ckpt.readers",
    "ckpt.checkpointer",
    "ckpt",
    "ckpt.integrations",
    "ckpt.integrations.rng",
    "ckpt.integrations.accelerate",
    "ckpt.integrations.transformers",
    "ckpt.integrations.lightning",
    "ckpt.check",
    "ckpt.writing",
    "ckpt.copying",
    "ckpt.interop",
    "ckpt.interop.optimizers",
    "ckpt.interop.tree",
    "ckpt.interop.files",
    "ckpt.interop.hf",
    "ckpt.interop.folder",
    "ckpt.interop.torchfile",
    "ckpt.interop.trusted",
    "ckpt.interop.metadata",
    "ckpt.interop.dcpfiles",
    "ckpt.interop.moving",
    "ckpt.interop.dcp",
    "ckpt.doctor",
    "ckpt.bench",
    "ckpt.diff",
    "ckpt.console",
    "ckpt.cli.look",
    "ckpt.cli.verify",
    "ckpt.cli.change",
    "ckpt.cli.move",
    "ckpt.cli.resume",
    "ckpt.cli.doctor",
    "ckpt.cli.bench",
    "ckpt.cli.diff",
    "ckpt.cli",
    "ckpt.cli.__main__",
    "ckpt.testing",
    "ckpt.testing.conformance",
    "ckpt.testing.crash",
    "ckpt.testing.proxy",
    "elastic.order",
    "elastic.data",
    "elastic",
    "elastic.failures",
    "elastic.membership",
    "elastic.decide",
    "elastic.messages",
    "elastic.actions",
    "elastic.leading",
    "elastic.agent",
    "elastic.options",
    "elastic.network",
    "elastic.registry",
    "elastic.roster",
    "elastic.guard",
    "elastic.stacks",
    "elastic.crew",
    "elastic.settling",
    "elastic.workers",
    "elastic.standby",
    "elastic.warm",
    "elastic.hooks",
    "elastic.links",
    "elastic.logs",
    "elastic.notices",
    "elastic.ledger",
    "elastic.service",
    "elastic.handler",
    "elastic.status",
    "elastic.goodput",
    "elastic.evidence",
    "elastic.report",
    "elastic.history",
    "elastic.chaos",
    "elastic.chaos.scenario",
    "elastic.chaos.trace",
    "elastic.chaos.judge",
    "elastic.chaos.listen",
    "elastic.chaos.node_init",
    "elastic.chaos.processes",
    "elastic.chaos.cgroups",
    "elastic.chaos.held",
    "elastic.chaos.nodes",
    "elastic.chaos.disk",
    "elastic.chaos.bucket",
    "elastic.chaos.ground",
    "elastic.chaos.fault",
    "elastic.chaos.damage",
    "elastic.chaos.clock_site.sitecustomize",
    "elastic.chaos.live",
    "elastic.chaos.store_faults",
    "elastic.chaos.faults",
    "elastic.chaos.watch",
    "elastic.chaos.conduct",
    "elastic.chaos.command",
    "elastic.chaos.fixture",
    "elastic.cli",
]
PURE = [
    "ckpt.errors",
    "ckpt.interval",
    "ckpt.slices",
    "ckpt.sharding",
    "ckpt.layout",
    "ckpt.symbolic",
    "ckpt.codec",
    "ckpt.manifest",
    "ckpt.records",
    "ckpt.log",
    "ckpt.retention",
    "ckpt.plan",
    "ckpt.keeper.stock",
    "elastic.order",
    "elastic.failures",
    "elastic.membership",
    "elastic.decide",
    "elastic.messages",
    "elastic.actions",
    "elastic.leading",
    "elastic.agent",
    "elastic.goodput",
    "elastic.evidence",
    "elastic.report",
    "elastic.chaos.scenario",
    "elastic.chaos.trace",
    "elastic.chaos.judge",
]
IMPURE = {"torch", "os", "time", "threading", "logging", "random", "socket", "secrets"}


def _modules() -> dict[str, Path]:
    found = {}
    for package in ("ckpt", "elastic"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path
    return found


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("name", _modules())
def test_a_module_imports_only_what_stands_above_it(name: str) -> None:
    assert name in ORDER, f"give {name} its place in ORDER"
    allowed = set(ORDER[: ORDER.index(name)])
    ours = {i for i in _imports(_modules()[name]) if i in ORDER}
    parents = {
        parent
        for i in ours
        for parent in [i.rpartition(".")[0]]
        if parent in {"ckpt.adapt", "ckpt.keeper", "ckpt.stores", "ckpt.integrations", "ckpt", "elastic"}
    }
    assert ours - allowed - parents == set()


@pytest.mark.parametrize("name", PURE)
def test_the_core_decides_without_torch_clock_or_files(name: str) -> None:
    tops = {i.split(".")[0] for i in _imports(_modules()[name])}
    assert tops & IMPURE == set()


def test_the_keeper_and_the_commands_start_without_torch() -> None:
    for name in ("ckpt.keeper.process", "ckpt.keeper.courier", "ckpt.cli", "elastic.cli"):
        code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0, name


def test_a_framework_is_imported_by_its_own_adapter_alone() -> None:
    frameworks = {"accelerate", "lightning", "peft", "torchdata", "transformers"}
    names = [name for name in _modules() if not name.startswith("ckpt.integrations.") and "__main__" not in name]
    found = {name: frameworks & {i.split(".")[0] for i in _imports(_modules()[name])} for name in names}
    assert {name for name, theirs in found.items() if theirs} == set()
    imported = ", ".join(name for name in names if name.startswith("ckpt"))
    code = f"import sys, {imported}; sys.exit(bool({frameworks!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_ckpt_never_imports_elastic() -> None:
    assert not [
        n
        for n, path in _modules().items()
        if n.startswith("ckpt") and any(i.split(".")[0] == "elastic" for i in _imports(path))
    ]
