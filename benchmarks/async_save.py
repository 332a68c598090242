"""What an asynchronous save costs training, and how soon it is durable, against torch DCP and the machine's limits.

    python benchmarks/async_save.py                  five rounds on GPT-2 124M + AdamW, FSDP2, 2 gloo ranks on CPU
    python benchmarks/async_save.py --rounds 1 --quick
    python benchmarks/async_save.py --write          also update benchmarks/RESULTS.md

The contenders take turns within each round. "Lost" is what 16 steps with one save took longer than 16 without, in the
same turn. Saving every step leaves out what the disk cannot take (`busy="skip"`), and holds every step in RAM.
"""

import datetime
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

import click
import machine
from results import write_section
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from save_load import FULL, QUICK
from worlds import World

CONTENDERS = ("holdfast", "holdfast, no overlap", "dcp", "dcp shared", "dcp process")
STEPS, STEP_S = 16, 0.3
MULTIPLES = (3, 10, 30)  # steps of so many times the copy's duration, saved every time

Figures = dict[str, dict[str, list[float]]]


def one_turn(world: World, name: str, folder: Path, found: dict[str, list[float]]) -> None:
    """The first save, later ones, and training with and without one."""
    folder.mkdir()
    world.call("open_async", contender=name, path=str(folder))
    for which in ("first", "second", "later", "later"):
        replies = world.call("async_save")
        found[f"{which} blocked"].append(max(reply["blocked"] for reply in replies))
        found[f"{which} durable"].append(max(reply["durable"] for reply in replies))
    with_save, without = (
        max(reply["seconds"] for reply in world.call("train", steps=STEPS, step_s=STEP_S, saves=saves))
        for saves in ([1], [])
    )
    found["lost"].append(with_save - without)
    world.call("close_async")
    shutil.rmtree(folder)


def every_step(world: World, copy_s: float, folder: Path, found: dict[str, list[float]]) -> None:
    """Training that saves every step against the same without."""
    folder.mkdir()
    world.call("open_async", contender="holdfast, skipping", path=str(folder))
    for _ in range(4):  # all memory is made
        world.call("async_save")
    for multiple in MULTIPLES:
        steps = max(6, 60 // multiple)
        with_saves, without = (
            max(r["seconds"] for r in world.call("train", steps=steps, step_s=multiple * copy_s, saves=saves))
            for saves in (list(range(steps)), [])
        )
        found[f"steps of about {multiple} x copy"].append(with_saves / without)
        found["one of these saves, x copy"].append((with_saves - without) / steps / copy_s)
    world.call("close_async")
    shutil.rmtree(folder)


def measure(rounds: int, config: dict[str, int], folder: Path, progress: Progress) -> Figures:
    found: Figures = defaultdict(lambda: defaultdict(list))
    task = progress.add_task("async saves", total=rounds * (len(CONTENDERS) + 2))
    with World(2, config, "fsdp2", seed=0) as world:
        world.call("available", names=["limit"])
        for number in range(rounds):
            turn = number % len(CONTENDERS)
            world.call("save", contender="limit", path=str(folder / "warm"))
            shutil.rmtree(folder / "warm")
            copies = [max(r["seconds"] for r in world.call("copy", contender="limit", path="")) for _ in range(3)]
            found["limit"]["copy"].append(median(copies))
            found["limit"]["fresh copy"].append(max(r["seconds"] for r in world.call("fresh_copy")))
            for _ in range(2):
                wrote = world.call("save", contender="limit", path=str(folder / "limit"))
                found["limit"]["write"].append(max(r["seconds"] for r in wrote))
                shutil.rmtree(folder / "limit")
            progress.advance(task)
            for name in CONTENDERS[turn:] + CONTENDERS[:turn]:
                progress.update(task, description=f"round {number + 1}: {name}")
                one_turn(world, name, folder / "async", found[name])
                progress.advance(task)
            every_step(world, median(copies), folder / "every", found["every step"])
            progress.advance(task)
    return found


def section(found: Figures, about: str) -> str:
    """The tables, in Markdown."""
    limit = {name: median(values) for name, values in found["limit"].items()}
    lines = [
        "## Asynchronous saves",
        "",
        about,
        "",
        "Medians, seconds, the slower rank. Limits of the same bytes: memcpy into touched memory "
        f"{limit['copy']:.2f}, into fresh memory {limit['fresh copy']:.2f}, "
        f"O_DIRECT write and fsync {limit['write']:.2f}.",
        "",
        "| | first save returns | later saves return | one save costs training | durable | durable / write limit |",
        "|---|---|---|---|---|---|",
    ]
    for name in CONTENDERS:
        if name in found:
            m = {what: median(values) for what, values in found[name].items()}
            lines.append(
                f"| {name} | {m['first blocked']:.3f} | {m['later blocked']:.3f} | {m['lost']:.2f} | "
                f"{m['later durable']:.2f} | {m['later durable'] / limit['write']:.2f} |"
            )
    lines += ["", "Training that saves every step, against the same without saving:", ""]
    for what, values in found["every step"].items():
        lines.append(f"- {what}: {median(values):.2f} ({min(values):.2f} – {max(values):.2f})")
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds; the median counts.")
@click.option("--quick", is_flag=True, help="A model of a few MB, to show that everything runs.")
@click.option("--dir", "parent", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Where to write.")
@click.option("--write", is_flag=True, help="Update benchmarks/RESULTS.md.")
def main(rounds: int, quick: bool, parent: Path | None, write: bool) -> None:
    """Compare asynchronous saves; Markdown on stdout, progress on stderr."""
    if write and quick:
        raise click.UsageError("--quick measures nothing worth writing down")
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=parent or machine.default_folder()) as folder:
        words = f"python benchmarks/async_save.py --rounds {rounds}" + (" --quick" if quick else "")
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        about = f"`{words}`, {date}; {machine.describe(Path(folder))}. {machine.busy() or ''}".rstrip()
        with Progress(*columns, console=console) as progress:
            found = measure(rounds, QUICK if quick else FULL, Path(folder), progress)
    text = section(found, about)
    click.echo(text)
    if write:
        write_section("async_save", text)


if __name__ == "__main__":
    main()
