"""A training under torchrun that saves through DCP onto a run; it dies in mid-save where it is told to.

python dcp_worker.py URL STEPS [POINT STEP]: POINT is "part" (rank 1, with half of its data written) or "commit" (rank
0, when all parts are durable). What was saved and loaded is printed as digests of the whole state.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ckpt.interop.dcp as adapter


def digest_of(node: Any, into: Any) -> None:
    if isinstance(node, dict):
        for name, item in sorted(node.items()):
            into.update(str(name).encode())
            digest_of(item, into)
    elif isinstance(node, torch.Tensor):
        whole = node.full_tensor() if isinstance(node, DTensor) else node
        into.update(whole.detach().numpy().tobytes())
    else:
        into.update(repr(node).encode())


def tell(what: str, step: int, state: dict[str, Any]) -> None:
    found = hashlib.sha256()
    digest_of({name: state[name] for name in ("model", "optim", "note")}, found)
    if dist.get_rank() == 0:
        print(f"{what} {step} {found.hexdigest()}", flush=True)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str) -> None:
    """From now on this process dies in the next save, at `point`."""
    if point == "commit" and dist.get_rank() == 0:
        adapter.commit_step = die  # type: ignore[assignment]
    if point == "part" and dist.get_rank() == 1:
        write_part, seen = adapter.write_part, list[object]()

        def half(run: Any, attempt: str, rank: int, plan: Any, fill: Any, values: Any) -> Any:
            def fill_or_die(*arguments: Any) -> None:
                seen.append(arguments)
                if len(seen) > len(plan.chunks) // 2:
                    die()
                fill(*arguments)

            return write_part(run, attempt, rank, plan, fill_or_die, values)

        adapter.write_part = half


def main(url: str, steps: int, point: str = "", at: int = 0) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 301), nn.Tanh(), nn.Linear(301, 5))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    note: dict[str, Any] = {"seen": 0, "pair": (1, 2.5)}

    def state() -> dict[str, Any]:
        found = get_state_dict(model, optim)
        return {"model": found[0], "optim": found[1], "note": note}

    first = adapter.newest_step(url) or 0
    if first:
        loaded = state()
        dcp.load(loaded, storage_reader=adapter.HoldfastReader(url, step=first))
        set_state_dict(model, optim, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
        note = loaded["note"]
        tell("loaded", first, state())
    for step in range(first + 1, steps + 1):
        torch.manual_seed(step)
        model(torch.randn(8, 16)).square().mean().backward()
        optim.step()
        optim.zero_grad()
        note["seen"] = step
        if step == at:
            arm(point)
        writer = adapter.HoldfastWriter(url, step=step)
        if step % 2:
            dcp.save(state(), storage_writer=writer)
        else:
            dcp.async_save(state(), storage_writer=writer).result()  # type: ignore[union-attr]
        tell("saved", step, state())
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's threads sometimes abort a process that ends after FSDP2 over gloo, without us, too


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:4], *map(int, sys.argv[4:5]))
