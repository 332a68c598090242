"""What a fine-tuning writes: GPT-2 124M with low-rank adapters, trained and saved every step, beside DCP.

    python benchmarks/lora.py [--steps 6] [--rank 8] [--model 124m] [--directory DIR] [--write]

All weights are in the state, the frozen ones too: the step is whole. Prints the bytes that each step added to the
directory and the seconds until it was durable; the last step is restored into a fresh model and compared bit for bit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from gpt2 import GPT2, GPT2_124M, GPT2_TINY
from machine import busy, default_folder, describe
from results import write_section
from torch import Tensor, nn
from torch.nn import functional

import ckpt

TO_REACH = 0.03  # of the full size, per step (issue 4)


class Adapted(nn.Module):
    """A frozen linear layer and its low-rank update."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, frozen.in_features) / rank)
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + functional.linear(functional.linear(x, self.down), self.up)


def adapted_gpt2(model: str, rank: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    gpt = GPT2(GPT2_124M if model == "124m" else GPT2_TINY).requires_grad_(False)
    for block in gpt.h:
        block.attn.c_attn = Adapted(block.attn.c_attn, rank)
        block.attn.c_proj = Adapted(block.attn.c_proj, rank)
    optim = torch.optim.AdamW([p for p in gpt.parameters() if p.requires_grad], lr=1e-3)
    return gpt, optim


def train(gpt: nn.Module, optim: torch.optim.Optimizer, step: int) -> None:
    tokens = torch.randint(0, 5000, (2, 33), generator=torch.Generator().manual_seed(step))
    loss = functional.cross_entropy(gpt(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optim.zero_grad()
    loss.backward()
    optim.step()


@dataclass(frozen=True)
class Saved:
    nbytes: list[int]
    seconds: list[float]


def by_holdfast(path: Path, gpt: nn.Module, optim: torch.optim.Optimizer, steps: int) -> Saved:
    nbytes, seconds = [], []
    with ckpt.Checkpointer(path) as checkpointer:
        for step in range(1, steps + 1):
            train(gpt, optim, step)
            began = time.monotonic()
            commit = checkpointer.save(step, {"model": gpt, "optim": optim}, blocking=True).wait()
            seconds.append(time.monotonic() - began)
            nbytes.append(commit.nbytes)
    return Saved(nbytes, seconds)


def by_dcp(path: Path, gpt: nn.Module, optim: torch.optim.Optimizer, steps: int) -> Saved:
    nbytes, seconds = [], []
    for step in range(1, steps + 1):
        train(gpt, optim, step)
        began = time.monotonic()
        writer = dcp.FileSystemWriter(path / str(step), sync_files=True)
        dcp.save({"model": gpt.state_dict(), "optim": optim.state_dict()}, storage_writer=writer, no_dist=True)
        seconds.append(time.monotonic() - began)
        nbytes.append(sum(file.stat().st_size for file in (path / str(step)).iterdir()))
    return Saved(nbytes, seconds)


def same(path: Path, gpt: nn.Module, model: str, rank: int) -> bool:
    """Whether the last step restores into a fresh model, bit for bit."""
    fresh, optim = adapted_gpt2(model, rank)
    for parameter in fresh.parameters():
        nn.init.constant_(parameter, 7.0)
    ckpt.restore(path, {"model": fresh, "optim": optim})
    return all(torch.equal(a, b) for a, b in zip(gpt.parameters(), fresh.parameters(), strict=True))


def report(found: dict[str, Saved], whole: int, options: argparse.Namespace) -> str:
    lines = [
        "## Fine-tuning: what did not change is stored once",
        "",
        f"`python benchmarks/lora.py --steps {options.steps} --rank {options.rank} --model {options.model}`, "
        f"{date.today()}; {describe(options.directory)}.{' ' + busy() if busy() else ''}",
        "",
        f"GPT-2 {options.model}, adapters of rank {options.rank} in every attention, AdamW; one process, saved after "
        f"every step, every byte durable. The whole state has {whole / 1e6:.1f} MB; share of it that a step adds, and "
        "seconds.",
        "",
        "| | first step | second | later steps (median) | share | to reach | seconds, first | later |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, saved in found.items():
        later, goal = statistics.median(saved.nbytes[2:]), f"≤ {TO_REACH}" if name == "holdfast" else ""
        lines.append(
            f"| {name} | {saved.nbytes[0] / 1e6:.1f} MB | {saved.nbytes[1] / 1e6:.1f} MB | {later / 1e6:.2f} MB "
            f"| {later / whole:.4f} | {goal} | {saved.seconds[0]:.2f} | {statistics.median(saved.seconds[2:]):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--model", choices=("124m", "tiny"), default="124m")
    parser.add_argument("--directory", type=Path, default=default_folder())
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        run, found = Path(directory) / "run", dict[str, Saved]()
        gpt, optim = adapted_gpt2(options.model, options.rank)
        found["holdfast"] = by_holdfast(run, gpt, optim, options.steps)
        assert same(run, gpt, options.model, options.rank), "the restored state differs from the saved one"
        os.makedirs(Path(directory) / "dcp")
        found["DCP"] = by_dcp(Path(directory) / "dcp", *adapted_gpt2(options.model, options.rank), options.steps)
    whole = sum(p.nbytes for p in gpt.parameters())
    whole += sum(t.nbytes for state in optim.state.values() for t in state.values() if isinstance(t, Tensor))
    section = report(found, whole, options)
    print(section)
    if options.write:
        write_section("lora", section)


if __name__ == "__main__":
    main()
