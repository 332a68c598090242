"""A character-level GPT in one file, in the style of nanoGPT: random offsets into one text, gradients accumulated over
micro batches, warm-up and cosine decay, one process or DDP.

    python after.py RUN [STEPS]            or: torchrun --nproc-per-node 2 after.py RUN [STEPS]
"""

import math
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ckpt

WIDTH, HEADS, LAYERS, CONTEXT, BATCH, MICRO_STEPS = 32, 4, 2, 32, 4, 2
WARMUP, LEARNING_RATE, MIN_LEARNING_RATE = 10, 3e-3, 3e-4

TEXT = (math.__doc__ + torch.__doc__ + nn.Module.__doc__).encode("ascii", "replace")
DATA = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8).long()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.token(tokens) + self.position.weight)
        return F.cross_entropy((x @ self.token.weight.T).flatten(0, 1), targets.flatten())


def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(len(DATA) - CONTEXT, (BATCH,))
    rows = torch.stack([DATA[start : start + CONTEXT + 1] for start in starts])
    return rows[:, :-1], rows[:, 1:]


def learning_rate(step: int, total: int) -> float:
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, total - WARMUP)
    return MIN_LEARNING_RATE + 0.5 * (1 + math.cos(math.pi * done)) * (LEARNING_RATE - MIN_LEARNING_RATE)


def main(url: str, total: int = 1000) -> None:
    ddp = "RANK" in os.environ
    torch.manual_seed(1337)
    model: nn.Module = GPT()
    if ddp:
        dist.init_process_group("gloo")
        torch.manual_seed(1337 + dist.get_rank())  # other offsets on every rank
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)

    checkpointer = ckpt.Checkpointer(url, every=ckpt.Every(steps=20))
    state = {"model": model, "optim": optimizer, "rng": ckpt.Rng()}
    for step in checkpointer.steps(total, state):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total)
        for micro_step in range(MICRO_STEPS):
            if ddp:  # gradients travel with the last micro batch only
                model.require_backward_grad_sync = micro_step == MICRO_STEPS - 1
            loss = model(*get_batch()) / MICRO_STEPS
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not ddp or dist.get_rank() == 0:
            print(f"step {step + 1} loss {loss.item()!r}", flush=True)
    if ddp:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
