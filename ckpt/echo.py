"""What a state holds, in numbers that are the same on any number of ranks: for proofs that a restore is exact.

Each element gives a 64-bit number that depends on its bits and on its place in the global tensor; a box of a tensor is
the sum of its elements. Sums of boxes that make up the tensor are therefore the same however it is cut up. Taken from
the live memory of the state, by no code that saves or restores. It finds mistakes, not forgeries.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch

from ckpt.adapt import Collected
from ckpt.events import point, watched
from ckpt.sharding import Piece, pieces_of

Echo: TypeAlias = list[tuple[str, list[int], list[int], int]]
"""Key, offset and shape of a box, and its sum in [0, 2**64)."""

_PLACE, _BITS, _MIX = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x94D049BB133111EB))
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def tell_echo(name: str, collected: Collected, rank: int, **facts: Any) -> None:
    """Be at the point `name`, and say what the state holds; nothing where nobody listens."""
    if watched():
        point(name, rank=rank, echo=echo_of(collected, rank), memory=memory_of(collected), **facts)


def echo_of(collected: Collected, rank: int) -> Echo:
    """The sums of all boxes that `rank` holds. Reads the whole state, on its device: for watched runs only."""
    found: Echo = []
    for key, local in collected.locals.items():
        tensor = collected.tensors[key].detach()
        for piece in pieces_of(local.sharding, local.spec.shape, rank):
            box = piece.box
            found.append((key, list(box.offset), list(box.shape), _sum(tensor, piece, local.spec.shape)))
    return found


def memory_of(collected: Collected) -> list[tuple[str, int, int, str]]:
    """Key, address, bytes and dtype of each tensor that lies in one piece in CPU memory: where it could be damaged."""
    found = []
    for key in collected.locals:
        tensor = collected.tensors[key]
        if tensor.device.type == "cpu" and tensor.numel() and tensor.is_contiguous():
            found.append((key, tensor.data_ptr(), tensor.nbytes, str(tensor.dtype).removeprefix("torch.")))
    return found


def _sum(tensor: torch.Tensor, piece: Piece, shape: tuple[int, ...]) -> int:
    box = tensor[tuple(slice(at, at + n) for at, n in zip(piece.at, piece.box.shape, strict=True))].contiguous()
    total = torch.zeros((), dtype=torch.int64, device=box.device)
    word = _WORDS[math.gcd(box.element_size(), 8)]
    words = box.reshape(-1, 1).view(word).to(torch.int64)  # (elements, words of one element)
    places = _places(piece, shape, box.device) * words.shape[1]
    for column in range(words.shape[1]):
        mixed = words[:, column] * _BITS + (places + column) * _PLACE
        mixed = (mixed ^ (mixed >> 29)) * _MIX
        total += (mixed ^ (mixed >> 32)).sum()
    return int(total) % 2**64


def _places(piece: Piece, shape: tuple[int, ...], device: Any) -> torch.Tensor:
    """The place of each element of the box in the global tensor, row by row, from 1 on."""
    found = torch.ones((), dtype=torch.int64, device=device)
    for axis, (offset, size) in enumerate(zip(piece.box.offset, piece.box.shape, strict=True)):
        index = torch.arange(offset, offset + size, device=device) * math.prod(shape[axis + 1 :])
        found = found.unsqueeze(-1) + index
    return found.reshape(-1)
