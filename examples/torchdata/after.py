"""A small convolutional classifier fed by torchdata's StatefulDataLoader: two worker processes, shuffled batches.

python after.py RUN [STEPS]
"""

import sys
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler

import ckpt


def endless(loader: Iterable[list[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    while True:
        yield from loader


def main(url: str, total: int = 1000) -> None:
    torch.manual_seed(7)
    images = torch.randn(392, 1, 8, 8)
    data = TensorDataset(images, images.mean(dim=(1, 2, 3)).gt(0).long())
    order = RandomSampler(data, generator=torch.Generator().manual_seed(7))
    loader = StatefulDataLoader(data, batch_size=8, sampler=order, num_workers=2, generator=torch.Generator())
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(288, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    batches = endless(loader)
    checkpointer = ckpt.Checkpointer(url, every=ckpt.Every(steps=20))
    state = {"model": model, "optim": optimizer, "loader": loader, "rng": ckpt.Rng()}
    for step in checkpointer.steps(total, state):
        inputs, targets = next(batches)
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} loss {loss.item()!r}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
