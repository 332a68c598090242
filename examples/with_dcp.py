"""A training that saves through torch.distributed.checkpoint, with holdfast underneath. Kill it, and run it again, on
another number of ranks if you like:

torchrun --nproc-per-node 2 examples/with_dcp.py my-run [STEPS]
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ckpt.interop.dcp import HoldfastReader, HoldfastWriter, newest_step


class App:
    """What torch's documentation calls an application state: model and optimizer by name, however they are sharded."""

    def __init__(self, model: nn.Module, optim: torch.optim.Optimizer) -> None:
        self.model, self.optim = model, optim

    def state_dict(self) -> dict[str, Any]:
        model, optim = get_state_dict(self.model, self.optim)
        return {"model": model, "optim": optim}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optim, model_state_dict=state["model"], optim_state_dict=state["optim"])


def main(url: str, total_steps: int = 100) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    app = App(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

    first = newest_step(url) or 0
    if first:
        dcp.load({"app": app}, storage_reader=HoldfastReader(url, step=first))
    for step in range(first, total_steps):
        torch.manual_seed(step)  # the same batch on all ranks, whatever their number
        x = torch.randn(32, 16)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        app.optim.zero_grad()
        loss.backward()
        app.optim.step()
        if (step + 1) % 10 == 0:
            dcp.save({"app": app}, storage_writer=HoldfastWriter(url, step=step + 1))
            if dist.get_rank() == 0:
                print(f"step {step + 1} loss {loss.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(sys.argv[1], *map(int, sys.argv[2:]))
