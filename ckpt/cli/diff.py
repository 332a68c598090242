"""`diff`: what changed between two steps, of one run or of two."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ckpt.console import Json, columns, count, find, json_option, open_at, output, plain, say
from ckpt.records import Commit
from ckpt.run import RunDirectory
from ckpt.sharding import TensorSpec

if TYPE_CHECKING:
    from ckpt.diff import Difference, Differences


@click.command()
@click.argument("left", metavar="A")
@click.argument("right", metavar="B")
@click.option("--all", "every", is_flag=True, help="List the tensors that are bit for bit the same, too.")
@json_option
def diff(left: str, right: str, every: bool, as_json: bool) -> None:
    """Say what changed between two steps: keys, dtypes and shapes, values, how much and in how many elements.

    A and B are URL or URL@STEP, the newest step where none is given; the layouts they were saved under do not matter.
    Tensors that did not change are called out: a save that repeats old weights shows. Every byte that is read is
    verified. Exits 1 if anything differs.

    \b
    Examples:
      ckpt diff /data/run@1000 /data/run@2000
      ckpt diff /data/run s3://bucket/copy

    \b
    --json prints
      {"left": SIDE, "right": SIDE, "equal": bool,
       "same": int,  # tensors that are bit for bit the same
       "values": [str],  # names of values that differ
       "tensors": [{"key": str, "status": "same" | "changed" | "kind" |
                    "left" | "right", "left": SPEC, "right": SPEC,
                    "share": float, "largest": float, "mean": float,
                    "not_finite": int}]}
      SIDE = {"url": str, "step": int}
      SPEC = {"dtype": str, "shape": [int]} | null
    """
    from ckpt.diff import compare_steps
    from ckpt.restorer import StepReader

    sides = _side(left), _side(right)
    with _progress() as told:
        found = compare_steps(StepReader(*sides[0]), StepReader(*sides[1]), told)
    document = _json(sides, found)
    output(document, as_json, lambda document: _print(document, every))
    if not found.equal:
        sys.exit(1)


def _side(text: str) -> tuple[RunDirectory, Commit]:
    run, view, number = open_at(text)
    return run, find(run, view, number)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    bar = Progress(TextColumn("tensors"), BarColumn(), MofNCompleteColumn(), console=Console(stderr=True),
                   disable=not sys.stderr.isatty())  # fmt: skip
    task = bar.add_task("tensors", total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _json(sides: tuple[tuple[RunDirectory, Commit], tuple[RunDirectory, Commit]], found: Differences) -> Json:
    left, right = ({"url": run.url, "step": commit.step} for run, commit in sides)
    return {
        "left": left,
        "right": right,
        "equal": found.equal,
        "same": sum(each.status == "same" for each in found.tensors),
        "values": list(found.values),
        "tensors": [_tensor(each) for each in found.tensors],
    }


def _tensor(found: Difference) -> Json:
    numbers = {name: getattr(found, name) for name in ("share", "largest", "mean", "not_finite")}
    return {"key": found.key, "status": found.status, "left": _spec(found.left), "right": _spec(found.right), **numbers}


def _spec(spec: TensorSpec | None) -> Json | None:
    return {"dtype": spec.dtype, "shape": list(spec.shape)} if spec else None


def _print(found: Json, every: bool) -> None:
    listed = [tensor for tensor in found["tensors"] if every or tensor["status"] != "same"]
    if listed:
        table = columns("tensor", "", "elements", "largest", "mean", right="elements largest mean")
        for tensor in listed:
            table.add_row(plain(tensor["key"]), *_words(tensor))
        say(table)
        say("")
    for name in found["values"]:
        say(plain(f"value {name} differs"))
    total = len(found["tensors"])
    left, right = (f"step {found[side]['step']} of {found[side]['url']}" for side in ("left", "right"))
    say(f"{left} and {right}: {found['same']} of {count(total, 'tensor')} bit for bit the same.")
    if total and found["same"] == total and found["left"] != found["right"]:
        say("Nothing changed in any tensor between them. If training went on, it saved old weights.")


def _words(tensor: Json) -> tuple[str, str, str, str]:
    match tensor["status"]:
        case "same":
            return "the same", "", "", ""
        case "left" | "right" as side:
            return f"only in {'A' if side == 'left' else 'B'}", "", "", ""
        case "kind":
            left, right = (f"{s['dtype']} {s['shape']}" for s in (tensor["left"], tensor["right"]))
            return f"{left} -> {right}", "", "", ""
    note = f"changed, {tensor['not_finite']} not finite" if tensor["not_finite"] else "changed"
    return note, f"{tensor['share']:.1%}", f"{tensor['largest']:.3g}", f"{tensor['mean']:.3g}"
