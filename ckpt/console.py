"""What all commands have in common: their options, how they open a run, print, and end. No torch here."""

from __future__ import annotations

import io
import json
import os
import reprlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from ckpt.errors import CkptError, Corrupt, NotFound
from ckpt.holder import find_commit
from ckpt.log import View
from ckpt.records import Commit
from ckpt.run import RunDirectory

Json = dict[str, Any]


def _from_environment(context: click.Context, parameter: click.Parameter, found: tuple[str, ...]) -> str:
    url = found[0] if found else os.environ.get("CKPT_URL")
    if not url:
        raise click.MissingParameter(ctx=context, param=parameter)
    if len(found) > 1:
        raise click.UsageError(f"there is one argument too many: {found[1]!r:.100}", context)
    return url


url_argument = click.argument("url", envvar="CKPT_URL", metavar="URL")
# click gives arguments to names from the left: this one may be left out before others, too.
leading_url_argument = click.argument("url", nargs=-1, callback=_from_environment, metavar="[URL]")


class StartsCommand(click.Command):
    """A command that is called `[URL] -- COMMAND...`: what stands behind `--` is never taken for the URL."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            given, _, _ = self.make_parser(ctx).parse_args(args[:at])
            if not isinstance(given.get("url"), str):
                url = os.environ.get("CKPT_URL")
                if not url:
                    raise click.UsageError("Missing argument 'URL' before `--`, and CKPT_URL is not set.", ctx)
                args = [*args[:at], url, *args[at:]]
            elif isinstance(found := given.get("command"), tuple) and found and found[0].startswith("-"):
                raise click.UsageError(f"{found[0]} is an option: it stands before the URL.", ctx)
        return super().parse_args(ctx, args)


strict_fencing_option = click.option(
    "--no-strict-fencing", "strict_fencing", flag_value=False, default=True,
    help="Where the store cannot keep two writers apart: your promise that nobody else writes.",
)  # fmt: skip
step_option = click.option("--step", type=click.IntRange(min=0), metavar="N", help="A step; else the newest.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")


def open_run(url: str) -> tuple[RunDirectory, View]:
    try:
        run = RunDirectory.open(url)
    except NotFound as error:
        base, _, step = url.rpartition("@")
        if not (base and step.isdecimal()):
            raise
        raise NotFound(f"{error} For step {step} of a run: `ckpt show {base} --step {step}`.") from None
    try:
        return run, run.log.read()
    except Corrupt as error:
        still = "Nothing was changed. Without its log a run's steps cannot be told from abandoned attempts"
        raise Corrupt(f"{error}\n{still}: bring this file back from a copy.") from error


def open_at(text: str) -> tuple[RunDirectory, View, int | None]:
    """The run, its log, and the step of URL or URL@STEP."""
    url, at, step = text.rpartition("@")
    number = int(step) if at and step.isdecimal() else None
    return *open_run(url if number is not None else text), number


@contextmanager
def byte_progress(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr at a terminal, told of the bytes that are done; from any thread."""
    bar = Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                   console=Console(stderr=True), disable=not sys.stderr.isatty())  # fmt: skip
    task = bar.add_task("bytes", total=total_bytes)
    with bar:
        yield lambda nbytes: bar.update(task, advance=nbytes)


def find(run: RunDirectory, view: View, step: int | None) -> Commit:
    try:
        return find_commit(view, step)
    except NotFound as error:
        raise NotFound(f"{run.url}: {error}") from None


def plain(text: str) -> str:
    """One line without control characters, whatever a hostile checkpoint holds."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def size(nbytes: int) -> str:
    power = min((max(nbytes, 1).bit_length() - 1) // 10, 5)
    return f"{nbytes / 1024**power:.1f} {'KMGTP'[power - 1]}iB" if power else f"{nbytes} B"


def age(unix_s: float) -> str:
    seconds = max(time.time() - unix_s, 0.0)
    for unit, length, limit in (("s", 1, 60), ("min", 60, 60), ("h", 3600, 48)):
        if seconds < length * limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def ranges(ranks: Iterable[int]) -> str:
    """`0-3,8` for 0, 1, 2, 3, 8; ascending and distinct."""
    groups = (list(group) for _, group in groupby(enumerate(ranks), key=lambda item: item[1] - item[0]))
    return ",".join(f"{g[0][1]}-{g[-1][1]}" if len(g) > 1 else str(g[0][1]) for g in groups)


INT_BITS_LIMIT = 1024  # Python refuses to write very long ones


class _Shortened(reprlib.Repr):
    """Values as Python writes them, cut to a line; tensors and arrays as dtype and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 16
        self.maxstring = self.maxother = 80

    def repr1(self, x: Any, level: int) -> str:
        if type(x).__name__ in ("Tensor", "ndarray"):
            return f"{type(x).__name__.lower()}({str(x.dtype).removeprefix('torch.')}, {list(x.shape)})"
        if isinstance(x, int) and x.bit_length() > INT_BITS_LIMIT:
            return f"int of {x.bit_length()} bits"
        return super().repr1(x, level)


def short(value: object) -> str:
    text = " ".join(_Shortened().repr(value).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def output(document: Json, as_json: bool, print_it: Callable[[Json], None]) -> None:
    if as_json:
        click.echo(json.dumps(document, allow_nan=False))
    else:
        print_it(document)


def columns(*names: str, right: str = "") -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        numeric = name in right.split()
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    return table


def say(what: str | Table) -> None:
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


def run_command(command: click.Command, name: str) -> NoReturn:
    """Be the program `name`: run the command, say what went wrong on stderr, exit with the code of its error."""
    try:
        code = command.main(prog_name=name, standalone_mode=False)
    except CkptError as error:
        text = "\n".join(map(plain, str(error).split("\n")))
        click.echo(f"{type(error).__name__}: {text}", err=True)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        click.echo("interrupted", err=True)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
