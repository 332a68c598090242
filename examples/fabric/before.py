"""A classifier under Lightning Fabric: shuffled batches, dropout.

python before.py RUN [STEPS]
"""

import sys
from collections.abc import Iterable, Iterator

import lightning
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler


def endless(loader: Iterable[list[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    while True:
        yield from loader


def main(url: str, total: int = 1000) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    fabric.seed_everything(7)
    points = torch.randn(392, 8)
    data = TensorDataset(points, (points.prod(dim=1) > 0).long())
    order = RandomSampler(data, generator=torch.Generator().manual_seed(7))
    loader = StatefulDataLoader(data, batch_size=8, sampler=order, generator=torch.Generator())
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=3e-3))

    batches = endless(fabric.setup_dataloaders(loader))
    for step in range(total):
        inputs, targets = next(batches)
        loss = F.cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        fabric.print(f"step {step + 1} loss {loss.item()!r}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
