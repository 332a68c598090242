"""What the demo saw, what it concludes, and how it shows it: values, pure judgement, tables and the plot.

Starts no process and waits for nothing; `demo.py` does that.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

LOSS_TOLERANCE = 0.02  # relative; another world size adds up gradients in another order, in bf16


@dataclass(frozen=True)
class Job:
    """What to run: `world` ranks until the save of step `kill_in_save_of`, or to the end."""

    number: int
    world: int
    kill_in_save_of: int | None


@dataclass
class Outcome:
    """What one job did, from its journal and from the run's directory."""

    job: Job
    start_step: int = 0  # completed steps when it began: the step it restored
    start_digest: str = ""
    losses: dict[int, float] = field(default_factory=dict)  # by completed steps
    digests: dict[int, str] = field(default_factory=dict)  # of the states it was about to save
    committed_before_kill: int | None = None  # newest commit that a reader saw before the kill
    committed: int | None = None  # newest commit after it
    resumed_from: int = 0  # what the next job restored; for the last job, what it committed
    committed_bytes: int = 0
    kill: str = ""  # what the job was doing when it was killed
    in_mid_save: bool = False  # killed before the commit of the step it was saving
    seconds: float = 0.0

    @property
    def steps_lost(self) -> int:
        return self.last_step - self.resumed_from

    @property
    def last_step(self) -> int:
        return max(self.losses, default=self.start_step)

    def record(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "start":
                self.start_step, self.start_digest = event["step"], event["digest"]
            case "step":
                self.losses[event["step"]] = event["loss"]
            case "state":
                self.digests[event["step"]] = event["digest"]


# ---- judgement


@dataclass(frozen=True)
class Check:
    claim: str
    holds: bool
    seen: str


def judge(outcomes: list[Outcome], total_steps: int, intact: Check) -> list[Check]:
    pairs = list(itertools.pairwise(outcomes))
    changes = [change for before, after in pairs for change in loss_changes(before, after)]
    worst = max(changes, default=0.0)
    return [
        Check(
            "every restart went on from the newest committed step",
            all(after.start_step >= (before.committed or 0) > 0 for before, after in pairs),
            ", ".join(f"{before.committed} -> {after.start_step}" for before, after in pairs),
        ),
        Check(
            "no step that a reader had seen committed was lost",
            all((o.committed or 0) >= (o.committed_before_kill or 0) for o in outcomes),
            ", ".join(f"{o.committed_before_kill} before, {o.committed} after" for o in outcomes[:-1]),
        ),
        Check(
            "the restored state is the saved state, bit for bit",
            all(state_verdict(outcomes, o) == "OK" for o in outcomes[1:]),
            ", ".join(f"step {o.start_step}: {o.start_digest[:12]} {state_verdict(outcomes, o)}" for o in outcomes[1:]),
        ),
        Check(
            f"steps computed twice have the same loss within {LOSS_TOLERANCE:.0%}",
            worst <= LOSS_TOLERANCE,
            f"{len(changes)} steps, largest difference {worst:.2%}",
        ),
        Check(
            "the run reached its end",
            outcomes[-1].committed == outcomes[-1].last_step == total_steps,
            f"step {outcomes[-1].last_step} of {total_steps}, committed {outcomes[-1].committed}",
        ),
        intact,
    ]


def loss_changes(before: Outcome, after: Outcome) -> list[float]:
    """Relative change of the loss for each step that both jobs computed."""
    twice = before.losses.keys() & after.losses.keys()
    return [abs(after.losses[step] - before.losses[step]) / before.losses[step] for step in sorted(twice)]


def state_verdict(outcomes: list[Outcome], restored: Outcome) -> str:
    """Compares the digest of a restored state with the one recorded when that step was saved."""
    earlier = outcomes[: outcomes.index(restored)]
    saved = [o.digests[restored.start_step] for o in earlier if restored.start_step in o.digests]
    if not saved:
        return "NOT RECORDED"
    return "OK" if saved[-1] == restored.start_digest else "DIFFERENT"


# ---- tables and plot


def tell(outcome: Outcome) -> str:
    job = outcome.job
    steps = f"steps {outcome.start_step + 1} to {outcome.last_step}"
    fate = f"[red]SIGKILL[/] {outcome.kill}" if outcome.kill else "[green]finished[/]"
    return f"[bold]{job.world} ranks[/], {steps} in {outcome.seconds:.0f} s: {fate}; committed: {outcome.committed}"


def outcome_table(outcomes: list[Outcome]) -> Table:
    """Fits into 80 columns."""
    table = Table(
        title="One run in three jobs", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for heading in ("ranks", "first\nstep", "last\nstep", "killed", "com-\nmitted", "steps\nlost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("loss\nbefore → after", "restored\nstate", "MB", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for previous, outcome in zip([None, *outcomes], outcomes, strict=False):
        table.add_row(
            str(outcome.job.world),
            str(outcome.start_step + 1),
            str(outcome.last_step),
            "no" if not outcome.kill else "mid-save" if outcome.in_mid_save else "after save",
            str(outcome.committed),
            str(outcome.steps_lost),
            loss_before_and_after(previous, outcome) if previous else "",
            f"{outcome.start_step}: {state_verdict(outcomes, outcome)}" if previous else "",
            f"{outcome.committed_bytes / 1e6:.0f}",
            f"{outcome.seconds:.0f}",
        )
    return table


def loss_before_and_after(before: Outcome, after: Outcome) -> str:
    """Loss of the first step that both jobs computed, else of the last step before and the first one after the kill."""
    step = after.start_step + 1
    if step in before.losses and step in after.losses:
        return f"{before.losses[step]:.3f} → {after.losses[step]:.3f}"
    return f"{before.losses[before.last_step]:.3f} → {after.losses[min(after.losses)]:.3f}"


def check_table(checks: list[Check]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for check in checks:
        table.add_row("[green]OK[/]" if check.holds else "[bold red]NO[/]", check.claim, f"[dim]{check.seen}[/]")
    return table


def draw(outcomes: list[Outcome], path: Path) -> None:
    """Loss over steps: a colour per job, a line per kill, hollow dots for the steps that were lost in it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5), dpi=140, layout="constrained")
    top = max(max(outcome.losses.values()) for outcome in outcomes)
    for outcome, colour in zip(outcomes, ("#3b6fb6", "#d9822b", "#2f9e6e"), strict=True):
        kept = {step: loss for step, loss in outcome.losses.items() if step <= outcome.resumed_from}
        lost = {step: loss for step, loss in outcome.losses.items() if step > outcome.resumed_from}
        axes.plot(list(kept), list(kept.values()), color=colour, linewidth=1.9, label=f"{outcome.job.world} ranks")
        axes.plot(list(lost), list(lost.values()), "o", markerfacecolor="none", markersize=7, color=colour)
        if outcome.kill:
            kill_at = outcome.last_step + 0.5
            axes.axvspan(outcome.resumed_from + 0.5, kill_at, color="#b3261e", alpha=0.08, linewidth=0)
            axes.axvline(kill_at, color="#b3261e", linestyle=(0, (4, 3)), linewidth=1.4)
            note = f" SIGKILL in the save of step {outcome.job.kill_in_save_of}:\n back to step {outcome.resumed_from}"
            axes.annotate(note, (kill_at, top), color="#b3261e", fontsize=9.5, va="top")
    axes.plot([], [], "o", markerfacecolor="none", markersize=7, color="#666666", label="lost, then computed again")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", xlim=(0, outcomes[-1].last_step + 1))
    worlds = " → ".join(str(outcome.job.world) for outcome in outcomes)
    axes.set_title(f"One training run on {worlds} ranks, killed in mid-save twice", loc="left", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, loc="center right")
    figure.savefig(path)
    pyplot.close(figure)
