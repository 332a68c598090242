"""What fault-injection runs train in the tests: a small transformer under DDP, unaware of what is done to it.

chaos_script.py STEPS [SAVE_EVERY]
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ckpt
import elastic

WIDTH, CONTEXT, GLOBAL_BATCH = 32, 16, 8
STEP_S = 0.05  # so that faults find it at work, and other tests have a share of the machine


class Tokens(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Sequences that can be learnt: each counts on from its first token."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = (torch.arange(CONTEXT + 1) + index) % 64
        return row[:-1], row[1:]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(tokens)))


def main(steps: int, save_every: int = 2) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(Model())
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = elastic.batches(Tokens(), global_batch=GLOBAL_BATCH, seed=1)
    state = {"model": model, "optim": optim, "data": data, "rng": ckpt.Rng()}
    with ckpt.Checkpointer(every=ckpt.Every(steps=save_every), commit_timeout_s=60) as checkpointer:
        for _ in checkpointer.steps(steps, state):
            for batch in data.step():
                inputs, targets = batch.data
                loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()) * batch.weight
                loss.backward()
            optim.step()
            optim.zero_grad()
            mean = loss.detach() / dist.get_world_size()
            dist.all_reduce(mean)
            checkpointer.report(loss=mean.item())
            time.sleep(STEP_S)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
