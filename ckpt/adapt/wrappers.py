"""What a user wraps a member of the state in, to say how it is held: `PerRank`, `Shard`, `Rng`."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import xxhash

OnResize = Literal["error", "first", "equal", "reseed"] | Callable[[Sequence[Any], int, int], Any]


class PerRank:
    """A member of the state that differs from rank to rank on purpose.

    `obj` is a value, or anything with `state_dict`/`load_state_dict`; what it holds is stored with each rank
    and given back to the rank of the same number. When the world has another size: `"error"` raises
    `Incompatible`, `"first"` gives every rank the state of rank 0, and a function
    `fn(states, rank, world) -> state` gets the states of all saved ranks.
    A module, optimizer or tensor in a PerRank is stored in the data files, under a name of this rank alone,
    and can only be restored by as many ranks as saved it.
    """

    def __init__(self, obj: Any, on_resize: OnResize = "error") -> None:
        if on_resize not in ("error", "first") and not callable(on_resize):
            raise ValueError(f'on_resize is "error", "first" or a function, not {on_resize!r}')
        self.obj = obj
        self.on_resize = on_resize


class Shard:
    """A plain local tensor declared to be the box at `offset` of a tensor of `global_shape` (in elements).

    For tensor- and expert-parallel code that keeps plain local shards. Ranks that declare the same box are
    replicas and must hold equal bytes. An optimizer's state of a declared parameter is sharded like it.
    """

    def __init__(self, tensor: torch.Tensor, global_shape: Sequence[int], offset: Sequence[int]) -> None:
        self.tensor = tensor
        self.global_shape = tuple(int(n) for n in global_shape)
        self.offset = tuple(int(n) for n in offset)
        ends = zip(self.offset, tensor.shape, self.global_shape, strict=True)
        if any(o < 0 or o + n > g for o, n, g in ends):
            raise ValueError(f"{tuple(tensor.shape)} at {self.offset} reaches outside {self.global_shape}")


class Rng:
    """The random generators of this process: Python, NumPy (if imported), torch CPU and every CUDA device.

    Stored with each rank, restored last. When the world has another size, every rank is reseeded from the
    saved state of rank 0 and its own number, so that no two ranks draw alike.
    """

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
        if "numpy" in sys.modules:
            state["numpy"] = sys.modules["numpy"].random.get_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            state["cuda"] = [torch.cuda.get_rng_state(device) for device in range(torch.cuda.device_count())]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "reseed" in state:
            self._seed(state["reseed"])
            return
        random.setstate(state["python"])
        torch.set_rng_state(state["torch"])
        if "numpy" in state:
            import numpy as np

            np.random.set_state(state["numpy"])
        for device, saved in enumerate(state.get("cuda", ())):
            if torch.cuda.is_available() and device < torch.cuda.device_count():
                torch.cuda.set_rng_state(saved, device)

    @staticmethod
    def reseed(states: Sequence[Any], rank: int, world: int) -> dict[str, Any]:
        """The state of `rank` in a world of another size: a seed from the saved rank 0's state and the rank."""
        saved = states[0]
        if "reseed" in saved:
            material = repr(saved["reseed"]).encode()
        else:
            material = repr(saved["python"]).encode() + bytes(saved["torch"].numpy())
        return {"reseed": xxhash.xxh3_64_intdigest(material, seed=rank)}

    @staticmethod
    def _seed(seed: int) -> None:
        random.seed(seed)
        torch.manual_seed(seed % (1 << 63))
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % (1 << 32))
