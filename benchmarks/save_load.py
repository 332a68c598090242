"""Compare saving, loading and resharding with torch DCP, torch.save, safetensors and the machine's limit.

    python benchmarks/save_load.py                  three rounds on GPT-2 124M + AdamW, FSDP2, gloo on CPU
    python benchmarks/save_load.py --rounds 1 --quick
    python benchmarks/save_load.py --write          also update benchmarks/RESULTS.md

Everything is equally durable (files and directories fsynced), every load goes into existing tensors and is checked bit
for bit afterwards. The contenders take turns within each round, in an order that moves on from round to round.
Owns the schedule; `worker.py` times, `contenders.py` knows the libraries, `save_load_report.py` makes the tables.
"""

import dataclasses
import datetime
import json
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Self

import click
import machine
import save_load_report as report
from results import write_section
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from save_load_report import Balance, Measurement
from worlds import World, WorldFailed

FULL = {"layers": 12, "heads": 12, "width": 768, "vocabulary": 50257, "context": 1024}
QUICK = {"layers": 2, "heads": 4, "width": 128, "vocabulary": 5003, "context": 64}

ALL = ("limit", "holdfast", "dcp", "torch-checkpointing", "torchsnapshot", "torch.save", "safetensors")
RESHARDING = ("holdfast", "dcp", "torch-checkpointing", "torchsnapshot")  # the others' files are bound to their rank
BALANCED = ("holdfast", "dcp")
# The data files of one save: the group is the writer.
WRITERS = {"holdfast": re.compile(r"^(r\d+)\.safetensors$"), "dcp": re.compile(r"^__(\d+)_\d+\.distcp$")}
BALANCED_RANKS = (2, 3, 4)
DISK_CHECKPOINTS = 7  # at most this many lie on the disk at one time


class Bench:
    """The worlds of one benchmark and what they measured; a context manager that ends the worlds."""

    def __init__(self, config: dict[str, int], contenders: list[str], folder: Path, seed: int, progress: Progress):
        self.config, self.contenders, self.folder, self.seed = config, contenders, folder, seed
        self.measurements: list[Measurement] = []
        self.balances: list[Balance] = []
        self.unavailable: dict[str, str] = {}
        self._progress = progress
        self._task = progress.add_task("save and load", total=None)
        self._worlds: dict[int, World] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_worlds()

    def start_worlds(self, *sizes: int, layout: str = "fsdp2") -> None:
        """Start a world of each size; whoever cannot take part drops out, with its reason noted."""
        for size in sizes:
            self._say(f"starting {size} ranks, {layout}")
            world = self._stack.enter_context(World(size, self.config, layout, seed=self.seed))
            self._worlds[size] = world
            missing = world.call("available", names=self.contenders)[0]["unavailable"]
            for name, reason in missing.items():
                self._say(f"{report.title(name)} does not take part: {reason}")
            self.unavailable |= missing
            self.contenders = [name for name in self.contenders if name not in self.unavailable]
            folder = self.folder / "warm-up"
            folder.mkdir()
            world.call("warm_up", path=str(folder))
            shutil.rmtree(folder)

    def expect(self, operations: int) -> None:
        """Tell the progress bar how many operations there will be."""
        self._progress.update(self._task, total=operations)

    def end_worlds(self) -> None:
        """End all worlds and free their memory."""
        self._stack.close()
        self._worlds.clear()

    def run_round(self, number: int) -> None:
        """Let every contender save and load once; only what is still to be resharded stays on the disk."""
        turn = number % len(self.contenders)
        order = self.contenders[turn:] + self.contenders[:turn]
        resharding = [name for name in order if name in RESHARDING]
        for name in order:
            self._save(number, "save", 2, name)
            self._load(number, "load 2->2", 2, name)
            self._load(number, "load cold", 2, name, cold=True)
            self._save_later(number, name)
            if name not in resharding:
                self._delete(name)
            if name == "limit":
                self._record(number, "copy", name, self._worlds[2].call("copy", contender=name, path=""))
        for target in (1, 4):
            for name in resharding:
                self._load(number, f"load 2->{target}", target, name)
        for name in resharding:
            self._delete(name)
        for name in resharding:
            self._worlds[4].call("save", contender=name, path=str(self._path(name)))
            self._load(number, "load 4->3", 3, name)
            self._delete(name)

    def measure_balance(self) -> None:
        """Save once in each layout and world size and compare the writers' bytes.

        DDP needs the whole state on every rank, so its worlds live one at a time, after all others.
        """
        for size in BALANCED_RANKS:
            self._balance("fsdp2", size)
        self.end_worlds()
        for size in BALANCED_RANKS:
            self.start_worlds(size, layout="ddp")
            self._balance("ddp", size)
            self.end_worlds()

    def state_bytes(self) -> int:
        """Bytes of the whole state, each tensor once."""
        return sum(reply["bytes"] for reply in self._worlds[2].call("state_bytes"))

    def _balance(self, layout: str, size: int) -> None:
        for name in self.contenders:
            if name in BALANCED:
                self._worlds[size].call("save", contender=name, path=str(self._path(name)))
                ratio = largest_over_mean(self._path(name), WRITERS[name], size)
                self.balances.append(Balance(layout, size, name, ratio))
                self._delete(name)
        self._progress.advance(self._task)

    def _save(self, number: int, operation: str, size: int, name: str) -> None:
        replies = self._worlds[size].call("save", contender=name, path=str(self._path(name)))
        self._record(
            number, operation, name, replies, files_bytes=sum(f.stat().st_size for f in files(self._path(name)))
        )

    def _save_later(self, number: int, name: str) -> None:
        path = self.folder / f"{name}-later"
        replies = self._worlds[2].call("save", contender=name, path=str(path), later=True)
        shutil.rmtree(path)
        self._record(number, "save later", name, replies)

    def _load(self, number: int, operation: str, size: int, name: str, cold: bool = False) -> None:
        replies = self._worlds[size].call("load", contender=name, path=str(self._path(name)), cold=cold)
        self._record(number, operation, name, replies)

    def _record(
        self, number: int, operation: str, name: str, replies: list[dict[str, Any]], files_bytes: int | None = None
    ) -> None:
        seconds = max(reply["seconds"] for reply in replies)
        cpu_seconds = sum(reply["cpu_seconds"] for reply in replies)
        memory = max(reply["extra_memory_bytes"] for reply in replies)
        self.measurements.append(Measurement(number, operation, name, seconds, cpu_seconds, memory, files_bytes))
        self._say(f"round {number + 1}  {operation:<9}  {name:<11}  {seconds:6.3f} s  (CPU {cpu_seconds:.3f} s)")
        self._progress.advance(self._task)

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _delete(self, name: str) -> None:
        shutil.rmtree(self._path(name))

    def _say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)


def files(path: Path) -> Iterator[Path]:
    """Every file under `path`."""
    return (file for file in path.rglob("*") if file.is_file())


def largest_over_mean(path: Path, pattern: re.Pattern[str], ranks: int) -> float:
    """The largest writer's bytes over the mean of `ranks` writers; one that wrote nothing counts."""
    sizes: dict[str, int] = {}
    for file in files(path):
        if match := pattern.match(file.name):
            sizes[match[1]] = sizes.get(match[1], 0) + file.stat().st_size
    if not 0 < len(sizes) <= ranks:
        raise ValueError(f"expected data files of 1 to {ranks} writers, found {len(sizes)}")
    return max(sizes.values()) / (sum(sizes.values()) / ranks)


def operations_count(contenders: list[str], rounds: int, balance: bool) -> int:
    """How many steps the progress bar has."""
    resharding = sum(name in RESHARDING for name in contenders)
    per_round = 4 * len(contenders) + ("limit" in contenders) + 3 * resharding
    return rounds * per_round + (2 * len(BALANCED_RANKS) if balance else 0)


def run(bench: Bench, rounds: int, balance: bool) -> None:
    """Measure everything; the worlds of a round live through all rounds, so that nobody meets a cold one."""
    bench.start_worlds(2, 1, 4, 3)
    bench.expect(operations_count(bench.contenders, rounds, balance))
    needed_bytes = DISK_CHECKPOINTS * bench.state_bytes()
    if shutil.disk_usage(bench.folder).free < needed_bytes:
        raise click.ClickException(f"{bench.folder} needs {needed_bytes / 1e9:.1f} GB free; choose another with --dir")
    for number in range(rounds):
        bench.run_round(number)
    if balance:
        bench.measure_balance()


def tables(bench: Bench, contenders: list[str]) -> list[report.Table]:
    """All tables that have something to say."""
    found = [
        report.main_table(bench.measurements, contenders),
        report.goal_table(bench.measurements, contenders),
        report.cost_table(bench.measurements, contenders),
    ]
    if bench.balances:
        found.append(report.balance_table(bench.balances, [name for name in contenders if name in BALANCED]))
    return found


def print_table(console: Console, table: report.Table) -> None:
    """A table for people, on stderr."""
    header, rows = table
    shown = Table(*header)
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def notes(bench: Bench, rounds: int, disturbed: str | None) -> str:
    """What a reader of the tables has to know."""
    lines = [
        f"GPT-2 and AdamW under FSDP2 on gloo ranks; medians of interleaved rounds (here {rounds}), "
        "ratios formed within a round and shown as median (lowest – highest).",
        "Files and directories fsynced; digests on for holdfast; every load goes into existing tensors and is checked.",
        "Limit: O_DIRECT write of a preallocated file and fsync; preadv from the page cache into touched memory; "
        "2 ranks, one thread each; cold: direct reads. Every warm load is held against the same preadv.",
    ]
    if copies := [m.seconds for m in bench.measurements if m.operation == "copy"]:
        lines.append(f"Copying the state into touched memory, 2 ranks: {median(copies):.2f} s.")
    lines += [f"{report.title(name)} did not take part: {reason}." for name, reason in bench.unavailable.items()]
    lines += [disturbed] if disturbed else []
    return "\n".join(lines)


def given_options() -> str:
    """The command line without what holds on one machine only: folders and files."""
    context = click.get_current_context()
    words = []
    for parameter in context.command.params:
        value = context.params[parameter.name or ""]
        if parameter.name in ("parent", "json_file") or value == parameter.get_default(context) or value == ():
            continue
        name = parameter.opts[0] if value is not False else parameter.secondary_opts[0]
        if isinstance(value, bool):
            words.append(name)
        else:
            words += [f"{name} {one}" for one in (value if isinstance(value, tuple) else (value,))]
    return " ".join(words)


def write_json(file: Path, bench: Bench, about: dict[str, Any]) -> None:
    """Every figure, and the medians of the ratios."""
    found = {
        **about,
        "unavailable": bench.unavailable,
        "summary": report.summary(bench.measurements),
        "measurements": [dataclasses.asdict(one) for one in bench.measurements],
        "balance": [dataclasses.asdict(one) for one in bench.balances],
    }
    file.write_text(json.dumps(found, indent=1) + "\n")


def measure(
    config: dict[str, int], contenders: list[str], rounds: int, balance: bool, folder: Path, seed: int, console: Console
) -> Bench:
    """Run the schedule with its files under `folder`, with progress on the console."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console) as progress,
        Bench(config, contenders, folder, seed, progress) as bench,
    ):
        run(bench, rounds, balance)
    return bench


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Rounds; the median counts.")
@click.option("--quick", is_flag=True, help="A model of a few MB, to show that everything runs.")
@click.option("--only", multiple=True, type=click.Choice(ALL), help="Only these contenders (repeatable).")
@click.option("--balance/--no-balance", default=True, show_default=True, help="Compare the writers' bytes as well.")
@click.option("--dir", "parent", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Where to write.")
@click.option("--seed", default=0, show_default=True, help="Seed of the values.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write every figure here.")
@click.option("--write", is_flag=True, help="Update benchmarks/RESULTS.md.")
def main(
    rounds: int,
    quick: bool,
    only: tuple[str, ...],
    balance: bool,
    parent: Path | None,
    seed: int,
    json_file: Path | None,
    write: bool,
) -> None:
    """Compare save, load and resharded load with the peers; Markdown on stdout, progress on stderr."""
    if write and quick:
        raise click.UsageError("--quick measures nothing worth writing down")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that worlds are ended and files deleted
    contenders = [name for name in ALL if not only or name in only]
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
    config = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=parent or machine.default_folder()) as folder:
        about = {
            "command": f"python benchmarks/save_load.py {given_options()}".rstrip(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine.describe(Path(folder)),
            "disturbed": machine.busy(),
        }
        if about["disturbed"]:
            console.print(about["disturbed"])
        try:
            bench = measure(config, contenders, rounds, balance, Path(folder), seed, console)
        except WorldFailed as error:
            raise click.ClickException(str(error)) from error
    found = tables(bench, contenders)
    for table in found:
        print_table(console, table)
    source = f"`{about['command']}`, {about['date']}; {about['machine']}."
    section = "\n\n".join(
        ["## Save, load, reshard", source, notes(bench, rounds, about["disturbed"]), *map(report.markdown, found)]
    )
    click.echo(section)
    if json_file:
        write_json(json_file, bench, about)
    if write:
        write_section("save_load", section)


if __name__ == "__main__":
    main()
