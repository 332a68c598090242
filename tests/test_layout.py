"""Worlds: what is refused, who owns what, and that the ownership rule tiles every tensor exactly once."""

from __future__ import annotations

import re
from math import prod
from time import monotonic

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_worlds import ddp, fsdp, gpt2_specs, layout_of, specs_drawn, world_of, worlds

from ckpt import layout as layout_module
from ckpt.layout import Entry, Layout, Owned, World, cover_faults, held, owned_by, replicas, writers
from ckpt.sharding import (
    ITEMSIZE,
    Declared,
    Mesh,
    OnMesh,
    Placement,
    Replicate,
    Sharding,
    Split,
    TensorSpec,
    Whole,
    pieces_of,
)
from ckpt.slices import Slice, cover_fault, whole
from ckpt.symbolic import decode_layout, encode_layout

F32 = "float32"


def one_tensor(shardings: list[Sharding | None], shape: tuple[int, ...] = (8, 4)) -> World:
    """Rank i holds tensor `t` as `shardings[i]`, or not at all."""
    specs = {"t": TensorSpec(F32, shape)}
    return world_of(layout_of(specs, {} if s is None else {"t": s}) for s in shardings)


def rows(start: int, stop: int) -> Declared:
    return Declared(Slice((start, 0), (stop - start, 4)))


def mesh(*ranks: int) -> OnMesh:
    return OnMesh(Mesh((len(ranks),), ranks), (Split(0),))


@pytest.mark.parametrize(
    "shardings",
    [
        [Whole(), Whole()],
        [None, Whole()],
        [mesh(0, 1), mesh(0, 1)],
        [mesh(1, 0), mesh(1, 0)],
        [rows(0, 3), rows(3, 8)],
        [rows(0, 3), rows(3, 8), rows(0, 3)],
        [mesh(0, 1), mesh(0, 1), mesh(2, 3), mesh(2, 3)],
        [mesh(0, 1), mesh(0, 1), rows(0, 4), rows(4, 8)],
        [OnMesh(Mesh((2,), (0, 1)), (Replicate(),))] * 2 + [Whole()],
    ],
)
def test_worlds_that_fit_together(shardings: list[Sharding | None]) -> None:
    assert cover_faults(one_tensor(shardings)) == []


@pytest.mark.parametrize(
    ("shardings", "fault"),
    [
        ([mesh(0, 1), None], r"t: its mesh names ranks \[1\]"),
        ([mesh(0, 1), mesh(0, 1), mesh(0, 1)], r"t: ranks \[2\] hold it on a mesh that does not name them"),
        ([mesh(1, 2), mesh(0, 1)], "t: "),
        ([rows(0, 3), rows(4, 8)], "t: gap in"),
        ([rows(0, 4), rows(3, 8)], "t: overlap in"),
        ([rows(0, 4), Whole()], "t: overlap in"),
        ([mesh(0, 1), mesh(0, 1), Whole()], "t: overlap in"),
        ([mesh(0, 1), mesh(0, 1), *[mesh(2, 3, 4)] * 3], "t: overlap in"),
        ([rows(0, 9)], "t: .* outside"),
    ],
)
def test_worlds_that_do_not(shardings: list[Sharding | None], fault: str) -> None:
    (found,) = cover_faults(one_tensor(shardings))
    assert re.match(fault, found), found


@pytest.mark.parametrize("spec", [TensorSpec(F32, (4, 8)), TensorSpec("bfloat16", (8, 4))])
def test_one_key_with_two_specs_is_refused(spec: TensorSpec) -> None:
    one, other = Layout((Entry("t", TensorSpec(F32, (8, 4)), Whole()),)), Layout((Entry("t", spec, Whole()),))
    (found,) = cover_faults(world_of([one, other]))
    assert "ranks hold it as" in found
    assert str(spec) in found


def test_every_faulty_key_is_named() -> None:
    specs = {key: TensorSpec(F32, (8, 4)) for key in "abcd"}
    world = world_of([layout_of(specs, {"a": rows(0, 1), "b": Whole(), "c": rows(0, 1), "d": rows(0, 8)})])
    assert [fault.split(":")[0] for fault in cover_faults(world)] == ["a", "c"]


def test_what_a_world_has_compared_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ranks that cut a tensor alike nothing is compared, however many there are."""
    alike = OnMesh(Mesh((2,), (0, 1)), (Split(0),))
    unlike = [OnMesh(Mesh((2,), (0, 1)), (Split(0),)), None, None]
    assert cover_faults(one_tensor([alike, alike])) == []
    usual = cover_faults(one_tensor([unlike[0], unlike[0], rows(0, 8)]))
    monkeypatch.setattr(layout_module, "COMPARED_LIMIT", 1)
    assert cover_faults(one_tensor([alike, alike])) == []
    (found,) = cover_faults(one_tensor([unlike[0], unlike[0], rows(0, 8)]))
    assert "too many pieces" in found
    assert "too many pieces" not in str(usual)


def all_owned(world: World) -> list[list[Owned]]:
    return [owned_by(world, rank) for rank in range(world.size)]


@st.composite
def any_world(draw: st.DrawFn) -> World:
    return draw(worlds(draw(specs_drawn())))


@given(any_world())
@settings(deadline=None)
def test_owned_boxes_tile_every_tensor_and_lie_in_what_their_rank_holds(world: World) -> None:
    assert cover_faults(world) == []
    boxes: dict[str, list[Slice]] = {key: [] for key in world.specs}
    for rank, owned in enumerate(all_owned(world)):
        assert owned == sorted(owned, key=lambda o: (o.key, o.box))
        for one in owned:
            boxes[one.key].append(one.box)
            entry = world.layout(rank).by_key[one.key]
            (piece,) = (p for p in pieces_of(entry.sharding, entry.spec.shape, rank) if one.box.within(p.box))
            assert one.box.relative_to(piece.box.offset).moved_by(piece.at).offset == one.at
    for key, spec in world.specs.items():
        assert all(box.numel for box in boxes[key])
        assert cover_fault(whole(spec.shape), boxes[key]) is None


@given(any_world())
@settings(deadline=None)
def test_what_is_not_a_parameter_is_written_by_its_lowest_holder(world: World) -> None:
    roles = {entry.key: entry.role for layout in world.layouts for entry in layout.entries}
    owned = all_owned(world)
    for key in (key for key, role in roles.items() if role != "parameter"):
        for group in held(world, key, whole(world.specs[key].shape)):
            for rank in group.ranks:
                mine = [o.box for o in owned[rank] if o.key == key and any(o.box == p.box for p in group.pieces)]
                assert len(mine) == (len(group.pieces) if rank == group.ranks[0] else 0)


@given(any_world(), st.data())
@settings(deadline=None)
def test_writers_are_those_whose_owned_boxes_meet(world: World, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(world.specs)))
    shape = world.specs[key].shape
    start = tuple(data.draw(st.integers(0, n)) for n in shape)
    box = Slice(start, tuple(data.draw(st.integers(0, n - o)) for o, n in zip(start, shape, strict=True)))
    for asked in (box, whole(shape)):
        expected = [
            rank
            for rank, owned in enumerate(all_owned(world))
            if any(o.key == key and o.box.intersect(asked) for o in owned)
        ]
        assert writers(world, key, asked) == expected


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("make", [ddp, fsdp])
def test_gpt2_with_adamw_is_balanced_by_bytes(make: object, ranks: int) -> None:
    assert callable(make)
    world: World = make(gpt2_specs(), ranks)
    written = [sum(o.box.numel * ITEMSIZE[world.specs[o.key].dtype] for o in owned) for owned in all_owned(world)]
    assert sum(written) == sum(spec.nbytes for spec in world.specs.values())
    assert max(written) <= 1.1 * sum(written) / ranks


def test_the_ownership_rule_is_the_one_that_is_written_down() -> None:
    """A reader finds the writers by this rule: it must not change under the name even-bytes/1."""
    specs = {"a": TensorSpec(F32, (1000, 100)), "b": TensorSpec(F32, ()), "c": TensorSpec(F32, (500, 200))}
    owned = [[(o.key, o.box.offset, o.box.shape, o.at) for o in one] for one in all_owned(ddp(specs, 3))]
    assert owned == [
        [("a", (0, 0), (667, 100), (0, 0))],
        [("a", (667, 0), (333, 100), (667, 0)), ("b", (), (), ()), ("c", (0, 0), (167, 200), (0, 0))],
        [("c", (167, 0), (333, 200), (167, 0))],
    ]


def test_a_key_with_the_same_grid_on_two_meshes_is_shared_by_both() -> None:
    world = one_tensor([mesh(0, 1), mesh(0, 1), mesh(2, 3), mesh(2, 3)], (1 << 17, 4))
    assert [[o.box.shape[0] for o in owned] for owned in all_owned(world)] == [[1 << 15]] * 4


def test_ties_that_ranks_do_not_see_alike_are_refused() -> None:
    spec = TensorSpec(F32, (8, 4))
    tied = Layout((Entry("a", spec, Whole()),), (("z", "a"),))
    untied = Layout((Entry("a", spec, Whole()), Entry("z", spec, Whole())))
    other = Layout((Entry("b", spec, Whole()),), (("z", "b"),))
    assert cover_faults(world_of([tied, tied])) == []
    assert "z: some ranks hold it tied to a" in cover_faults(world_of([tied, untied]))[0]
    assert "z: some ranks hold it tied to" in cover_faults(world_of([tied, other]))[0]


def test_replicas_to_compare_are_those_that_no_mesh_vouches_for() -> None:
    on_one_mesh = one_tensor([OnMesh(Mesh((2,), (0, 1)), (Replicate(),))] * 2)
    assert list(replicas(on_one_mesh, 0)) == []
    assert list(replicas(one_tensor([Whole(), Whole()]), 1)) == [((0, 1), "t")]
    assert list(replicas(one_tensor([rows(0, 3), rows(3, 8), rows(0, 3)]), 1)) == []
    assert list(replicas(one_tensor([rows(0, 3), rows(3, 8), rows(0, 3)]), 2)) == [((0, 2), "t")]
    two_meshes = one_tensor([mesh(0, 1), mesh(0, 1), mesh(2, 3), mesh(2, 3)])
    assert list(replicas(two_meshes, 1)) == [((1, 3), "t")]


def test_values_belong_to_the_lowest_rank_that_names_them() -> None:
    world = World((Layout((), values=("a",)), Layout((), values=("a", "b"))), (0, 1, 1, 0))
    assert world.value_owner == {"a": 0, "b": 1}


@given(any_world())
@settings(deadline=None)
def test_a_layout_travels_unchanged(world: World) -> None:
    for layout in world.layouts:
        data = encode_layout(layout)
        assert decode_layout(data) == layout
        assert encode_layout(decode_layout(data)) == data


def test_a_layout_with_ties_and_values_travels_unchanged() -> None:
    entry = Entry("model/wte", TensorSpec("bfloat16", (5, 3)), Whole(), "buffer")
    layout = Layout((entry,), (("model/head", "model/wte"),), ("step",), ("rng",))
    assert decode_layout(encode_layout(layout)) == layout


def test_layouts_that_arrive_from_many_ranks_share_their_mesh() -> None:
    """To compare two equal meshes of 100,000 ranks for every tensor would take minutes."""
    entry = Entry("t", TensorSpec(F32, (8,)), mesh(*range(8)))
    data = encode_layout(Layout((entry,)))
    left, right = (decode_layout(data).entries[0].sharding for _ in range(2))
    assert isinstance(left, OnMesh)
    assert isinstance(right, OnMesh)
    assert left.mesh is right.mesh


def _big(data: int, tensor: int, tensors: int, *, replicate: bool = False) -> World:
    ranks = data * tensor
    grid = Mesh((data, tensor), tuple(range(ranks)))
    first: Placement = Replicate() if replicate else Split(0, tensor)
    specs = {f"t{i:05d}": TensorSpec(F32, ((1 << 17) + 64 * (i % 7), 16)) for i in range(tensors)}
    return World((layout_of(specs, {key: OnMesh(grid, (first, Split(0))) for key in specs}),), (0,) * ranks)


@pytest.mark.parametrize("replicate", [False, True])
def test_the_work_of_one_rank_does_not_grow_with_the_world(replicate: bool) -> None:
    """65,536 ranks: any look at each rank for each of 1,000 tensors would take minutes."""
    world = _big(8192, 8, 1000, replicate=replicate)
    began = monotonic()
    assert cover_faults(world) == []
    owned = owned_by(world, 12_345)
    for key in list(world.specs)[:200]:
        writers(world, key, Slice((5, 0), (3, 16)))
    assert monotonic() - began < 10
    if not replicate:
        assert len(owned) == 1000
    assert all(prod(o.box.shape) for o in owned)
