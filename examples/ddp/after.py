"""Data parallel training in the style of the tutorial of DDP: a Trainer class, epochs, a DistributedSampler, momentum,
and a schedule by epoch.

    python after.py RUN [STEPS]            or: torchrun --nproc-per-node 2 after.py RUN [STEPS]
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import ckpt


class Trainer:
    def __init__(self, model: nn.Module, train_data: DataLoader, optimizer: torch.optim.Optimizer, url: str) -> None:
        self.model = DistributedDataParallel(model)
        self.train_data = train_data
        self.optimizer = optimizer
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        self.url = url

    def _run_batch(self, source: torch.Tensor, targets: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(source), targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def _run_epoch(self, epoch: int) -> None:
        self.train_data.sampler.set_epoch(epoch)
        for index, (source, targets) in enumerate(self.train_data):
            loss = self._run_batch(source, targets)
            if dist.get_rank() == 0:
                print(f"step {epoch * len(self.train_data) + index + 1} loss {loss!r}", flush=True)
        self.scheduler.step()

    def train(self, max_epochs: int) -> None:
        state = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        with ckpt.Checkpointer(self.url, every=ckpt.Every(steps=1)) as checkpointer:
            for epoch in checkpointer.steps(max_epochs, state):
                self._run_epoch(epoch)


def load_train_data() -> Dataset:
    sources = torch.randn(320, 20)
    return TensorDataset(sources, (sources @ torch.randn(20, 4)).argmax(1))


def main(url: str, total: int = 1000, batch_size: int = 16) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update({name: value for name, value in alone.items() if "TORCHELASTIC_RUN_ID" not in os.environ})
    dist.init_process_group("gloo")
    torch.manual_seed(7)
    dataset, model = load_train_data(), nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    loader = DataLoader(dataset, batch_size // dist.get_world_size(), sampler=DistributedSampler(dataset))
    trainer = Trainer(model, loader, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), url)
    trainer.train(total // len(loader))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
