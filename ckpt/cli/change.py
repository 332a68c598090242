"""The commands that write to a run: `gc`, `pin`, `unpin`, `delete`, `cp`."""

from __future__ import annotations

from typing import Literal

import click

from ckpt.console import (
    Json,
    byte_progress,
    columns,
    count,
    find,
    json_option,
    leading_url_argument,
    open_at,
    open_run,
    output,
    plain,
    say,
    size,
    strict_fencing_option,
    url_argument,
)
from ckpt.errors import CkptError, Fenced
from ckpt.holder import Holder, carry_out, check_fencing, is_gone
from ckpt.keeper.courier import settle_what_was_left
from ckpt.keeper.ram import RamTier
from ckpt.log import View
from ckpt.pins import ask_to_delete, checked_name, pin, unpin
from ckpt.records import Start
from ckpt.retention import Best, Keep, Plan, decide_delete, plan_retention
from ckpt.run import RunDirectory

SETTLE_S = 60.0  # for what a job left in memory

takeover_option = click.option(
    "--takeover", is_flag=True, help="Also if a job holds the run that may still live: it is fenced out."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")


@click.command()
@url_argument
@click.option("--last", type=click.IntRange(1), required=True, metavar="N", help="Keep the newest N steps.")
@click.option("--every", type=click.IntRange(1), metavar="N", help="Keep the first of each N steps.")
@click.option("--best", metavar="METRIC", help="Keep the best steps by this metric.")
@click.option("--mode", type=click.Choice(["min", "max"]), default="min", show_default=True, help="What is best.")
@click.option("--best-count", type=click.IntRange(1), default=1, show_default=True, help="How many of the best.")
@dry_run_option
@takeover_option
@strict_fencing_option
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
    strict_fencing: bool,
    as_json: bool,
) -> None:
    """Delete the steps that a rule does not keep, and those asked for by `ckpt delete`.

    For a run that no job holds: a job that trains deletes by itself, with ckpt.Checkpointer(keep=...). What leaves is
    recorded in the log first. The newest step, pinned ones and the one that the last job went on from always stay;
    attempts that were never committed, and that the run has passed, leave. Exits 11 if a job holds the run.

    \b
    Examples:
      ckpt gc /data/run --last 3 --every 10000 --dry-run
      ckpt gc /data/run --last 1 --best val_loss

    \b
    --json prints
      {"url": str, "dry_run": bool, "freed": int,  # bytes
       "kept": [{"step": int, "attempt": str, "why": str}],
       "deleted": [{"step": int, "attempt": str, "nbytes": int}],
       "abandoned": [str],  # attempts that were never committed
       "unfinished": [str]}  # attempts whose deletion was cut short
    """
    run, view = open_run(url)
    keep = Keep(last=last, every=every, best=Best(best, mode, best_count) if best else None)
    present = run.attempts()
    plan = plan_retention(view, keep, present)
    unfinished = [name for name in present if name in view.retired]
    if not dry_run and (plan.attempts or unfinished):
        still = "Nothing was deleted. Let that job delete, with Checkpointer(keep=...), or stop it and pass --takeover"
        require_idle(run, view.holder, takeover, still)
        start = _take(run, view, takeover, strict_fencing)
        plan = plan_retention(run.log.view, keep, run.attempts()).within(plan)  # after what was adopted
        carry_out(run, plan, start.generation, start.nonce)
    found = _plan_json(run, run.log.view, plan, dry_run) | {"unfinished": unfinished}
    output(found, as_json, _print_plan)


def require_idle(run: RunDirectory, holder: Start | None, takeover: bool, still: str) -> None:
    """Fenced, with what is `still` the case, if a job may work; what one left in this node's memory is stored first."""
    if holder is None or takeover:
        return
    if not is_gone(holder):
        raise Fenced(
            f"{run.url}: generation {holder.generation} was started by pid {holder.pid} on host {holder.host!r}, which "
            f"may still run. {still}"
        )
    if RamTier.of(run).exists():
        click.echo("a job left something in this node's memory, which is stored first", err=True)
    try:
        settle_what_was_left(run, SETTLE_S)
    except (CkptError, OSError) as error:
        raise Fenced(
            f"{run.url}: what a job left in this node's memory is not stored yet ({error}). {still}"
        ) from error


def _take(run: RunDirectory, seen: View, takeover: bool, strict_fencing: bool) -> Start:
    taken = Holder(run, run_id=None, takeover=takeover, strict_fencing=strict_fencing, seen=seen)
    start = taken.take("gc")
    taken.adopt()  # what the job before left complete: the next one could not any more
    return start


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
    for kind, why in (("abandoned", "never committed"), ("unfinished", "its deletion was cut short")):
        leaving += [(int(name.partition(".")[0]), name, "leaves", why) for name in found[kind]]
    for step, attempt, what, why in sorted(
        [*leaving, *((s["step"], s["attempt"], "", s["why"]) for s in found["kept"])]
    ):
        table.add_row(str(step), attempt, what, plain(why))
    say(table)
    verb = "would be deleted" if found["dry_run"] else "deleted"
    say(f"\n{count(len(leaving), 'attempt')} {verb}, {size(found['freed'])}")


# One step at a time


def _name(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    try:
        return checked_name(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command("pin")
@leading_url_argument
@click.argument("step", type=click.IntRange(min=0))
@click.option("--name", callback=_name, metavar="NAME", help="Its name; else step-<N>. Pinned again, a name moves.")
@strict_fencing_option
@json_option
def pin_step(url: str, step: int, name: str | None, strict_fencing: bool, as_json: bool) -> None:
    """Keep a step, whatever the rule of the job is.

    Counts when this returns, also for a job that trains at the moment, which is not disturbed. `ckpt ls` shows pins,
    `ckpt unpin` lets go of one. Exits 10 if there is no such step (any more).

    \b
    Examples:
      ckpt pin /data/run 12000 --name paper
      ckpt unpin /data/run paper

    \b
    --json prints
      {"url": str, "step": int, "attempt": str, "name": str}
    """
    run, view = open_run(url)
    check_fencing(run, strict_fencing)
    find(run, view, step)
    made = pin(run, step, name)
    output({"url": run.url, "step": step, "attempt": made.attempt, "name": made.name}, as_json, _print_pin)


def _print_pin(found: Json) -> None:
    say(f"step {found['step']} of {plain(found['url'])} is pinned as {found['name']}")


@click.command("unpin")
@leading_url_argument
@click.argument("name")
@strict_fencing_option
@json_option
def unpin_step(url: str, name: str, strict_fencing: bool, as_json: bool) -> None:
    """Let go of a pin, by its name: rules count again for its step.

    \b
    Example:
      ckpt unpin /data/run paper

    \b
    --json prints
      {"url": str, "name": str}
    """
    run, _ = open_run(url)
    check_fencing(run, strict_fencing)
    unpin(run, name)
    output({"url": run.url, "name": name}, as_json, lambda found: say(f"{found['name']} pins nothing any more"))


@click.command("delete")
@leading_url_argument
@click.argument("step", type=click.IntRange(min=0))
@dry_run_option
@takeover_option
@strict_fencing_option
@json_option
def delete_step(url: str, step: int, dry_run: bool, takeover: bool, strict_fencing: bool, as_json: bool) -> None:
    """Delete one step.

    Where a job holds the run it is asked to, and does so after its next save; otherwise it is done at once. The newest
    step, pinned ones and the one that the last job went on from stay (exit 13). A job on another machine counts as one
    that holds the run, until another one has started: --takeover if you know that it has ended.

    \b
    Examples:
      ckpt delete /data/run 12000 --dry-run
      ckpt delete /data/run 12000

    \b
    --json prints
      {"url": str, "dry_run": bool, "step": int, "attempt": str,
       "nbytes": int, "done": bool}  # false: a job will do it
    """
    run, view = open_run(url)
    commit = find(run, view, step)
    done = view.holder is None or takeover or is_gone(view.holder)
    if dry_run:
        decide_delete(view, nonce="dry-run", attempt=commit.attempt)
    else:
        check_fencing(run, strict_fencing)
        if done:
            require_idle(run, view.holder, takeover, "Nothing was deleted. Try again soon, or pass --takeover")
        ask_to_delete(run, commit)
        if done:
            start = _take(run, view, takeover, strict_fencing)
            carry_out(run, plan_retention(run.log.view, None), start.generation, start.nonce)
    about = {"step": step, "attempt": commit.attempt, "nbytes": commit.nbytes}
    output({"url": run.url, "dry_run": dry_run, **about, "done": done}, as_json, _print_deleted)


def _print_deleted(found: Json) -> None:
    what = f"step {found['step']} of {plain(found['url'])}, {size(found['nbytes'])},"
    when = "" if found["done"] else " after its next save by the job that holds the run"
    would = "would be" if found["dry_run"] else "is" if found["done"] else "will be"
    say(f"{what} {would} deleted{when}")


# Steps of another run


@click.command("cp")
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option("--all", "every", is_flag=True, help="All steps of the lineage, oldest first; else the newest.")
@takeover_option
@strict_fencing_option
@json_option
def copy_run(source: str, target: str, every: bool, takeover: bool, strict_fencing: bool, as_json: bool) -> None:
    """Copy steps of a run into another place, from any store to any other.

    FROM is URL or URL@STEP, TO the URL of a run, which is begun where there is none. Every byte is verified on the
    way, and a damaged step is not committed over there. Interrupted, the same command goes on where it was. Steps
    that are there already are left alone; a run only grows, so older steps cannot be added to one that has newer.

    \b
    Examples:
      ckpt cp /data/run@12000 s3://bucket/run
      ckpt cp s3://bucket/run /local/run --all

    \b
    --json prints
      {"from": str, "to": str,
       "copied": [{"step": int, "attempt": str, "nbytes": int}],
       "there_already": [int]}
    """
    from ckpt.copying import copy_steps

    run, view, number = open_at(source)
    commits = view.standing() if every and number is None else [find(run, view, number)]
    into = RunDirectory.open(target, create=True)
    seen = into.log.read()
    require_idle(into, seen.holder, takeover, "Nothing was copied. Stop that job and pass --takeover")
    known = {commit.attempt for commit in into.log.read().standing()}
    holder = Holder(into, run_id=None, takeover=takeover, strict_fencing=strict_fencing, seen=seen)
    missing = [commit for commit in commits if commit.attempt not in known]
    with byte_progress(sum(commit.nbytes for commit in missing)) as told:
        made = copy_steps(run, missing, holder, told)
    copied = [{"step": each.step, "attempt": each.attempt, "nbytes": each.nbytes} for each in made]
    there = [commit.step for commit in commits if commit.attempt in known]
    output({"from": run.url, "to": into.url, "copied": copied, "there_already": there}, as_json, _print_copied)


def _print_copied(found: Json) -> None:
    for step in found["there_already"]:
        say(f"step {step} was there already")
    for step in found["copied"]:
        say(f"step {step['step']}: {size(step['nbytes'])} copied and verified")
    say(plain(f"{count(len(found['copied']), 'step')} of {found['from']} copied to {found['to']}"))
