"""GPT-2 with its AdamW state, in any layout, filled so that every element is known in advance.

Owns the model of the benchmarks and the oracle they check against: the value of an element depends only on the seed,
the tensor's key and the element's index in the whole tensor, so any rank at any world size can tell whether what it
loaded is right without having seen what was saved. Saves and loads nothing itself.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Layout = Literal["plain", "ddp", "fsdp2"]

_FILL_BLOCK = 1 << 20  # elements; small enough to stay in a core's cache
_HASH_FACTOR = 0x9E3779B1 - (1 << 32)  # odd, so every index in a tensor is moved; as a signed 32-bit number


@dataclass(frozen=True)
class Config:
    """Sizes of a GPT-2; the defaults are the released 124M model."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    vocabulary: int = 50257
    context: int = 1024


GPT2_124M = Config()
GPT2_TINY = Config(layers=2, heads=5, width=130, vocabulary=5003, context=64)  # sizes that do not divide


class Attention(nn.Module):
    """Causal self-attention with GPT-2's fused query-key-value projection."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width)
        by_head = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = by_head.unbind(0)  # each (batch, heads, time, width / heads)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """The two-layer feed-forward part of a block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """The released architecture, the output projection tied to the token embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocabulary, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight
        self.apply(_init_weights)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, time) -> (batch, time, vocabulary)
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class LocalTensor:
    """What this rank holds of one tensor: contiguous elements, the first of them number `start` of the whole."""

    key: str
    local: Tensor
    start: int


@dataclass
class TrainingState:
    """A model and its optimizer as one rank holds them."""

    model: nn.Module
    optim: torch.optim.Optimizer
    seed: int
    rank: int
    world: int

    def tensors(self) -> Iterator[LocalTensor]:
        """Yield each tensor once: parameters (tied weights once), then the optimizer's state."""
        parameters = {key.removeprefix("module."): value for key, value in self.model.named_parameters()}
        for key, parameter in parameters.items():
            yield self._local(f"model/{key}", parameter)
        for key, parameter in parameters.items():
            for name, value in self.optim.state[parameter].items():
                yield self._local(f"optim/{key}/{name}", value)

    @property
    def local_bytes(self) -> int:
        """How many bytes of tensors this rank holds."""
        return sum(t.local.nbytes for t in self.tensors())

    def _local(self, key: str, value: Tensor) -> LocalTensor:
        local, start = value.detach(), 0
        if hasattr(local, "to_local"):
            rows, *row_shape = local.shape
            local = local.to_local()
            start = _first_row(rows, self.rank, self.world, local_rows=local.shape[0]) * math.prod(row_shape)
        return LocalTensor(key, local, start)


def build(config: Config, layout: Layout, *, seed: int, rank: int, world: int) -> TrainingState:
    """Build a model from random weights and an AdamW whose state is allocated, sharded as `layout` says.

    FSDP2 wraps each block and the root. Distributed layouts need an initialised process group with a CPU backend.
    """
    torch.manual_seed(seed)
    model = _distribute(GPT2(config), layout, world)
    optim = torch.optim.AdamW(_groups(model), betas=(0.9, 0.95))
    for group in optim.param_groups:
        for parameter in group["params"]:
            optim.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
    return TrainingState(model, optim, seed, rank, world)


def _distribute(model: GPT2, layout: Layout, world: int) -> nn.Module:
    if layout == "plain":
        return model
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# Two groups with hyperparameters of their own, as GPT-2 is trained; a load has to bring these back too.
_DECAY = {"lr": 6e-4, "weight_decay": 0.1}
_NO_DECAY = {"lr": 3e-4, "weight_decay": 0.0}


def _groups(model: nn.Module) -> list[dict[str, object]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], **_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], **_NO_DECAY},
    ]


def fill(state: TrainingState) -> None:
    """Give every element its own value and every group its hyperparameters."""
    for tensor in state.tensors():
        flat = tensor.local.view(-1)
        for low in range(0, flat.numel(), _FILL_BLOCK):
            block = flat[low : low + _FILL_BLOCK]
            block.copy_(_expected(state.seed, tensor, low, block.numel()))
    set_hyperparameters(state)


def set_hyperparameters(state: TrainingState) -> None:
    """Give every optimizer group its own hyperparameters."""
    for group, hyperparameters in zip(state.optim.param_groups, (_DECAY, _NO_DECAY), strict=True):
        group.update(hyperparameters)


def wipe(state: TrainingState) -> None:
    """Overwrite everything a load has to bring back, in place."""
    for tensor in state.tensors():
        tensor.local.zero_()
    for group in state.optim.param_groups:
        group.update(lr=0.0, weight_decay=0.0)


def verify(state: TrainingState) -> None:
    """Raise AssertionError naming the first tensor, or group, that does not hold exactly what `fill` gave it."""
    for tensor in state.tensors():
        flat = tensor.local.view(-1)
        for low in range(0, flat.numel(), _FILL_BLOCK):
            block = flat[low : low + _FILL_BLOCK]
            wanted = _expected(state.seed, tensor, low, block.numel())
            if not torch.equal(block.view(torch.int32), wanted.view(torch.int32)):
                raise AssertionError(f"{tensor.key} differs in local elements [{low}, {low + block.numel()})")
    for number, (group, wanted_group) in enumerate(zip(state.optim.param_groups, (_DECAY, _NO_DECAY), strict=True)):
        found = {name: group[name] for name in wanted_group}
        if found != wanted_group:
            raise AssertionError(f"optimizer group {number}: expected {wanted_group}, got {found}")


def _expected(seed: int, tensor: LocalTensor, low: int, count: int) -> Tensor:
    """The float32 values, all in [1, 2), of `count` elements from local element `low` on."""
    first = tensor.start + low
    index = torch.arange(first, first + count, dtype=torch.int32)
    key_hash = zlib.crc32(f"{seed}/{tensor.key}".encode()) - (1 << 31)
    mixed = index.mul_(_HASH_FACTOR).add_(key_hash)  # wraps around
    one = 0x3F800000  # the bits of 1.0
    return mixed.bitwise_right_shift_(9).bitwise_and_(0x7FFFFF).bitwise_or_(one).view(torch.float32)


def _first_row(rows: int, rank: int, world: int, *, local_rows: int) -> int:
    """First row of this rank's part under `torch.chunk`, worked out apart from DTensor's own arithmetic."""
    chunk = -(-rows // world)
    start = min(rank * chunk, rows)
    expected_rows = min(chunk, rows - start)
    if local_rows != expected_rows:
        raise AssertionError(f"rank {rank} of {world} should hold {expected_rows} of {rows} rows, holds {local_rows}")
    return start
