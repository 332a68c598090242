"""A store that somebody else can write to: whoever lacks the key can take away, but not put anything in its place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import Pool
from keepers import forget
from msgspec.structs import replace as changed
from states import bits
from test_hostile_files import forge

import ckpt
from ckpt import Checkpointer, CkptError, Commit, Corrupt, Incompatible, Keep
from ckpt.holder import Holder
from ckpt.keeper.coordinator import Attempt, commit
from ckpt.keeper.orders import Job, Stored, Summary
from ckpt.layout import Layout, World
from ckpt.manifest import PartRef, decode_manifest, decode_part, digest
from ckpt.records import Pin, Record, Retire, Start, decode_record, encode_record, slot_name
from ckpt.run import RunDirectory
from ckpt.signing import KEY_VARIABLE, Chain, signing_key
from ckpt.symbolic import encode_world

ROOT = Path(__file__).parent.parent
KEY, OTHER = "5e" * 32, "0f" * 32


@pytest.fixture(autouse=True)
def _with_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def state(step: int) -> dict[str, Any]:
    return {"t": torch.full((300, 300), float(step)), "n": step}


def saved(path: Path, *steps: int) -> Path:
    with Checkpointer(path) as checkpointer:
        for step in steps:
            checkpointer.save(step, state(step), blocking=True)
    return path


def slots(path: Path) -> list[Path]:
    return sorted((path / "log").iterdir())


def record(slot: Path) -> Any:
    return decode_record(slot.read_bytes())


def append(path: Path, forged: Record) -> None:
    """As somebody who can write there, knows the format, and has no key."""
    (path / "log" / slot_name(len(slots(path)))).write_bytes(encode_record(forged))


def refused(path: Path, *says: str) -> None:
    target = state(-1)
    before, log = bits(target), slots(path)
    acts: list[Callable[[], object]] = [
        lambda: ckpt.restore(path, target, fallback=True),
        lambda: ckpt.load(path),
        lambda: Checkpointer(path, takeover=True).restore(target, fallback=True),
        lambda: next(ckpt.follow(path, timeout_s=0)),
    ]
    for act in acts:
        with pytest.raises(Corrupt) as caught:
            act()
        for text in (str(path), *says):
            assert text in str(caught.value)
        assert KEY not in str(caught.value)
    assert (bits(target), slots(path)) == (before, log)


def test_a_signed_run_saves_restores_pins_and_deletes(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    with Checkpointer(tmp_path, keep=Keep(last=1)) as checkpointer:
        target = state(0)
        assert checkpointer.restore(target) == 3
        assert bits(target) == bits(state(3))
        checkpointer.pin(1)
        checkpointer.save(4, state(4), blocking=True)
    forget()
    assert [found.step for found in RunDirectory.open(tmp_path).log.read().standing()] == [1, 3, 4]
    assert ckpt.restore(tmp_path, target, step=1) == 1
    assert bits(target) == bits(state(1))


def test_every_digest_on_the_way_to_a_byte_is_a_strong_one(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    found, attempt = record(slots(tmp_path)[-1]), next((tmp_path / "steps").iterdir())
    manifest = decode_manifest((attempt / "MANIFEST").read_bytes(), "")
    part = decode_part((attempt / "r00000.part").read_bytes(), "")
    assert len(found.manifest_digest) == 64
    assert [len(ref.part_digest) for ref in manifest.parts] == [32]
    assert [chunk.digest_bytes for chunk in part.chunks] == [32] * len(part.chunks)


def test_a_reader_of_its_own_reads_a_signed_run(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    line = [sys.executable, str(ROOT / "examples" / "read_format.py"), str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "t  torch.float32  [300, 300]  sum 90000" in done.stdout


def _save_as_ranks(rank: int, world: int, path: str, key: str) -> None:
    os.environ[KEY_VARIABLE] = key
    try:
        with Checkpointer(path) as checkpointer:
            checkpointer.save(1, {"t": torch.arange(300_000.0)}, blocking=True)
            assert checkpointer.restore({"t": torch.zeros(300_000)}) == 1
    finally:
        del os.environ[KEY_VARIABLE]


def test_several_ranks_sign_through_one_keeper(pool: Pool, tmp_path: Path) -> None:
    pool.results(_save_as_ranks, 2, str(tmp_path), KEY)
    assert ckpt.load(tmp_path)["t"].equal(torch.arange(300_000.0))


# Who cannot be deceived


def a_start(path: Path) -> Start:
    view = RunDirectory.open(path).log.read()
    assert view.holder is not None
    return changed(view.holder, generation=view.generation + 1, nonce="forged", run_id=None)


def test_a_forged_start_neither_fences_nor_goes_back(tmp_path: Path) -> None:
    first = record(slots(saved(tmp_path, 1, 2))[1])
    append(tmp_path, changed(a_start(tmp_path), base=first.attempt))
    refused(tmp_path, slots(tmp_path)[-1].name, "is not signed", "every record before this one is genuine")


def test_a_forged_start_stops_the_job_that_runs_with_what_is_wrong(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state(1), blocking=True)
    append(tmp_path, a_start(tmp_path))
    with pytest.raises(Corrupt, match="is not signed"):
        checkpointer.save(2, state(2), blocking=True)
    slots(tmp_path)[-1].unlink()  # as the message says
    checkpointer.save(3, state(3), blocking=True)
    assert ckpt.load(tmp_path)["n"] == 3


@pytest.mark.parametrize("kind", ["commit", "retire", "pin"])
def test_no_record_is_taken_from_whoever_lacks_the_key(tmp_path: Path, kind: str) -> None:
    start, first, second = map(record, slots(saved(tmp_path, 1, 2)))
    forged: dict[str, Record] = {
        "commit": changed(second, nonce="forged", step=9, attempt="000000009.forged", parent=second.attempt),
        "retire": Retire(generation=start.generation, nonce="forged", attempts=(second.attempt, first.attempt)),
        "pin": Pin(nonce="forged", attempt=first.attempt, name="forged"),
    }
    append(tmp_path, forged[kind])
    refused(tmp_path, slots(tmp_path)[-1].name, "is not signed")


def test_a_record_of_another_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)
    monkeypatch.setenv(KEY_VARIABLE, OTHER)
    refused(tmp_path, "0000000000.json", "another key")


def test_a_signed_record_counts_in_its_run_and_its_slot_only(tmp_path: Path) -> None:
    for name in ("one", "two"):
        saved(tmp_path / name, 1, 2)
    one = slots(tmp_path / "one")
    shutil.copy(slots(tmp_path / "two")[2], one[2])
    refused(tmp_path / "one", one[2].name, "copied from elsewhere")
    one = slots(saved(tmp_path / "three", 1, 2, 3))
    shutil.copy(one[1], one[0].with_name(slot_name(len(one))))
    refused(tmp_path / "three", slot_name(len(one)), "copied from elsewhere")


def test_a_record_cannot_be_taken_out_of_the_middle(tmp_path: Path) -> None:
    log = slots(saved(tmp_path, 1, 2, 3))
    log[1].unlink()
    for before, after in pairwise(log[1:]):
        after.rename(before)
    refused(tmp_path, log[1].name, "taken away")


@pytest.mark.parametrize("field", ["step", "attempt", "manifest_digest", "nbytes", "metrics"])
def test_no_field_of_a_commit_can_be_changed(tmp_path: Path, field: str) -> None:
    saved(tmp_path, 1)
    slot = slots(tmp_path)[-1]
    found = record(slot)
    values = {"step": 2, "manifest_digest": "00" * 32, "nbytes": 5, "metrics": {"loss": 0.0}}
    values["attempt"] = found.attempt + "x"
    edit = {field: values[field], **({"attempt": f"000000002.{found.attempt[10:]}"} if field == "step" else {})}
    signature = slot.read_bytes().split(b',"signature":"')[1][:64]
    slot.write_bytes(encode_record(changed(found, **edit), lambda body: bytes.fromhex(signature.decode())))
    refused(tmp_path, slot.name, "changed")


def test_a_step_made_up_with_every_weak_digest_right_is_refused(tmp_path: Path) -> None:
    """All but the record: that is what whoever lacks the key can do."""
    genuine: list[bytes] = []

    def keep(found: Commit) -> Commit:
        genuine.append(max((tmp_path / "log").iterdir()).read_bytes())
        return found

    forge(tmp_path, manifest=lambda m: changed(m, metrics={"loss": 0.0}), record=keep)
    slot = max((tmp_path / "log").iterdir())
    with pytest.raises(Corrupt, match="is not signed"):
        ckpt.load(tmp_path)
    slot.write_bytes(genuine[0])
    with pytest.raises(Corrupt, match="its bytes are not those that the commit of step 2 names"):
        ckpt.load(tmp_path)


def test_what_no_record_names_is_not_adopted(tmp_path: Path) -> None:
    """An attempt that looks complete may be anybody's: the next start would sign it."""
    slots(saved(tmp_path, 1, 2))[-1].unlink()
    forget()
    target = state(0)
    assert Checkpointer(tmp_path).restore(target) == 1  # and that is what taking away can do


# Who has the key and who has not


def test_without_the_key_a_signed_run_can_be_read_and_not_appended_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)
    before = slots(tmp_path)
    forget()
    monkeypatch.delenv(KEY_VARIABLE)
    assert ckpt.load(tmp_path)["n"] == 1
    with pytest.raises(Incompatible, match=rf"{KEY_VARIABLE} is not set here.*Nothing was appended"):
        Checkpointer(tmp_path, takeover=True).restore(state(0))
    assert slots(tmp_path) == before


def test_an_unsigned_run_is_not_trusted_where_a_key_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    saved(tmp_path, 1)
    forget()
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    refused(tmp_path, "0000000000.json", "begun without a key", f"Without {KEY_VARIABLE}")


def test_a_keeper_without_the_key_is_found_out_before_the_commit(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path, create=True)
    start = Holder(run, run_id=None, takeover=False).take("a test")
    job = Job("000000001.a", 1, 0, start.generation, start.nonce, 1, 60.0, False)
    world = World((Layout((), (), (), ()),), (0,))
    weak = Stored(job.attempt, 0, PartRef(10, digest(b"part"), 4096, digest(b"")), ())
    attempt = Attempt(job, 0.0, True, layouts=encode_world(world), summary=Summary("", {}), stored={0: weak})
    with pytest.raises(Incompatible, match=rf"{KEY_VARIABLE} is not set alike.*rank 0"):
        commit(run, attempt)
    assert run.attempts() == []


def test_the_key_from_a_file_and_what_is_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    monkeypatch.setenv(KEY_VARIABLE, f"file:{file}")
    assert signing_key() == bytes.fromhex(KEY)
    file.write_text("secret words that are no hex")
    for wrong in (f"file:{file}", "file:/nowhere", KEY[:-2], KEY + "z", "secret words"):
        monkeypatch.setenv(KEY_VARIABLE, wrong)
        with pytest.raises(Incompatible, match=rf"{KEY_VARIABLE}.*openssl rand") as caught:
            RunDirectory.open(tmp_path / "run", create=True)
        assert "secret" not in str(caught.value)
        assert KEY[:-2] not in str(caught.value)
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert signing_key() is None


def test_the_key_is_written_nowhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpointer = Checkpointer(tmp_path / "run")
    checkpointer.save(1, state(1), blocking=True)
    ram = Path(os.environ["CKPT_RAM_DIR"])
    files = [path for root in (tmp_path, ram) for path in root.rglob("*") if path.is_file()]
    assert any(path.name == "MANIFEST" for path in files)
    assert any(path.is_relative_to(ram) for path in files)
    forms = (bytes.fromhex(KEY), KEY.encode(), repr(bytes.fromhex(KEY)).encode())
    assert not [path for path in files for form in forms if form in path.read_bytes()]
    said = "".join(map(repr, (Chain(bytes.fromhex(KEY), "run"), RunDirectory.open(tmp_path / "run"), checkpointer)))
    checkpointer.close()
    assert not [form for form in forms for text in (said, *capfd.readouterr()) if form in text.encode()]


# Any log, changed in any way


def _signed(count: int, run: str = "run", key: str = KEY, other_end: bool = False) -> list[bytes]:
    chain, log = Chain(bytes.fromhex(key), run), list[bytes]()
    for number in range(count):
        forked = other_end and number >= 2
        log.append(encode_record(Pin(nonce=f"n{forked:d}", attempt="000000001.a", name="x"), chain.sign))
        chain = chain.after(log[-1])
    return log


_LOG = _signed(6)
_FOREIGN = [*_signed(6, run="other"), *_signed(6, key=OTHER)]
_OTHER_END = _signed(6, other_end=True)[2:]  # was cut off, and the run went on otherwise


def test_another_end_of_the_same_log_is_not_mixed_in() -> None:
    chain = Chain(bytes.fromhex(KEY), "run").after(_LOG[0]).after(_LOG[1])
    assert chain.after(_OTHER_END[0]).after(_OTHER_END[1]).last
    for first, second in ((_LOG[2], _OTHER_END[1]), (_OTHER_END[0], _LOG[3])):
        with pytest.raises(Corrupt, match="taken away"):
            chain.after(first).after(second)


def test_the_first_record_of_another_run_is_refused() -> None:
    for foreign in _FOREIGN[0], _FOREIGN[6]:
        with pytest.raises(Corrupt, match="copied from elsewhere"):
            Chain(bytes.fromhex(KEY), "run").after(foreign)


@given(st.lists(st.sampled_from([*_LOG, *_FOREIGN]), max_size=8))
def test_only_the_end_of_a_signed_log_can_be_taken_away(log: list[bytes]) -> None:
    chain = Chain(bytes.fromhex(KEY), "run")
    try:
        for data in log:
            chain = chain.after(data)
    except CkptError:
        assert log != _LOG[: len(log)]
    else:
        assert log == _LOG[: len(log)]


@given(st.integers(0, 5), st.data())
def test_no_bit_of_a_signed_record_can_be_changed(slot: int, data: st.DataObject) -> None:
    chain = Chain(bytes.fromhex(KEY), "run")
    for before in range(slot):
        chain = chain.after(_LOG[before])
    damaged = bytearray(_LOG[slot])
    body = len(damaged) - len(b',"digest":"') - 32 - len(b'"}\n')  # behind it stands the digest of every record
    damaged[data.draw(st.integers(0, body - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(Corrupt):
        chain.after(bytes(damaged))
