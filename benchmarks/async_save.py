"""What an asynchronous save costs training, and how soon it is durable, against torch DCP and the machine's limits.

    python benchmarks/async_save.py                  three rounds on GPT-2 124M + AdamW, FSDP2, 2 gloo ranks on CPU
    python benchmarks/async_save.py --layout ddp     every rank holds the whole state
    python benchmarks/async_save.py --model 41m      0.5 GB instead of 1.5
    python benchmarks/async_save.py --rounds 1 --model quick
    python benchmarks/async_save.py --write          also update benchmarks/RESULTS.md

The contenders take turns within each round, all equally durable. "Lost" is what 16 steps with one save took longer than
16 without, in the same turn. Saving every step leaves out what the disk cannot take (`busy="skip"`), and holds every
step in RAM. Memory is what the whole machine has less of at the peak of a save, the page cache left aside.
"""

import datetime
import importlib.util
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Self

import click
import machine
from results import write_section
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from save_load import FULL, QUICK
from worlds import World

OURS = ("holdfast", "holdfast, no overlap", "holdfast, blocking")
PEERS = {
    "dcp": "torch",
    "dcp shared": "torch",
    "dcp process": "torch",
    "torch-checkpointing": "torch_checkpointing",
    "torchsnapshot": "torchsnapshot",
}
MODELS = {"124m": FULL, "41m": {**FULL, "heads": 6, "width": 384}, "quick": QUICK}
STEPS, STEP_S, PAIRS = 16, 0.3, 2
MULTIPLES = (3, 10, 30)  # steps of so many times the copy's duration, saved every time

Figures = dict[str, dict[str, list[float]]]


class Memory:
    """While entered, looks again and again how much memory the machine has left; `peak_bytes` is the largest loss."""

    def __enter__(self) -> Self:
        self._before = self._least = self._available()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.peak_bytes = self._before - self._least

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self._least = min(self._least, self._available())

    @staticmethod
    def _available() -> int:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024


def one_turn(world: World, name: str, folder: Path, found: dict[str, list[float]]) -> None:
    """The first save, later ones, and training with and without one."""
    folder.mkdir()
    world.call("open_async", contender=name, path=str(folder))
    with Memory() as memory:
        for which in ("first", "second", "later", "later"):
            replies = world.call("async_save")
            found[f"{which} blocked"].append(max(reply["blocked"] for reply in replies))
            found[f"{which} durable"].append(max(reply["durable"] for reply in replies))
    found["memory"].append(memory.peak_bytes / 1e9)
    for _ in range(PAIRS):
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
        steps = max(6, 36 // multiple)
        with_saves, without = (
            max(r["seconds"] for r in world.call("train", steps=steps, step_s=multiple * copy_s, saves=saves))
            for saves in (list(range(steps)), [])
        )
        found[f"steps of {multiple} x copy"].append(with_saves / without)
        goal = 1 + 1.3 * copy_s / (without / steps) if multiple < MULTIPLES[-1] else 1.05
        found[f"goal at {multiple} x"].append(goal)
        found["one of these saves, x copy"].append((with_saves - without) / steps / copy_s)
    world.call("close_async")
    shutil.rmtree(folder)


def after_kill(config: dict[str, int], layout: str, folder: Path, found: dict[str, list[float]]) -> None:
    """All workers die by SIGKILL; others go on from RAM. Those end in peace, and others again go on from the disk."""
    folder.mkdir()
    with World(2, config, layout, seed=0) as world:
        world.call("open_async", contender="holdfast", path=str(folder))
        world.call("async_save")
        world.kill()
    for source in ("RAM", "disk"):
        with World(2, config, layout, seed=0) as world:
            replies = world.call("restore_again", path=str(folder / "run"))
            found[f"restore from {source}"].append(max(reply["seconds"] for reply in replies))
        time.sleep(1)  # the keeper of workers that ended in peace goes within that
    shutil.rmtree(folder)


def measure(
    rounds: int, config: dict[str, int], layout: str, contenders: list[str], folder: Path, progress: Progress
) -> Figures:
    found: Figures = defaultdict(lambda: defaultdict(list))
    task = progress.add_task("async saves", total=rounds * (len(contenders) + 3))
    with World(2, config, layout, seed=0) as world:
        world.call("available", names=["limit"])
        for number in range(rounds):
            turn = number % len(contenders)
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
            for name in contenders[turn:] + contenders[:turn]:
                progress.update(task, description=f"round {number + 1}: {name}")
                one_turn(world, name, folder / "async", found[name])
                progress.advance(task)
            every_step(world, median(copies), folder / "every", found["every step"])
            progress.advance(task)
    for number in range(rounds):
        progress.update(task, description=f"round {number + 1}: after SIGKILL")
        after_kill(config, layout, folder / "killed", found["after kill"])
        progress.advance(task)
    return found


def section(found: Figures, title: str, about: str, missing: list[str]) -> str:
    """The tables, in Markdown."""
    limit = {name: median(values) for name, values in found["limit"].items()}
    lines = [
        f"## Asynchronous saves: {title}",
        "",
        about,
        "",
        "Medians, seconds, the slower rank. Limits of the same bytes: memcpy into touched memory "
        f"{limit['copy']:.2f}, into fresh memory {limit['fresh copy']:.2f}, "
        f"O_DIRECT write and fsync {limit['write']:.2f}.",
        *[f"{name} did not take part: it is not installed." for name in missing],
        "",
        "| | first save returns | later saves return | one save costs training | durable | durable / write limit | "
        "GB of memory at the peak |",
        "|---|---|---|---|---|---|---|",
    ]
    m = {name: {what: median(values) for what, values in found[name].items()} for name in (*OURS, *PEERS)}
    for name in (*OURS, *PEERS):
        if of := m[name]:
            lines.append(
                f"| {name} | {of['first blocked']:.3f} | {of['later blocked']:.3f} | {of['lost']:.2f} | "
                f"{of['later durable']:.2f} | {of['later durable'] / limit['write']:.2f} | {of['memory']:.2f} |"
            )
    ours, apart = m["holdfast"], m["holdfast, no overlap"]
    best = min((of["lost"], name) for name, of in m.items() if of and name in PEERS)
    every, after = found["every step"], found["after kill"]
    ram, disk = (median(after[f"restore from {source}"]) for source in ("RAM", "disk"))
    lines += ["", "| ratio or figure | measured | to reach |", "|---|---|---|"]
    lines += [
        f"| no overlap, later saves return / memcpy into touched memory | {apart['later blocked'] / limit['copy']:.2f} "
        "| ≤ 1.3 |",
        f"| no overlap, first save returns / memcpy into fresh memory "
        f"| {apart['first blocked'] / limit['fresh copy']:.2f} | ≤ 1.3 |",
        f"| overlap, later saves return, ms | {ours['later blocked'] * 1e3:.0f} | ≤ 20 |",
        f"| one save costs training / the best peer ({best[1]}) | {ours['lost'] / best[0]:.2f} | ≤ 0.5 |",
        f"| blocking, later saves / O_DIRECT limit | {m['holdfast, blocking']['later durable'] / limit['write']:.2f} "
        "| ≤ 1.15 |",
        f"| durable / O_DIRECT limit | {ours['later durable'] / limit['write']:.2f} | ≤ 1.25 |",
        f"| durable / dcp | {ours['later durable'] / m['dcp']['later durable']:.2f} | ≤ 0.6 |",
        f"| restore from RAM after SIGKILL / warm from disk ({ram:.2f} / {disk:.2f} s) | {ram / disk:.2f} | ≤ 1.1 |",
    ]
    for multiple in MULTIPLES:
        values, goal = every[f"steps of {multiple} x copy"], median(every[f"goal at {multiple} x"])
        lines.append(
            f"| saving every step, steps of {multiple} x copy / without saving "
            f"| {median(values):.2f} ({min(values):.2f} – {max(values):.2f}) | ≤ {goal:.2f} |"
        )
    costs = every["one of these saves, x copy"]
    lines += ["", f"One of the saves of every step cost {median(costs):.1f} x the copy in the median."]
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Rounds; the median counts.")
@click.option("--model", type=click.Choice(list(MODELS)), default="124m", show_default=True, help="Parameters.")
@click.option("--layout", type=click.Choice(["fsdp2", "ddp"]), default="fsdp2", show_default=True, help="Parallelism.")
@click.option("--dir", "parent", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Where to write.")
@click.option("--write", is_flag=True, help="Update benchmarks/RESULTS.md.")
def main(rounds: int, model: str, layout: str, parent: Path | None, write: bool) -> None:
    """Compare asynchronous saves; Markdown on stdout, progress on stderr."""
    if write and model == "quick":
        raise click.UsageError("the quick model measures nothing worth writing down")
    missing = sorted({package for package in PEERS.values() if importlib.util.find_spec(package) is None})
    contenders = [*OURS, *(name for name, package in PEERS.items() if package not in missing)]
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=parent or machine.default_folder()) as folder:
        words = f"python benchmarks/async_save.py --rounds {rounds} --model {model} --layout {layout}"
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        about = f"`{words}`, {date}; {machine.describe(Path(folder))}. {machine.busy() or ''}".rstrip()
        with Progress(*columns, console=console) as progress:
            found = measure(rounds, MODELS[model], layout, contenders, Path(folder), progress)
    text = section(found, f"GPT-2 {model} and AdamW, {layout}, 2 ranks", about, missing)
    click.echo(text)
    if write:
        write_section(f"async_save_{model}_{layout}", text)


if __name__ == "__main__":
    main()
