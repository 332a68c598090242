"""What planning costs one rank in worlds of up to 100,000 ranks: in one process, without any of the others.

    python benchmarks/plan_scale.py                 all cases; about two minutes
    python benchmarks/plan_scale.py --write         also update benchmarks/RESULTS.md

Plans are pure functions of what every rank holds, so one process can play any rank of any world. Measured cold: the
caches of the pure modules are emptied before every figure. Save: the ranks' layouts as they arrive -> World -> proof
that everything is covered -> plan. Restore at another size: MANIFEST bytes -> World -> parts to open -> their bytes ->
plan of reads. Parts hold what `plan_save` gives their writers; their digests are made up.
Owns the worlds and the clock; `plan_worlds.py` describes the models.
"""

import dataclasses
import datetime
import gc
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import TypeVar

import click
import machine
import plan_worlds
from plan_worlds import Case
from results import write_section
from save_load_report import markdown

from ckpt import layout as layout_module
from ckpt import manifest as manifest_module
from ckpt import sharding as sharding_module
from ckpt import symbolic as symbolic_module
from ckpt.layout import OWNERSHIP, World, cover_faults
from ckpt.manifest import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    Chunk,
    Manifest,
    Part,
    PartRef,
    decode_manifest,
    decode_part,
    encode_manifest,
    encode_part,
)
from ckpt.plan import Target, needed_parts, plan_load, plan_save
from ckpt.sharding import pieces_of
from ckpt.symbolic import decode_layout, encode_layout

ATTEMPT = "000001000.benchmark"
ROUNDS = 3  # the median counts

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Saved:
    """One rank's save, planned cold. `world_s` and `cover_s` are part of `save_s`."""

    case: str
    ranks: int
    tensors: int  # in the world
    own_tensors: int  # that this rank holds
    chunks: int  # that this rank writes
    world_s: float
    cover_s: float
    save_s: float


@dataclasses.dataclass(frozen=True)
class Restored:
    """One rank's restore at another size, planned cold from bytes."""

    case: str
    ranks: int
    own_tensors: int
    manifest_bytes: int
    parts: int
    parts_bytes: int
    decode_s: float  # MANIFEST and parts
    plan_s: float  # which parts, and the reads
    fetches: int
    read_over_used: float

    @property
    def opened_bytes(self) -> int:
        return self.manifest_bytes + self.parts_bytes


def forget() -> None:
    """Empty every cache of the pure modules, so that the next figure is a cold one.

    What exists already is hidden from the garbage collector: to walk over torch's objects takes up to 0.15 s, now
    and then, whatever is planned.
    """
    for module in (sharding_module, layout_module, manifest_module, symbolic_module):
        for value in vars(module).values():
            if clear := getattr(value, "cache_clear", None):
                clear()
    gc.collect()
    gc.freeze()


def timed(act: Callable[[], T]) -> tuple[float, T]:
    """Processor seconds: a plan is one thread and waits for nothing, and other work on the machine does not count."""
    began = time.process_time()
    result = act()
    return time.process_time() - began, result


def slowest_save(case: Case) -> Saved:
    """Of the first, the middle and the last rank, the one that spends most."""
    ranks = (0, case.saved.size // 2, case.saved.size - 1)
    return max((measure_save(case, rank) for rank in ranks), key=lambda saved: saved.save_s)


def slowest_restore(case: Case) -> Restored:
    """Of the first, the middle and the last rank, the one that spends most."""
    ranks = (0, case.target.size // 2, case.target.size - 1)
    return max((measure_restore(case, rank) for rank in ranks), key=lambda found: found.decode_s + found.plan_s)


def measure_save(case: Case, rank: int) -> Saved:
    """The median over ROUNDS of what `rank` spends."""
    arriving = [encode_layout(layout) for layout in case.saved.layouts]
    rounds = []
    for _ in range(ROUNDS):
        forget()
        world_s, world = timed(lambda: World(tuple(map(decode_layout, arriving)), case.saved.layout_of))
        cover_s, faults = timed(lambda world=world: cover_faults(world))
        assert not faults, faults[:3]
        plan_s, plan = timed(lambda world=world: plan_save(world, rank))
        rounds.append((world_s + cover_s + plan_s, world_s, cover_s))
    save_s, world_s, cover_s = (median(column) for column in zip(*rounds, strict=True))
    own = len(case.saved.layout(rank).entries)
    return Saved(case.name, case.saved.size, len(case.saved.specs), own, len(plan.chunks), world_s, cover_s, save_s)


def measure_restore(case: Case, rank: int) -> Restored:
    """The median over ROUNDS of what `rank` spends; the parts that it opens are made before, off the clock."""
    data = encode_manifest(_manifest(case.saved))
    made: dict[int, bytes] = {}
    rounds = []
    for _ in range(ROUNDS):
        forget()
        manifest_s, manifest = timed(lambda: decode_manifest(data, "MANIFEST"))
        targets = _targets(case.target, rank)
        which_s, needed = timed(lambda: needed_parts(manifest.world, manifest.ownership, targets))  # noqa: B023
        made.update((part, encode_part(_part(case.saved, part))) for part in needed - made.keys())
        forget()
        parts_s, parts = timed(lambda: {n: decode_part(made[n], f"part {n}").chunks for n in sorted(needed)})  # noqa: B023
        load_s, plan = timed(lambda: plan_load(targets, parts))  # noqa: B023
        rounds.append((manifest_s + parts_s, which_s + load_s))
    decode_s, plan_s = (median(column) for column in zip(*rounds, strict=True))
    return Restored(
        case.name,
        case.target.size,
        len(targets),
        len(data),
        len(made),
        sum(map(len, made.values())),
        decode_s,
        plan_s,
        len(plan.fetches),
        plan.read_bytes / max(plan.used_bytes, 1),  # the last shard of an uneven split is empty
    )


def _manifest(world: World) -> Manifest:
    made_up = [rank.to_bytes(DIGEST_BYTES, "big") for rank in range(world.size)]
    refs = tuple(PartRef(300_000 + i % 1000, found, 1 << 30, found) for i, found in enumerate(made_up))
    return Manifest(1000, 3, ATTEMPT, None, world, OWNERSHIP, refs, bytes(DIGEST_BYTES), {"val_loss": 2.5})


def _part(world: World, rank: int) -> Part:
    plan = plan_save(world, rank)
    chunks = []
    for c in plan.chunks:
        blocks = -(-c.nbytes // BLOCK_BYTES)
        made_up = bytes(DIGEST_BYTES * blocks)
        box = c.owned.box
        chunks.append(Chunk(c.owned.key, box.offset, box.shape, c.spec.dtype, "", c.at, c.nbytes, "raw", made_up))
    return Part(rank, ATTEMPT, plan.file.data_bytes, tuple(chunks), {}, {})


def _targets(world: World, rank: int) -> list[Target]:
    """Targets in plain host memory, as a bound state gives them."""
    found = []
    for entry in world.layout(rank).entries:
        pieces = pieces_of(entry.sharding, entry.spec.shape, rank)
        shape = tuple(max((p.at[d] + p.box.shape[d] for p in pieces), default=0) for d in range(len(entry.spec.shape)))
        found.append(Target(entry.key, pieces, shape, direct=True))
    return found


def save_table(saves: list[Saved]) -> str:
    header = [
        "one rank plans a save",
        "ranks",
        "tensors",
        "its own",
        "chunks",
        "layouts in (s)",
        "proof (s)",
        "all (s)",
    ]
    rows = [
        [
            s.case,
            f"{s.ranks:,}",
            f"{s.tensors:,}",
            f"{s.own_tensors:,}",
            f"{s.chunks:,}",
            f"{s.world_s:.3f}",
            f"{s.cover_s:.3f}",
            f"{s.save_s:.3f}",
        ]
        for s in saves
    ]
    return markdown((header, rows))


def restore_table(restores: list[Restored]) -> str:
    header = ["one rank plans a restore", "to ranks", "MANIFEST (MB)", "parts it opens", "both (MB)", "decode (s)"]
    header += ["plan (s)", "reads", "read / used"]
    rows = [
        [
            r.case,
            f"{r.ranks:,}",
            f"{r.manifest_bytes / 1e6:.2f}",
            f"{r.parts:,}",
            f"{r.opened_bytes / 1e6:.2f}",
            f"{r.decode_s:.3f}",
            f"{r.plan_s:.3f}",
            f"{r.fetches:,}",
            f"{r.read_over_used:.3f}",
        ]
        for r in restores
    ]
    return markdown((header, rows))


def growth_table(saves: list[Saved], restores: list[Restored]) -> str:
    header = ["FSDP2 x TP 8", "save (ms)", "per own tensor (µs)", "restore (ms)", "per own tensor (µs)", "opened (MB)"]
    rows = []
    for s, r in zip(saves, restores, strict=True):
        restore_s = r.decode_s + r.plan_s
        rows.append(
            [
                f"{s.ranks:,} ranks, {s.own_tensors:,} tensors",
                f"{s.save_s * 1e3:.0f}",
                f"{s.save_s / s.own_tensors * 1e6:.0f}",
                f"{restore_s * 1e3:.0f}",
                f"{restore_s / r.own_tensors * 1e6:.0f}",
                f"{r.opened_bytes / 1e6:.2f}",
            ]
        )
    return markdown((header, rows))


GOALS = """\
To reach: one rank's plan of a save and of a restore ≤ 2 s at 4,480 ranks; MANIFEST plus opened parts ≤ 20 MB and
decoded in ≤ 1 s at 1,024 ranks x 1,500 tensors, where DCP's metadata was extrapolated from measurements at 32 to 64
ranks to 0.26 GB, 23 s to load on every rank and 105 s to plan on rank 0. Seconds are processor seconds of one thread,
the median of three, cold (nothing cached from an earlier plan), of the first, the middle and the last rank the
slowest; without the walks of Python's garbage collector over what torch brought along (up to 0.15 s each). In a run,
a save is planned once per layout, not once per save."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write every figure here.")
@click.option("--write", is_flag=True, help="Update benchmarks/RESULTS.md.")
def main(json_file: Path | None, write: bool) -> None:
    """Time the plans of one rank in large worlds; Markdown on stdout, progress on stderr."""
    about = {
        "command": shlex.join(["python", "benchmarks/plan_scale.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine.describe(Path.cwd()),
        "disturbed": machine.busy(),
    }
    saves, restores = [], []
    for case in _each(plan_worlds.cases()):
        saves.append(slowest_save(case))
        restores.append(slowest_restore(case))
    grown_saves, grown_restores = [], []
    for case in _each(plan_worlds.growing()):
        grown_saves.append(measure_save(case, case.saved.size // 2))
        grown_restores.append(measure_restore(case, case.target.size // 2))
    source = f"`{about['command']}`, {about['date']}; {about['machine']}."
    paragraphs = ["## Planning at scale", source, GOALS, *([about["disturbed"]] if about["disturbed"] else [])]
    tables = [save_table(saves), restore_table(restores), growth_table(grown_saves, grown_restores)]
    section = "\n\n".join([*paragraphs, *tables])
    click.echo(section)
    if json_file:
        figures = {
            "about": about,
            "saves": [dataclasses.asdict(s) for s in saves + grown_saves],
            "restores": [dataclasses.asdict(r) for r in restores + grown_restores],
        }
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    if write:
        write_section("plan_scale", section)


def _each(cases: list[Callable[[], Case]]) -> Iterator[Case]:
    for make in cases:
        case = make()
        click.echo(f"{case.name} ...", err=True)
        yield case


if __name__ == "__main__":
    main()
