"""What `chaos_stock.py` has trained on nodes that fail: a small model under DDP on gloo, a save every second step.

    chaos_job.py elastic|stock STEPS

`stock` saves as its user would: DCP into a directory of the step's own, then a file that names it, made by a rename. It
makes the marks that a report is made of itself: the time of a start is its generation.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from ckpt.events import point

WIDTH, LAYERS, STEP_S, EVERY = 64, 2, 0.05, 2


def main(library: str, steps: int) -> None:
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    model = DistributedDataParallel(torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))))
    optimizer = torch.optim.AdamW(model.parameters())

    def train() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, WIDTH)).square().mean().backward()
        optimizer.step()
        time.sleep(STEP_S)

    {"elastic": train_elastic, "stock": train_stock}[library](model, optimizer, train, steps)
    dist.destroy_process_group()


def train_elastic(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, train: Callable[[], None], steps: int
) -> None:
    import ckpt

    with ckpt.Checkpointer(every=ckpt.Every(steps=EVERY), commit_timeout_s=60) as checkpointer:
        for _ in checkpointer.steps(steps, {"model": model, "optim": optimizer}):
            train()


def train_stock(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, train: Callable[[], None], steps: int
) -> None:
    folder, step = Path(os.environ["CKPT_URL"]), 0
    folder.mkdir(exist_ok=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    began = [int(time.time() * 10) % 10**9]
    dist.broadcast_object_list(began)  # torchrun's count of restarts does not grow when nodes come and go

    def tell(name: str, step: int) -> None:
        point(name, step=step, rank=rank, world=world, generation=began[0], attempt=str(step))

    newest = folder / "newest"
    if newest.exists():
        step = int(newest.read_text())
        tell("restoring", step)
        states = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=folder / f"step{step}")
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optim"])
        tell("restore", step)
    while step < steps:
        step += 1
        train()
        tell("step", step)
        if step % EVERY == 0:
            save(model, optimizer, folder, step, tell)


def save(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, step: int, tell: Callable[[str, int], None]
) -> None:
    tell("save", step)
    states = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=folder / f"step{step}")
    if dist.get_rank() == 0:
        part = folder / "newest.part"
        part.write_text(str(step))
        part.rename(folder / "newest")
        tell("commit", step)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
