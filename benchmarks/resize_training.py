"""The training that `resize_losses.py` resizes: a small GPT under DDP in fp32, without dropout.

    resize_training.py RUN EVENTS        RESIZE_STEPS in the environment

Every rank says in a file of its own below EVENTS what it restored, and after each step the loss of the global batch.
It makes no step beyond the number that stands in EVENTS/limit, so that each size gets its part of the run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import ckpt
import elastic

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from train_gpt import GPT, Config, standard_library

CONFIG = Config(layers=2, heads=4, width=64, context=64)
GLOBAL_BATCH = 24  # 4 ranks have 6 samples each, 3 have 8, 2 have 12; 5 have 4 or 5
SAVE_EVERY = 7
POLL_S = 0.02


class Windows(Dataset[Tensor]):
    """Runs of `length` bytes of a text, side by side."""

    def __init__(self, text: Tensor, length: int) -> None:
        self.text, self.length = text, length

    def __len__(self) -> int:
        return len(self.text) // self.length

    def __getitem__(self, index: int) -> Tensor:
        return self.text[index * self.length : (index + 1) * self.length].long()


class Journal:
    """What this rank says, a line for each event."""

    def __init__(self, events: Path) -> None:
        self.limit = events / "limit"
        self.path = events / f"{os.getpid()}.jsonl"
        current = elastic.current()
        assert current is not None
        node = os.environ["TEST_NODE"]
        self.about = {"generation": current.generation, "node": node, "pid": os.getpid(), "rank": dist.get_rank()}

    def say(self, what: str, **more: Any) -> None:
        line = {"what": what, **self.about, "world": dist.get_world_size(), **more}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def restored(self, step: int) -> None:
        """Said once."""
        if not self.path.exists():
            self.say("restored", step=step)

    def wait_until_allowed(self, step: int) -> None:
        """Return on all ranks once rank 0 has read a limit above `step`."""
        while dist.get_rank() == 0 and not (self.limit.exists() and int(self.limit.read_text()) > step):
            time.sleep(POLL_S)
        dist.barrier()


def train_step(model: DistributedDataParallel, optim: torch.optim.Optimizer, data: elastic.Batches) -> float:
    """One step; the mean loss over the global batch, before it."""
    total = torch.zeros(())
    for batch in data.step():
        logits = model(batch.data[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch.data[:, 1:].flatten()) * batch.weight
        loss.backward()
        total += loss.detach()
    optim.step()
    optim.zero_grad()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def main(url: str, events: Path, steps: int) -> None:
    dist.init_process_group("gloo")
    journal = Journal(events)
    torch.manual_seed(CONFIG.seed)
    model = DistributedDataParallel(GPT(CONFIG))
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = standard_library(CONFIG.text_bytes)
    data = elastic.batches(Windows(text, CONFIG.context + 1), global_batch=GLOBAL_BATCH, seed=CONFIG.seed)
    state = {"model": model, "optim": optim, "data": data}

    with ckpt.Checkpointer(url, every=ckpt.Every(steps=SAVE_EVERY)) as checkpointer:
        for step in checkpointer.steps(steps, state):
            journal.restored(step)
            journal.wait_until_allowed(step)
            journal.say("step", step=step + 1, loss=train_step(model, optim, data))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(os.environ["RESIZE_STEPS"]))
