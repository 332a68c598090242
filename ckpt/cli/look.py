"""What is there: `ls` lists the steps of a run, `show` one step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import click

from ckpt.console import (
    Json,
    age,
    columns,
    count,
    find,
    json_option,
    open_run,
    output,
    plain,
    ranges,
    say,
    short,
    size,
    step_option,
    url_argument,
)
from ckpt.errors import CkptError, Corrupt, Incompatible, NotFound
from ckpt.layout import World
from ckpt.log import View
from ckpt.manifest import Part
from ckpt.records import Commit
from ckpt.run import RunDirectory
from ckpt.sharding import Declared, OnMesh, Sharding
from ckpt.symbolic import placement_code

if TYPE_CHECKING:
    from ckpt.check import Values


@click.command("ls")
@url_argument
@json_option
def list_steps(url: str, as_json: bool) -> None:
    """List the steps of a run.

    First the lineage, oldest first: the newest step (the head) and those it was built on. Then what lies outside:
    steps left behind when the run went back, and attempts without a commit record, which are being written right now
    or were abandoned. Steps deleted by retention are only counted. Exits 10 if there is no step.

    \b
    Examples:
      ckpt ls /data/run
      ckpt ls /data/run --json | jq '.steps[] | [.step, .metrics.val_loss]'

    \b
    --json prints
      {"url": str, "generation": int, "head": int | null, "deleted": int,
       "steps": [STEP],  # the lineage, oldest first
       "outside": [STEP],  # committed, not in the lineage
       "uncommitted": [{"attempt": str, "step": int, "nbytes": int,
                        "unix_s": float}]}
      STEP = {"step": int, "generation": int, "attempt": str,
              "parent": str | null, "unix_s": float, "nbytes": int,
              "world": int, "content_digest": str,
              "sources": [str],  # attempts that hold what did not change
              "metrics": {str: float | "nan" | "inf" | "-inf"},
              "pins": [str]}
    """
    run, view = open_run(url)
    listing = _listing(run, view)
    output(listing, as_json, _print_listing)
    if ignored := view.without_effect:
        click.echo(f"warning: {count(len(ignored), 'record')} of the log without effect; see `ckpt check`", err=True)
    if not listing["steps"]:
        raise NotFound(f"{run.url}: this run has no checkpoint yet")


def _listing(run: RunDirectory, view: View) -> Json:
    lineage, outside = view.standing(), view.standing_outside()
    left = [name for name in run.attempts() if name not in view.commits and name not in view.retired]
    return {
        "url": run.url,
        "generation": view.generation,
        "head": lineage[-1].step if lineage else None,
        "deleted": len(view.retired),
        "steps": [_commit_json(commit, view) for commit in lineage],
        "outside": [_commit_json(commit, view) for commit in outside],
        "uncommitted": [found for name in left if (found := _attempt_json(run, name))],
    }


def _commit_json(commit: Commit, view: View) -> Json:
    names = ("step", "generation", "attempt", "parent", "unix_s", "nbytes", "world", "content_digest", "sources")
    metrics = {name: value if math.isfinite(value) else str(value) for name, value in commit.metrics.items()}
    pins = sorted(name for name, pin in view.pins.items() if pin.attempt == commit.attempt)
    return {**{name: getattr(commit, name) for name in names}, "metrics": metrics, "pins": pins}


def _attempt_json(run: RunDirectory, attempt: str) -> Json | None:
    """An attempt without a commit record; None if it has gone meanwhile."""
    try:
        found = run.store.usage(run.attempt_path(attempt))
    except CkptError:
        return None
    return {"attempt": attempt, "step": int(attempt.partition(".")[0]), "nbytes": found.nbytes, "unix_s": found.unix_s}


def _print_listing(listing: Json) -> None:
    table = columns("step", "gen", "age", "size", "world", "", "metrics", right="step gen age size world")
    for found in listing["steps"]:
        marks = ["head"] if found is listing["steps"][-1] else []
        marks += [f"pin:{name}" for name in found["pins"]]
        table.add_row(*_common(found), plain(" ".join(marks)), _metrics(found["metrics"]))
    say(table)
    if listing["deleted"]:
        say(f"\n{listing['deleted']} more deleted by retention")
    if listing["outside"] or listing["uncommitted"]:
        say("\nOutside of the lineage, not restored:")
        table = columns("step", "gen", "age", "size", "world", "attempt", "why", right="step gen age size world")
        for found in listing["outside"]:
            table.add_row(*_common(found), found["attempt"], "left by going back")
        for found in listing["uncommitted"]:
            table.add_row(*_common(found), found["attempt"], "no commit record")
        say(table)


def _common(found: Json) -> list[str]:
    generation, world = (str(found.get(name, "")) for name in ("generation", "world"))
    return [str(found["step"]), generation, age(found["unix_s"]), size(found["nbytes"]), world]


def _metrics(metrics: Mapping[str, float | str]) -> str:
    return plain("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in metrics.items()))


@click.command()
@url_argument
@step_option
@json_option
def show(url: str, step: int | None, as_json: bool) -> None:
    """Show what a step holds: tensors, who wrote them, values.

    The keys are those that ckpt.load(keys=...) and restore(only=...) take. "shards" is the number of stored pieces,
    "ranks" those that wrote them. Opens the MANIFEST and all parts, no data.

    \b
    Examples:
      ckpt show /data/run
      ckpt show /data/run --step 2000 | grep lm_head

    \b
    --json prints
      {"url": str, **STEP, "head": bool,
       "tensors": [{"key": str, "dtype": str, "shape": [int], "nbytes": int,
                    "sharding": str, "shards": int, "ranks": [int]}],
       "tied": {str: str},  # other name: key
       "values": {str: str},  # as Python writes them, shortened
       "rank_values": {str: [int]}}  # name: ranks
      STEP = {"step": int, "generation": int, "attempt": str,
              "parent": str | null, "unix_s": float, "nbytes": int,
              "world": int, "content_digest": str,
              "sources": [str],  # attempts that hold what did not change
              "metrics": {str: float | "nan" | "inf" | "-inf"},
              "pins": [str]}
    """
    run, view = open_run(url)
    output(_describe(run, view, find(run, view, step)), as_json, _print_step)


def _describe(run: RunDirectory, view: View, commit: Commit) -> Json:
    from ckpt.check import Values
    from ckpt.restorer import StepReader

    reader = StepReader(run, commit)
    world = reader.manifest.world
    shards: dict[str, list[int]] = {}
    rank_values: dict[str, list[int]] = {}
    for rank in range(world.size):
        for chunk in reader.part(rank).chunks:
            shards.setdefault(chunk.key, []).append(rank)
        for name in world.layout(rank).rank_values:
            rank_values.setdefault(name, []).append(rank)
    stand_ins = Values(world)
    values = {name: _value(stand_ins, reader.part(r), name) for name, r in sorted(world.value_owner.items())}
    return {
        "url": run.url,
        **_commit_json(commit, view),
        "head": view.head is commit,
        "tensors": [_tensor_json(world, key, shards.get(key, [])) for key in sorted(world.specs)],
        "tied": dict(sorted(world.aliases.items())),
        "values": values,
        "rank_values": dict(sorted(rank_values.items())),
    }


def _value(stand_ins: Values, part: Part, name: str) -> str:
    if name not in part.values:
        raise Corrupt(f"the part of rank {part.rank} lacks the value {name}")
    try:
        return short(stand_ins.decode(name, part.values[name]))
    except Incompatible as error:
        return f"({error})"


def _tensor_json(world: World, key: str, writers: Sequence[int]) -> Json:
    spec, sharding = world.specs[key], _sharding_words(list(world.instances[key]))
    described = {"key": key, "dtype": spec.dtype, "shape": list(spec.shape), "nbytes": spec.nbytes}
    return {**described, "sharding": sharding, "shards": len(writers), "ranks": sorted(set(writers))}


def _sharding_words(shardings: Sequence[Sharding]) -> str:
    """`whole`, `mesh 2x4: R, S0` or `declared`; several, where ranks hold a tensor in several ways."""
    words: list[str] = []
    for sharding in shardings:
        if isinstance(sharding, OnMesh):
            placements = ", ".join(map(placement_code, sharding.placements))
            words.append(f"mesh {'x'.join(map(str, sharding.mesh.shape))}: {placements}")
        else:
            words.append("declared" if isinstance(sharding, Declared) else "whole")
    return "; ".join(dict.fromkeys(words))


def _print_step(found: Json) -> None:
    nbytes = sum(tensor["nbytes"] for tensor in found["tensors"])
    say(f"step {found['step']} of {plain(found['url'])}{' (head)' if found['head'] else ''}\n")
    facts = {
        "saved": f"{datetime.fromtimestamp(found['unix_s']):%Y-%m-%d %H:%M:%S}, {age(found['unix_s'])} ago",
        "generation": str(found["generation"]),
        "attempt": found["attempt"],
        "parent": found["parent"] or "none, the first of its lineage",
        "world": count(found["world"], "rank"),
        "size": f"{size(found['nbytes'])} on disk; {count(len(found['tensors']), 'tensor')} of {size(nbytes)}",
        "content": found["content_digest"],
        **({"unchanged in": ", ".join(found["sources"])} if found["sources"] else {}),
        "metrics": _metrics(found["metrics"]) or "none",
        **({"pinned as": plain(", ".join(found["pins"]))} if found["pins"] else {}),
    }
    for name, fact in facts.items():
        say(f"{name:<11}{fact}")
    say("")
    table = columns("tensor", "dtype", "shape", "sharding", "shards", "ranks", right="shards")
    for tensor in found["tensors"]:
        shape, ranks = "x".join(map(str, tensor["shape"])) or "scalar", ranges(tensor["ranks"]) or "-"
        table.add_row(plain(tensor["key"]), tensor["dtype"], shape, tensor["sharding"], str(tensor["shards"]), ranks)
    say(table)
    _print_pairs("tied to", "tensor", found["tied"])
    _print_pairs("value", "", found["values"])
    _print_pairs("value of each rank", "ranks", {name: ranges(ranks) for name, ranks in found["rank_values"].items()})


def _print_pairs(left: str, right: str, pairs: Mapping[str, str]) -> None:
    table = columns(left, right)
    for name, value in pairs.items():
        table.add_row(plain(name), plain(value))
    if pairs:
        say("")
        say(table)
