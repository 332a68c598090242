"""`doctor`: what can this store be trusted with?"""

from __future__ import annotations

import sys

import click

from ckpt.console import Json, columns, json_option, output, plain, say, url_argument
from ckpt.doctor import Diagnosis, examine
from ckpt.stores import open_store


@click.command()
@url_argument
@json_option
def doctor(url: str, as_json: bool) -> None:
    """Find out whether a run can be kept in a place, and whether the place keeps two jobs apart.

    Writes below a name of its own, which is removed; a run that is there is not touched. Some stores accept a
    condition and ignore it, some let several win a race: there, that one job writes at a time is your promise, given
    by ckpt.Checkpointer(strict_fencing=False). Exits 1 if the place is unfit, or does not keep two jobs apart.

    \b
    Examples:
      ckpt doctor s3://bucket/run
      ckpt doctor /mnt/nfs/run --json

    \b
    --json prints
      {"url": str, "usable": bool, "fences": bool,
       "trials": [{"name": str, "what": str, "ok": bool, "seen": str,
                   "seconds": float}]}
    """
    found = examine(open_store(url))
    output(_json(found), as_json, _print)
    if not found.fences:
        sys.exit(1)


def _json(found: Diagnosis) -> Json:
    names = ("name", "what", "ok", "seen", "seconds")
    trials = [{name: getattr(trial, name) for name in names} for trial in found.trials]
    return {"url": found.url, "usable": found.usable, "fences": found.fences, "trials": trials}


def _print(found: Json) -> None:
    table = columns("", "tried", "seconds", "seen", right="seconds")
    for trial in found["trials"]:
        mark = "ok" if trial["ok"] else "NO"
        table.add_row(mark, trial["what"], f"{trial['seconds']:.2f}", "" if trial["ok"] else plain(trial["seen"]))
    say(table)
    if found["fences"]:
        say(f"\n{found['url']} keeps runs, and keeps two jobs in one run apart.")
    elif found["usable"]:
        promise = "If you promise that one job writes at a time, pass ckpt.Checkpointer(strict_fencing=False)."
        say(f"\n{found['url']} keeps runs, but cannot keep two jobs apart. {promise}")
    else:
        say(f"\n{found['url']} is no place for a run.")
