"""The command `ckpt`: look at a run's directory from a shell. Only `gc` writes to it.

Owns what is printed. Data goes to stdout, as tables or with --json as one JSON document; progress, warnings and
errors go to stderr, and the exit code says how it ended (`ckpt --help` lists them). At a terminal, tables fit its
width and long names are wrapped; elsewhere a row is one line of plain text, never cut short, without colour.
"""

from __future__ import annotations

import io
import json
import math
import reprlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from functools import partial
from itertools import groupby
from typing import Any, Literal, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from ckpt.check import Finding, Report, Values, check_log, check_step
from ckpt.errors import CkptError, Corrupt, Fenced, Incompatible, NotFound
from ckpt.holder import Holder, carry_out, find_commit, is_gone
from ckpt.layout import World
from ckpt.log import View
from ckpt.manifest import Part, placement_code
from ckpt.records import Commit
from ckpt.restorer import StepReader
from ckpt.retention import Best, Keep, Plan, plan_retention
from ckpt.run import RunDirectory
from ckpt.sharding import Declared, OnMesh, Sharding

Json = dict[str, Any]

url_argument = click.argument("url", envvar="CKPT_URL", metavar="URL")
step_option = click.option("--step", type=click.IntRange(min=0), metavar="N", help="A step; else the newest.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="holdfast")
def cli() -> None:
    """Look at the checkpoints of a training run.

    URL is the directory of the run, as given to ckpt.Checkpointer; where it is left out, $CKPT_URL counts. Nothing but
    gc ever writes, so all else is safe beside a run that trains. Errors go to stderr, with --json too.

    \b
    Examples:
      ckpt ls /data/run                    which steps are there
      ckpt show /data/run --step 2000      what step 2000 holds, and who wrote it
      ckpt check /data/run --all           is every byte still what was saved
      ckpt gc /data/run --last 3 --dry-run what would be deleted
      ckpt ls /data/run --json | jq '.steps[-1].step'

    \b
    Exit codes:
      0 ok   1 failure   2 wrong usage   10 no checkpoint or no such step
      11 fenced   12 corrupt   13 incompatible   130 interrupted
    """


@cli.command("ls")
@url_argument
@json_option
def list_steps(url: str, as_json: bool) -> None:
    """List the steps of a run.

    First the lineage, oldest first: the newest step (the head) and those it was built on. Then what lies outside:
    steps left behind when the run went back, and attempts without a commit record, which are being written right now
    or were abandoned. Steps deleted by retention are only counted. Exits 10 if there is no step.

    \b
    Examples:
      ckpt ls /data/run
      ckpt ls /data/run --json | jq '.steps[] | [.step, .metrics.val_loss]'

    \b
    --json prints
      {"url": str, "generation": int, "head": int | null, "deleted": int,
       "steps": [STEP, ...],     the lineage, oldest first
       "outside": [STEP, ...],   committed, not in the lineage
       "uncommitted": [{"attempt": str, "step": int, "nbytes": int,
                        "unix_s": float}, ...]}
      STEP = {"step": int, "generation": int, "attempt": str,
              "parent": str | null, "unix_s": float, "nbytes": int,
              "world": int, "content_digest": str,
              "metrics": {str: float, or "nan", "inf", "-inf"}, "pins": [str]}
    """
    run, view = _open(url)
    listing = _listing(run, view)
    _output(listing, as_json, _print_listing)
    if ignored := check_log(view):
        click.echo(f"warning: {_count(len(ignored), 'record')} of the log without effect; see `ckpt check`", err=True)
    if not listing["steps"]:
        raise NotFound(f"{run.url}: this run has no checkpoint yet")


def _listing(run: RunDirectory, view: View) -> Json:
    lineage = [commit for commit in view.lineage() if commit.attempt not in view.retired]
    outside = [commit for commit in view.outside() if commit.attempt not in view.retired]
    left = [name for name in run.attempts() if name not in view.commits and name not in view.retired]
    return {
        "url": run.url,
        "generation": view.generation,
        "head": lineage[-1].step if lineage else None,
        "deleted": len(view.retired),
        "steps": [_commit_json(commit, view) for commit in lineage],
        "outside": [_commit_json(commit, view) for commit in outside],
        "uncommitted": [found for name in left if (found := _attempt_json(run, name))],
    }


def _commit_json(commit: Commit, view: View) -> Json:
    names = ("step", "generation", "attempt", "parent", "unix_s", "nbytes", "world", "content_digest")
    metrics = {name: value if math.isfinite(value) else str(value) for name, value in commit.metrics.items()}
    pins = sorted(name for name, pin in view.pins.items() if pin.attempt == commit.attempt)
    return {**{name: getattr(commit, name) for name in names}, "metrics": metrics, "pins": pins}


def _attempt_json(run: RunDirectory, attempt: str) -> Json | None:
    """An attempt without a commit record; None if it has gone meanwhile."""
    try:
        found = run.store.usage(run.attempt_path(attempt))
    except CkptError:
        return None
    return {"attempt": attempt, "step": int(attempt.partition(".")[0]), "nbytes": found.nbytes, "unix_s": found.unix_s}


def _print_listing(listing: Json) -> None:
    table = _table("step", "gen", "age", "size", "world", "", "metrics", right="step gen age size world")
    for found in listing["steps"]:
        marks = ["head"] if found is listing["steps"][-1] else []
        marks += [f"pin:{name}" for name in found["pins"]]
        table.add_row(*_common(found), _plain(" ".join(marks)), _metrics(found["metrics"]))
    _print(table)
    if listing["deleted"]:
        _print(f"\n{listing['deleted']} more deleted by retention")
    if listing["outside"] or listing["uncommitted"]:
        _print("\nOutside of the lineage, not restored:")
        table = _table("step", "gen", "age", "size", "world", "attempt", "why", right="step gen age size world")
        for found in listing["outside"]:
            table.add_row(*_common(found), found["attempt"], "left by going back")
        for found in listing["uncommitted"]:
            table.add_row(*_common(found), found["attempt"], "no commit record")
        _print(table)


def _common(found: Json) -> list[str]:
    generation, world = (str(found.get(name, "")) for name in ("generation", "world"))
    return [str(found["step"]), generation, _age(found["unix_s"]), _size(found["nbytes"]), world]


def _metrics(metrics: Mapping[str, float | str]) -> str:
    return _plain("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in metrics.items()))


@cli.command()
@url_argument
@step_option
@json_option
def show(url: str, step: int | None, as_json: bool) -> None:
    """Show what a step holds: tensors, who wrote them, values.

    The keys are those that ckpt.load(keys=...) and restore(only=...) take. "shards" is the number of stored pieces,
    "ranks" those that wrote them. Opens the MANIFEST and all parts, no data.

    \b
    Examples:
      ckpt show /data/run
      ckpt show /data/run --step 2000 | grep lm_head

    \b
    --json prints
      {"url": str, STEP as in `ckpt ls --json`, "head": bool,
       "tensors": [{"key": str, "dtype": str, "shape": [int], "nbytes": int,
                    "sharding": str, "shards": int, "ranks": [int]}, ...],
       "tied": {other name: key}, "values": {name: str},
       "rank_values": {name: [rank, ...]}}
      Values are shown as Python writes them, shortened.
    """
    run, view = _open(url)
    _output(_describe(run, view, _find(run, view, step)), as_json, _print_step)


def _describe(run: RunDirectory, view: View, commit: Commit) -> Json:
    reader = StepReader(run, commit)
    world = reader.manifest.world
    shards: dict[str, list[int]] = {}
    rank_values: dict[str, list[int]] = {}
    for rank in range(world.size):
        for chunk in reader.part(rank).chunks:
            shards.setdefault(chunk.key, []).append(rank)
        for name in world.layout(rank).rank_values:
            rank_values.setdefault(name, []).append(rank)
    stand_ins = Values(world)
    values = {name: _value(stand_ins, reader.part(r), name) for name, r in sorted(world.value_owner.items())}
    return {
        "url": run.url,
        **_commit_json(commit, view),
        "head": view.head is commit,
        "tensors": [_tensor_json(world, key, shards.get(key, [])) for key in sorted(world.specs)],
        "tied": dict(sorted(world.aliases.items())),
        "values": values,
        "rank_values": dict(sorted(rank_values.items())),
    }


def _value(stand_ins: Values, part: Part, name: str) -> str:
    if name not in part.values:
        raise Corrupt(f"the part of rank {part.rank} lacks the value {name}")
    try:
        return _short(stand_ins.decode(name, part.values[name]))
    except Incompatible as error:
        return f"({error})"


def _tensor_json(world: World, key: str, writers: Sequence[int]) -> Json:
    spec, sharding = world.specs[key], _sharding_words(list(world.instances[key]))
    described = {"key": key, "dtype": spec.dtype, "shape": list(spec.shape), "nbytes": spec.nbytes}
    return {**described, "sharding": sharding, "shards": len(writers), "ranks": sorted(set(writers))}


def _sharding_words(shardings: Sequence[Sharding]) -> str:
    """`whole`, `mesh 2x4: R, S0` or `declared`; several, where ranks hold a tensor in several ways."""
    words: list[str] = []
    for sharding in shardings:
        if isinstance(sharding, OnMesh):
            placements = ", ".join(map(placement_code, sharding.placements))
            words.append(f"mesh {'x'.join(map(str, sharding.mesh.shape))}: {placements}")
        else:
            words.append("declared" if isinstance(sharding, Declared) else "whole")
    return "; ".join(dict.fromkeys(words))


def _print_step(found: Json) -> None:
    nbytes = sum(tensor["nbytes"] for tensor in found["tensors"])
    _print(f"step {found['step']} of {_plain(found['url'])}{' (head)' if found['head'] else ''}\n")
    facts = {
        "saved": f"{datetime.fromtimestamp(found['unix_s']):%Y-%m-%d %H:%M:%S}, {_age(found['unix_s'])} ago",
        "generation": str(found["generation"]),
        "attempt": found["attempt"],
        "parent": found["parent"] or "none, the first of its lineage",
        "world": _count(found["world"], "rank"),
        "size": f"{_size(found['nbytes'])} on disk; {_count(len(found['tensors']), 'tensor')} of {_size(nbytes)}",
        "content": found["content_digest"],
        "metrics": _metrics(found["metrics"]) or "none",
        **({"pinned as": _plain(", ".join(found["pins"]))} if found["pins"] else {}),
    }
    for name, fact in facts.items():
        _print(f"{name:<11}{fact}")
    _print("")
    table = _table("tensor", "dtype", "shape", "sharding", "shards", "ranks", right="shards")
    for tensor in found["tensors"]:
        shape, ranks = "x".join(map(str, tensor["shape"])) or "scalar", _ranges(tensor["ranks"]) or "-"
        table.add_row(_plain(tensor["key"]), tensor["dtype"], shape, tensor["sharding"], str(tensor["shards"]), ranks)
    _print(table)
    _print_pairs("tied to", "tensor", found["tied"])
    _print_pairs("value", "", found["values"])
    _print_pairs("value of each rank", "ranks", {name: _ranges(ranks) for name, ranks in found["rank_values"].items()})


def _print_pairs(left: str, right: str, pairs: Mapping[str, str]) -> None:
    table = _table(left, right)
    for name, value in pairs.items():
        table.add_row(_plain(name), _plain(value))
    if pairs:
        _print("")
        _print(table)


@cli.command()
@url_argument
@step_option
@click.option("--all", "every", is_flag=True, help="Check every step of the lineage.")
@json_option
def check(url: str, step: int | None, every: bool, as_json: bool) -> None:
    """Read a step's every byte and compare it with what was committed.

    Follows the digests: commit record, MANIFEST, parts, data files, blocks; and proves that the parts together hold
    each tensor exactly once. Without --step and --all the head is checked. One line for each finding names file and
    tensor. Exits 12 if there is damage.

    \b
    Examples:
      ckpt check /data/run
      ckpt check /data/run --step 2000
      ckpt check /data/run --all --json | jq '.steps[] | select(.ok) | .step'

    \b
    --json prints
      {"url": str, "ok": bool, "log": [FINDING, ...],
       "steps": [{"step": int, "attempt": str, "nbytes": int, "world": int,
                  "ok": bool, "complete": bool, "findings": [FINDING, ...]}]}
      FINDING = {"file": str, relative to the run,
                 "tensor": str | null, "problem": str}
      "complete" is false where there is more than the 100 findings listed.
    """
    if every and step is not None:
        raise click.UsageError("--step and --all exclude each other")
    run, view = _open(url)
    chosen = [_find(run, view, step)]
    if every:
        chosen = [commit for commit in view.lineage() if commit.attempt not in view.retired]
    log_findings = [] if step is not None else check_log(view)
    reports = _check_steps(run, chosen)
    ok = not log_findings and all(report.ok for report in reports)
    _output(
        {"url": run.url, "ok": ok, "log": list(map(asdict, log_findings)), "steps": list(map(_report_json, reports))},
        as_json,
        _print_reports,
    )
    if not ok:
        raise Corrupt(_verdict(run, reports, log_findings))


def _check_steps(run: RunDirectory, commits: Sequence[Commit]) -> list[Report]:
    """Check each; what retention deletes meanwhile is left out, and `NotFound` if nothing else was asked for."""
    reports: list[Report] = []
    with _progress(sum(commit.nbytes for commit in commits)) as advance:
        for commit in commits:
            done = sum(report.commit.nbytes for report in reports)
            reports.append(check_step(run, commit, partial(advance, f"checking step {commit.step}", done)))
    if any(not report.ok for report in reports):
        retired = run.log.read().retired
        reports = [report for report in reports if report.ok or report.commit.attempt not in retired]
    if not reports:
        raise NotFound(f"{run.url}: step {commits[0].step} was deleted by retention while it was checked")
    return reports


@contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[str, int, int, int], None]]:
    """A bar on stderr if that is a terminal. Yields `advance(what, before, done, of)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("checking", total=total_bytes)

        def advance(what: str, before: int, done: int, _: int) -> None:
            bar.update(task, description=what, completed=before + done)

        yield advance


def _report_json(report: Report) -> Json:
    about = {name: getattr(report.commit, name) for name in ("step", "attempt", "nbytes", "world")}
    return {**about, "ok": report.ok, "complete": report.complete, "findings": list(map(asdict, report.findings))}


def _print_reports(found: Json) -> None:
    for finding in found["log"]:
        _print(_finding_line(finding))
    for report in found["steps"]:
        wrote = f"{_size(report['nbytes'])} written by {_count(report['world'], 'rank')}, every digest matches"
        more = "" if report["complete"] else f", more than these {len(report['findings'])} findings"
        _print(f"step {report['step']}: {'ok, ' + wrote if report['ok'] else 'DAMAGED' + more}")
        for finding in report["findings"]:
            _print(f"  {_finding_line(finding)}")


def _finding_line(finding: Json) -> str:
    tensor = f"{finding['tensor']}: " if finding["tensor"] is not None else ""
    return _plain(f"{finding['file']}: {tensor}{finding['problem']}")


def _verdict(run: RunDirectory, reports: Sequence[Report], log_findings: Sequence[Finding]) -> str:
    damaged, intact = ([report.commit.step for report in reports if report.ok is ok] for ok in (False, True))
    if not damaged:
        records = _count(len(log_findings), "record")
        return f"{run.url}: {records} of the log without effect: steps may be missing; see `ckpt ls {run.url}`"
    many = "steps {} are" if len(damaged) > 1 else "step {} is"
    what = f"{run.url}: {many.format(', '.join(map(str, damaged)))} damaged."
    if intact:
        return f"{what} Intact: {', '.join(map(str, intact))}; restore(state, step={intact[-1]}) goes back there."
    older = f"Older steps may be intact: `ckpt check {run.url} --all` tells"
    return f"{what} {older}; restore(state, fallback=True) takes the newest that is."


def _open(url: str) -> tuple[RunDirectory, View]:
    run = RunDirectory.open(url)
    try:
        return run, run.log.read()
    except Corrupt as error:
        still = "Nothing was changed. Without its log a run's steps cannot be told from abandoned attempts"
        raise Corrupt(f"{error}\n{still}: bring this file back from a copy.") from error


@cli.command()
@url_argument
@click.option("--last", type=click.IntRange(1), required=True, metavar="N", help="Keep the newest N steps.")
@click.option("--every", type=click.IntRange(1), metavar="N", help="Keep the first of each N steps.")
@click.option("--best", metavar="METRIC", help="Keep the best steps by this metric.")
@click.option("--mode", type=click.Choice(["min", "max"]), default="min", show_default=True, help="What is best.")
@click.option("--best-count", type=click.IntRange(1), default=1, show_default=True, help="How many of the best.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option("--takeover", is_flag=True, help="Also if a job holds the run that may still live: it is fenced out.")
@json_option
def gc(
    url: str,
    last: int,
    every: int | None,
    best: str | None,
    mode: Literal["min", "max"],
    best_count: int,
    dry_run: bool,
    takeover: bool,
    as_json: bool,
) -> None:
    """Delete the steps that a rule does not keep.

    For a run that no job holds: a job that trains deletes by itself, with ckpt.Checkpointer(keep=...). What leaves is
    recorded in the log first. The newest step, pinned ones and the one that the last job went on from always stay;
    attempts that were never committed, and that the run has passed, leave. Exits 11 if a job holds the run.

    
    Examples:
      ckpt gc /data/run --last 3 --every 10000 --dry-run
      ckpt gc /data/run --last 1 --best val_loss

    
    --json prints
      {"url": str, "dry_run": bool, "freed": int, in bytes
       "kept": [{"step": int, "attempt": str, "why": str}, ...],
       "deleted": [{"step": int, "attempt": str, "nbytes": int}, ...],
       "abandoned": [str, ...]}   attempts that were never committed
    """
    run, view = _open(url)
    keep = Keep(last=last, every=every, best=Best(best, mode, best_count) if best else None)
    plan = plan_retention(view, keep, run.attempts())
    if not dry_run and (plan.attempts or any(name in view.retired for name in run.attempts())):
        _carry_out(run, view, plan, takeover)
    _output(_plan_json(run, view, plan, dry_run), as_json, _print_plan)


def _carry_out(run: RunDirectory, view: View, plan: Plan, takeover: bool) -> None:
    holder = view.holder
    if holder is not None and not takeover and not is_gone(holder):
        raise Fenced(
            f"{run.url}: generation {holder.generation} was started by pid {holder.pid} on host {holder.host!r}, which "
            "may still run. Nothing was deleted. Let that job delete, with Checkpointer(keep=...), or stop it and pass "
            "--takeover"
        )
    taken = Holder(run, run_id=None, takeover=takeover)
    start = taken.take("gc")
    taken.adopt()  # what the job before left complete: the next one could not any more
    carry_out(run, plan, start.generation, start.nonce)


def _plan_json(run: RunDirectory, view: View, plan: Plan, dry_run: bool) -> Json:
    kept = sorted((view.commits[name].step, name, why) for name, why in plan.kept.items())
    leaving = [{"step": found.step, "attempt": found.attempt, "nbytes": found.nbytes} for found in plan.leaving]
    return {
        "url": run.url,
        "dry_run": dry_run,
        "freed": sum(commit.nbytes for commit in plan.leaving),
        "kept": [{"step": step, "attempt": name, "why": why} for step, name, why in kept],
        "deleted": leaving,
        "abandoned": list(plan.abandoned),
    }


def _print_plan(found: Json) -> None:
    table = _table("step", "attempt", "", "why", right="step")
    leaving = [(step["step"], step["attempt"], "leaves", "") for step in found["deleted"]]
    leaving += [(int(name.partition(".")[0]), name, "leaves", "never committed") for name in found["abandoned"]]
    for step, attempt, what, why in sorted(
        [*leaving, *((s["step"], s["attempt"], "", s["why"]) for s in found["kept"])]
    ):
        table.add_row(str(step), attempt, what, _plain(why))
    _print(table)
    verb = "would be deleted" if found["dry_run"] else "deleted"
    _print(f"\n{_count(len(leaving), 'attempt')} {verb}, {_size(found['freed'])}")


def _find(run: RunDirectory, view: View, step: int | None) -> Commit:
    try:
        return find_commit(view, step)
    except NotFound as error:
        raise NotFound(f"{run.url}: {error}") from None


def _plain(text: str) -> str:
    """One line without control characters, whatever a hostile checkpoint holds."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _size(nbytes: int) -> str:
    power = min((max(nbytes, 1).bit_length() - 1) // 10, 5)
    return f"{nbytes / 1024**power:.1f} {'KMGTP'[power - 1]}iB" if power else f"{nbytes} B"


def _age(unix_s: float) -> str:
    seconds = max(time.time() - unix_s, 0.0)
    for unit, length, limit in (("s", 1, 60), ("min", 60, 60), ("h", 3600, 48)):
        if seconds < length * limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def _ranges(ranks: Iterable[int]) -> str:
    """`0-3,8` for 0, 1, 2, 3, 8; ascending and distinct."""
    groups = (list(group) for _, group in groupby(enumerate(ranks), key=lambda item: item[1] - item[0]))
    return ",".join(f"{g[0][1]}-{g[-1][1]}" if len(g) > 1 else str(g[0][1]) for g in groups)


class _Shortened(reprlib.Repr):
    """Values as Python writes them, cut to a line; tensors and arrays as dtype and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 16
        self.maxstring = self.maxother = 80

    def repr1(self, x: Any, level: int) -> str:
        if type(x).__name__ in ("Tensor", "ndarray"):
            return f"{type(x).__name__.lower()}({str(x.dtype).removeprefix('torch.')}, {list(x.shape)})"
        return super().repr1(x, level)


def _short(value: object) -> str:
    text = " ".join(_Shortened().repr(value).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def _output(document: Json, as_json: bool, print_it: Callable[[Json], None]) -> None:
    if as_json:
        click.echo(json.dumps(document, allow_nan=False))
    else:
        print_it(document)


def _table(*names: str, right: str = "") -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        numeric = name in right.split()
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    return table


def _print(what: str | Table) -> None:
    """To the terminal, wrapped to its width; elsewhere as plain lines of any length."""
    if sys.stdout.isatty():
        Console(markup=False, highlight=False, emoji=False, soft_wrap=isinstance(what, str)).print(what)
        return
    if isinstance(what, Table):
        out = io.StringIO()
        plain = Console(file=out, width=100_000, color_system=None, force_terminal=False, markup=False, emoji=False)
        plain.print(what, highlight=False)
        what = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    click.echo(what)


def main() -> NoReturn:
    """Entry point: run the command, say what went wrong on stderr, exit as the module says."""
    try:
        code = cli.main(prog_name="ckpt", standalone_mode=False)
    except CkptError as error:
        text = "\n".join(map(_plain, str(error).split("\n")))
        click.echo(f"{type(error).__name__}: {text}", err=True)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        click.echo("interrupted", err=True)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
