"""Writes docs/commands.md from the commands themselves: `python docs/make_commands.py`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

import ckpt.cli
import elastic.cli

PAGE = Path(__file__).parent / "commands.md"

HEAD = """\
# Commands

<!-- Written by `python docs/make_commands.py`. Change the docstrings of the commands instead. -->

Data goes to stdout, progress and errors to stderr. At a terminal tables fit its width; elsewhere a row is one line of
plain text without colour. URL is a path or the URL of a bucket ([stores.md](stores.md)); where it is left out,
`CKPT_URL` counts.

## Completion

In `~/.bashrc` (for zsh and fish: `zsh_source`, `fish_source`):

```sh
eval "$(_CKPT_COMPLETE=bash_source ckpt)"
eval "$(_ELASTIC_COMPLETE=bash_source elastic)"
```

## JSON

With `--json` a command prints one document on one line. Each command below says which, in this notation: `str`, `int`,
`float` (an `int` counts as one), `bool`, `null` and words in quotes are what they are in JSON; `A | B` is either; `[A]`
an array of any length; `{"name": A}` an object with these members and no others; `{str: A}` an object with any names;
a word in capitals is defined further down, and `**WORD` stands for the members of that object. What follows `#`
explains. Later versions may add members.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_group("ckpt", ckpt.cli.cli), *_group("elastic", elastic.cli.cli)])


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with what is typed to call it."""
    for name, group in (("ckpt", ckpt.cli.cli), ("elastic", elastic.cli.cli)):
        for command in group.commands.values():
            yield f"{name} {command.name}", command


def help_of(command: click.Command) -> str:
    """What a command says of itself, without indentation."""
    return inspect.cleandoc(command.help or "")


def _group(name: str, group: click.Group) -> Iterator[str]:
    yield f"## {name}\n"
    yield _words(help_of(group))
    for called, command in commands():
        if called.startswith(f"{name} "):
            yield f"### {called}\n"
            yield _usage(called, command)
            yield _words(help_of(command))
            yield _options(command)


def _words(text: str) -> str:
    """Paragraphs as they are; blocks that keep their lines (after a line `\\b`) fenced below their first line."""
    pieces = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("\b\n"):
            head, _, lines = paragraph.removeprefix("\b\n").partition("\n")
            pieces.append(f"{head}\n\n```text\n{inspect.cleandoc(lines)}\n```\n")
        else:
            pieces.append(paragraph.replace("[", "\\[") + "\n")
    return "\n".join(pieces)


def _usage(called: str, command: click.Command) -> str:
    context = click.Context(command, info_name=called)
    return f"`{called} {' '.join(command.collect_usage_pieces(context))}`\n"


def _options(command: click.Command) -> str:
    context = click.Context(command)
    options = [each for each in command.params if isinstance(each, click.Option)]
    rows = [found for each in options if (found := each.get_help_record(context)) is not None]
    cells = [[re.sub(r" +", " ", text.replace("|", "\\|")) for text in row] for row in rows]
    return "\n".join(["| option | |", "|---|---|", *(f"| `{option}` | {what} |" for option, what in cells)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
