"""Worlds made by hand or by hypothesis, for tests of the pure modules: what a rank holds, and what is in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import numpy as np
from hypothesis import strategies as st

from ckpt.layout import Entry, Layout, Role, World
from ckpt.sharding import Declared, Mesh, OnMesh, Replicate, Sharding, Split, TensorSpec, Whole, pieces_of
from ckpt.slices import Slice

Specs = Mapping[str, TensorSpec]


def world_of(layouts: Iterable[Layout]) -> World:
    """The world in which rank i has the i-th layout."""
    distinct: dict[Layout, int] = {}
    layout_of = tuple(distinct.setdefault(layout, len(distinct)) for layout in layouts)
    return World(tuple(distinct), layout_of)


def layout_of(specs: Specs, shardings: Mapping[str, Sharding], roles: Mapping[str, Role] | None = None) -> Layout:
    """The layout that holds each of `shardings`; roles default to parameter."""
    entries = (Entry(key, specs[key], shardings[key], (roles or {}).get(key, "parameter")) for key in sorted(shardings))
    return Layout(tuple(entries))


def ddp(specs: Specs, ranks: int) -> World:
    return world_of([layout_of(specs, {key: Whole() for key in specs})] * ranks)


def fsdp(specs: Specs, ranks: int) -> World:
    on_mesh = OnMesh(Mesh((ranks,), tuple(range(ranks))), (Split(0),))
    return world_of([layout_of(specs, {k: on_mesh if s.shape else Whole() for k, s in specs.items()})] * ranks)


def gpt2_specs(
    layers: int = 12, vocabulary: int = 50257, width: int = 768, context: int = 1024
) -> dict[str, TensorSpec]:
    """GPT-2 (124M by default) in fp32 with its AdamW state, the tied output layer stored once."""
    shapes: dict[str, tuple[int, ...]] = {"wte": (vocabulary, width), "wpe": (1024, width)}
    for norm in ("ln_f", *(f"h.{i}.ln_{j}" for i in range(layers) for j in (1, 2))):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for i in range(layers):
        for name, rows, columns in (("attn", 3, 1), ("proj", 1, 1), ("fc", 4, 1), ("out", 1, 4)):
            shapes |= {f"h.{i}.{name}.weight": (rows * width, columns * width), f"h.{i}.{name}.bias": (rows * width,)}
    specs = {f"model/{key}": TensorSpec("float32", shape) for key, shape in shapes.items()}
    for key, shape in shapes.items():
        specs |= {f"optim/{key}/{name}": TensorSpec("float32", shape) for name in ("exp_avg", "exp_avg_sq")}
        specs[f"optim/{key}/step"] = TensorSpec("float32", ())
    return specs


_DTYPES = ("uint8", "float16", "int32", "float64", "complex128")


@st.composite
def specs_drawn(draw: st.DrawFn) -> dict[str, TensorSpec]:
    """A few tensors: scalars, empty ones, small uneven ones, and some that are large enough to be cut."""
    small = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    large = st.sampled_from([(37, 4100), (1, 3, 50_000), (300_000,), (2, 2, 2, 20_001)])
    drawn = draw(st.lists(st.one_of(small, small, large), min_size=1, max_size=5))
    return {f"t{i}": TensorSpec(draw(st.sampled_from(_DTYPES)), shape) for i, shape in enumerate(drawn)}


@st.composite
def worlds(draw: st.DrawFn, specs: Specs) -> World:
    """DDP, FSDP, HSDP, FSDP x TP, pipeline stages or declared shards of `specs`, with buffers among them."""
    kind = draw(st.sampled_from(["ddp", "fsdp", "mesh", "mesh", "pipeline", "declared"]))
    roles: dict[str, Role] = {key: draw(st.sampled_from(["parameter"] * 4 + ["buffer", "tensor"])) for key in specs}
    if kind == "ddp":
        return world_of([layout_of(specs, {key: Whole() for key in specs}, roles)] * draw(st.integers(1, 5)))
    if kind == "pipeline":
        return draw(_pipeline(specs, roles))
    if kind == "declared":
        return draw(_declared(specs, roles))
    shape = (draw(st.integers(1, 5)),) if kind == "fsdp" else (draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    ranks = prod(shape)
    mesh = Mesh(shape, tuple(draw(st.permutations(range(ranks)))))
    shardings = {key: draw(_on(mesh, spec)) for key, spec in specs.items()}
    return world_of([layout_of(specs, shardings, roles)] * ranks)


@st.composite
def _on(draw: st.DrawFn, mesh: Mesh, spec: TensorSpec) -> Sharding:
    if not spec.shape:
        return draw(st.sampled_from([Whole(), OnMesh(mesh, (Replicate(),) * len(mesh.shape))]))
    split = st.builds(Split, st.integers(0, len(spec.shape) - 1), st.sampled_from([1, 1, 2, 3]))
    return OnMesh(mesh, tuple(draw(st.one_of(st.just(Replicate()), split, split)) for _ in mesh.shape))


@st.composite
def _pipeline(draw: st.DrawFn, specs: Specs, roles: Mapping[str, Role]) -> World:
    """Stages with other keys and a mesh each; the first key lies on the first and the last stage, alike."""
    stages, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    names = list(specs)
    placements = {key: draw(_on(Mesh((width,), tuple(range(width))), spec)) for key, spec in specs.items()}
    layouts = []
    for stage in range(stages):
        mesh = Mesh((width,), tuple(range(stage * width, (stage + 1) * width)))
        keys = {key for i, key in enumerate(names) if i % stages == stage}
        if stage == stages - 1:
            keys.add(names[0])
        shardings = {}
        for key in keys:
            on = placements[key]
            shardings[key] = OnMesh(mesh, on.placements) if isinstance(on, OnMesh) else on
        layouts += [layout_of(specs, shardings, roles)] * width
    return world_of(layouts)


@st.composite
def _declared(draw: st.DrawFn, specs: Specs, roles: Mapping[str, Role]) -> World:
    """Every rank declares rows of its own; some shares are empty, some are declared by two ranks alike."""
    ranks, copies = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    layouts: list[dict[str, Sharding]] = [{} for _ in range(ranks)]
    for key, spec in specs.items():
        rows = spec.shape[0] if spec.shape else 0
        cuts = [0, *sorted(draw(st.lists(st.integers(0, rows), min_size=ranks - 1, max_size=ranks - 1))), rows]
        for rank in range(ranks):
            box = Slice((cuts[rank], *(0 for _ in spec.shape[1:])), (cuts[rank + 1] - cuts[rank], *spec.shape[1:]))
            layouts[rank][key] = Declared(box) if spec.shape else Whole()
    return world_of([layout_of(specs, layout, roles) for layout in layouts] * copies)


def content(key: str, spec: TensorSpec) -> np.ndarray:
    """The whole tensor; neighbouring elements differ, and so do tensors."""
    dtype = np.dtype(spec.dtype)
    first = sum(key.encode()) % 50
    return (np.arange(first, first + prod(spec.shape)) % 241).astype(dtype).reshape(spec.shape)


def local_shape(sharding: Sharding, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Shape of the local tensor that `pieces_of` describes."""
    pieces = pieces_of(sharding, shape, rank)
    if not pieces:
        return (0, *shape[1:]) if shape else ()
    return tuple(max(p.at[d] + p.box.shape[d] for p in pieces) for d in range(len(shape)))


def window(box: Slice, at: tuple[int, ...] | None = None) -> tuple[object, ...]:
    """Index of a box in a NumPy array, from `at` where that is given; never a copy."""
    start = box.offset if at is None else at
    return (..., *(slice(o, o + n) for o, n in zip(start, box.shape, strict=True)))


def local_of(world: World, key: str, rank: int) -> np.ndarray:
    """The local tensor of `rank`, filled."""
    entry = world.layout(rank).by_key[key]
    whole_tensor = content(key, entry.spec)
    local = np.zeros(local_shape(entry.sharding, entry.spec.shape, rank), whole_tensor.dtype)
    for piece in pieces_of(entry.sharding, entry.spec.shape, rank):
        local[window(piece.box, piece.at)] = whole_tensor[window(piece.box)]
    return local
