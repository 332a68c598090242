"""Checkpoints of other libraries into a run and out of it: written and loaded by those libraries, bit for bit."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from jobs import ROOT, Pool
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ckpt
from ckpt.check import check_step
from ckpt.cli import cli
from ckpt.errors import Corrupt
from ckpt.holder import Holder, find_commit
from ckpt.interop.moving import Format, Moved, export_step, import_step
from ckpt.restorer import StepReader
from ckpt.run import RunDirectory


def load_in(source: Path, run: Path, step: int = 7, **options: Any) -> Moved:
    opened = RunDirectory.open(run, create=True)
    commit, moved = import_step(source, Holder(opened, run_id=None, takeover=False), step, **options)
    assert check_step(opened, commit).ok
    return moved


def put_out(run: Path, target: Path, form: Format, only: str = "", **options: Any) -> Moved:
    opened = RunDirectory.open(run)
    return export_step(StepReader(opened, find_commit(opened.log.read(), None)), target, form, only, **options)


class Training:
    """A model with buffers and a frozen order of parameters, an optimizer with state, a schedule, a count."""

    def __init__(self, seed: int, steps: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200), nn.Linear(200, 300))
        self.optim = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.sched = torch.optim.lr_scheduler.StepLR(self.optim, 2)
        for _ in range(steps):
            self.model(torch.randn(8, 300)).square().sum().backward()
            self.optim.step()
            self.sched.step()

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optim": self.optim, "sched": self.sched, "n": 0}

    def plain(self) -> dict[str, Any]:
        optim = self.optim.state_dict()
        return {"model": self.model.state_dict(), "optim": optim, "sched": self.sched.state_dict(), "n": 3}

    def named(self) -> dict[str, Any]:
        model, optim = get_state_dict(self.model, self.optim)
        return {**self.plain(), "model": model, "optim": optim}

    def take(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optim, model_state_dict=state["model"], optim_state_dict=state["optim"])
        self.sched.load_state_dict(state["sched"])


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def write_torch(training: Training, path: Path) -> None:
    torch.save(training.plain(), path)


def write_dcp(training: Training, path: Path) -> None:
    dcp.save(training.named(), checkpoint_id=path)


def read_torch(path: Path) -> dict[str, Any]:
    assert zipfile.ZipFile(path).testzip() is None
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def read_dcp(path: Path) -> dict[str, Any]:
    state = Training(5, steps=1).named()
    dcp.load(state, checkpoint_id=path)
    return state


@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_a_training_goes_in_and_out_with_its_optimizer(tmp_path: Path, form: Format) -> None:
    write, read = {"torch": (write_torch, read_torch), "dcp": (write_dcp, read_dcp)}[form]
    training = Training(1, steps=3)
    write(training, tmp_path / "theirs")
    assert load_in(tmp_path / "theirs", tmp_path / "run", part_bytes=400_000).notes == ()

    restored = Training(2)
    state = restored.state()
    assert ckpt.restore(tmp_path / "run", state) == 7
    assert state["n"] == 3
    assert same(restored.plain(), training.plain())

    put_out(tmp_path / "run", tmp_path / "ours", form)
    loaded = read(tmp_path / "ours")
    taken = Training(3)
    taken.take(loaded)
    assert same(taken.plain(), training.plain())
    load_in(tmp_path / "ours", tmp_path / "again")
    assert ckpt.restore(tmp_path / "again", Training(4).state()) == 7


def test_what_transformers_saves_is_restored_and_what_we_export_it_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)  # its head is tied to its embedding
    model.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    load_in(tmp_path / "theirs", tmp_path / "run", prefix="model")

    torch.manual_seed(1)
    restored = transformers.GPT2LMHeadModel(config)
    ckpt.restore(tmp_path / "run", {"model": restored})
    assert same(dict(restored.state_dict()), dict(model.state_dict()))

    with ckpt.Checkpointer(tmp_path / "trained") as checkpointer:  # now with the tie recorded
        checkpointer.save(1, {"model": restored, "rng": ckpt.Rng()}, blocking=True)
    for name, limit in (("single", 10**9), ("sharded", 10_000)):
        moved = put_out(tmp_path / "trained", tmp_path / name, "hf", "model", shard_bytes=limit)
        config.save_pretrained(tmp_path / name)
        loaded, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert moved.notes == ()
    assert put_out(tmp_path / "trained", tmp_path / "whole.pt", "torch").notes[0].endswith("rng")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert all((tmp_path / "sharded" / file).exists() for file in index["weight_map"].values())


def test_tied_tensors_and_every_dtype_of_safetensors(tmp_path: Path) -> None:
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight
    save_model(tied, str(tmp_path / "tied.safetensors"))
    load_in(tmp_path / "tied.safetensors", tmp_path / "tied", prefix="model")
    assert same(ckpt.load(tmp_path / "tied")["model/b.weight"], tied["a"].weight.detach())
    kinds = [torch.bool, torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.uint16, torch.float32, torch.complex64]
    theirs = {str(kind): torch.arange(5).to(torch.float32).to(kind) for kind in kinds} | {"none": torch.empty(0, 2)}
    save_file(theirs, tmp_path / "theirs.safetensors")
    load_in(tmp_path / "theirs.safetensors", tmp_path / "run")
    put_out(tmp_path / "run", tmp_path / "ours.safetensors", "safetensors")
    found = load_file(tmp_path / "ours.safetensors")
    assert {k: v.view(torch.uint8).tolist() for k, v in found.items()} == {
        k: v.view(torch.uint8).tolist() for k, v in theirs.items()
    }


def save_sharded(rank: int, world: int, url: str) -> None:
    mesh = init_device_mesh("cpu", (world,))
    full = torch.arange(7 * 5, dtype=torch.float32).reshape(7, 5)
    state = {name: distribute_tensor(full, mesh, [Shard(dim)]) for dim, name in enumerate(("rows", "columns"))}
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(1, {"model": state}, blocking=True)
    dist.barrier()


def save_dcp_sharded(rank: int, world: int, path: str) -> None:
    mesh = init_device_mesh("cpu", (world,))
    full = torch.arange(7 * 5 * 3, dtype=torch.float32).reshape(7, 5, 3)
    dcp.save({f"t{d}": distribute_tensor(full, mesh, [Shard(d)]) for d in range(3)}, checkpoint_id=path)


def test_what_several_ranks_saved_comes_out_whole(tmp_path: Path, pool: Pool) -> None:
    pool.results(save_sharded, 3, str(tmp_path / "run"))
    put_out(tmp_path / "run", tmp_path / "out.safetensors", "safetensors", "model")
    full = torch.arange(7 * 5, dtype=torch.float32).reshape(7, 5)
    assert same(load_file(tmp_path / "out.safetensors"), {"rows": full, "columns": full})
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    pool.results(save_dcp_sharded, 3, str(tmp_path / "dcp"))
    load_in(tmp_path / "dcp", tmp_path / "again", prefix="x")
    full = torch.arange(7 * 5 * 3, dtype=torch.float32).reshape(7, 5, 3)
    assert same(ckpt.load(tmp_path / "again"), {f"x/t{d}": full for d in range(3)})


def test_wrapped_names_strided_tensors_and_old_files_come_in(tmp_path: Path) -> None:
    weights = torch.randn(40, 30)
    state = {"_orig_mod.a": weights.t(), "_orig_mod.b": weights[3:9, 5:], "_orig_mod.c": weights}
    torch.save({"model": state, "rng": [torch.ones(2), 5]}, tmp_path / "new.pt")
    torch.save({"model": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "_orig_mod." in load_in(tmp_path / "new.pt", tmp_path / "new").notes[0]
    load_in(tmp_path / "old.pt", tmp_path / "old", only="model", prefix="deep/model")
    for name, at in (("new", "model"), ("old", "deep/model")):
        found = ckpt.load(tmp_path / name)
        assert same([found[f"{at}/{key}"] for key in "abc"], [weights.t(), weights[3:9, 5:], weights])
    assert ckpt.load(tmp_path / "new")["rng/1"] == 5


@pytest.mark.parametrize("make", [lambda net: torch.optim.AdamW(net.parameters()), lambda net: grouped(net)])
def test_an_exported_optimizer_is_what_load_state_dict_takes(
    tmp_path: Path, make: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    """torch goes by the order in the file, whatever the names: "10.weight" sorts before "2.weight"."""
    net, other = (nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))) for _ in range(2))
    optim, loaded = make(net), make(other)
    net(torch.randn(5, 4)).square().sum().backward()
    optim.step()
    with ckpt.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"model": net, "optim": optim}, blocking=True)
    put_out(tmp_path / "run", tmp_path / "out.pt", "torch")
    state = read_torch(tmp_path / "out.pt")
    other.load_state_dict(state["model"])
    loaded.load_state_dict(state["optim"])
    assert same(loaded.state_dict(), optim.state_dict())


def grouped(net: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of two groups, as the Trainer makes them: what decays, and what does not."""
    parameters = dict(net.named_parameters())
    groups = [{"params": [p for n, p in parameters.items() if n.endswith(kind)]} for kind in ("weight", "bias")]
    return torch.optim.AdamW([{**groups[0], "weight_decay": 0.3}, groups[1]], lr=0.01)


def test_an_optimizer_is_stored_by_number_where_its_parameters_cannot_be_told(tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    optim = grouped(net)
    net(torch.randn(5, 4)).square().sum().backward()
    optim.step()
    torch.save({"model": net.state_dict(), "optim": optim.state_dict()}, tmp_path / "a.pt")
    moved = load_in(tmp_path / "a.pt", tmp_path / "a")
    assert "says nothing about their order in the model; it was stored by number" in moved.notes[0]
    other = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    restored = grouped(other)
    with pytest.raises(ckpt.Incompatible, match=r"optim/group_of/model/0.weight"):
        ckpt.restore(tmp_path / "a", {"model": other, "optim": restored})
    ckpt.restore(tmp_path / "a", {"optim": restored}, only=["optim"])
    assert same(restored.state_dict(), optim.state_dict())
    put_out(tmp_path / "a", tmp_path / "optim.pt", "torch", "optim")
    assert same(read_torch(tmp_path / "optim.pt"), optim.state_dict())
    load_in(tmp_path / "optim.pt", tmp_path / "alone")
    ckpt.restore(tmp_path / "alone", {"optim": grouped(other)})

    named = torch.optim.AdamW(net.named_parameters())  # which says it
    named.step()
    torch.save({"model": net.state_dict(), "optim": named.state_dict()}, tmp_path / "b.pt")
    assert not load_in(tmp_path / "b.pt", tmp_path / "b").notes
    shuffled = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optim = torch.optim.AdamW(reversed(list(shuffled.parameters())))
    shuffled(torch.ones(1, 4)).sum().backward()
    optim.step()
    torch.save({"model": shuffled.state_dict(), "optim": optim.state_dict()}, tmp_path / "c.pt")
    assert "of these shapes" in load_in(tmp_path / "c.pt", tmp_path / "c").notes[0]


# Hostile input


class Bomb:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.marker}",)


def _dcp_with(folder: Path, data: bytes) -> Path:
    folder.mkdir()
    dcp.save({"a": torch.ones(3)}, checkpoint_id=folder)
    (folder / ".metadata").write_bytes(data)
    return folder


def _nested(depth: int) -> bytes:
    """A tuple of twos of twos: small as a pickle, without end as text or as a key."""
    return b"\x80\x04]" + b"}(" + b"K\x01" + b"2\x86" * depth + b"K\x01u."


def _hostile(tmp_path: Path, marker: Path) -> dict[str, Path]:
    metadata = {
        "bomb": pickle.dumps(Bomb(str(marker))),
        "bomb_in_a_real_one": pickle.dumps({"state_dict_metadata": Bomb(str(marker))}, protocol=2),
        "memo": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "allocation": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
        "nested_key": _nested(200),
        "class_written_to": b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n"
        b"N}X\x04\x00\x00\x00kindK\x01s\x86b.",
        "cut": b"\x80\x04}",
    }
    found = {f"metadata_{name}": _dcp_with(tmp_path / f"m_{name}", data) for name, data in metadata.items()}
    torch.save({"a": torch.ones(2), "b": Bomb(str(marker))}, tmp_path / "bomb.pt")
    torch.save({"a": torch.ones(2), "b": Bomb(str(marker))}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb(str(marker))))
    torch.save({"a": torch.ones(1000)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as old, zipfile.ZipFile(tmp_path / "small.pt", "w", 8) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    (tmp_path / "torn.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:3000])
    found |= {name: tmp_path / f"{name}.pt" for name in ("bomb", "old", "small", "torn")}
    found["raw"] = tmp_path / "plain.pkl"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers: dict[str, Any] = {
        "far": {"a": {**entry, "data_offsets": [0, 1 << 50]}},
        "overlap": {"a": entry, "b": {**entry, "data_offsets": [4, 12]}},
        "shape": {"a": {**entry, "shape": [3]}},
        "huge": {"a": {**entry, "shape": [1 << 61, 1 << 61]}},
        "negative": {"a": {**entry, "shape": [-2]}},
        "hole": {"a": {**entry, "data_offsets": [4, 12]}},
        "extra": {"a": {**entry, "file": "/etc/passwd"}},
    }
    for name, table in headers.items():
        text, nbytes = json.dumps(table).encode(), 8 if name == "shape" else 12
        found[f"header_{name}"] = tmp_path / f"{name}.safetensors"
        found[f"header_{name}"].write_bytes(len(text).to_bytes(8, "little") + text + bytes(nbytes))
    found["header_length"] = tmp_path / "length.safetensors"
    found["header_length"].write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    (tmp_path / "outside").mkdir()
    index = {"weight_map": {"a": "../good.safetensors"}}
    (tmp_path / "outside" / "model.safetensors.index.json").write_text(json.dumps(index))
    return found | {"index": tmp_path / "outside"}


_watched: list[str] = []


def _watch(event: str, arguments: object) -> None:
    if _watched and event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "ctypes.dlopen"):
        _watched.append(f"{event} {arguments}")


sys.addaudithook(_watch)


def test_hostile_files_are_refused_and_nothing_of_them_runs(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    hostile = _hostile(tmp_path, marker)
    _watched[:] = ["on"]
    try:
        for name, path in hostile.items():
            with pytest.raises((ckpt.Corrupt, ckpt.Incompatible)) as caught:
                load_in(path, tmp_path / "run")
            assert str(path) in str(caught.value) or path.name in str(caught.value), (name, caught.value)
            assert len(str(caught.value)) < 1500, name
        assert _watched == ["on"]
    finally:
        _watched.clear()
    assert not marker.exists()
    assert RunDirectory.open(tmp_path / "run").log.read().commits == {}
    assert "--trust-pickle" in _refusal(hostile["bomb"], tmp_path / "run")


def _refusal(path: Path, run: Path) -> str:
    with pytest.raises(ckpt.CkptError) as caught:
        load_in(path, run)
    return str(caught.value)


class Caller(nn.Linear):
    """A model pickled whole, which calls home as it is unpickled."""

    port = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        try:
            socket.create_connection(("127.0.0.1", state["port"]), timeout=5).close()
        except OSError:
            Path(state["told"]).write_text("no network")


def _may_leave_network() -> bool:
    code = "import sys; from ckpt.interop.trusted import leave_network; sys.exit(not leave_network())"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_a_trusted_pickle_is_read_in_a_process_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        model = Caller(4, 3)
        model.port, model.told = server.getsockname()[1], str(tmp_path / "told")  # type: ignore[assignment]
        torch.save({"net": model, "args": object(), "epoch": 4}, tmp_path / "whole.pt")
        assert "--trust-pickle" in _refusal(tmp_path / "whole.pt", tmp_path / "run")
        moved = load_in(tmp_path / "whole.pt", tmp_path / "run", trust_pickle=True)
    found = ckpt.load(tmp_path / "run")
    assert same(found["net/weight"], model.weight.detach())
    assert found["epoch"] == 4
    assert any("/args (object): left out" in note for note in moved.notes)
    if _may_leave_network():
        assert (tmp_path / "told").exists()
    else:
        assert any("network" in note for note in moved.notes)


# The commands


def _ckpt(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments))


def test_the_commands_refuse_what_would_overwrite_or_race(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    source, url, out = str(tmp_path / "a.safetensors"), str(tmp_path / "run"), tmp_path / "out.safetensors"
    done = _ckpt("import", source, url, "--step", "5", "--prefix", "model", "--json")
    assert json.loads(done.stdout)["tensors"] == 1
    export = ("export", f"{url}@5", str(out), "--format", "safetensors", "--only", "model")
    assert _ckpt(*export).exit_code == 0
    assert load_file(out)["w"].tolist() == [1, 1, 1]
    before = out.read_bytes()
    assert "nothing is overwritten" in str(_ckpt(*export).exception)
    assert out.read_bytes() == before
    assert isinstance(
        _ckpt("export", url, str(tmp_path / "x"), "--format", "hf", "--only", "no").exception, ckpt.NotFound
    )
    assert not (tmp_path / "x").exists()
    assert "steps only grow" in str(_ckpt("import", source, url, "--step", "5", "--takeover").exception)
    with ckpt.Checkpointer(url, takeover=True) as checkpointer:
        checkpointer.save(6, {"n": 1}, blocking=True)
        holder = RunDirectory.open(url).log.read().holder
        assert holder is not None
        assert isinstance(_ckpt("import", source, url, "--step", "9").exception, ckpt.Fenced)
    assert sorted(p.name for p in tmp_path.iterdir() if ".tmp-" in p.name) == []


def test_the_name_of_a_file_tells_its_format(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"w": torch.arange(3.0)}, blocking=True)
    for name, read in (("w.safetensors", load_file), ("w.pt", read_torch)):
        CliRunner().invoke(cli, ["export", str(tmp_path / "run"), str(tmp_path / name)], catch_exceptions=False)
        assert read(tmp_path / name)["w"].tolist() == [0, 1, 2]
    refused = CliRunner().invoke(cli, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert (refused.exit_code, "--format hf or dcp" in refused.output) == (2, True)


def test_a_failed_export_or_import_leaves_nothing(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(500_000)}, tmp_path / "a.pt")
    load_in(tmp_path / "a.pt", tmp_path / "run")
    (data,) = (tmp_path / "run" / "steps").glob("*/*.safetensors")
    damaged = bytearray(data.read_bytes())
    damaged[1_500_000] ^= 1
    data.write_bytes(damaged)
    for form in ("safetensors", "hf", "dcp", "torch"):
        with pytest.raises(Exception, match="digest"):
            put_out(tmp_path / "run", tmp_path / "out", form)  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "run"}
    save_file({"w": torch.ones(500_000)}, tmp_path / "b.safetensors")
    os.truncate(tmp_path / "b.safetensors", 1_000_000)
    with pytest.raises(ckpt.Corrupt):
        load_in(tmp_path / "b.safetensors", tmp_path / "run", 8)
    assert len(list((tmp_path / "run" / "steps").iterdir())) == 1


MEASURE = """
import shutil
import sys
from pathlib import Path
import torch
from test_interop import load_in, put_out
from test_memory import _grown_by
forms, folder = sys.argv[1].split(","), Path(sys.argv[2])
load_in(folder / "small.pt", folder / "warm")
for form in forms:
    put_out(folder / "warm", folder / f"warm-{form}", form)
print("import", _grown_by(lambda: load_in(folder / "big.pt", folder / "run")))
(folder / "big.pt").unlink()
for form in forms:
    print(form, _grown_by(lambda: put_out(folder / "run", folder / form, form)))
    print("from", form, _grown_by(lambda: load_in(folder / form, folder / "back")))
    shutil.rmtree(folder / "back")
    shutil.rmtree(folder / form) if (folder / form).is_dir() else (folder / form).unlink()
"""


def _memory(tmp_path: Path, forms: str, gibibytes: float) -> None:
    """One tensor has half of the bytes, so that nothing may hold a tensor as a whole."""
    half = int(gibibytes * (1 << 30)) // 8
    torch.save({"w": torch.ones(100)}, tmp_path / "small.pt")
    torch.save({"w": torch.ones(half), **{f"w{i}": torch.ones(half // 8) for i in range(8)}}, tmp_path / "big.pt")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    command = [sys.executable, "-c", MEASURE, forms, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    grown = {line.rpartition(" ")[0]: int(line.rpartition(" ")[2]) for line in done.stdout.splitlines()}
    assert len(grown) == 1 + 2 * len(forms.split(","))
    assert max(grown.values()) < 300 << 20, grown


def test_half_a_gibibyte_takes_little_memory(tmp_path: Path) -> None:
    _memory(tmp_path, "dcp", 0.5)


@pytest.mark.prove
def test_two_gibibytes_take_little_memory_in_every_format(tmp_path: Path) -> None:
    _memory(tmp_path, "safetensors,hf,dcp,torch", 2)


# Of frameworks


def test_weights_in_both_formats_are_weights_and_not_a_training(tmp_path: Path) -> None:
    """As hubs offer them; beside an optimizer they are a training's, and safetensors counts."""
    save_file({"w": torch.arange(3.0)}, tmp_path / "model.safetensors")
    torch.save({"w": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    load_in(tmp_path, tmp_path / "run", prefix="model")
    assert ckpt.load(tmp_path / "run")["model/w"].tolist() == [0, 1, 2]
    torch.save(torch.optim.SGD([nn.Parameter(torch.zeros(3))]).state_dict(), tmp_path / "optimizer.bin")
    load_in(tmp_path, tmp_path / "training")
    assert ckpt.load(tmp_path / "training")["model/w"].tolist() == [0, 1, 2]


def test_weights_in_several_pickled_files_come_in(tmp_path: Path) -> None:
    from accelerate import Accelerator

    torch.manual_seed(1)
    net = nn.Sequential(*(nn.Linear(40, 40) for _ in range(11)))
    Accelerator(cpu=True).save_model(net, str(tmp_path), max_shard_size="20KB", safe_serialization=False)
    index = tmp_path / "pytorch_model.bin.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 2
    load_in(tmp_path, tmp_path / "run")
    loaded = ckpt.load(tmp_path / "run")
    assert all(torch.equal(loaded[f"model/{key}"], value) for key, value in net.state_dict().items())

    optim = torch.optim.AdamW(net.parameters())
    a_step(net, optim, inputs=torch.randn(3, 40))
    torch.save(optim.state_dict(), tmp_path / "optimizer.pt")  # by position in the model, which shards do not keep
    assert any("stored by number" in note for note in load_in(tmp_path, tmp_path / "training").notes)

    torch.save({"0.weight": 5}, tmp_path / "pytorch_model-00001-of-00099.bin")
    index.write_text(json.dumps({"weight_map": {"0.weight": "pytorch_model-00001-of-00099.bin"}}))
    with pytest.raises(Corrupt, match="no dict of tensors"):
        load_in(tmp_path, tmp_path / "refused")
    index.write_text(json.dumps({"weight_map": {"w": "../elsewhere.bin"}}))
    with pytest.raises(Corrupt, match="not the name of a shard"):
        load_in(tmp_path, tmp_path / "refused")
    index.write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    with pytest.raises(Corrupt, match="not the name of a shard"):
        load_in(tmp_path, tmp_path / "refused")


def a_step(net: nn.Module, *objects: Any, inputs: torch.Tensor) -> None:
    net(inputs).square().sum().backward()
    for each in objects:
        each.step()


@pytest.mark.parametrize("safe", [True, False])
def test_what_accelerate_saves_is_restored_and_what_we_export_it_loads(tmp_path: Path, safe: bool) -> None:
    from accelerate import Accelerator

    def prepared(seed: int) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(11)))
        optim = torch.optim.AdamW(net.parameters(), lr=0.01)
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(net, optim, torch.optim.lr_scheduler.StepLR(optim, 2))

    accelerator, net, optim, sched = prepared(1)
    for _ in range(3):
        a_step(net, optim, sched, inputs=torch.randn(5, 4))
    accelerator.save_state(str(tmp_path / "theirs"), safe_serialization=safe)
    notes = load_in(tmp_path / "theirs", tmp_path / "run").notes
    assert notes[0].endswith("a program's: random_states_0.pkl")
    assert any("stored by number" in note for note in notes) is safe  # safetensors does not keep the order

    _, *restored = prepared(2)
    whole = dict(zip(("model", "optimizer", "scheduler"), restored, strict=True))
    by_name, by_number = (["model", "scheduler"], ["optimizer"]) if safe else (list(whole), [])
    for names in filter(None, (by_name, by_number)):
        ckpt.restore(tmp_path / "run", {name: whole[name] for name in names}, only=names)
    for one, two in zip((net, optim, sched), restored, strict=True):
        assert same(one.state_dict(), two.state_dict())

    put_out(tmp_path / "run", tmp_path / "ours", "hf", "model")
    put_out(tmp_path / "run", tmp_path / "ours" / "optimizer.bin", "torch", "optimizer")
    put_out(tmp_path / "run", tmp_path / "sched.pt", "torch", "scheduler")
    torch.save(read_torch(tmp_path / "sched.pt")["scheduler"], tmp_path / "ours" / "scheduler.bin")
    other, *loaded = prepared(3)
    other.load_state(str(tmp_path / "ours"))
    for one, two in zip((net, optim, sched), loaded, strict=True):
        assert same(one.state_dict(), two.state_dict())


def test_what_the_trainer_saves_is_restored_and_what_we_export_it_loads(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    data = [{name: torch.randint(0, 50, (8,)) for name in ("input_ids", "labels")} for _ in range(8)]

    def trainer(folder: str, steps: int) -> Any:
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=steps, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        return transformers.Trainer(transformers.GPT2LMHeadModel(config), arguments, train_dataset=data)

    first = trainer("first", 2)
    first.train()
    theirs = tmp_path / "first" / "checkpoint-2"
    notes = load_in(theirs, tmp_path / "run").notes
    assert "rng_state.pth, training_args.bin" in notes[0]
    assert "2 groups name parameters by number" in notes[1]
    second = trainer("second", 2)
    second.create_optimizer_and_scheduler(2)
    ckpt.restore(tmp_path / "run", {"model": second.model}, only=["model"])
    ckpt.restore(tmp_path / "run", {"optimizer": second.optimizer}, only=["optimizer"])
    assert same(second.model.state_dict(), first.model.state_dict())
    assert same(second.optimizer.state_dict(), first.optimizer.state_dict())
    assert ckpt.load(tmp_path / "run", keys=["trainer_state"])["trainer_state"]["global_step"] == 2

    ours = tmp_path / "ours" / "checkpoint-2"
    ours.parent.mkdir()
    put_out(tmp_path / "run", ours, "hf", "model")
    put_out(tmp_path / "run", ours / "optimizer.pt", "torch", "optimizer")
    for name in ("config.json", "trainer_state.json", "training_args.bin", "rng_state.pth", "scheduler.pt"):
        (ours / name).write_bytes((theirs / name).read_bytes())
    losses = []
    for start in (theirs, ours):
        third = trainer("third", 4)
        third.train(resume_from_checkpoint=str(start))
        losses.append([p.detach().clone() for p in third.model.parameters()])
    assert same(*losses)


def test_what_lightning_saves_is_restored_and_what_we_export_it_loads(tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(11)))

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.net(batch).square().sum()

        def configure_optimizers(self) -> Any:
            optim = torch.optim.AdamW(self.parameters(), lr=0.01)
            return [optim], [torch.optim.lr_scheduler.StepLR(optim, 1)]

    def fitted(steps: int, start: Path | None = None) -> tuple[Any, Any]:
        torch.manual_seed(1)
        module = Module()
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(24, 4), 2), ckpt_path=start)
        return trainer, module

    trainer, module = fitted(3)
    trainer.save_checkpoint(tmp_path / "theirs.ckpt")
    assert load_in(tmp_path / "theirs.ckpt", tmp_path / "run").notes == ()
    restored = Module()
    (optim,), _ = restored.configure_optimizers()
    keys = ["state_dict", "optimizer_states"]
    ckpt.restore(tmp_path / "run", {"state_dict": restored, "optimizer_states": [optim]}, only=keys)
    assert same(restored.state_dict(), module.state_dict())
    assert same(optim.state_dict(), trainer.optimizers[0].state_dict())

    put_out(tmp_path / "run", tmp_path / "ours.ckpt", "torch")
    ends = [fitted(6, start)[1].state_dict() for start in (tmp_path / "theirs.ckpt", tmp_path / "ours.ckpt")]
    assert same(*ends)
    assert not same(ends[0], fitted(6)[1].state_dict())
