"""A classifier under the Lightning Trainer: shuffled batches, a schedule, dropout.

python before.py RUN [STEPS]
"""

import sys
from typing import Any

import lightning
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler


class Classifier(lightning.LightningModule):
    def __init__(self, total: int) -> None:
        super().__init__()
        self.total = total
        self.net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.net(inputs), targets)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, outputs: dict[str, torch.Tensor], batch: list[torch.Tensor], index: int) -> None:
        print(f"step {self.global_step} loss {outputs['loss'].item()!r}", flush=True)


def main(url: str, total: int = 1000) -> None:
    lightning.seed_everything(7)
    points = torch.randn(392, 8)
    data = TensorDataset(points, (points.prod(dim=1) > 0).long())
    order = RandomSampler(data, generator=torch.Generator().manual_seed(7))
    loader = StatefulDataLoader(data, batch_size=8, sampler=order, generator=torch.Generator())
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = []
    trainer = lightning.Trainer(max_steps=total, accelerator="cpu", devices=1, callbacks=callbacks, **quiet)
    trainer.fit(Classifier(total), loader)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
