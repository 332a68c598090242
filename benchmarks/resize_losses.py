"""Losses of a run that is resized again and again, beside those of one that is left alone.

    python benchmarks/resize_losses.py [--steps 240] [--write]

Real agents under stock torchrun, one worker each: nodes are killed with SIGKILL while they train, the leader first, and
others are started. Every step of the resized run, also those that were computed again, must have the undisturbed run's
loss at a relative tolerance of 1e-3. `--write` puts the result into RESULTS.md and the plot into docs/.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from agents import Cluster
from machine import REPOSITORY, describe
from results import write_section

WORLDS = (4, 3, 5, 2)
TOLERANCE = 1e-3
STEPS_TO_STOP = 2  # in which all ranks have agreed after which step they stop
PLOT = REPOSITORY / "docs" / "resize-loss.png"


@dataclass(frozen=True)
class Part:
    """What one generation computed: its loss after each step, by number of completed steps."""

    world: int
    losses: dict[int, float]


# ---- runs


def train(folder: Path, worlds: tuple[int, ...], steps: int) -> list[Part]:
    """Train for `steps`, an equal part of them on each number of nodes in turn; what each generation computed."""
    folder.mkdir()
    with Cluster(folder, REPOSITORY / "benchmarks" / "resize_training.py") as cluster:
        for i, world in enumerate(worlds):
            resize(cluster, world, max(worlds), steps)
            shrinks = i + 1 < len(worlds) and worlds[i + 1] < world
            end = steps * (i + 1) // len(worlds)
            allow(cluster, end + steps // (4 * len(worlds)) * shrinks)  # so that nodes are killed while they train
            cluster.until(f"{world} nodes come to step {end}", lambda end=end: cluster.last_step() >= end)
        codes = {name: agent.wait() for name, agent in cluster.agents.items() if agent.process.poll() != -9}
        assert set(codes.values()) == {0}, f"agents ended with {codes}"
        return parts(cluster)


def resize(cluster: Cluster, world: int, largest: int, steps: int) -> None:
    """Kill or start nodes until `world` are there, and wait until they have restored.

    Workers that wait for the limit are asked to stop for the newcomers, which they do after a step: they get a few.
    """
    alive = [name for name, agent in cluster.agents.items() if agent.process.poll() is None]
    before = cluster.generation()
    if len(alive) > world:
        leader = cluster.leader()
        for name in sorted(alive, key=lambda name: name != leader)[: len(alive) - world]:
            cluster.agents[name].kill()
    for _ in range(world - len(alive)):
        more = {"RESIZE_STEPS": str(steps), "ELASTIC_JOIN_WINDOW_S": "10", "ELASTIC_GROW_WAIT_S": "1"}
        cluster.add(f"n{len(cluster.agents)}", f"1:{largest}", **more)
    if alive and len(alive) < world:
        leader = cluster.leader()
        cluster.until("the workers are asked to stop", lambda: cluster.log_has(leader, "workers are to stop at one"))
        allow(cluster, cluster.last_step() + STEPS_TO_STOP)

    def restored() -> bool:
        return cluster.generation() > before and len(cluster.workers(cluster.generation())) == world

    cluster.until(f"{world} nodes have restored", restored, deadline_s=300)


def allow(cluster: Cluster, step: int) -> None:
    part = cluster.events / "limit.part"
    part.write_text(str(step))
    part.rename(cluster.events / "limit")


def parts(cluster: Cluster) -> list[Part]:
    """What the generations computed, as rank 0 said it; those that made no step are left out."""
    found: dict[int, Part] = {}
    for event in cluster.said():
        if event["what"] == "step" and event["rank"] == 0:
            part = found.setdefault(event["generation"], Part(event["world"], {}))
            part.losses[event["step"]] = event["loss"]
    return [found[generation] for generation in sorted(found)]


# ---- judgement


def differences(resized: list[Part], undisturbed: dict[int, float]) -> list[float]:
    """Relative difference of each step that was computed, also of those that were computed twice."""
    return [abs(loss - undisturbed[step]) / undisturbed[step] for part in resized for step, loss in part.losses.items()]


def check(resized: list[Part], undisturbed: dict[int, float], worlds: tuple[int, ...], steps: int) -> None:
    """AssertionError unless each size made steps, all steps were made, and every loss is the undisturbed run's."""
    assert [part.world for part in resized] == list(worlds), [part.world for part in resized]
    assert {step for part in resized for step in part.losses} == set(undisturbed) == set(range(1, steps + 1))
    worst = max(differences(resized, undisturbed))
    assert worst <= TOLERANCE, f"losses differ by {worst:.2e}, more than {TOLERANCE:g}"


# ---- report


def draw(resized: list[Part], undisturbed: dict[int, float], path: Path) -> None:
    """Loss over steps, a colour for each size, above the undisturbed run's; hollow dots for what was lost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5), dpi=140, layout="constrained")
    axes.plot(*zip(*undisturbed.items(), strict=True), color="#c9c9c9", linewidth=6, label="undisturbed, 4 ranks")
    colours = ("#3b6fb6", "#d9822b", "#2f9e6e", "#8b5fbf")
    for part, colour, later in zip(resized, colours, [*resized[1:], None], strict=False):
        resumed = min(later.losses) if later else max(part.losses) + 1
        kept = {step: loss for step, loss in part.losses.items() if step < resumed}
        lost = {step: loss for step, loss in part.losses.items() if step >= resumed}
        axes.plot(list(kept), list(kept.values()), color=colour, linewidth=1.6, label=f"{part.world} ranks")
        axes.plot(list(lost), list(lost.values()), "o", markerfacecolor="none", markersize=7, color=colour)
        if later:
            at, killed = max(part.losses) + 0.5, part.world - later.world
            colour = "#b3261e" if killed > 0 else "#2f9e6e"
            note = f" {killed} of {part.world} killed" if killed > 0 else f" {-killed} come"
            axes.axvline(at, color=colour, linestyle=(0, (4, 3)), linewidth=1.4)
            axes.annotate(note, (at, max(undisturbed.values())), color=colour, fontsize=9.5, va="top")
    axes.plot([], [], "o", markerfacecolor="none", markersize=7, color="#666666", label="lost, then computed again")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", xlim=(0, max(undisturbed) + 1))
    sizes = " → ".join(str(part.world) for part in resized)
    axes.set_title(f"One training run on {sizes} ranks, and one that was left alone", loc="left", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(facecolor="white", edgecolor="none", framealpha=1, loc="center right")
    figure.savefig(path)
    pyplot.close(figure)


def report(resized: list[Part], undisturbed: dict[int, float], steps: int, folder: Path) -> str:
    rows = [
        f"| {part.world} | {min(part.losses)} – {max(part.losses)} | {max(differences([part], undisturbed)):.1e} |"
        for part in resized
    ]
    again = sum(len(part.losses) for part in resized) - steps
    sizes = " → ".join(str(part.world) for part in resized)
    return f"""## A run that is resized

`python benchmarks/resize_losses.py --write`, {datetime.date.today()}; {describe(folder)}.

To reach: every loss of a run resized {sizes} within a relative {TOLERANCE:g} of an undisturbed run's (4 ranks), fp32,
no dropout. Real agents under torchrun, a worker each; nodes are killed with SIGKILL while they train, the leader first.
A GPT of 0.1 M parameters under DDP with AdamW, global batch 24, {steps} steps, of which {again} were computed twice.

| ranks | steps | largest relative difference of a loss |
| ---: | ---: | ---: |
{chr(10).join(rows)}

![Losses of both runs](../docs/resize-loss.png)"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--write", action="store_true", help="put the result into RESULTS.md and docs/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as ram:
        os.environ["CKPT_RAM_DIR"] = ram
        (undisturbed,) = train(Path(folder) / "undisturbed", (4,), options.steps)
        resized = train(Path(folder) / "resized", WORLDS, options.steps)
        section = report(resized, undisturbed.losses, options.steps, Path(folder))
    print(section)
    check(resized, undisturbed.losses, WORLDS, options.steps)
    if options.write:
        write_section("resize_losses", section)
        draw(resized, undisturbed.losses, PLOT)


if __name__ == "__main__":
    main()
