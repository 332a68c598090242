"""The command `ckpt`: look at a run's directory from a shell. Only those in `change` and `import` write to a run.

Owns what is printed. Data goes to stdout, as tables or with --json as one JSON document; progress, warnings and
errors go to stderr, and the exit code says how it ended (`ckpt --help` lists them). At a terminal, tables fit its
width and long names are wrapped; elsewhere a row is one line of plain text, never cut short, without colour. What needs
torch is imported by the commands that need it, once they run: help, completion and `ls` do not wait seconds for it.
"""

from __future__ import annotations

from typing import NoReturn

import click

from ckpt.cli.bench import bench
from ckpt.cli.change import copy_run, delete_step, gc, pin_step, unpin_step
from ckpt.cli.diff import diff
from ckpt.cli.doctor import doctor
from ckpt.cli.look import list_steps, show
from ckpt.cli.move import export_run, import_file
from ckpt.cli.resume import resume
from ckpt.cli.verify import check
from ckpt.console import run_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="holdfast")
def cli() -> None:
    """Look at the checkpoints of a training run, and start it again.

    URL is the place of the run, as given to ckpt.Checkpointer; where it is left out, $CKPT_URL counts. All commands
    but gc --takeover and delete --takeover are safe beside a job that trains. Errors go to stderr, with --json too.

    \b
    Examples:
      ckpt ls /data/run                         which steps are there
      ckpt show /data/run --step 2000           what it holds, who wrote it
      ckpt check /data/run --all                is every byte what was saved
      ckpt diff /data/run@1000 /data/run        what changed since step 1000
      ckpt resume /data/run -- python train.py  go on, and again after failures
      ckpt cp /data/run@2000 s3://bucket/x      copy step 2000 elsewhere
      ckpt export /data/run out --format hf     for another library
      ckpt import gpt2/ /data/run --step 0      from another library
      ckpt gc /data/run --last 3 --dry-run      what would be deleted
      ckpt pin /data/run 2000 --name best       never delete step 2000
      ckpt doctor s3://bucket/run               can a run be kept there
      ckpt bench /data/run                      what does a save cost
      ckpt ls /data/run --json | jq '.steps[-1].step'

    \b
    Exit codes:
      0 ok   1 failure   2 wrong usage   10 no checkpoint or no such step
      11 fenced   12 corrupt   13 incompatible   130 interrupted
    """


for command in (
    list_steps,
    show,
    check,
    diff,
    resume,
    copy_run,
    export_run,
    import_file,
    gc,
    pin_step,
    unpin_step,
    delete_step,
    doctor,
    bench,
):
    cli.add_command(command)


def main() -> NoReturn:
    """Entry point: run the command, say what went wrong on stderr, exit as the module says."""
    run_command(cli, "ckpt")
