"""The worlds of `plan_scale.py`: real models and parallel layouts, as values.

A parameter comes with its AdamW state. FSDP2 over tensor-parallel parameters gives strided shards, as in torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ckpt.layout import Entry, Layout, World
from ckpt.sharding import Mesh, OnMesh, Placement, Replicate, Split, TensorSpec


@dataclass(frozen=True)
class Case:
    """A world that saves, and one that restores what it saved."""

    name: str
    saved: World
    target: World


@dataclass(frozen=True)
class Grid:
    """Ranks of a run: `tensor` fastest, then `data`, then `pipeline`, as Megatron orders them."""

    data: int
    tensor: int
    pipeline: int = 1
    sharded: bool = True  # FSDP over `data`; else replicas

    def mesh(self, stage: int) -> Mesh:
        ranks = self.data * self.tensor
        return Mesh((self.data, self.tensor), tuple(range(stage * ranks, (stage + 1) * ranks)))

    def placements(self, tensor: Placement) -> tuple[Placement, Placement]:
        """Placements over (data, tensor); `tensor` is how tensor parallelism splits the parameter."""
        if not self.sharded:
            return Replicate(), tensor
        return (Split(0, self.tensor) if tensor == Split(0) else Split(0)), tensor


Parameter = tuple[str, tuple[int, ...], Placement]  # name, shape, and how tensor parallelism splits it


def entries(parameters: list[Parameter], grid: Grid, mesh: Mesh, *, mixed: bool) -> list[Entry]:
    """The tensors that a stage holds. `mixed`: bf16 parameters with an fp32 copy, as Megatron keeps them."""
    found = []
    for name, shape, tensor in parameters:
        sharding = OnMesh(mesh, grid.placements(tensor))
        states = ["exp_avg", "exp_avg_sq", *(["master"] if mixed else [])]
        found.append(Entry(f"model/{name}", TensorSpec("bfloat16" if mixed else "float32", shape), sharding))
        found.extend(Entry(f"optim/{name}/{state}", TensorSpec("float32", shape), sharding) for state in states)
    return found


def world(stages: list[list[Parameter]], grid: Grid, *, mixed: bool) -> World:
    layouts = []
    for stage, parameters in enumerate(stages):
        found = entries(parameters, grid, grid.mesh(stage), mixed=mixed)
        layouts.append(Layout(tuple(sorted(found, key=lambda entry: entry.key)), values=("progress",)))
    return World(tuple(layouts), tuple(stage for stage in range(len(stages)) for _ in range(grid.data * grid.tensor)))


def llama(parameters: int) -> list[Parameter]:
    """Layers of a Llama of width 8,192 until there are `parameters`."""
    found: list[Parameter] = [("embed", (128_256, 8192), Split(0))]
    layer = 0
    while True:
        for name, shape, tensor in (
            ("attn.q", (8192, 8192), Split(0)),
            ("attn.k", (1024, 8192), Split(0)),
            ("attn.v", (1024, 8192), Split(0)),
            ("attn.o", (8192, 8192), Split(1)),
            ("mlp.gate", (28_672, 8192), Split(0)),
            ("mlp.up", (28_672, 8192), Split(0)),
            ("mlp.down", (8192, 28_672), Split(1)),
            ("norm.1", (8192,), Replicate()),
            ("norm.2", (8192,), Replicate()),
        ):
            if len(found) == parameters:
                return found
            found.append((f"layers.{layer}.{name}", shape, tensor))
        layer += 1


def megatron(layers: int, width: int, stages: int) -> list[list[Parameter]]:
    """A Megatron GPT cut into pipeline stages; the word embedding lies on the first and on the last, tied."""
    words: Parameter = ("embedding.word", (51_200, width), Split(0))
    found: list[list[Parameter]] = []
    for stage in range(stages):
        per_stage = layers // stages
        own: list[Parameter] = []
        for layer in range(stage * per_stage, (stage + 1) * per_stage):
            for name, shape, tensor in (
                ("input_norm", (width,), Replicate()),
                ("post_norm", (width,), Replicate()),
                ("qkv", (3 * width, width), Split(0)),
                ("dense", (width, width), Split(1)),
                ("h_to_4h", (4 * width, width), Split(0)),
                ("4h_to_h", (width, 4 * width), Split(1)),
            ):
                bias = Split(0) if tensor == Split(0) else Replicate()
                own.append((f"layers.{layer:04d}.{name}.weight", shape, tensor))
                own.append((f"layers.{layer:04d}.{name}.bias", (shape[0],), bias))
        found.append(own)
    found[0] += [words, ("embedding.position", (2048, width), Replicate())]
    if stages > 1:
        found[-1].append(words)
    found[-1] += [("final_norm.weight", (width,), Replicate()), ("final_norm.bias", (width,), Replicate())]
    return found


def _fsdp_tp(name: str, parameters: int, saved: Grid, target: Grid) -> Case:
    stages = [llama(parameters)]
    return Case(name, world(stages, saved, mixed=False), world(stages, target, mixed=False))


def _pipeline(name: str, layers: int, width: int, saved: Grid, target: Grid) -> Case:
    before, after = (world(megatron(layers, width, grid.pipeline), grid, mixed=True) for grid in (saved, target))
    return Case(name, before, after)


def cases() -> list[Callable[[], Case]]:
    """The three worlds of the goals; the first restores with the same and with another tensor parallelism."""
    nlg, nlg_other = Grid(16, 8, 35, sharded=False), Grid(20, 8, 21, sharded=False)
    large, large_other = Grid(1250, 8, 10), Grid(1000, 8, 10)
    return [
        partial(_fsdp_tp, "FSDP 128 x TP 8 → 96 x 8", 500, Grid(128, 8), Grid(96, 8)),
        partial(_fsdp_tp, "FSDP 128 x TP 8 → 192 x 4", 500, Grid(128, 8), Grid(192, 4)),
        partial(_pipeline, "NLG 530B, DP 16 x TP 8 x PP 35 → 20 x 8 x 21", 105, 20_480, nlg, nlg_other),
        partial(_pipeline, "FSDP 1,250 x TP 8 x PP 10 → 1,000 x 8 x 10", 160, 25_600, large, large_other),
    ]


def growing() -> list[Callable[[], Case]]:
    """More tensors in one world, then more ranks with the same tensors; three quarters of the ranks restore."""
    sizes = [(128, tensors) for tensors in (375, 750, 1500, 3000, 6000)]
    sizes += [(data, 1500) for data in (16, 1024, 8192)]
    return [
        partial(_fsdp_tp, f"{data * 8:,} ranks, {n:,} tensors", n // 3, Grid(data, 8), Grid(data * 3 // 4, 8))
        for data, n in sizes
    ]
