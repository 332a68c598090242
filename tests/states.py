"""What the state tests share: bit-exact comparison, a model small enough to train in a test, a save and a restore."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ckpt


class Box:
    """The smallest stateful object: one value."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, value: Any) -> None:
        self.value = value


def bits(value: Any) -> Any:
    """`value` with every tensor as (dtype, shape, bytes), so that == compares bit by bit and types count."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        return str(value.dtype), tuple(value.shape), bytes(plain.reshape(-1).view(torch.uint8).tolist())
    if isinstance(value, Mapping):
        return type(value), [(key, bits(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [bits(item) for item in value]
    return type(value), repr(value)


def model(seed: int, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 3))


def batches(count: int, skip: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`count` batches of one fixed sequence, after the first `skip`."""
    generator = torch.Generator().manual_seed(11)
    for i in range(skip + count):
        batch = torch.randn(5, 4, generator=generator), torch.randn(5, 3, generator=generator)
        if i >= skip:
            yield batch


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, skip: int = 0, after: Callable[[], object] = bool
) -> list[float]:
    """The losses of `steps` steps; `after` runs at the end of each."""
    losses = []
    for x, y in batches(steps, skip):

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
        after()
    return losses


def round_trip(path: Path, state: Any, target: Any, **options: Any) -> None:
    """Save `state` as step 1 under `path` and restore it into `target`."""
    with ckpt.Checkpointer(path) as checkpointer:
        checkpointer.save(1, state, blocking=True)
    assert ckpt.restore(path, target, **options) == 1


def stored_bytes(path: Path) -> int:
    """Bytes of all data files under a run's directory."""
    return sum(file.stat().st_size for file in path.glob("steps/*/*.safetensors"))


def stored_chunks(path: Path) -> list[str]:
    """Keys of all chunks in the newest step."""
    from ckpt.holder import find_commit
    from ckpt.restorer import StepReader
    from ckpt.run import RunDirectory

    run = RunDirectory.open(path)
    reader = StepReader(run, find_commit(run.log.read(), None))
    return [chunk.key for rank in range(reader.manifest.world.size) for chunk in reader.part(rank).chunks]


def keys(path: Path) -> set[str]:
    return set(ckpt.load(path))


def equal(left: Iterable[Any], right: Iterable[Any]) -> bool:
    return bits(list(left)) == bits(list(right))
