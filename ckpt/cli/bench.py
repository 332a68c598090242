"""`bench`: what can this machine and this store do, and what does a save cost?"""

from __future__ import annotations

from dataclasses import asdict

import click

from ckpt.console import Json, byte_progress, columns, json_option, output, plain, say, url_argument
from ckpt.errors import NotFound
from ckpt.manifest import digest, strong_digest
from ckpt.run import RunDirectory
from ckpt.signing import signing_key
from ckpt.store import Store
from ckpt.stores import open_store


@click.command()
@url_argument
@click.option("--mb", type=click.IntRange(4), default=256, show_default=True, metavar="N",
              help="MiB to move each time; memory for three times as much.")  # fmt: skip
@click.option("--state-gb", type=click.FloatRange(0, min_open=True), metavar="GB",
              help="GB (10^9) that this machine saves; else all of the newest step of the run.")  # fmt: skip
@click.option("--mtbf", "mtbf_h", type=click.FloatRange(0, min_open=True), default=24.0, show_default=True,
              metavar="HOURS", help="Mean time between failures of the whole run.")  # fmt: skip
@json_option
def bench(url: str, mb: int, state_gb: float | None, mtbf_h: float, as_json: bool) -> None:
    """Measure what this machine and a store can do, and say what a save costs and how often to save.

    Copies into the RAM tier, digests, writes to a folder of its own in the store, reads it back and removes it; a run
    that is there is not touched. What follows is for one machine: where N machines save a run together, --state-gb
    is an N-th of its state. Training waits for the copy at most, as what its optimizers update is copied while it goes
    on. The interval is the one that ckpt.Every.auto(mtbf_s=...) comes to from these figures.

    \b
    Examples:
      ckpt bench /data/run
      ckpt bench s3://bucket/run --state-gb 12 --mtbf 3

    \b
    --json prints
      {"url": str, "moved_bytes": int,
       "rates": {"first_copy_bytes_per_s": float, "copy_bytes_per_s": float,
                 "digest_bytes_per_s": float, "write_bytes_per_s": float,
                 "read_bytes_per_s": float, "record_s": float},
       "cost": COST | null}  # null: the run has no step, and no --state-gb
      COST = {"state_bytes": int, "first_copied_s": float, "copied_s": float,
              "durable_s": float, "restored_s": float, "mtbf_s": float,
              "interval_s": float, "lost": float}  # a share of the time
    """
    from ckpt.bench import MOVES, amount, cost_of, measure

    store = open_store(url)
    nbytes = amount(mb << 20)
    state_bytes = round(state_gb * 1e9) if state_gb is not None else _newest_bytes(store)
    with byte_progress(MOVES * nbytes) as told:
        rates = measure(store, nbytes, strong_digest if signing_key() else digest, told)
    cost = cost_of(rates, state_bytes, mtbf_h * 3600) if state_bytes else None
    document = {"url": store.url, "moved_bytes": nbytes, "rates": asdict(rates), "cost": asdict(cost) if cost else None}
    output(document, as_json, _print)


def _newest_bytes(store: Store) -> int:
    """Bytes of the newest step; 0 where there is none."""
    try:
        head = RunDirectory.at(store).log.read().head
    except NotFound:
        return 0
    return head.nbytes if head else 0


def _print(found: Json) -> None:
    table = columns("measured", "", right="")
    for name, what in _RATES.items():
        table.add_row(what, f"{found['rates'][name] / 1e9:.2f} GB/s")
    table.add_row("a record in the store", _seconds(found["rates"]["record_s"]))
    say(table)
    cost = found["cost"]
    if cost is None:
        say(f"\n{plain(found['url'])} has no step yet: --state-gb N says what saving N GB costs.")
        return
    table = columns(f"saving {cost['state_bytes'] / 1e9:.3g} GB", "")
    for name, what in _COST.items():
        table.add_row(what, _seconds(cost[name]))
    say("")
    say(table)
    say(
        f"\nWith a failure every {cost['mtbf_s'] / 3600:.3g} h: save every {_seconds(cost['interval_s'])}; saves and "
        f"failures then take {cost['lost']:.2%} of the time.\n"
        f"ckpt.Every.auto(mtbf_s={cost['mtbf_s']:.0f}) finds this interval by itself, from what saves are seen to cost."
    )


_RATES = {
    "first_copy_bytes_per_s": "first copy into the RAM tier",
    "copy_bytes_per_s": "later copies",
    "digest_bytes_per_s": "digests, one core",
    "write_bytes_per_s": "writing to the store, durable",
    "read_bytes_per_s": "reading from the store, cold, verified",
}
_COST = {
    "first_copied_s": "the first save is copied after",
    "copied_s": "later ones (training waits so long at most)",
    "durable_s": "durable after",
    "restored_s": "read back within",
}


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.1f} s"
