"""The command `elastic`: start the agent of a node, and look at a run's membership.

Owns what is printed: data on stdout, progress and errors on stderr.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from ckpt.console import Json, age, columns, json_option, output, plain, run_command, say, url_argument

MAX_RESTARTS = 1_000_000
HISTORY = 10


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="holdfast")
def cli() -> None:
    """Train on nodes that come and go.

    URL is the place of the run, as given to ckpt.Checkpointer: a shared directory or a bucket that all nodes reach.

    \b
    Examples:
      elastic run --nodes 2:8 /shared/run -- train.py --lr 3e-4     on every node
      elastic status /shared/run
      elastic drain node7 /shared/run

    \b
    Exit codes of run: that of the first worker that failed, and
      0 done   11 another job has the run   75 too few nodes for too long
      76 workers failed again and again without a new step
      130/143 signals; 143 also where this node left as planned and the job goes on
    """


@cli.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--nodes", default="1", show_default=True, metavar="MIN:MAX", help="How many nodes may work together.")
@click.option("--workers", default="auto", show_default=True, metavar="N",
              help="Workers on this node; auto: one for each CUDA device, or one.")  # fmt: skip
@click.option("--run-id", default="none", metavar="ID", help="Agents of one job have the same; others are refused.")
@url_argument
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- SCRIPT...")
def run(nodes: str, workers: str, run_id: str, url: str, command: Sequence[str]) -> None:
    """Start this node's agent for the run at URL: torchrun with elastic rendezvous and restarts without end.

    SCRIPT is what torchrun takes there, its other options included: `-- -m package.module`, `-- --no-python ./main`.
    """
    arguments = torchrun_arguments(url, nodes, workers, run_id, list(command))
    sys.argv = ["torchrun", *arguments]  # agents compare what they run
    sys.exit(_launch(arguments))


def torchrun_arguments(url: str, nodes: str, workers: str, run_id: str, command: list[str]) -> list[str]:
    """The command line of torchrun for this agent."""
    if command[0] == "--":
        command = command[1:]
    if workers == "auto":
        import torch

        workers = str(torch.cuda.device_count() or 1)
    return [
        "--rdzv-backend", "elastic", "--rdzv-endpoint", url, "--rdzv-id", run_id, "--max-restarts", str(MAX_RESTARTS),
        "--nnodes", nodes, "--nproc-per-node", workers, *command,
    ]  # fmt: skip


def _launch(arguments: list[str]) -> int:
    """Be the agent; the exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    torchrun: Any = run
    try:
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
@url_argument
@json_option
def show_status(url: str, as_json: bool) -> None:
    """Show who works on the run at URL, who waits, and why generations ended. Takes a few seconds; changes nothing.

    \b
    --json prints
      {"url": str, "generation": int, "state": "led" | "no leader" | "over" | "done" | "not elastic",
       "reason": str, "unix_s": float, "spares": [name], "quarantined": [name], "cordoned": [name], "steps": [int],
       "members": [{"rank": int, "name": str, "node": str, "addresses": [str], "leads": bool}],
       "generations": [{"generation": int, "unix_s": float, "nodes": int, "reason": str, "commits": int}]}
    """
    from elastic.status import status

    output(status(url), as_json, _print)


def _print(found: Json) -> None:
    say(f"generation {found['generation']}, {found['state']}: {plain(found['reason']) or 'nobody has begun'}")
    if found["members"]:
        members = columns("rank", "node", "address", "", right="rank")
        for member in found["members"]:
            leads = "leads" if member["leads"] else ""
            members.add_row(str(member["rank"]), plain(member["name"]), plain(member["addresses"][0]), leads)
        say(members)
    for what in ("spares", "quarantined", "cordoned"):
        if found[what]:
            say(f"{what}: {plain(', '.join(found[what]))}")
    say(f"newest steps: {', '.join(map(str, found['steps'])) or 'none'}")
    history = columns("generation", "age", "nodes", "commits", "why", right="generation age nodes commits")
    for one in found["generations"][-HISTORY:]:
        nodes = str(one["nodes"] or "-")
        history.add_row(str(one["generation"]), age(one["unix_s"]), nodes, str(one["commits"]), plain(one["reason"]))
    say(history)


@cli.command("drain")
@click.argument("node")
@url_argument
def drain(node: str, url: str) -> None:
    """Take NODE out of the run at URL now: all ranks stop at one step, saved, and the others go on from it.

    NODE is a host's name, or a node's as `elastic status --json` shows it. Its agent ends with exit code 143, and none
    of this name joins until `elastic cordon --undo`.
    """
    _put(node, url, drain=True)
    click.echo(f"{node} leaves; nothing is lost", err=True)


@cli.command("cordon")
@click.option("--undo", is_flag=True, help="Let agents of this name join again.")
@click.argument("node")
@url_argument
def cordon(node: str, url: str, undo: bool) -> None:
    """Let NODE work to the end of its generation, and in none after it.

    NODE as in `elastic drain`.
    """
    if undo:
        from ckpt.run import RunDirectory
        from elastic.roster import remove_cordon

        remove_cordon(RunDirectory.open(url), node)
    else:
        _put(node, url, drain=False)


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


def _put(node: str, url: str, *, drain: bool) -> None:
    from ckpt.run import RunDirectory
    from elastic.roster import Cordon, put_cordon

    put_cordon(RunDirectory.open(url), Cordon(node, drain))


def main() -> NoReturn:
    """Entry point: run the command, say what went wrong on stderr, exit as the module says."""
    run_command(cli, "elastic")


if __name__ == "__main__":
    main()
