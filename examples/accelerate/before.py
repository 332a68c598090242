"""A classifier under Accelerate: shuffled batches, gradients accumulated over two of them, a schedule, dropout.

accelerate launch before.py RUN [STEPS]
"""

import math
import sys

import torch
import torch.nn.functional as F  # noqa: N812
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ACCUMULATE = 2


def main(url: str, total: int = 1000) -> None:
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=ACCUMULATE,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    set_seed(7)
    points = torch.randn(392, 8)
    data = TensorDataset(points, (points.prod(dim=1) > 0).long())
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total * accelerator.num_processes)
    loader = DataLoader(data, batch_size=8, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    updates = math.ceil(len(loader) / ACCUMULATE)
    for epoch in range(total // updates):
        for index, (inputs, targets) in enumerate(loader):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step = epoch * updates + index // ACCUMULATE + 1
                accelerator.print(f"step {step} loss {loss.item()!r}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
