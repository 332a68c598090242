"""The command `elastic`: start the agent of a node, and look at a run's membership.

Owns what is printed: data on stdout, progress and errors on stderr.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

import click

from ckpt.console import Json, StartsCommand, age, columns, json_option, output, plain, run_command, say, url_argument
from ckpt.run import RunDirectory

MAX_RESTARTS = 1_000_000
HISTORY = 10

run_id_option = click.option(
    "--run-id", default=None, metavar="ID", help="The job's, where URL is tcp://host:port (and no CKPT_SIGNING_KEY)."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="holdfast")
def cli() -> None:
    """Train on nodes that come and go.

    URL is the place of the run, as given to ckpt.Checkpointer: a shared directory or a bucket that all nodes reach.
    Where there is none: tcp://host:port, kept by the agent on that host, which must live as long as the job.

    \b
    Examples:
      elastic run --nodes 2:8 /shared/run -- train.py --lr 3e-4  on every node
      elastic status /shared/run
      elastic drain node7 /shared/run

    \b
    Exit codes of run: that of the first worker that failed, and
      0 done   11 another job has the run
      75 too few nodes for too long, or tcp:// has forgotten the job
      76 workers or nodes failed again and again without a new step
      130/143 signals; 143 also where this node left as planned
    """


@cli.command(
    "run", cls=StartsCommand, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.option("--nodes", default="1", show_default=True, metavar="MIN:MAX", help="How many nodes may work together.")
@click.option("--workers", default="auto", show_default=True, metavar="N",
              help="Workers on this node; auto: one for each CUDA device, or one.")  # fmt: skip
@click.option("--preload", default="", metavar="MODULES",
              help="Modules, as torch,numpy, that standbys import ahead, so that a restart need not.")  # fmt: skip
@click.option("--log-dir", default="", metavar="DIR",
              help="Also keep what workers print, in a folder for each generation.")  # fmt: skip
@click.option("--run-id", default="none", metavar="ID", help="Agents of one job have the same; others are refused.")
@url_argument
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- SCRIPT...")
def run(nodes: str, workers: str, preload: str, log_dir: str, run_id: str, url: str, command: Sequence[str]) -> None:
    """Start this node's agent for the run at URL: torchrun with elastic rendezvous and restarts without end.

    SCRIPT is what torchrun takes there, its other options included: `-- -m package.module`, `-- --no-python ./main`.

    \b
    Examples:
      elastic run --nodes 2:8 /shared/run -- train.py --lr 3e-4
      elastic run --nodes 4 --workers 8 s3://bucket/run -- -m package.train
    """
    arguments = torchrun_arguments(url, nodes, workers, run_id, list(command), log_dir)
    sys.argv = ["torchrun", *arguments]  # agents compare what they run
    sys.exit(_launch(arguments, [name.strip() for name in preload.split(",") if name.strip()]))


def torchrun_arguments(
    url: str, nodes: str, workers: str, run_id: str, command: list[str], log_dir: str = ""
) -> list[str]:
    """The command line of torchrun for this agent."""
    if command[0] == "--":
        command = command[1:]
    if workers == "auto":
        import torch

        workers = str(torch.cuda.device_count() or 1)
    logs = ["--logs-specs", "elastic", "--log-dir", log_dir, "--tee", "3"] if log_dir else []
    return [
        "--rdzv-backend", "elastic", "--rdzv-endpoint", url, "--rdzv-id", run_id, "--max-restarts", str(MAX_RESTARTS),
        "--nnodes", nodes, "--nproc-per-node", workers, *logs, *command,
    ]  # fmt: skip


def _launch(arguments: list[str], preload: list[str]) -> int:
    """Be the agent; the exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from elastic.warm import warm_workers

    torchrun: Any = run
    try:
        with warm_workers(preload) if preload else nullcontext():
            torchrun.run(torchrun.parse_args(arguments))
    except SignalException as error:
        click.echo(f"elastic: ended by {signal.Signals(error.sigval).name}", err=True)
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        click.echo(str(error), err=True)
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


@cli.command("status")
@run_id_option
@url_argument
@json_option
def show_status(url: str, run_id: str | None, as_json: bool) -> None:
    """Show who works on the run at URL, who waits, and why generations ended.

    Takes a few seconds, in which it watches the leader's counter; changes nothing.

    \b
    Examples:
      elastic status /shared/run
      elastic status /shared/run --json | jq -r '.members[].name'

    \b
    --json prints
      {"url": str, "generation": int,
       "state": "led" | "no leader" | "over" | "done" | "not elastic",
       "reason": str, "unix_s": float,
       "spares": [str], "quarantined": [str], "cordoned": [str],  # names
       "slow": [str],  # what is said of ranks that the others wait for
       "steps": [int],  # the newest
       "members": [{"rank": int, "name": str, "node": str,
                    "addresses": [str], "leads": bool}],
       "generations": [{"generation": int, "unix_s": float, "nodes": int,
                        "reason": str, "commits": int}]}
    """
    from elastic.status import status

    output(status(url, run_id), as_json, _print)


def _print(found: Json) -> None:
    say(f"generation {found['generation']}, {found['state']}: {plain(found['reason']) or 'nobody has begun'}")
    if found["members"]:
        members = columns("rank", "node", "address", "", right="rank")
        for member in found["members"]:
            leads = "leads" if member["leads"] else ""
            members.add_row(str(member["rank"]), plain(member["name"]), plain(member["addresses"][0]), leads)
        say(members)
    for what in ("spares", "quarantined", "cordoned", "slow"):
        if found[what]:
            say(f"{what}: {plain(', '.join(found[what]))}")
    say(f"newest steps: {', '.join(map(str, found['steps'])) or 'none'}")
    history = columns("generation", "age", "nodes", "commits", "why", right="generation age nodes commits")
    for one in found["generations"][-HISTORY:]:
        nodes = str(one["nodes"] or "-")
        history.add_row(str(one["generation"]), age(one["unix_s"]), nodes, str(one["commits"]), plain(one["reason"]))
    say(history)


@cli.command("report")
@click.option("--html", type=click.Path(dir_okay=False), metavar="FILE", help="Write the page there.")
@url_argument
@json_option
def report(url: str, html: str | None, as_json: bool) -> None:
    """Show what befell the run at URL: where its time went, failures, and steps computed again.

    From what its agents wrote into its directory while they worked. With --html also as one page.

    \b
    Examples:
      elastic report /shared/run
      elastic report /shared/run --html report.html

    \b
    --json prints
      {"url": str,
       "figures": {"seconds": float, "goodput": float,
                   "split_s": {"productive": float, "recompute": float,
                               "saving": float, "detection": float,
                               "rendezvous": float, "restore": float,
                               "ending": float},
                   "faults": int, "generations": int, "steps": int,
                   "steps_computed_again": int,
                   "median_recovery_s": float | null,
                   "worst_recovery_s": float | null},
       "failures": [{"at": float, "node": str, "what": str,
                     "generation": int, "step": int,
                     "recovered_at": float | null}]}
    """
    from importlib.resources import files
    from pathlib import Path

    from elastic.history import figures_of, history
    from elastic.ledger import read_ledger
    from elastic.report import page

    run = RunDirectory.open(url)
    evidence = history(run.url, read_ledger(run), run.log.read().commits.values())
    figures = figures_of(evidence)
    if html is not None:
        style = files("elastic").joinpath("report.css").read_text()
        Path(html).write_text(page(evidence, (), style, figures))
    failures = [
        {
            "at": fault.at,
            "node": fault.nodes[0],
            "what": fault.what,
            "generation": fault.generation,
            "step": fault.step,
            "recovered_at": fault.recovered_at,
        }
        for fault in evidence.faults
    ]
    output({"url": run.url, "figures": figures, "failures": failures}, as_json, _print_report)


def _print_report(found: Json) -> None:
    figures = found["figures"]
    say(f"goodput {figures['goodput']:.0%} of {figures['seconds']:.0f} s, {figures['generations']} generations, "
        f"{figures['steps_computed_again']} of {figures['steps']} steps computed again")  # fmt: skip
    table = columns("spent on", "seconds", right="seconds")
    for kind, seconds in figures["split_s"].items():
        table.add_row(kind, f"{seconds:.1f}")
    say(table)
    for failure in found["failures"]:
        say(f"{failure['at']:.1f} s, generation {failure['generation']}: {plain(failure['what'])}")


@cli.command("drain")
@run_id_option
@click.argument("node")
@url_argument
@json_option
def drain(node: str, url: str, run_id: str | None, as_json: bool) -> None:
    """Take NODE out of the run at URL now: all ranks stop at one step, saved, and the others go on from it.

    NODE is a host's name, or a node's as `elastic status --json` shows it. Its agent ends with exit code 143, and none
    of this name joins until `elastic cordon --undo`.

    \b
    Example:
      elastic drain node7 /shared/run

    \b
    --json prints
      {"url": str, "node": str, "cordoned": bool, "drained": bool}
    """
    run = _put(node, url, run_id, drain=True)
    output(_cordon_json(run, node, drained=True), as_json, lambda found: say(_drained(run, node)))


@cli.command("cordon")
@click.option("--undo", is_flag=True, help="Let agents of this name join again.")
@run_id_option
@click.argument("node")
@url_argument
@json_option
def cordon(node: str, url: str, undo: bool, run_id: str | None, as_json: bool) -> None:
    """Let NODE work to the end of its generation, and in none after it.

    NODE as in `elastic drain`.

    \b
    Examples:
      elastic cordon node7 /shared/run
      elastic cordon --undo node7 /shared/run

    \b
    --json prints
      {"url": str, "node": str, "cordoned": bool, "drained": bool}
    """
    run = _lift(node, url, run_id) if undo else _put(node, url, run_id, drain=False)
    what = "may join again" if undo else "joins no generation after this one"
    output(_cordon_json(run, node, cordoned=not undo), as_json, lambda found: say(f"{plain(node)} {what}"))


@cli.command("chaos", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
@click.option("--seed", default=0, show_default=True, help="Draws nodes, and the faults of random and replay.")
@click.option(
    "--seeds", type=click.IntRange(min=1), default=1, metavar="N", help="As many runs, with seeds from --seed on."
)
@click.option("--nodes", type=click.IntRange(min=1), help="So many, instead of what the scenario says.")
@click.option("--minutes", default=2.0, show_default=True, help="For how long random and replay inject faults.")
@click.option("--folder", type=click.Path(file_okay=False), help="A new one for the run, logs and report.")
@click.option("--reference", is_flag=True, help="First run undisturbed, and compare every metric with it.")
@click.option("--processes", is_flag=True, help="Nodes without namespaces, as without root.")
@click.option("--list", "as_list", is_flag=True, help="Show the faults and scenarios, and what each needs.")
@json_option
@click.argument("scenario", required=False)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- SCRIPT...")
def chaos(
    seed: int, seeds: int, nodes: int | None, minutes: float, folder: str | None, reference: bool, processes: bool,
    as_list: bool, as_json: bool, scenario: str | None, command: Sequence[str],
) -> None:  # fmt: skip
    """Put SCRIPT through the failures of SCENARIO on this machine, and judge whether it kept its promises.

    SCENARIO is a shipped one, `random`, `replay TRACE.json`, or a TOML file. SCRIPT is what `elastic run` takes; it
    finds the place of its run in CKPT_URL. Writes report.html and report.json. Several --seeds in one --folder add up:
    what is there already is not run again.

    \b
    Examples:
      elastic chaos --list
      elastic chaos node-loss -- train.py
      elastic chaos random --seed 7 --minutes 5 -- train.py
      elastic chaos replay trace.json --minutes 5 -- train.py

    \b
    --json prints of a run, or of --list
      {"passed": bool, "folder": str,
       "figures": {"seconds": float, "goodput": float,
                   "split_s": {"productive": float, "recompute": float,
                               "saving": float, "detection": float,
                               "rendezvous": float, "restore": float,
                               "ending": float},
                   "faults": int, "generations": int, "steps": int,
                   "steps_computed_again": int,
                   "median_recovery_s": float | null,
                   "worst_recovery_s": float | null},
       "oracles": [{"oracle": str, "evidence": str,
                    "verdict": "green" | "red" | "not judged"}]}
      | {"faults": [{"kind": str, "stands_for": str,
                     "share_percent": float | null, "promise": str,
                     "needs": [str], "lacks": [str]}],
         "scenarios": [{"name": str, "title": str, "nodes": int,
                        "lacks": [str]}]}

    Exit code 0 only if no oracle is red.
    """
    from elastic.chaos import command as chaos_command

    if as_list:
        chaos_command.show_listing(as_json)
        return
    if scenario is None or not command:
        raise click.UsageError("which SCENARIO, and which -- SCRIPT? `elastic chaos --list` shows the scenarios")
    sys.exit(
        chaos_command.run(
            scenario, command, seeds=range(seed, seed + seeds), nodes=nodes, minutes=minutes, folder=folder,
            reference=reference, as_processes=processes, as_json=as_json,
        )
    )  # fmt: skip


def _put(node: str, url: str, run_id: str | None, *, drain: bool) -> RunDirectory:
    from elastic.registry import open_run
    from elastic.roster import Cordon, put_cordon

    run = open_run(url, run_id)
    put_cordon(run, Cordon(node, drain))
    return run


def _lift(node: str, url: str, run_id: str | None) -> RunDirectory:
    from elastic.registry import open_run
    from elastic.roster import remove_cordon

    run = open_run(url, run_id)
    remove_cordon(run, node)
    return run


def _drained(run: RunDirectory, node: str) -> str:
    from elastic.membership import of_start

    membership = of_start(run.log.read().holder)
    members = membership.members if membership is not None else ()
    if any(node in (member.name, member.node) for member in members):
        return f"{plain(node)} leaves; nothing is lost"
    names = ", ".join(sorted({plain(member.name) for member in members})) or "nobody"
    return f"no node of the name {plain(node)} is at work ({names}); one that waits, or comes, will not join"


def _cordon_json(run: RunDirectory, node: str, *, cordoned: bool = True, drained: bool = False) -> Json:
    return {"url": run.url, "node": node, "cordoned": cordoned, "drained": drained}


def main() -> NoReturn:
    """Entry point: run the command, say what went wrong on stderr, exit as the module says."""
    run_command(cli, "elastic")


if __name__ == "__main__":
    main()
