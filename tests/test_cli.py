"""The command `ckpt` as a person runs it: a real run, a real subprocess, real damage."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from jobs import Pool
from torch import nn

import ckpt.cli
from ckpt.check import FINDINGS_LIMIT, check_step
from ckpt.console import age, plain, ranges, short, size
from ckpt.holder import find_commit
from ckpt.log import decide_retire
from ckpt.manifest import BLOCK_BYTES, Part, decode_part
from ckpt.records import decode_record, encode_record
from ckpt.run import RunDirectory

ROOT = Path(__file__).parent.parent
STEP_FIELDS = {"step", "generation", "attempt", "parent", "unix_s", "nbytes", "world"}
STEP_FIELDS |= {"content_digest", "sources", "metrics", "pins"}
Damage = Callable[[Path], object]
Main = Callable[..., tuple[int, str, str]]


class Tied(nn.Module):
    """Small, but with one tensor of several digest blocks and two names for it."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(300, 512)
        self.head = nn.Linear(512, 300, bias=False)
        self.head.weight = self.emb.weight
        self.norm = nn.LayerNorm(512)


def _train(state: dict[str, Any]) -> None:
    model, optim = state["model"], state["optim"]
    optim.zero_grad()
    model.head(model.norm(model.emb(torch.arange(8)))).square().mean().backward()
    optim.step()
    state["sched"].step()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lineage 10, 20, 25, 40; step 30 left behind by going back to 20; an attempt at 50 that never committed."""
    path = tmp_path_factory.mktemp("cli") / "run"
    model = Tied()
    optim = torch.optim.AdamW(model.parameters())
    sched = torch.optim.lr_scheduler.StepLR(optim, 10)
    state = {"model": model, "optim": optim, "sched": sched, "rng": ckpt.Rng(), "note": {"a": (1, 2)}}
    with ckpt.Checkpointer(path) as checkpointer:
        for step in (10, 20, 30):
            _train(state)
            checkpointer.save(step, state, metrics={"val_loss": 1 / step}, blocking=True)
        checkpointer.restore(state, step=20)
        for step in (25, 40):
            _train(state)
            checkpointer.save(step, state, metrics={"val_loss": float("nan")} if step == 40 else {}, blocking=True)
    abandoned = path / "steps" / "000000050.abandoned"
    abandoned.mkdir()
    (abandoned / "r00000.part").write_bytes(b"half of it")
    return path


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def _ckpt(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "CKPT_URL"}
    return subprocess.run(
        [sys.executable, "-m", "ckpt.cli", *map(str, args)],
        env={**env, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _json(main: Main, *args: str | Path, code: int = 0) -> dict[str, Any]:
    got, out, error = main(*args, "--json")
    assert got == code, error
    found: dict[str, Any] = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return found


def _attempt(run: Path, step: int) -> Path:
    (found,) = (run / "steps").glob(f"{step:09d}.*")
    return found


def _data(run: Path, step: int = 40) -> Path:
    return _attempt(run, step) / "r00000.safetensors"


def _part(run: Path, step: int = 40) -> Part:
    return decode_part((_attempt(run, step) / "r00000.part").read_bytes(), "part")


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """`ckpt` within this process, which saves importing torch: (exit code, stdout, stderr)."""

    def call(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ckpt", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            ckpt.cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return call


# What it shows


def test_ls_lists_the_lineage_and_apart_from_it_what_lies_outside(saved: Path) -> None:
    done = _ckpt("ls", saved)
    lineage, outside = done.stdout.split("\nOutside of the lineage, not restored:\n")
    assert [line.split()[0] for line in lineage.splitlines()] == ["step", "10", "20", "25", "40"]
    assert [line.split()[-2:] for line in lineage.splitlines() if " head" in line] == [["head", "val_loss=nan"]]
    left, abandoned = outside.splitlines()[1:]
    assert left.split()[0] == "30"
    assert left.endswith("  left by going back")
    assert re.match(r" +50 .* 10 B +000000050.abandoned +no commit record$", abandoned)


def test_ls_json_has_the_documented_fields(saved: Path, main: Main) -> None:
    found = _json(main, "ls", saved)
    assert found.keys() == {"url", "generation", "head", "deleted", "steps", "outside", "uncommitted"}
    assert (found["url"], found["generation"], found["head"], found["deleted"]) == (str(saved), 2, 40, 0)
    assert [step["step"] for step in found["steps"]] == [10, 20, 25, 40]
    assert [step["parent"] for step in found["steps"][1:]] == [step["attempt"] for step in found["steps"][:-1]]
    assert [step["step"] for step in found["outside"]] == [30]
    assert all(step.keys() == STEP_FIELDS for step in found["steps"] + found["outside"])
    assert found["steps"][1]["metrics"] == {"val_loss": 0.05}
    assert found["steps"][3]["metrics"] == {"val_loss": "nan"}
    files = [path.stat().st_size for path in _attempt(saved, 40).iterdir()]
    assert found["steps"][3]["nbytes"] == sum(files)
    (abandoned,) = found["uncommitted"]
    assert abandoned.keys() == {"attempt", "step", "nbytes", "unix_s"}
    assert (abandoned["attempt"], abandoned["step"], abandoned["nbytes"]) == ("000000050.abandoned", 50, 10)


def test_show_lists_tensors_ties_and_values(saved: Path) -> None:
    done = _ckpt("show", saved)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"step 40 of {saved} (head)\n")
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    assert rows["model/emb.weight"] == ["float32", "300x512", "whole", "1", "0"]
    assert rows["optim/state/model/norm.bias/step"] == ["float32", "scalar", "whole", "1", "0"]
    assert rows["model/head.weight"] == ["model/emb.weight"]
    assert rows["note"] == ["{'a':", "(1,", "2)}"]
    assert rows["rng"] == ["0"]


def test_show_json_has_the_documented_fields(saved: Path, main: Main) -> None:
    found = _json(main, "show", saved, "--step", "20")
    assert found.keys() == {*STEP_FIELDS, "url", "head", "tensors", "tied", "values", "rank_values"}
    assert (found["step"], found["head"]) == (20, False)
    tensors = {tensor["key"]: tensor for tensor in found["tensors"]}
    where = {"sharding": "whole", "shards": 1, "ranks": [0]}
    what = {"key": "model/emb.weight", "dtype": "float32", "shape": [300, 512], "nbytes": 300 * 512 * 4}
    assert tensors["model/emb.weight"] == {**what, **where}
    assert found["tied"] == {"model/head.weight": "model/emb.weight"}
    assert found["rank_values"] == {"rng": [0]}
    assert found["values"]["optim/group_of/model/norm.bias"] == "0"
    assert "'step_size': 10" in found["values"]["sched"]
    assert sorted((*tensors, *found["tied"], *found["values"])) == sorted(ckpt.load(saved, step=20))


def _save_sharded(rank: int, world: int, path: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2))
    split: DTensor = distribute_tensor(torch.arange(48.0).view(6, 8), mesh, [Shard(0), Replicate()])
    own = ckpt.Shard(torch.full((2, 3), float(rank)), (8, 3), (2 * rank, 0))
    large = nn.Parameter(torch.arange(4 << 18).float())
    state = {"split": split, "own": own, "large": large, "each": ckpt.PerRank(rank), "history": [torch.ones(2000)]}
    with ckpt.Checkpointer(path) as checkpointer:
        checkpointer.save(1, state, blocking=True)


@pytest.fixture(scope="module")
def sharded(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "sharded"
    pool.results(_save_sharded, 4, str(path))
    return path


def test_show_says_how_tensors_are_sharded_and_who_wrote_them(sharded: Path, main: Main) -> None:
    found = _json(main, "show", sharded)
    tensors = {tensor["key"]: tensor for tensor in found["tensors"]}
    about = {key: (tensor["sharding"], tensor["shards"]) for key, tensor in tensors.items()}
    assert about["split"] == ("mesh 2x2: S0, R", 2)
    assert about["own"] == ("declared", 4)
    assert about["large"] == ("whole", 4)
    assert tensors["large"]["ranks"] == [0, 1, 2, 3]
    assert found["rank_values"] == {"each": [0, 1, 2, 3]}
    text = main("show", sharded)[1]
    assert re.search(r"^large +float32 +1048576 +whole +4 +0-3$", text, re.MULTILINE)
    assert re.search(r"^each +0-3$", text, re.MULTILINE)


def test_check_of_a_sharded_step_names_the_one_damaged_writer(sharded: Path, tmp_path: Path, main: Main) -> None:
    run = tmp_path / "run"
    shutil.copytree(sharded, run)
    assert main("check", run)[0] == 0
    (_attempt(run, 1) / "r00002.part").unlink()
    found = _json(main, "check", run, code=12)["steps"][0]["findings"]
    assert {Path(finding["file"]).name for finding in found} == {"r00002.part"}
    assert found[0]["problem"] == "is missing"
    assert "not whole: large, own" in found[1]["problem"]


def _at_a_terminal(*args: str | Path) -> str:
    """What `ckpt` prints to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ckpt.cli", *map(str, args)]
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        text = b"".join(iter(lambda: _read(ours), b""))
        assert process.wait(60) == 0, text.decode()
    os.close(ours)
    return text.decode()


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:  # EIO: the other side is closed
        return b""


@pytest.mark.parametrize("command", ["ls", "show"])
def test_a_terminal_of_80_columns_shows_all_of_it(saved: Path, command: str) -> None:
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", _at_a_terminal(command, saved)).splitlines()
    assert [line for line in lines if len(line) > 80 and str(saved) not in line] == []
    assert "…" not in "".join(lines)


def test_check_shows_its_progress_at_a_terminal(saved: Path) -> None:
    shown = _at_a_terminal("check", saved)
    assert "checking step 40" in shown
    assert "step 40: ok" in shown


def test_a_pipe_gets_plain_text_of_any_length(tmp_path: Path) -> None:
    key = "very/long/" + "k" * 300
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"very": {"long": {"k" * 300: torch.ones(2)}}}, blocking=True)
    done = _ckpt("show", tmp_path, COLUMNS="80", FORCE_COLOR="1")
    assert re.search(rf"^{key} +float32 +2 +whole +1 +0$", done.stdout, re.MULTILINE)
    assert "\x1b" not in done.stdout


# What it finds


def test_check_of_an_intact_run_exits_0(saved: Path, main: Main) -> None:
    assert main("check", saved)[1].startswith("step 40: ok, ")
    found = _json(main, "check", saved, "--all")
    assert found.keys() == {"url", "ok", "log", "steps"}
    assert (found["ok"], found["log"]) == (True, [])
    fields = {"step", "attempt", "nbytes", "world", "ok", "complete", "findings"}
    assert all(step.keys() == fields for step in found["steps"])
    assert [(step["step"], step["ok"]) for step in found["steps"]] == [(10, True), (20, True), (25, True), (40, True)]


def _flip_a_byte_of_the_embedding(run: Path) -> None:
    chunk = next(chunk for chunk in _part(run).chunks if chunk.key == "model/emb.weight")
    _flip(_data(run), chunk.at + BLOCK_BYTES + 5)


def _flip_a_byte_of_the_header(run: Path) -> None:
    _flip(_data(run), _data(run).read_bytes().index(b'"model/emb.weight') + 3)


def _exchange_two_header_entries(run: Path) -> None:
    """A header that safetensors accepts and that gives two tensors each other's bytes."""
    one, other = (f'"optim/state/model/emb.weight/{name}@0,0"'.encode() for name in ("exp_avg", "exp_avg_sq"))
    data = _data(run).read_bytes()
    _data(run).write_bytes(data.replace(one, b'"#"').replace(other, one).replace(b'"#"', other))


def _flip_a_byte_of_the_padding(run: Path) -> None:
    _flip(_data(run), _data(run).stat().st_size - 1)


def _cut_off_data(run: Path) -> None:
    os.truncate(_data(run), _data(run).stat().st_size // 2)


def _append_to_data(run: Path) -> None:
    with _data(run).open("ab") as file:
        file.write(bytes(4096))


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere")).with_name(path.name).symlink_to("elsewhere")


def _replace_by_another_steps(name: str) -> Damage:
    return lambda run: shutil.copy(_attempt(run, 25) / name, _attempt(run, 40) / name)


DATA, PART, MANIFEST = "r00000.safetensors", "r00000.part", "MANIFEST"
DAMAGES: list[tuple[Damage, str, str | None, str]] = [
    (_flip_a_byte_of_the_embedding, DATA, "model/emb.weight", "1 of 3 blocks do not match their digest"),
    (_flip_a_byte_of_the_header, DATA, "model/emb.weight", "header entry is missing"),
    (_exchange_two_header_entries, DATA, "optim/state/model/emb.weight/exp_avg", "header entry is"),
    (_flip_a_byte_of_the_padding, DATA, None, "padding"),
    (lambda run: _flip(_data(run), 3), DATA, None, "header claims"),
    (_cut_off_data, DATA, "optim/state/model/norm.bias/exp_avg", "past the end"),
    (_cut_off_data, DATA, None, "is cut off"),
    (_append_to_data, DATA, None, "is too long"),
    (lambda run: _data(run).unlink(), DATA, None, "is missing; it held model/emb.weight"),
    (lambda run: _link(_data(run)), DATA, None, "is a symbolic link"),
    (_replace_by_another_steps(DATA), DATA, "model/norm.bias", "do not match"),
    (lambda run: (_attempt(run, 40) / PART).unlink(), PART, None, "is missing"),
    (lambda run: _flip(_attempt(run, 40) / PART, 200), PART, None, "do not match the digest in the MANIFEST"),
    (lambda run: os.truncate(_attempt(run, 40) / PART, 200), PART, None, "has 200 bytes"),
    (_replace_by_another_steps(PART), PART, None, "MANIFEST"),
    (lambda run: _link(_attempt(run, 40) / PART), PART, None, "symbolic link"),
    (lambda run: _flip(_attempt(run, 40) / MANIFEST, 99), MANIFEST, None, "do not match the digest in the commit"),
    (lambda run: (_attempt(run, 40) / MANIFEST).unlink(), MANIFEST, None, "is missing"),
    (_replace_by_another_steps(MANIFEST), MANIFEST, None, "commit record"),
    (lambda run: shutil.rmtree(_attempt(run, 40)), MANIFEST, None, "is missing"),
]


@pytest.mark.parametrize(("damage", "file", "tensor", "problem"), DAMAGES)
def test_check_names_file_and_tensor_of_damage_and_exits_12(
    run: Path, main: Main, damage: Damage, file: str, tensor: str | None, problem: str
) -> None:
    attempt = _attempt(run, 40).name
    damage(run)
    code, out, error = main("check", run, "--all", "--json")
    intact = "Intact: 10, 20, 25; restore(state, step=25) goes back there."
    assert (code, error) == (12, f"Corrupt: {run}: step 40 is damaged. {intact}\n")
    found = json.loads(out)
    assert [step["ok"] for step in found["steps"]] == [True, True, True, False]
    findings = found["steps"][-1]["findings"]
    assert all(finding.keys() == {"file", "tensor", "problem"} for finding in findings)
    named = [f for f in findings if (f["file"], f["tensor"]) == (f"steps/{attempt}/{file}", tensor)]
    assert [f for f in named if problem in f["problem"]], findings


def test_damage_is_one_readable_line_and_says_what_to_run_next(run: Path, main: Main) -> None:
    _flip_a_byte_of_the_embedding(run)
    done = _ckpt("check", run)
    assert done.returncode == 12
    first, second = done.stdout.splitlines()
    assert first == "step 40: DAMAGED"
    where = f"  steps/{_attempt(run, 40).name}/{DATA}: model/emb.weight: chunk at [0, 0], shape [300, 512]: "
    assert second.startswith(where)
    assert done.stderr.startswith(f"Corrupt: {run}: step 40 is damaged. ")
    assert f"`ckpt check {run} --all`" in done.stderr
    (_attempt(run, 40) / MANIFEST).unlink()
    code, out, error = main("show", run)
    assert (code, out, f"{MANIFEST}: this file" in error, f"`ckpt check {run} --all`" in error) == (12, "", True, True)


def test_a_damaged_record_exits_12_and_names_it(run: Path, main: Main) -> None:
    _flip(run / "log" / "0000000002.json", 200)
    for command in ("ls", "show", "check"):
        code, out, error = main(command, run)
        assert (code, out, "log/0000000002.json" in error) == (12, "", True)


def test_a_record_changed_into_one_without_effect_is_found(run: Path, main: Main) -> None:
    """The head is then an older step: nothing but this says that a commit was lost."""
    record = run / "log" / "0000000006.json"
    found = decode_record(record.read_bytes())
    assert isinstance(found, ckpt.Commit)
    record.write_bytes(encode_record(msgspec.structs.replace(found, parent=_attempt(run, 20).name)))
    code, out, error = main("check", run, "--json")
    assert code == 12
    assert [finding["file"] for finding in json.loads(out)["log"]] == ["log/0000000006.json"]
    assert "1 record of the log without effect" in error
    code, out, error = main("ls", run)
    assert (code, "25" in out, "warning: 1 record" in error) == (0, True, True)


@pytest.mark.parametrize(("content", "expected"), [(None, 12), ("{}", 13), ("{", 12), ('"major":2', 13)])
def test_a_lost_or_foreign_format_file_is_no_missing_checkpoint(
    run: Path, main: Main, content: str | None, expected: int
) -> None:
    path = run / "FORMAT.json"
    text = path.read_text()
    path.unlink()
    if content is not None:
        path.write_text(text.replace('"major":1', content) if "major" in content else content)
    code, out, error = main("ls", run)
    assert (code, out, "FORMAT.json" in error) == (expected, "", True)


def test_no_such_step_exits_10_and_says_which_there_are(saved: Path) -> None:
    done = _ckpt("show", "--step", "31", CKPT_URL=str(saved))
    assert (done.returncode, done.stdout) == (10, "")
    assert done.stderr.startswith(f"NotFound: {saved}: there is no step 31 in this run; newest steps: 10, 20, 25, 40.")


def test_a_step_left_behind_is_named_with_the_way_back_to_it(saved: Path) -> None:
    left = [str(commit.step) for commit in RunDirectory.open(saved).log.read().standing_outside()]
    assert left
    done = _ckpt("show", "--step", left[0], CKPT_URL=str(saved))
    assert done.returncode == 10
    assert f"`ckpt resume --step {left[0]} URL -- COMMAND` goes on from it" in done.stderr


def test_a_number_that_python_does_not_write(main: Main, tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"n": 10**6000}, blocking=True)
    code, said, _ = main("show", tmp_path)
    assert (code, "int of 19932 bits" in said) == (0, True), said


def test_no_checkpoint_exits_10(main: Main, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ckpt.Checkpointer(tmp_path / "unsaved").close()
    for where in ("empty", "nowhere", "unsaved"):
        for command in ("ls", "show", "check"):
            code, _, error = main(command, tmp_path / where)
            assert (code, error.startswith("NotFound: "), str(tmp_path / where) in error) == (10, True, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "unsaved"]
    assert not any((tmp_path / "empty").iterdir())


def test_wrong_usage_exits_2(main: Main, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPT_URL", raising=False)
    for args in (("ls",), ("check", saved, "--all", "--step", "10"), ("show", saved, "--step", "x"), ("nonsense",)):
        code, out, error = main(*args)
        assert (code, out, "Error: " in error) == (2, "", True)


def test_an_interrupt_exits_130(main: Main, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ckpt.check, "check_step", interrupted)
    assert main("check", saved) == (130, "", "\ninterrupted\n")


def test_deleted_steps_are_counted_and_not_checked(run: Path, main: Main) -> None:
    directory = RunDirectory.open(run)
    view = directory.log.read()
    commit = find_commit(view, 10)
    assert view.holder is not None
    holder = {"generation": view.generation, "holder_nonce": view.holder.nonce, "nonce": "retire"}
    directory.log.append(lambda view: decide_retire(view, attempts=[commit.attempt], **holder))
    shutil.rmtree(_attempt(run, 10))
    assert "1 more deleted by retention" in main("ls", run)[1]
    assert main("check", run, "--all")[0] == 0
    assert main("check", run, "--step", "10")[0] == 10
    with pytest.raises(ckpt.NotFound, match="deleted by retention while it was checked"):
        ckpt.cli.verify._check_steps(directory, [commit])


def test_a_check_reports_its_progress_to_the_end_and_stops_after_enough_findings(tmp_path: Path) -> None:
    many = {f"t{n}": torch.full((3,), float(n)) for n in range(FINDINGS_LIMIT + 20)}
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        commit = checkpointer.save(1, many).wait()
    heard: list[tuple[int, int]] = []
    run = RunDirectory.open(tmp_path)
    assert check_step(run, commit, lambda done, total: heard.append((done, total))).ok
    assert (heard, heard[-1]) == (sorted(heard), (commit.nbytes, commit.nbytes))
    data = _data(tmp_path, 1).read_bytes()
    base = min(chunk.at for chunk in _part(tmp_path, 1).chunks)
    _data(tmp_path, 1).write_bytes(data[:base] + bytes(255 - byte for byte in data[base:]))
    assert len((report := check_step(run, commit)).findings) == FINDINGS_LIMIT
    assert not report.complete


def test_words() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536 << 10)] == ["0 B", "1023 B", "1.0 KiB", "1.5 MiB"]
    assert [age(time.time() - s) for s in (0, 59, 61, 7200, 49 * 3600)] == ["0 s", "59 s", "1 min", "2 h", "2 d"]
    assert [ranges(ranks) for ranks in ([], [3], [0, 1, 2, 5, 7, 8])] == ["", "3", "0-2,5,7-8"]
    assert plain("a\x1b[31mb\n") == "a\\x1b[31mb\\x0a"
    assert short({"a": torch.ones(2, 3), "b": "x" * 500}).startswith("{'a': tensor(float32, [2, 3]), 'b': 'xxx")
    assert len(short(list(range(10**6)))) <= 200


# doctor


def test_doctor_of_a_directory(tmp_path: Path) -> None:
    done = _ckpt("doctor", tmp_path / "run", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["usable"]
    assert found["fences"]
    assert {trial["name"] for trial in found["trials"]} == {"put", "list", "data", "delete", "create", "race", "whole"}
    assert "keeps two jobs in one run apart" in _ckpt("doctor", tmp_path / "run").stdout
    assert list((tmp_path / "run").iterdir()) == []


def test_doctor_of_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = _ckpt("doctor", tmp_path / "file")
    assert done.returncode == 1
    assert "cannot be written to" in done.stderr
