"""`check`: is every byte still what was saved?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ckpt.console import (
    Json,
    count,
    find,
    json_option,
    open_run,
    output,
    plain,
    say,
    size,
    step_option,
    url_argument,
)
from ckpt.errors import Corrupt, NotFound
from ckpt.records import Commit
from ckpt.run import RunDirectory

if TYPE_CHECKING:
    from ckpt.check import Finding, Report


@click.command()
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
      {"url": str, "ok": bool, "log": [FINDING],
       "steps": [{"step": int, "attempt": str, "nbytes": int, "world": int,
                  "ok": bool,
                  "complete": bool,  # false: more than the 100 findings
                  "findings": [FINDING]}]}
      FINDING = {"file": str,  # relative to the run
                 "tensor": str | null, "problem": str}
    """
    if every and step is not None:
        raise click.UsageError("--step and --all exclude each other")
    from ckpt.check import check_log

    run, view = open_run(url)
    chosen = [find(run, view, step)]
    if every:
        chosen = view.standing()
    log_findings = [] if step is not None else check_log(view)
    reports = _check_steps(run, chosen)
    ok = not log_findings and all(report.ok for report in reports)
    output(
        {"url": run.url, "ok": ok, "log": list(map(asdict, log_findings)), "steps": list(map(_report_json, reports))},
        as_json,
        _print_reports,
    )
    if not ok:
        raise Corrupt(_verdict(run, reports, log_findings))


def _check_steps(run: RunDirectory, commits: Sequence[Commit]) -> list[Report]:
    """Check each; what retention deletes meanwhile is left out, and `NotFound` if nothing else was asked for."""
    from ckpt.check import check_step

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
        say(_finding_line(finding))
    for report in found["steps"]:
        wrote = f"{size(report['nbytes'])} written by {count(report['world'], 'rank')}, every digest matches"
        more = "" if report["complete"] else f", more than these {len(report['findings'])} findings"
        say(f"step {report['step']}: {'ok, ' + wrote if report['ok'] else 'DAMAGED' + more}")
        for finding in report["findings"]:
            say(f"  {_finding_line(finding)}")


def _finding_line(finding: Json) -> str:
    tensor = f"{finding['tensor']}: " if finding["tensor"] is not None else ""
    return plain(f"{finding['file']}: {tensor}{finding['problem']}")


def _verdict(run: RunDirectory, reports: Sequence[Report], log_findings: Sequence[Finding]) -> str:
    damaged, intact = ([report.commit.step for report in reports if report.ok is ok] for ok in (False, True))
    if not damaged:
        records = count(len(log_findings), "record")
        return f"{run.url}: {records} of the log without effect: steps may be missing; see `ckpt ls {run.url}`"
    many = "steps {} are" if len(damaged) > 1 else "step {} is"
    what = f"{run.url}: {many.format(', '.join(map(str, damaged)))} damaged."
    if intact:
        return f"{what} Intact: {', '.join(map(str, intact))}; restore(state, step={intact[-1]}) goes back there."
    older = f"Older steps may be intact: `ckpt check {run.url} --all` tells"
    return f"{what} {older}; restore(state, fallback=True) takes the newest that is."
