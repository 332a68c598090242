"""What `save_load.py` measured, as tables: pure functions from measurements to text.

The ratios are what counts. Each is formed within a round, between operations that ran seconds apart, and the median
over the rounds is shown with the lowest and highest: absolute figures on a shared machine vary more than ratios do.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

TITLES = {"limit": "machine's limit", "holdfast": "holdfast", "dcp": "DCP"}


@dataclass(frozen=True)
class Measurement:
    """One operation of one contender in one round: the slowest rank's seconds, all ranks' CPU seconds together,

    the largest growth of a rank's resident set (mapped files included).
    """

    round: int
    operation: str
    contender: str
    seconds: float
    cpu_seconds: float
    extra_memory_bytes: int
    files_bytes: int | None = None  # what a save left on the disk


@dataclass(frozen=True)
class Balance:
    """Largest writer's bytes over the mean of all writers, and how many files' worth of writers there were."""

    layout: str
    ranks: int
    contender: str
    largest_over_mean: float


@dataclass(frozen=True)
class Operation:
    """A row of the main table; `limit` names the operation whose limit it is held against."""

    name: str
    title: str
    limit: str


OPERATIONS = (
    Operation("save", "first save of a run, 2 ranks, durable", "save"),
    Operation("save later", "later save, 2 ranks, durable", "save later"),
    Operation("load 2->2", "load 2 → 2, warm", "load 2->2"),
    Operation("load cold", "load 2 → 2, cold", "load cold"),
    Operation("load 2->1", "load 2 → 1, warm", "load 2->2"),
    Operation("load 2->4", "load 2 → 4, warm", "load 2->2"),
    Operation("load 4->3", "load 4 → 3, warm", "load 2->2"),
)

SHARDED = ("dcp", "torch-checkpointing", "torchsnapshot")  # peers whose files another number of ranks can load
PEERS = (*SHARDED, "torch.save", "safetensors")

# (operation, against whom, the other's operation, at most); the issues of this project set these
GOALS: tuple[tuple[str, tuple[str, ...], str, float], ...] = (
    ("save", ("limit",), "save", 1.15),
    ("save", SHARDED, "save", 0.75),
    ("save", PEERS, "save", 0.75),
    ("save later", ("limit",), "save later", 1.15),
    ("save later", SHARDED, "save later", 0.75),
    ("save later", PEERS, "save later", 0.75),
    ("load 2->2", ("limit",), "load 2->2", 1.5),
    ("load 2->2", ("dcp",), "load 2->2", 0.35),
    ("load cold", ("limit",), "load cold", 1.15),
    ("load 2->1", ("holdfast",), "load 2->2", 1.3),
    ("load 2->4", ("holdfast",), "load 2->2", 1.3),
    ("load 2->1", SHARDED, "load 2->1", 0.7),
    ("load 2->4", SHARDED, "load 2->4", 0.7),
    ("load 4->3", ("dcp",), "load 4->3", 0.5),
)

Table = tuple[list[str], list[list[str]]]  # header, rows


def main_table(measurements: Sequence[Measurement], contenders: Sequence[str]) -> Table:
    """Median seconds of every contender."""
    header = ["seconds (median)", *(title(name) for name in contenders)]
    rows = []
    for operation in OPERATIONS:
        row = [operation.title]
        for name in contenders:
            row.append(_seconds(measurements, operation.limit if name == "limit" else operation.name, name))
        rows.append(row)
    return header, rows


def goal_table(measurements: Sequence[Measurement], contenders: Sequence[str]) -> Table:
    """Every ratio that this library is to reach, against the best of those named, by their medians."""
    titles = {operation.name: operation.title for operation in OPERATIONS}
    header, rows = ["holdfast", "against", "ratio", "to reach"], []
    for operation, others, theirs, goal in GOALS:
        medians = {name: _middle([m.seconds for m in _select(measurements, theirs, name)]) for name in others}
        present = {name: value for name, value in medians.items() if name in contenders and value is not None}
        if not present or "holdfast" not in contenders:
            continue
        best = min(present, key=lambda name: present[name])
        what = f"its own {titles[theirs]}" if best == "holdfast" else title(best)
        if len(others) > 1:
            what += f", best of {len(present)} {'sharded ' if others == SHARDED else ''}peers"
        ratio = _ratio(measurements, ("holdfast", operation), (best, theirs))
        rows.append([titles[operation], what, ratio, f"≤ {goal:g}"])
    return header, rows


def cost_table(measurements: Sequence[Measurement], contenders: Sequence[str]) -> Table:
    """What each contender left on the disk, the CPU time it took, and how much its largest rank grew.

    CPU time hardly depends on what else the machine was doing, so it tells a slow library from a slow minute.
    """
    header = ["", *(title(name) for name in contenders)]
    rows = [["GB written"]]
    for name in contenders:
        sizes = [m.files_bytes for m in _select(measurements, "save", name) if m.files_bytes is not None]
        rows[0].append(_median([size / 1e9 for size in sizes], ".3f"))
    found = {(o, name): _select(measurements, o.name, name) for o in OPERATIONS for name in contenders}
    for operation in OPERATIONS:
        cells = [_median([m.cpu_seconds for m in found[operation, name]], ".2f") for name in contenders]
        rows.append([f"CPU seconds, all ranks, {operation.title}", *cells])
    for operation in OPERATIONS:
        cells = [_median([m.extra_memory_bytes / 2**20 for m in found[operation, name]], ".0f") for name in contenders]
        rows.append([f"MiB grown at the peak, {operation.title}", *cells])
    return header, rows


def balance_table(balances: Sequence[Balance], contenders: Sequence[str]) -> Table:
    """Largest writer over mean, per layout and number of ranks."""
    header = ["largest writer / mean", *(title(name) for name in contenders)]
    found = {(b.layout, b.ranks, b.contender): f"{b.largest_over_mean:.3f}" for b in balances}
    keys = sorted({(b.layout, b.ranks) for b in balances})
    rows = [[f"{layout}, {n} ranks", *(found.get((layout, n, name), "–") for name in contenders)] for layout, n in keys]
    return header, rows


def markdown(table: Table) -> str:
    """A table as Markdown; the first column left, the others right aligned."""
    header, rows = table
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def summary(measurements: Sequence[Measurement]) -> dict[str, dict[str, float | None]]:
    """The medians of the ratios, for machines to read."""
    return {
        operation.name: {
            "holdfast_over_dcp": _middle(_ratios(measurements, ("holdfast", operation.name), ("dcp", operation.name))),
            "holdfast_over_limit": _middle(
                _ratios(measurements, ("holdfast", operation.name), ("limit", operation.limit))
            ),
            "dcp_over_limit": _middle(_ratios(measurements, ("dcp", operation.name), ("limit", operation.limit))),
        }
        for operation in OPERATIONS
    }


def title(contender: str) -> str:
    """The contender's name in the tables."""
    return TITLES.get(contender, contender)


def _select(measurements: Iterable[Measurement], operation: str, contender: str) -> list[Measurement]:
    return [m for m in measurements if m.operation == operation and m.contender == contender]


def _seconds(measurements: Sequence[Measurement], operation: str, contender: str) -> str:
    return _median([m.seconds for m in _select(measurements, operation, contender)], ".2f")


def _median(values: Sequence[float], form: str) -> str:
    return format(median(values), form) if values else "–"


def _ratios(
    measurements: Sequence[Measurement], numerator: tuple[str, str], denominator: tuple[str, str]
) -> list[float]:
    """One ratio per round that holds both; each side is (contender, operation)."""
    above, below = (
        {m.round: m.seconds for m in _select(measurements, operation, contender)}
        for contender, operation in (numerator, denominator)
    )
    return [above[number] / below[number] for number in sorted(above.keys() & below.keys())]


def _middle(values: list[float]) -> float | None:
    return median(values) if values else None


def _ratio(measurements: Sequence[Measurement], numerator: tuple[str, str], denominator: tuple[str, str]) -> str:
    values = _ratios(measurements, numerator, denominator)
    if len(values) > 1:
        return f"{median(values):.2f} ({min(values):.2f} – {max(values):.2f})"
    return f"{values[0]:.2f}" if values else "–"
