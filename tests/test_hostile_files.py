"""A whole checkpoint in which something is wrong behind right digests: refused before anything is touched.

What single manifests and parts may hold is in test_manifest.py; here they come with a log that vouches for them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from keepers import forget
from msgspec.structs import replace as changed
from states import bits

import ckpt
from ckpt import Checkpointer, CkptError, Corrupt, Incompatible
from ckpt import run as run_module
from ckpt.check import check_step
from ckpt.manifest import Chunk, Manifest, Part, decode_manifest, decode_part, digest, encode_manifest, encode_part
from ckpt.records import Commit, Unpin, decode_record, encode_record, seal
from ckpt.run import RunDirectory, RunLog, open_store
from ckpt.sharding import TensorSpec

Change = Callable[[Any], Any]


def state(value: float) -> dict[str, Any]:
    return {"a": torch.full((8, 4), float(value)), "b": torch.full((8, 4), float(value)), "n": float(value)}


def forge(
    path: Path, *, part: Change = lambda p: p, manifest: Change = lambda m: m, record: Change = lambda r: r
) -> Path:
    """A run of steps 1 and 2; step 2 is changed, with every digest made to fit. Returns its attempt's directory."""
    with Checkpointer(path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(float(step)), blocking=True)
    forget()  # a whole copy in RAM would be restored, and rightly
    attempt, slot = max((path / "steps").iterdir()), max((path / "log").iterdir())
    forged = part(decode_part((attempt / "r00000.part").read_bytes(), ""))
    part_data, content = encode_part(forged), forged.content_digest()
    (attempt / "r00000.part").write_bytes(part_data)
    found: Manifest = decode_manifest((attempt / "MANIFEST").read_bytes(), "")
    ref = changed(found.parts[0], part_bytes=len(part_data), part_digest=digest(part_data), content_digest=content)
    manifest_data = encode_manifest(manifest(changed(found, parts=(ref,))))
    (attempt / "MANIFEST").write_bytes(manifest_data)
    commit = decode_record(slot.read_bytes())
    assert isinstance(commit, Commit)
    vouching = changed(commit, manifest_bytes=len(manifest_data), manifest_digest=digest(manifest_data).hex())
    slot.write_bytes(encode_record(record(vouching)))
    return attempt


def refused(path: Path, kind: type[CkptError], *says: str) -> None:
    target = state(-1)
    before = bits(target)
    for act in (
        lambda: ckpt.restore(path, target),
        lambda: Checkpointer(path).restore(target),
        lambda: ckpt.load(path),
    ):
        with pytest.raises(CkptError) as caught:
            act()
        assert type(caught.value) is kind, caught.value
        for pattern in says:
            assert re.search(pattern, str(caught.value)), f"{pattern!r} is not in: {caught.value}"
    assert bits(target) == before


def test_the_forger_alone_changes_nothing(tmp_path: Path) -> None:
    forge(tmp_path)
    target = state(-1)
    assert ckpt.restore(tmp_path, target) == 2
    assert bits(target) == bits(state(2))


def chunks(change: Callable[[list[Chunk]], list[Chunk]]) -> Change:
    return lambda part: changed(part, chunks=tuple(change(list(part.chunks))))


PARTS: dict[str, tuple[Change, str]] = {
    "missing chunk": (chunks(lambda c: c[1:]), "a: .*not cover"),
    "half a chunk": (
        chunks(lambda c: [changed(c[0], shape=(4, 4), stored_bytes=64), *c[1:]]),
        "a: .*not cover",
    ),
    "the same elements twice": (chunks(lambda c: [c[0], changed(c[1], key="a")]), ""),
    "overlapping bytes": (chunks(lambda c: [c[0], changed(c[1], at=c[0].at + 64)]), "share bytes"),
    "bytes beyond the file": (chunks(lambda c: [c[0], changed(c[1], at=1 << 40)]), "outside the data file"),
    "bytes before the file": (chunks(lambda c: [changed(c[0], at=-64), c[1]]), "outside the data file"),
    "another dtype": (chunks(lambda c: [changed(c[0], dtype="int32"), c[1]]), ""),
    "no such dtype": (chunks(lambda c: [changed(c[0], dtype="object"), c[1]]), "dtype 'object'"),
    "a place outside the tensor": (chunks(lambda c: [changed(c[0], offset=(1, 0)), c[1]]), ""),
    "too few digests": (chunks(lambda c: [changed(c[0], digests=b""), c[1]]), "digests"),
    "a file elsewhere": (chunks(lambda c: [changed(c[0], file="../../../etc/passwd"), c[1]]), "etc/passwd"),
    "an absolute file": (chunks(lambda c: [changed(c[0], file="/etc/passwd"), c[1]]), "etc/passwd"),
    "a file of an attempt that the manifest does not name": (
        chunks(lambda c: [changed(c[0], file="000000001.aaaa/r00000.safetensors"), c[1]]),
        "does not name",
    ),
    "the part of another attempt": (lambda p: changed(p, attempt="000000001.aaaa"), "another attempt"),
    "another size of the data file": (lambda p: changed(p, data_bytes=p.data_bytes + 4096), "the MANIFEST says"),
    "the part of another rank": (lambda p: changed(p, rank=3), "another attempt or rank|rank 3"),
    "a missing value": (lambda p: changed(p, values={}), "lacks the value '?n"),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_cannot_be_true(tmp_path: Path, name: str) -> None:
    change, says = PARTS[name]
    forge(tmp_path, part=change)
    refused(tmp_path, Corrupt, re.escape(str(tmp_path)) + "|not cover", says)
    target = state(-1)
    assert ckpt.restore(tmp_path, target, fallback=True) == 1
    assert bits(target) == bits(state(1))


def _with_spec(manifest: Manifest, rows: int = 16) -> Manifest:
    """A manifest that claims a larger tensor than its parts hold."""
    layout = manifest.world.layouts[0]
    entries = tuple(replace(entry, spec=TensorSpec("float32", (rows, 4))) for entry in layout.entries)
    return changed(manifest, world=replace(manifest.world, layouts=(replace(layout, entries=entries),)))


def test_a_larger_tensor_than_was_stored(tmp_path: Path) -> None:
    forge(tmp_path, manifest=_with_spec)
    target = {"a": torch.zeros(16, 4), "b": torch.zeros(16, 4), "n": 0}
    with pytest.raises(Corrupt, match=r"a: .*not cover|a at"):
        ckpt.restore(tmp_path, target)
    assert not target["a"].any()


def test_no_memory_is_taken_for_what_was_not_stored(tmp_path: Path) -> None:
    forge(tmp_path, manifest=lambda manifest: _with_spec(manifest, 1 << 46))
    with pytest.raises(Corrupt, match=r"not cover|a at"):
        ckpt.load(tmp_path)


def test_the_manifest_of_another_attempt(tmp_path: Path) -> None:
    forge(tmp_path, manifest=lambda m: changed(m, attempt="000000002.aaaa"))
    refused(tmp_path, Corrupt, "MANIFEST: it is that of 000000002.aaaa", "`ckpt check")


def test_data_that_the_digests_do_not_know(tmp_path: Path) -> None:
    def lie(part: Part) -> Part:
        return changed(part, chunks=tuple(changed(c, digests=bytes(16)) for c in part.chunks))

    attempt = forge(tmp_path, part=lie)
    with pytest.raises(Corrupt, match=rf"{re.escape(str(attempt))}.*tensor . at .*does not match its digest"):
        ckpt.load(tmp_path)


# The log and FORMAT.json


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attempt", "../../../etc"),
        ("attempt", "000000002./etc"),
        ("attempt", "000000002.A"),
        ("attempt", "2.aaaa"),
        ("parent", ".."),
        ("nonce", "a/b"),
        ("step", -1),
        ("manifest_bytes", -1),
        ("manifest_digest", "zz"),
    ],
)
def test_unsafe_names_in_a_record(tmp_path: Path, field: str, value: object) -> None:
    forge(tmp_path)
    slot = max((tmp_path / "log").iterdir())
    fields = json.loads(slot.read_bytes())
    fields[field] = value
    slot.write_bytes(json.dumps(fields).encode() + b"\n")
    refused(tmp_path, Corrupt, re.escape(f"{tmp_path}"), re.escape(f"log/{slot.name}"))


def test_a_manifest_larger_than_the_cap_is_not_read(tmp_path: Path) -> None:
    attempt = forge(tmp_path, record=lambda r: changed(r, manifest_bytes=1 << 40))
    with (attempt / "MANIFEST").open("r+b") as stream:
        stream.truncate(1 << 40)
    refused(tmp_path, Corrupt, "MANIFEST", "at most", "`ckpt check")


def test_an_unknown_format_version(tmp_path: Path) -> None:
    forge(tmp_path)
    file = tmp_path / "FORMAT.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "major": 99}))
    says = ("FORMAT.json", "written in format 99", "reads 1.x", "Nothing was changed", "use the version that wrote it")
    refused(tmp_path, Incompatible, re.escape(str(tmp_path)), *says)


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b'{"name": "other"}', Incompatible, "belongs to another program"),
        (b'{"name": "holdfast", "major": 1', Corrupt, "cannot be read"),
        (b"", Corrupt, "cannot be read"),
        (b"[" * 4000, Corrupt, "cannot be read"),
        (b" " * 9000, Corrupt, "at most 4096"),
        (b'{"name": "holdfast", "major": 1, "minor": 0, "nonce": "../x"}', Corrupt, "nonce"),
    ],
)
def test_a_format_file_that_is_not_one(tmp_path: Path, content: bytes, kind: type[CkptError], says: str) -> None:
    forge(tmp_path)
    (tmp_path / "FORMAT.json").write_bytes(content)
    refused(tmp_path, kind, re.escape(str(tmp_path)), "FORMAT.json", says)


def test_a_lost_format_file(tmp_path: Path) -> None:
    forge(tmp_path)
    (tmp_path / "FORMAT.json").unlink()
    refused(tmp_path, Corrupt, "FORMAT.json is missing although there is a log")


def test_links_are_not_followed(tmp_path: Path) -> None:
    attempt = forge(tmp_path)
    data = attempt / "r00000.safetensors"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    target = state(-1)
    with pytest.raises(CkptError, match=r"r00000\.safetensors"):
        ckpt.restore(tmp_path, target)
    assert bits(target) == bits(state(-1))


WATCH = """
import json, os, sys
sys.path.insert(0, {tests!r})
import torch
import ckpt, ckpt.check, ckpt.cli
from ckpt import CkptError
from test_hostile_files import state

def read(url):
    for act in (lambda: ckpt.restore(url, state(-1)), lambda: ckpt.load(url),
                lambda: ckpt.cli.cli(["show", url], standalone_mode=False),
                lambda: ckpt.cli.cli(["check", url, "--all"], standalone_mode=False)):
        try:
            act()
        except CkptError:
            pass

OURS = ("/proc/sys/kernel/random/boot_id", "/proc/meminfo", "/dev/null")
armed, seen, allowed = False, [], ()

def hook(event, arguments):
    if not armed:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith(allowed) and path not in OURS:
            seen.append(["open", path])
    elif event in ("exec", "compile", "import", "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen",
                   "ctypes.dlopen", "socket.connect", "pickle.find_class", "os.remove", "os.rename", "os.link",
                   "os.symlink", "os.mkdir", "os.rmdir", "os.truncate"):
        seen.append([event, str(arguments)[:200]])

for url in [{warm!r}, *{urls!r}]:
    read(url)  # what is imported, or made of our own annotations, at its first use; what a file does, it does again
sys.addaudithook(hook)
for url in {urls!r}:
    allowed, armed = (os.path.realpath(url) + os.sep, os.path.realpath(url)), True
    read(url)
    armed = False
if {prove_it_sees!r}:
    armed = True
    open("/etc/hostname")
    eval("1")
    armed = False
print("seen:" + json.dumps(seen))
"""


def _watched(warm: Path, urls: list[str], prove_it_sees: bool = False) -> list[list[str]]:
    code = WATCH.format(tests=str(Path(__file__).parent), warm=str(warm), urls=urls, prove_it_sees=prove_it_sees)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout.rpartition("seen:")[2])
    return found


def test_no_code_runs_and_nothing_outside_of_the_run_is_opened(tmp_path: Path) -> None:
    forge(tmp_path / "good")
    runs = []
    for number, (change, _) in enumerate(PARTS.values()):
        forge(tmp_path / f"part{number}", part=change)
        runs.append(str(tmp_path / f"part{number}"))
    for number, change in enumerate((_with_spec, lambda m: changed(m, attempt="000000002.aaaa"))):
        forge(tmp_path / f"manifest{number}", manifest=change)
        runs.append(str(tmp_path / f"manifest{number}"))
    for number, (field, value) in enumerate((("attempt", "000000002./etc"), ("parent", ".."), ("kind", "import os"))):
        forge(run := tmp_path / f"record{number}")
        slot = max((run / "log").iterdir())
        body = json.dumps({**json.loads(slot.read_bytes()), field: value}).rpartition(', "digest"')[0].encode()
        slot.write_bytes(body + seal(body))
        runs.append(str(run))
    assert _watched(tmp_path / "good", runs) == []


def test_the_hook_sees_what_it_must(tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    forge(tmp_path)
    events = {event for event, _ in _watched(tmp_path, [], prove_it_sees=True)}
    assert events >= {"open", "compile", "exec"}


@pytest.mark.parametrize("what", ["MANIFEST", "r00000.part", "slot"])
def test_a_file_that_is_a_link_is_refused(tmp_path: Path, what: str) -> None:
    attempt = forge(tmp_path / "run")
    slot = max((tmp_path / "run" / "log").iterdir())
    place = slot if what == "slot" else attempt / what
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    target = state(-1)
    before = bits(target)
    with pytest.raises(CkptError):
        ckpt.restore(tmp_path / "run", target)
    assert bits(target) == before


@pytest.mark.parametrize("what", ["FORMAT.json", "MANIFEST", "r00000.part", "r00000.safetensors", "slot", "next slot"])
def test_a_pipe_in_place_of_a_file_keeps_nobody_waiting(tmp_path: Path, what: str) -> None:
    attempt = forge(tmp_path / "run")
    slot = max((tmp_path / "run" / "log").iterdir())
    following = slot.with_name(f"{int(slot.stem) + 1:010d}.json")
    place = {"slot": slot, "next slot": following, "FORMAT.json": tmp_path / "run" / what}.get(what, attempt / what)
    place.unlink(missing_ok=True)
    os.mkfifo(place)
    with pytest.raises(CkptError):
        ckpt.load(tmp_path / "run")


def test_a_field_that_stands_twice_in_a_record(tmp_path: Path) -> None:
    body = encode_record(Unpin(nonce="a", name="mine"))[: -len(seal(b""))] + b',"name":"other"'
    with pytest.raises(ckpt.Corrupt, match="twice"):
        decode_record(body + seal(body))


def test_half_a_character_in_a_record() -> None:
    """Nobody could write such a text again, or print it. Found by `test_fuzz`."""
    body = encode_record(Unpin(nonce="a", name="mine"))[: -len(seal(b""))] + rb',"later":"\ud800"'
    with pytest.raises(ckpt.Corrupt, match="cannot be read"):
        decode_record(body + seal(body))


@pytest.mark.parametrize("what", ["steps", "log", "attempt"])
def test_a_directory_that_is_a_link_is_refused(tmp_path: Path, what: str) -> None:
    attempt = forge(tmp_path / "run")
    place = attempt if what == "attempt" else tmp_path / "run" / what
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CkptError, match="symbolic link"):
        ckpt.load(tmp_path / "run")
    with pytest.raises(CkptError, match="symbolic link"), ckpt.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.restore(state(-1), required=True)


def test_a_log_without_records_is_no_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_STALE_LOOK_S", 0.01)
    forge(tmp_path)
    for record in (tmp_path / "log").iterdir():
        record.unlink()
    kept = sorted((tmp_path / "steps").rglob("*"))
    with pytest.raises(Corrupt, match="all records of its log are missing, although there are 2 attempts"):
        Checkpointer(tmp_path, keep=ckpt.Keep(last=1)).restore(state(0))
    with pytest.raises(Corrupt, match="all records of its log are missing"):
        ckpt.load(tmp_path)
    assert sorted((tmp_path / "steps").rglob("*")) == kept


def test_a_log_whose_listing_is_old_is_looked_at_again(tmp_path: Path) -> None:
    """As a node sees it over NFS that has listed the log just before the first record stood."""
    forge(tmp_path)
    there, aside = tmp_path / "log", tmp_path / "aside"
    there.rename(aside)
    waited: list[float] = []

    def shown(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            aside.rename(there)

    view = RunLog(open_store(tmp_path), sleep=shown).read()
    assert ([commit.step for commit in view.standing()], len(waited)) == ([1, 2], 3)


def test_a_header_far_longer_than_its_part_can_need_is_not_read(tmp_path: Path) -> None:
    header = b'{"a":[' + b",".join([b"[]"] * 1_000_000) + b"]}"
    nbytes = 8 + len(header)

    def longer(manifest: Manifest) -> Manifest:
        return changed(manifest, parts=(changed(manifest.parts[0], data_bytes=nbytes),))

    attempt = forge(tmp_path, part=lambda part: changed(part, data_bytes=nbytes), manifest=longer)
    (attempt / "r00000.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    run = RunDirectory.open(tmp_path)
    found = check_step(run, run.log.read().standing()[-1]).findings
    assert any(f"its safetensors header claims {len(header)} bytes" in each.problem for each in found), found
