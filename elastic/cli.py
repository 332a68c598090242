"""The command `elastic`: start the agent of a node, and look at a run's membership.

Owns what is printed: data on stdout, progress and errors on stderr.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from ckpt.errors import CkptError

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

    \b
    Exit codes of run: that of the first worker that failed, and
      0 done   11 another job has the run   75 too few nodes for too long
      76 workers failed again and again without a new step   130/143 signals
    """


@cli.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--nodes", default="1", show_default=True, metavar="MIN:MAX", help="How many nodes may work together.")
@click.option("--workers", default="auto", show_default=True, metavar="N",
              help="Workers on this node; auto: one for each CUDA device, or one.")  # fmt: skip
@click.option("--run-id", default="none", metavar="ID", help="Agents of one job have the same; others are refused.")
@click.argument("url", envvar="CKPT_URL", metavar="URL")
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
@click.argument("url", envvar="CKPT_URL", metavar="URL")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
def show_status(url: str, as_json: bool) -> None:
    """Show who works on the run at URL, who waits, and why generations ended. Takes a few seconds; changes nothing.

    \b
    --json prints
      {"url": str, "generation": int, "state": "led" | "no leader" | "over" | "done" | "not elastic",
       "reason": str, "unix_s": float, "spares": [name], "quarantined": [name], "steps": [int],
       "members": [{"rank": int, "name": str, "node": str, "addresses": [str], "leads": bool}],
       "generations": [{"generation": int, "unix_s": float, "nodes": int, "reason": str, "commits": int}]}
    """
    from elastic.status import status

    found = status(url)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"generation {found['generation']}, {found['state']}: {found['reason'] or 'nobody has begun'}")
    members = Table("rank", "node", "address", "", box=None)
    for member in found["members"]:
        leads = "leads" if member["leads"] else ""
        members.add_row(str(member["rank"]), member["name"], member["addresses"][0], leads)
    if found["members"]:
        console.print(members)
    for what in ("spares", "quarantined"):
        if found[what]:
            console.print(f"{what}: {', '.join(found[what])}")
    console.print(f"newest steps: {', '.join(map(str, found['steps'])) or 'none'}")
    history = Table("generation", "began", "nodes", "commits", "why", box=None)
    for one in found["generations"][-HISTORY:]:
        began = datetime.fromtimestamp(one["unix_s"]).astimezone().isoformat(" ", "seconds")
        history.add_row(str(one["generation"]), began, str(one["nodes"] or "-"), str(one["commits"]), one["reason"])
    console.print(history)


def main() -> NoReturn:
    """Entry point: run the command, say what went wrong on stderr, exit as the module says."""
    try:
        code = cli.main(prog_name="elastic", standalone_mode=False)
    except CkptError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        click.echo("interrupted", err=True)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
