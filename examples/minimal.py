"""The smallest run that survives. Stop it with ^C, kill or kill -9, and run the same command again:

python examples/minimal.py my-run [STEPS]
"""

import sys

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import ckpt


def main(url: str, total_steps: int = 20_000) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"model": model, "optim": optim, "rng": ckpt.Rng()}

    with ckpt.Checkpointer(url, every=ckpt.Every(steps=1000)) as checkpointer:
        for step in checkpointer.steps(total_steps, state):  # goes on from the newest step that was saved
            x = 6 * torch.rand(256, 2) - 3
            loss = F.mse_loss(model(x), torch.sin(x[:, :1]) * torch.cos(x[:, 1:]))
            optim.zero_grad()
            loss.backward()
            optim.step()
            checkpointer.report(loss=loss.item())
            if (step + 1) % 1000 == 0:
                print(f"step {step + 1:6d}  loss {loss.item():.6f}", flush=True)
    if checkpointer.stopped:
        sys.exit(143)  # SIGTERM: the step is saved, but the run is not finished


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        main(sys.argv[1], *map(int, sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit("\nstopped; run the same command again to go on")
