"""The commands that write to a run: `gc`."""

from __future__ import annotations

from typing import Literal

import click

from ckpt.cli.shared import (
    Json,
    columns,
    count,
    json_option,
    open_run,
    output,
    plain,
    say,
    size,
    url_argument,
)
from ckpt.errors import Fenced
from ckpt.holder import Holder, carry_out, is_gone
from ckpt.log import View
from ckpt.retention import Best, Keep, Plan, plan_retention
from ckpt.run import RunDirectory


@click.command()
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
    run, view = open_run(url)
    keep = Keep(last=last, every=every, best=Best(best, mode, best_count) if best else None)
    plan = plan_retention(view, keep, run.attempts())
    if not dry_run and (plan.attempts or any(name in view.retired for name in run.attempts())):
        _carry_out(run, view, plan, takeover)
    output(_plan_json(run, view, plan, dry_run), as_json, _print_plan)


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
    table = columns("step", "attempt", "", "why", right="step")
    leaving = [(step["step"], step["attempt"], "leaves", "") for step in found["deleted"]]
    leaving += [(int(name.partition(".")[0]), name, "leaves", "never committed") for name in found["abandoned"]]
    for step, attempt, what, why in sorted(
        [*leaving, *((s["step"], s["attempt"], "", s["why"]) for s in found["kept"])]
    ):
        table.add_row(str(step), attempt, what, plain(why))
    say(table)
    verb = "would be deleted" if found["dry_run"] else "deleted"
    say(f"\n{count(len(leaving), 'attempt')} {verb}, {size(found['freed'])}")
