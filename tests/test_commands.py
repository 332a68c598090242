"""What the commands say of themselves: help that teaches, a reference that is up to date, JSON as documented."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
from click.shell_completion import BashComplete
from click.testing import CliRunner
from jobs import ROOT
from json_notation import Notation
from test_elastic_cli import view_of

import ckpt
import ckpt.cli
import elastic.cli
from elastic.membership import of_start
from elastic.roster import Pulse
from elastic.status import describe

GROUPS = {"ckpt": ckpt.cli.cli, "elastic": elastic.cli.cli}
COMMANDS = [f"{name} {each}" for name, group in GROUPS.items() for each in group.commands]


def _command(called: str) -> click.Command:
    group, name = called.split()
    return GROUPS[group].commands[name]


def _help(called: str) -> str:
    group, *name = called.split()
    done = CliRunner().invoke(GROUPS[group], [*name, "--help"], prog_name=group, terminal_width=80)
    assert done.exit_code == 0
    return done.stdout


def _block(text: str, head: str) -> list[str]:
    """The lines of help below the one that matches `head`, to the next blank line."""
    found = re.search(rf"^ *{head}.*\n((?: +\S.*\n)+)", text, re.MULTILINE)
    return [line.strip() for line in found[1].splitlines()] if found else []


def _maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_commands", ROOT / "docs" / "make_commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date() -> None:
    made = _maker()
    assert made.PAGE.read_text() == made.page(), "run `python docs/make_commands.py`"


@pytest.mark.parametrize("called", COMMANDS)
def test_a_command_teaches_itself_within_80_columns(called: str) -> None:
    text, command = _help(called), _command(called)
    assert _block(text, "Examples?:")
    assert max(map(len, text.splitlines())) <= 80
    options = {option.name for option in command.params if isinstance(option, click.Option)}
    assert bool(_block(text, "--json.* prints")) == ("as_json" in options)
    assert ("as_json" in options) == (called != "elastic run")  # its output is that of the workers
    assert all(option.help for option in command.params if isinstance(option, click.Option))


def _examples() -> Iterator[str]:
    for called in (*COMMANDS, *GROUPS):
        yield from (re.split(r"  +", line)[0] for line in _block(_help(called), "Examples?:"))


@pytest.mark.parametrize("name", GROUPS)
def test_a_program_teaches_itself_within_80_columns(name: str) -> None:
    text = _help(name)
    assert _block(text, "Exit codes")
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("line", list(_examples()))
def test_an_example_is_a_command_that_is_understood(line: str) -> None:
    name, *words = shlex.split(line.partition(" | ")[0])
    found, command, arguments = GROUPS[name].resolve_command(click.Context(GROUPS[name]), words)
    assert command is not None
    command.make_context(found, arguments)


# JSON


def _printed(called: str, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
    group, name = called.split()
    done = CliRunner().invoke(GROUPS[group], [name, "--json", *map(str, arguments)])
    ended = getattr(done.exception, "exit_code", done.exit_code)
    assert ended == code, f"{done.output} {done.exception!r}"
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return found


def _faults(called: str, document: object) -> list[str]:
    return Notation("\n".join(_block(_help(called), "--json.* prints"))).faults(document)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 to 4, of which 1 has a pin and 3 a metric that is no number; step 5 was left behind."""
    path = tmp_path_factory.mktemp("commands") / "run"
    model = torch.nn.Linear(4, 2)
    state = {"model": model, "tied": model.weight, "n": (1, 2), "each": ckpt.PerRank(3)}
    with ckpt.Checkpointer(path) as checkpointer:
        for step in (1, 2, 3, 5):
            metrics = {"loss": float("nan") if step == 3 else 0.5}
            checkpointer.save(step, state, metrics=metrics, blocking=True)
        checkpointer.pin(1, "first")
        checkpointer.restore(state, step=3)
        checkpointer.save(4, {**state, "n": (1, 3)}, blocking=True)
    return path


def _documents(run: Path, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every command's, in an order in which they work one after the other on a copy of `run`."""

    def printed(called: str, *arguments: str | Path, code: int = 0) -> tuple[str, dict[str, Any]]:
        return called, _printed(called, *arguments, code=code)

    here, file = folder / "run", folder / "state.pt"
    yield printed("ckpt cp", run, here)
    yield printed("ckpt cp", run, folder / "all", "--all")
    for of in (run, folder / "all"):
        yield printed("ckpt ls", of)
        yield printed("ckpt show", of)
    yield printed("ckpt check", run, "--all")
    yield printed("ckpt diff", f"{run}@3", run, code=1)
    yield printed("ckpt diff", run, here)
    yield printed("ckpt resume", "--dry-run", "--before", "4", run, "--", "true")
    yield printed("ckpt resume", "--dry-run", folder / "nothing", "--", "true")
    yield printed("ckpt export", run, file, "--format", "torch")
    yield printed("ckpt import", file, folder / "imported", "--step", "7")
    yield printed("ckpt pin", folder / "all", "2", "--name", "two")
    yield printed("ckpt unpin", folder / "all", "two")
    yield printed("ckpt delete", folder / "all", "2", "--dry-run")
    yield printed("ckpt delete", folder / "all", "2", "--takeover")
    yield printed("ckpt gc", folder / "all", "--last", "1", "--takeover")
    yield printed("ckpt doctor", folder / "store")
    yield printed("ckpt bench", folder / "store", "--mb", "4")
    yield printed("ckpt bench", run, "--mb", "4")
    yield printed("elastic status", run)
    yield printed("elastic report", run)
    yield printed("elastic drain", "node7", run)
    yield printed("elastic cordon", "--undo", "node7", run)
    yield printed("elastic chaos", "--list")
    view = view_of("why")
    pulses = Pulse("a", 1, 3), Pulse("a", 1, 5, waiting=("host-c",), avoided=("host-d",))
    yield "elastic status", describe("/run", view, of_start(view.holder), *pulses, ["host-e"])
    (data,) = (here / "steps").glob("*/r00000.safetensors")
    os.truncate(data, 100)
    yield printed("ckpt check", here, code=12)


def test_every_document_is_as_the_help_says(run: Path, tmp_path: Path) -> None:
    seen = set()
    for called, document in _documents(run, tmp_path):
        assert _faults(called, document) == [], called
        seen.add(called)
    assert seen == {called for called in COMMANDS if called != "elastic run"}


def test_the_address_may_stand_in_the_environment(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*words: str) -> int:
        return CliRunner().invoke(ckpt.cli.cli, words).exit_code

    monkeypatch.setenv("CKPT_URL", str(run))
    assert call("pin", "2", "--name", "two") == 0
    assert [step["pins"] for step in _printed("ckpt ls")["steps"]][:2] == [["first"], ["two"]]
    assert (call("unpin", "two"), call("resume", "--dry-run", "--", "python", "train.py")) == (0, 0)
    assert "no step 9 in this run" in str(CliRunner().invoke(ckpt.cli.cli, ["delete", "9"]).exception)
    assert (call("pin"), call("pin", str(run), "x", "2"), call("pin", "nothing", "2")) == (2, 2, 1)
    monkeypatch.delenv("CKPT_URL")
    assert (call("pin", "2"), call("resume", "--dry-run", "--", "python", "train.py")) == (2, 2)
    assert call("resume", "--dry-run", "--step", "1", str(run), "--", "python", "train.py") == 0
    assert call("resume", str(run), "--dry-run", "--", "python", "train.py") == 2


@pytest.mark.parametrize(
    ("value", "faults"),
    [
        ({"a": 1, "b": [{"c": None}], "n": 1.5}, []),
        ({"a": True, "b": [{"c": "x"}], "n": 1}, ["$.a: True is not int"]),
        ({"a": 1, "b": [{"c": "y"}], "n": 1}, ["$.b[0].c: 'y' is none of 2 kinds"]),
        ({"a": 1, "b": {}, "n": 1}, ["$.b: {} is no array"]),
        ({"a": 1, "b": [], "x": 1}, ["$: these members are on one side only: ['n', 'x']"]),
    ],
)
def test_the_notation_tells_a_wrong_document(value: object, faults: Sequence[str]) -> None:
    assert (
        Notation('{"a": int,  # why, [not]\n "b": [C], **N}\nC = {"c": "x" | null}\nN = {"n": float}').faults(value)
        == faults
    )


# Completion


@pytest.mark.parametrize(("name", "typed", "offered"), [("ckpt", "re", "resume"), ("elastic", "dr", "drain")])
def test_a_shell_completes_commands(name: str, typed: str, offered: str) -> None:
    """As the shell asks; that the script is printed and that bash takes it shows in docs/commands.md."""
    shell = BashComplete(GROUPS[name], {}, name, f"_{name.upper()}_COMPLETE")
    assert f"complete -o nosort -F _{name}_completion {name}" in shell.source()
    assert [found.value for found in shell.get_completions([], typed)] == [offered]
    assert "--json" in [found.value for found in shell.get_completions([offered], "--")]
