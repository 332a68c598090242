"""Bad input: a typed error that says what, where, what still works and what to do; the state passed in is untouched."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from keepers import forget
from states import Box, bits, model, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

import ckpt
from ckpt import Checkpointer, CkptError, Corrupt, Incompatible, NotFound


def build(seed: int) -> dict[str, Any]:
    net = model(seed)
    return {"model": net, "optim": torch.optim.AdamW(net.parameters(), lr=1e-2), "box": Box(seed), "n": seed}


def contents(state: dict[str, Any]) -> object:
    optimizer = state["optim"]
    groups = [{**group, "params": None} for group in optimizer.param_groups]
    entries = [dict(optimizer.state.get(p, {})) for g in optimizer.param_groups for p in g["params"]]
    return bits([state["model"].state_dict(), entries, groups, state["box"].value, state["n"]])


def saved(path: Path, *steps: int) -> Path:
    """A run with these steps; returns the directory of the newest attempt."""
    state = build(0)
    train(state["model"], state["optim"], 1)
    with Checkpointer(path) as checkpointer:
        for step in steps:
            checkpointer.save(step, {**state, "n": step}, blocking=True)
    forget()
    return max((path / "steps").iterdir())


def refused(kind: type[CkptError], act: Callable[[dict[str, Any]], object], *says: str) -> str:
    """`act` raises exactly `kind`, with a message that matches all of `says`, and leaves its state as it was."""
    state = build(1)
    train(state["model"], state["optim"], 1, skip=9)
    before = contents(state)
    with pytest.raises(CkptError) as caught:
        act(state)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    for pattern in says:
        assert re.search(pattern, message), f"{pattern!r} is not in: {message}"
    assert contents(state) == before
    return message


def refuses_to_save(path: Path, state: Any, *says: str) -> None:
    """Saving `state` is Incompatible; the run keeps its older step and goes on."""
    with Checkpointer(path) as checkpointer:
        checkpointer.save(1, {"ok": 1}, blocking=True)
        with pytest.raises(Incompatible) as caught:
            checkpointer.save(2, state, blocking=True)
        for pattern in says:
            assert re.search(pattern, str(caught.value)), f"{pattern!r} is not in: {caught.value}"
        assert checkpointer.all_steps() == [1]
        checkpointer.save(2, {"ok": 2}, blocking=True)


# Where there is nothing to read


def test_a_directory_with_no_checkpoint(tmp_path: Path) -> None:
    for act in (lambda s: ckpt.restore(tmp_path, s), lambda s: ckpt.load(tmp_path)):
        refused(NotFound, act, re.escape(str(tmp_path)), "no checkpoint", "Is the path right")
    refused(NotFound, lambda s: ckpt.restore(tmp_path / "absent", s), "absent")
    refused(NotFound, lambda s: Checkpointer(tmp_path).restore(s, required=True), re.escape(str(tmp_path)))


def test_a_step_that_does_not_exist(tmp_path: Path) -> None:
    saved(tmp_path, 1, 5)
    for act in (
        lambda s: ckpt.restore(tmp_path, s, step=3),
        lambda s: ckpt.load(tmp_path, step=3),
        lambda s: Checkpointer(tmp_path).restore(s, step=3),
    ):
        refused(NotFound, act, "no step 3", "newest steps: 1, 5")
    assert Checkpointer(tmp_path).all_steps() == [1, 5]


def test_an_address_that_cannot_be_opened(tmp_path: Path) -> None:
    refused(ckpt.StorageError, lambda s: Checkpointer("gopher://host/run"), "gopher://host/run", "Use a path")
    (tmp_path / "file").write_text("")
    refused(ckpt.StorageError, lambda s: Checkpointer(tmp_path / "file"), "file")


# A state that differs from what is stored


def test_all_that_differs_comes_in_one_error(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        stored = {"shape": torch.ones(2, 3), "dtype": torch.ones(4), "gone": torch.ones(1), "value gone": 1}
        checkpointer.save(1, stored, blocking=True)
    target = {"shape": torch.zeros(3, 2), "dtype": torch.zeros(4).half(), "new": torch.zeros(1), "value new": 2}
    before = bits(target)
    with pytest.raises(Incompatible) as caught:
        ckpt.restore(tmp_path, target)
    message = str(caught.value)
    for line in (
        f"step 1 of {tmp_path}",
        "shape: shape [2, 3] in the checkpoint, [3, 2] in the state",
        "dtype: float32 in the checkpoint, float16 in the state",
        "missing in the checkpoint: new",
        "missing in the checkpoint: value%20new",
        "in the checkpoint, not in the state: gone",
        "in the checkpoint, not in the state: value%20gone",
        "Nothing was touched",
        f"`ckpt show {tmp_path}`",
        "only=",
        "strict=False",
    ):
        assert line in message
    assert bits(target) == before


def test_another_model(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    wide = model(1, width=7)
    other = {"model": wide, "optim": torch.optim.AdamW(wide.parameters())}
    before = bits(wide.state_dict())
    with pytest.raises(Incompatible, match=r"model/0.weight: shape \[6, 4\] in the checkpoint, \[7, 4\] in the state"):
        ckpt.restore(tmp_path, other)
    assert bits(wide.state_dict()) == before
    assert not other["optim"].state


def test_another_model_is_named_before_what_its_optimizer_lacks(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    deep = torch.nn.Sequential(*model(1), torch.nn.Linear(3, 3))
    with pytest.raises(Incompatible) as caught:
        ckpt.restore(tmp_path, {"model": deep, "optim": torch.optim.AdamW(deep.parameters()), "box": Box(0), "n": 0})
    message = str(caught.value)
    parts = ("missing in the checkpoint: model/4.weight", "missing in the checkpoint: optim/group_of/model/4.bias")
    assert 0 < message.index(parts[0]) < message.index(parts[1])


def test_a_state_is_a_dict_or_a_list_with_names(tmp_path: Path) -> None:
    refuses_to_save(tmp_path / "a", model(0), r'a state is a dict or a list, not Sequential: \{"model": model')
    refuses_to_save(tmp_path / "b", {"a": {1: torch.ones(1)}}, "a: keys of a state are strings, got .1")


# What cannot be stored


class TwoHalves(torch.Tensor):
    """A tensor that has no memory of its own."""

    @staticmethod
    def __new__(cls, half: torch.Tensor) -> TwoHalves:
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def _freed() -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def _circle() -> list[Any]:
    circle: list[Any] = []
    circle.append({"again": circle})
    return circle


def _quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: lambda: 0, "thing.*function.*state_dict"),
        (lambda: {"deep": [1, {"er": object()}]}, r"thing.*\['deep'\]\[1\]\['er'\].*builtins.object.*leave it out"),
        (lambda: open("/dev/null"), "thing.*TextIOWrapper"),  # noqa: SIM115
        (lambda: torch.eye(3).to_sparse(), "thing: only dense tensors can be stored, not torch.sparse_coo"),
        (_quantized, "thing: torch.qint8 cannot be stored"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "thing: this Tensor has no plain memory"),
        (lambda: TwoHalves(torch.ones(3)), "thing: this TwoHalves has no plain memory.*state_dict"),
        (_freed, "thing: this Tensor has no plain memory"),
        (lambda: torch.ones(3, device="meta"), "thing: a meta tensor has no memory.*to_empty"),
        (lambda: nn.Linear(2, 2, device="meta"), "thing/bias: a meta tensor"),
        (lambda: nn.LazyLinear(3), "thing/bias: this lazy UninitializedParameter has no shape yet. Run the model once"),
        (_circle, "a state cannot contain itself"),
        (lambda: [_circle(), torch.ones(1)], "a state cannot contain itself"),
        (lambda: [1, ("a", torch.ones(1))], "a tuple in a state cannot hold tensors.*use a list"),
        (lambda: Box({"x": {1: object()}}), "thing: .*object"),
        (lambda: ckpt.PerRank(object()), "thing: .*object"),
        (lambda: ckpt.PerRank(Box(bytes(65 << 20))), "thing: .* bytes are too many for a value of one rank"),
        (lambda: torch.float4_e2m1fn_x2, "thing.*float4_e2m1fn_x2 cannot be stored"),
    ],
)
def test_an_object_that_cannot_be_stored(tmp_path: Path, make: Callable[[], Any], says: str) -> None:
    refuses_to_save(tmp_path, {"inner": {"thing": make()}}, "^inner|contain itself", says)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (torch.zeros(3, device="meta"), "t: a meta tensor has no memory.*to_empty"),
        (torch.zeros(1).expand(3), "t: an expanded tensor cannot be restored into.*contiguous"),
        (torch.zeros(3).to_sparse(), "t: only dense tensors"),
        (torch.zeros(9).as_strided((3, 3), (2, 1)), "t: elements of this tensor overlap.*contiguous"),
        (nn.UninitializedParameter(), "t: this lazy UninitializedParameter has no shape yet. Run the model once first"),
        (torch.zeros(3, dtype=torch.complex64).conj(), "t: a lazy conjugate cannot be restored into"),
    ],
    ids=["meta", "expanded", "sparse", "overlapping", "lazy", "conjugate"],
)
def test_a_target_that_cannot_be_filled(tmp_path: Path, target: torch.Tensor, says: str) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": torch.ones(2), "t": torch.ones(3, dtype=target.dtype)}, blocking=True)
    first = torch.zeros(2)
    with pytest.raises(Incompatible, match=says):
        ckpt.restore(tmp_path, {"a": first, "t": target})
    assert first.tolist() == [0.0, 0.0]


def test_a_meta_module_says_to_empty(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    meta = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)).to("meta")
    with pytest.raises(Incompatible, match=r"model/0.bias: a meta tensor .* Call module.to_empty"):
        ckpt.restore(tmp_path, {"model": meta}, only=["model"])
    meta.to_empty(device="cpu")
    assert ckpt.restore(tmp_path, {"model": meta}, only=["model"]) == 1


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    class Twice(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {"inner.weight": self.weight, "module.inner.weight": torch.ones(3)}

    net = nn.DataParallel(Twice(2, 2))
    net.state_dict = net.module.state_dict
    refuses_to_save(tmp_path, {"m": net}, "m/inner.weight: two different tensors of the state have this name")


@pytest.fixture
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_partial_placement(tmp_path: Path, mesh: Any) -> None:
    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    refuses_to_save(tmp_path, {"grad": partial}, "grad: a Partial placement is a sum .* redistribute")
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"grad": torch.ones(3)}, blocking=True)
    with pytest.raises(Incompatible, match="grad: a Partial placement"):
        ckpt.restore(tmp_path, {"grad": partial})
    assert partial.to_local().tolist() == [1.0] * 3


def test_several_ranks_without_a_process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for act in (lambda s: Checkpointer(tmp_path), lambda s: ckpt.restore(tmp_path, s)):
        refused(Incompatible, act, "WORLD_SIZE is 2", "init_process_group")
    assert ckpt.load(tmp_path)["n"] == 1  # needs no group


def test_a_closed_checkpointer(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, build(0), blocking=True)
    checkpointer.close()
    checkpointer.close()
    says = (re.escape(str(tmp_path)), "is closed; make a new one")
    refused(CkptError, lambda s: checkpointer.save(2, s, blocking=True), *says)
    refused(CkptError, lambda s: checkpointer.restore(s), *says)
    refused(CkptError, lambda s: next(checkpointer.steps(2, s)), *says)
    assert checkpointer.all_steps() == [1]


def test_an_error_of_the_user_s_own_load_passes_with_a_note(tmp_path: Path) -> None:
    class Broken(Box):
        def load_state_dict(self, value: Any) -> None:
            raise ZeroDivisionError

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": Box(1)}, blocking=True)
    with pytest.raises(ZeroDivisionError) as caught:
        ckpt.restore(tmp_path, {"a": Broken()})
    assert "partly overwritten" in caught.value.__notes__[0]


# Damage on the way or in the store (hostile metadata: test_hostile_files.py)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def grow(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(1 << 40)  # sparse: reading it whole would end the test


BEFORE_READING = [
    (name, damage)
    for name in ("MANIFEST", "r00000.part", "r00000.safetensors")
    for damage in (cut, flip, grow, Path.unlink)
    if (name, damage) != ("r00000.safetensors", flip)
]


@pytest.mark.parametrize(("name", "damage"), BEFORE_READING)
def test_damage_that_is_seen_before_reading(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    attempt = saved(tmp_path, 1, 2)
    damage(attempt / name)
    where = re.escape(str(attempt / name))
    says = (where, "Other steps are not affected", "`ckpt check", "fallback=True")
    refused(Corrupt, lambda s: ckpt.restore(tmp_path, s), *says)
    refused(Corrupt, lambda s: Checkpointer(tmp_path).restore(s), *says)
    _falls_back(tmp_path)


def _falls_back(path: Path) -> None:
    for restore in (
        lambda s: ckpt.restore(path, s, fallback=True),
        lambda s: Checkpointer(path).restore(s, fallback=True),
    ):
        state = build(1)
        assert restore(state) == 1
        assert state["n"] == 1
    assert Checkpointer(path).all_steps() == [1]  # the writer went back for good


def test_damage_in_the_data(tmp_path: Path) -> None:
    attempt = saved(tmp_path, 1, 2)
    data = attempt / "r00000.safetensors"
    raw = bytearray(data.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    raw[header] ^= 1  # the first byte of the first tensor
    data.write_bytes(raw)
    state = build(1)
    with pytest.raises(Corrupt) as caught:
        ckpt.restore(tmp_path, state)
    for part in (str(data), "tensor model/0.bias", "digest", "partly overwritten", "every stored step", "ckpt check"):
        assert part in str(caught.value)
    with pytest.raises(Corrupt, match=r"tensor model/0\.bias"):
        ckpt.load(tmp_path)
    assert ckpt.load(tmp_path, keys=["model/3.weight"])
    _falls_back(tmp_path)


def test_nothing_whole_to_fall_back_to(tmp_path: Path) -> None:
    attempt = saved(tmp_path, 1)
    cut(attempt / "MANIFEST")
    refused(Corrupt, lambda s: ckpt.restore(tmp_path, s, fallback=True), "MANIFEST")


@pytest.mark.parametrize("step", [True, -1, 1.0, "7", None, 2**63])
def test_a_step_that_is_no_count(tmp_path: Path, step: Any) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, build(0), blocking=True)
        refused(Incompatible, lambda s: checkpointer.save(step, s, blocking=True), "number of completed steps")
    assert ckpt.restore(tmp_path, build(1)) == 3


@pytest.mark.parametrize(
    "metrics", [{"a": "x"}, {"a": None}, {"a": [1.0]}, {"a": 10**400}, {3: 1.0}, {"a\n": 1.0}, {"x" * 40000: 1.0}]
)
def test_metrics_that_no_record_can_hold(tmp_path: Path, metrics: Any) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        refused(Incompatible, lambda s: checkpointer.save(1, s, metrics=metrics, blocking=True), "metrics")
        assert list((tmp_path / "steps").iterdir()) == []
        checkpointer.save(1, build(0), blocking=True)


@pytest.mark.parametrize("run_id", [5, "x" * 257, "\udc80"])
def test_a_run_id_that_is_no_name(tmp_path: Path, run_id: Any) -> None:
    with pytest.raises(Incompatible, match="run_id is a printable string"):
        Checkpointer(tmp_path, run_id=run_id)
