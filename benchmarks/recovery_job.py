"""What `recovery.py` has trained: a small model under DDP on gloo, a save after every step, a line for every step.

    recovery_job.py elastic|stock FOLDER

`stock` saves as its user would: DCP into a directory of the step's own, then a file that names it, made by a rename.
"""

import json
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

WIDTH, LAYERS, STEP_S = 256, 4, 0.1


def main(library: str, folder: Path) -> None:
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    model = DistributedDataParallel(torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))))
    optimizer = torch.optim.AdamW(model.parameters())
    events = folder / f"{os.getpid()}.jsonl"
    with open(events, "a", buffering=1) as out:

        def train(step: int) -> None:
            optimizer.zero_grad()
            model(torch.randn(8, WIDTH)).square().mean().backward()
            optimizer.step()
            time.sleep(STEP_S)
            out.write(json.dumps({"step": step, "rank": dist.get_rank(), "pid": os.getpid(), "at": time.time()}) + "\n")

        {"elastic": train_elastic, "stock": train_stock}[library](folder, model, optimizer, train)


def train_elastic(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, train: Callable[[int], None]
) -> None:
    import ckpt

    with ckpt.Checkpointer(folder / "run", every=ckpt.Every(steps=1), keep=ckpt.Keep(last=2)) as checkpointer:
        for step in checkpointer.steps(1_000_000, {"model": model, "optim": optimizer}):
            train(step + 1)


def train_stock(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, train: Callable[[int], None]
) -> None:
    newest, step = folder / "newest", 0
    if newest.exists():
        step = int(newest.read_text())
        states = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=folder / f"step{step}")
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optim"])
    while True:
        step += 1
        train(step)
        states = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
        dcp.save(states, checkpoint_id=folder / f"step{step}")
        if dist.get_rank() == 0:
            part = folder / "newest.part"
            part.write_text(str(step))
            part.rename(newest)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
