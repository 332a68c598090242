"""Trains a byte-level GPT with FSDP2 and keeps it alive with holdfast. Kill it, run it again, on any number of ranks.

    torchrun --nproc-per-node 4 examples/train_gpt.py my-run

The model (10.8 M parameters) computes in bf16 and keeps fp32 master weights; the text is the Python standard library
of the interpreter that runs this file. Everything about checkpoints stands in `train`, from `state` to `report`. The
journal is there for `demo.py`, which kills this script and wants to know what it was doing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import ckpt

VOCABULARY = 256  # one token per byte


@dataclass(frozen=True)
class Config:
    layers: int = 6
    heads: int = 6
    width: int = 384
    context: int = 128
    batch: int = 12  # sequences per step over all ranks; 1, 2, 3, 4, 6 and 12 ranks divide it
    learning_rate: float = 8e-4
    warmup_steps: int = 8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    text_bytes: int = 4 << 20
    seed: int = 7


# ---- model


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm_attention(x))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (batch, head, time, d)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self.head.weight = self.token.weight  # tied: a checkpoint holds it once
        self.initialise()

    def initialise(self) -> None:
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.token.weight, std=0.04)
        for block in self.blocks:  # each block begins as the identity
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.down.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # (batch, time, VOCABULARY)


def compute_dtype() -> torch.dtype:
    """bf16, except on a CPU without bf16 instructions: emulated, a step takes ten times longer than in fp32."""
    flags = Path("/proc/cpuinfo").read_text()  # avx512_bf16, amx_bf16; on Arm bf16
    return torch.bfloat16 if "bf16" in flags else torch.float32


def build_model(config: Config) -> GPT:
    """The same weights on every rank, then sharded: fp32 shards, bf16 compute, fp32 gradient reduction."""
    torch.manual_seed(config.seed)
    model = GPT(config)
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype(), reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=precision)
    fully_shard(model, mp_policy=precision)
    return model


def build_optimizer(model: nn.Module, config: Config, total_steps: int) -> tuple[Optimizer, LRScheduler]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)

    def warmup_then_cosine(step: int) -> float:
        warmup = min(1.0, (step + 1) / config.warmup_steps)
        return warmup * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / total_steps)))

    return optimizer, LambdaLR(optimizer, warmup_then_cosine)


# ---- data


def standard_library(limit_bytes: int) -> Tensor:
    """The first bytes of the running interpreter's own library, files in name order: uint8, (bytes,)."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"\n".join(file.read_bytes() for file in files)[:limit_bytes]
    if not text:
        raise SystemExit(f"no *.py in {sysconfig.get_path('stdlib')}: this interpreter's standard library has no text")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batch(text: Tensor, step: int, config: Config) -> tuple[Tensor, Tensor]:
    """This rank's part of the step's batch. The batch follows from (seed, step) alone, whatever the world size."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    starts = torch.randint(len(text) - config.context, (config.batch,), generator=generator)
    mine = starts.chunk(dist.get_world_size())[dist.get_rank()]
    rows = torch.stack([text[start : start + config.context + 1] for start in mine]).long()
    return rows[:, :-1], rows[:, 1:]


# ---- journal: what the demo wants to know


class Journal:
    """Rank 0 appends one JSON line per event to a file; without a path nothing happens. Call it on every rank."""

    def __init__(self, path: Path | None, digest_every: int) -> None:
        self.path = path
        self.digest_every = digest_every
        self.first_step: int | None = None

    def before(self, step: int, state: dict[str, Any]) -> None:
        """Before the first step of this process: the state as it was restored."""
        if self.path is not None and self.first_step is None:
            self.first_step = step
            self.write("start", step=step, digest=state_digest(state), compute=str(compute_dtype()))

    def after(self, completed_steps: int, loss: float, state: dict[str, Any]) -> None:
        """After a step: its loss and, where a save follows, the state that will be saved."""
        if self.path is not None:
            self.write("step", step=completed_steps, loss=loss)
            if completed_steps % self.digest_every == 0:
                self.write("state", step=completed_steps, digest=state_digest(state))

    def write(self, event: str, **fields: object) -> None:
        if self.path is not None and dist.get_rank() == 0:
            with self.path.open("a") as file:
                file.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")


def state_digest(state: dict[str, Any]) -> str:
    """SHA-256 of parameters, AdamW state and schedule, whole tensors in name order: the same at any world size.

    Collective. Only rank 0 hashes the tensors; what the others return means nothing.
    """
    digest = hashlib.sha256(json.dumps(state["sched"].state_dict(), sort_keys=True).encode())
    for name, tensor in named_tensors(state["model"], state["optim"]):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0:
            digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
            digest.update(whole.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def named_tensors(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in sorted(model.named_parameters()):
        yield name, parameter
        for slot, tensor in sorted(optimizer.state[parameter].items()):
            yield f"{name}.{slot}", tensor


# ---- training


def train_step(model: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor, clip_norm: float) -> float:
    """One optimizer step; returns the mean loss of the whole batch, all ranks together, before the step."""
    logits = model(inputs)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mean = loss.detach()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def train(url: str, total_steps: int, save_every: int, journal: Journal, config: Config) -> None:
    text = standard_library(config.text_bytes)
    model = build_model(config)
    optim, sched = build_optimizer(model, config, total_steps)
    state = {"model": model, "optim": optim, "sched": sched, "rng": ckpt.Rng()}

    with ckpt.Checkpointer(url, every=ckpt.Every(steps=save_every)) as checkpointer:
        for step in checkpointer.steps(total_steps, state):  # restores first; saves when due and at the end
            journal.before(step, state)
            loss = train_step(model, optim, *batch(text, step, config), config.clip_norm)
            sched.step()
            checkpointer.report(loss=loss)
            journal.after(step + 1, loss, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="directory of the run")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--journal", type=Path, help="append a JSON line per event to this file (for demo.py; slow)")
    arguments = parser.parse_args()

    config = Config()
    dist.init_process_group("gloo")
    try:
        if config.batch % dist.get_world_size():
            raise SystemExit(f"a batch of {config.batch} does not divide among {dist.get_world_size()} ranks")
        journal = Journal(arguments.journal, arguments.save_every)
        train(arguments.url, arguments.steps, arguments.save_every, journal, config)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
