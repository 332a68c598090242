"""POSIX passes what every store must do, what it does underneath, and the run's directory on top."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ckpt.errors import CkptError, Corrupt, Fenced, Incompatible, NotFound, StorageError
from ckpt.log import View, decide_start
from ckpt.records import Request, Start, encode_record
from ckpt.run import RunDirectory, RunLog, open_store
from ckpt.store import OutcomeUnknown, Store
from ckpt.stores.posix import PosixStore
from ckpt.testing.conformance import ALL, StoreConformance, caught, race


class TestPosixStore(StoreConformance):
    @pytest.fixture
    def open_again(self, tmp_path: Path) -> Callable[[], Store]:
        return lambda: PosixStore(str(tmp_path / "deep" / "run"))

    def test_it_is_atomic(self, store: Store) -> None:
        store.make_directory("")
        assert store.capabilities.fences


class TestPosixStoreWithoutHardLinks(StoreConformance):
    @pytest.fixture
    def open_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Store]:
        monkeypatch.setattr(os, "link", _no_links)
        return lambda: PosixStore(str(tmp_path / "run"))

    def test_it_says_so(self, store: Store) -> None:
        assert store.capabilities.fences  # nothing there to be probed, nothing to be fenced
        store.make_directory("")
        assert not store.capabilities.atomic_create
        assert not store.capabilities.fences
        assert store.capabilities.exclusive_create


# POSIX underneath


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that matter for durability, as "call name", temporary names shortened to "tmp"."""
    seen: list[str] = []
    paths: dict[int, str] = {}

    def short(path: object) -> str:
        name = os.path.basename(str(path))
        return "tmp" if name.startswith(".tmp-") else name

    def record(name: str, describe: Callable[..., str]) -> None:
        original = getattr(os, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            if described := describe(*arguments):
                seen.append(f"{name} {described}")
            result = original(*arguments, **options)
            if name == "open":
                paths[result] = short(arguments[0])
            return result

        monkeypatch.setattr(os, name, wrapper)

    record("open", lambda path, flags, *_: short(path) if flags & os.O_CREAT else "")
    for name in ("write", "fsync"):
        record(name, lambda fd, *_: paths[fd])
    for name in ("link", "rename"):
        record(name, lambda source, target: f"{short(source)} {short(target)}")
    for name in ("mkdir", "unlink"):
        record(name, lambda path, *_: short(path))
    return seen


def test_create_makes_everything_durable_in_order(tmp_path: Path, calls: list[str]) -> None:
    store = PosixStore(str(tmp_path / "new" / "run"))
    store.make_directory("")
    assert calls == ["mkdir new", f"fsync {tmp_path.name}", "mkdir run", "fsync new"]
    assert store.capabilities.atomic_create
    calls.clear()
    store.create("log/x", b"data")
    made = ["open tmp", "write tmp", "fsync tmp", "link tmp x", "fsync log", "unlink tmp"]
    assert calls == ["mkdir log", "fsync run", *made]
    calls.clear()
    store.create("log/y", b"data")
    assert calls == [call.replace(" x", " y") for call in made]
    calls.clear()
    store.put("log/z", b"data")
    assert calls[:5] == ["open tmp", "write tmp", "fsync tmp", "rename tmp z", "fsync log"]


def test_a_directory_made_by_another_process_is_made_durable_too(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "log").mkdir()
    calls.clear()
    PosixStore(str(tmp_path)).make_directory("log")
    assert calls[-1] == f"fsync {tmp_path.name}"


@pytest.mark.parametrize("operation", ["create", "put"])
@pytest.mark.parametrize("hard_links", [True, False])
def test_a_failure_at_any_call_leaves_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, hard_links: bool
) -> None:
    if not hard_links:
        monkeypatch.setattr(os, "link", _no_links)
    for number in range(100):
        store = PosixStore(str(tmp_path / f"{number}"))
        with monkeypatch.context() as patch:
            fuse = _Fuse(patch, number)
            error = caught(lambda each=store: getattr(each, operation)("log/x", b"data"))  # type: ignore[misc]
        if not fuse.blown:
            assert number > 8
            return
        names = store.list("log") if store.exists("log") else []
        if names and (hard_links or operation == "put"):
            assert store.read("log/x", limit_bytes=ALL) == b"data"
        assert names == ["x"] or error is not None
        assert not names or error is None or isinstance(error, OutcomeUnknown), "it said that nothing was made"
    pytest.fail("never ran through")


class _Fuse:
    """Makes the n-th call that touches the file system fail with EIO."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int) -> None:
        self.left, self.blown = number, False
        for name in ("open", "write", "fsync", "link", "rename", "mkdir", "unlink"):
            patch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == -1:
                self.blown = True
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(*arguments, **options)

        return wrapper


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only")]
)
def test_errors_name_operation_path_and_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    store = PosixStore(str(tmp_path))
    monkeypatch.setattr(os, "write", fail)
    for operation in (store.create, store.put):
        with pytest.raises(StorageError, match=f"write {tmp_path}/.*{errno.errorcode[number]}.*{hint}"):
            operation("x", b"data")
    assert os.listdir(tmp_path) == []


@pytest.mark.timeout(20)
def test_a_write_that_makes_no_progress_is_an_error_and_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PosixStore(str(tmp_path))
    monkeypatch.setattr(os, "write", lambda *_: 0)
    for operation in (store.create, store.put):
        with pytest.raises(StorageError, match="no progress"):
            operation("x", b"data")


def test_leftovers_of_a_crash_are_not_listed(tmp_path: Path) -> None:
    store = PosixStore(str(tmp_path))
    store.create("log/0000000000.json", b"x")
    (tmp_path / "log" / ".tmp-0123").write_bytes(b"half")
    (tmp_path / "log" / ".nfs0001").write_bytes(b"")
    (tmp_path / "log" / "README.TXT").write_bytes(b"")
    assert store.list("log") == ["0000000000.json"]


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    store = PosixStore(str(tmp_path / "run"))
    store.make_directory("steps")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "run" / "steps" / "away").symlink_to(tmp_path)
    with pytest.raises(StorageError, match="symbolic link"):
        store.read("link", limit_bytes=ALL)
    store.delete("steps/away")
    store.delete("steps")
    store.put("link", b"own")
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert store.read("link", limit_bytes=ALL) == b"own"


def test_files_obey_the_umask_and_have_a_local_path(tmp_path: Path) -> None:
    store = PosixStore(str(tmp_path))
    before = os.umask(0o027)
    try:
        store.create("x", b"")
    finally:
        os.umask(before)
    path = store.local_path("x")
    assert path == str(tmp_path / "x")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640


# The run's directory and its log


def a_request(nonce: str) -> Request:
    return Request(nonce=nonce, verb="pin", arguments={})


class Faulty(PosixStore):
    """The next creates of a slot do as `plan` says: win, lose the reply, never arrive, arrive after the read back."""

    def __init__(self, root: str, *plan: str) -> None:
        super().__init__(root)
        self.plan = list(plan)
        self.late: tuple[str, bytes] | None = None
        self.synced: list[str] = []

    def create(self, path: str, data: bytes) -> None:
        fault = self.plan.pop(0) if self.plan and path.startswith("log/") else "win"
        if self.late:
            super().create(*self.late)
            self.late = None
        if fault in ("win", "reply lost"):
            super().create(path, data)
        elif fault == "late":
            self.late = (path, data)
        if fault != "win":
            raise OutcomeUnknown(fault)

    def sync_directory(self, path: str) -> None:
        self.synced.append(path)


@pytest.mark.parametrize(
    "plan", [("win",), ("reply lost",), ("never",), ("never", "never"), ("late",), ("late", "reply lost")]
)
def test_append_stands_exactly_once_whatever_the_reply(tmp_path: Path, plan: tuple[str, ...]) -> None:
    RunDirectory.open(tmp_path, create=True).log.append(lambda view: a_request("earlier"))
    store = Faulty(str(tmp_path), *plan)
    log = RunLog(store, sleep=lambda _: None)
    assert log.append(lambda view: a_request("mine")).nonce == "mine"
    assert [request.nonce for _, request in RunLog(open_store(tmp_path)).read().requests] == ["earlier", "mine"]
    assert store.synced == (["log"] if plan[-1] in ("reply lost", "late") else [])  # before it is acknowledged
    assert log.view == log.read() == RunLog(open_store(tmp_path)).read()


def test_append_that_never_learns_its_outcome_says_so(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, create=True)
    with pytest.raises(OutcomeUnknown):
        RunLog(Faulty(str(tmp_path), *["never"] * 20), sleep=lambda _: None).append(lambda view: a_request("mine"))


def test_the_loser_of_a_slot_decides_again(tmp_path: Path) -> None:
    log = RunDirectory.open(tmp_path, create=True).log

    def decide(view: View) -> Start:
        if not view.next_slot:  # somebody is faster
            RunLog(open_store(tmp_path)).append(lambda other: decide_start(other, nonce="b", run_id=None, reason="b"))
        return decide_start(view, nonce="a", run_id=None, reason="a", expected_generation=0)

    with pytest.raises(Fenced, match="generation 0, but the current one is 1"):
        log.append(decide)
    with pytest.raises(ValueError, match=r"without effect.*starts generation 9"):
        log.append(lambda view: Start(**(msgspec.structs.asdict(log.view.starts[0]) | {"generation": 9})))
    assert log.read().next_slot == 1


def test_processes_that_append_at_once_all_stand_once(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, create=True)
    slots = race(12, lambda n: len(RunLog(open_store(tmp_path)).append(lambda _: a_request(f"n{n}")).nonce))
    assert -1 not in slots
    nonces = [request.nonce for _, request in RunLog(open_store(tmp_path)).read().requests]
    assert sorted(nonces) == sorted(f"n{n}" for n in range(12))


def test_damaged_logs_are_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunDirectory.open(tmp_path, create=True).log
    for nonce in "abc":
        log.append(lambda _, nonce=nonce: a_request(nonce))  # type: ignore[misc]
    slot = tmp_path / "log" / "0000000001.json"
    slot.write_bytes(encode_record(a_request("b"))[:-5])
    with pytest.raises(Corrupt, match=r"0000000001\.json.*cut off"):
        RunLog(open_store(tmp_path)).read()
    with monkeypatch.context() as patch:  # without hard links it is a void slot
        patch.setattr(os, "link", _no_links)
        view = RunLog(open_store(tmp_path), sleep=lambda _: None).read()
    assert (view.next_slot, len(view.requests), view.ignored[0].entry) == (3, 2, None)
    slot.unlink()
    with pytest.raises(Corrupt, match=r"0000000001\.json is missing although later records exist"):
        RunLog(open_store(tmp_path)).read()
    shutil.rmtree(tmp_path / "log")
    with pytest.raises(Corrupt, match="had 3 records and now has 0"):
        log.read()


def test_open_reads_later_minor_versions(tmp_path: Path) -> None:
    (tmp_path / "FORMAT.json").write_bytes(b'{"name":"holdfast","major":1,"minor":7,"nonce":"a","later":[]}')
    assert RunDirectory.open(tmp_path).format.minor == 7


def test_open_makes_a_run_once(tmp_path: Path) -> None:
    url = str(tmp_path / "a" / "run")
    with pytest.raises(NotFound, match=f"no checkpoint at {url}"):
        RunDirectory.open(url)
    assert not (tmp_path / "a").exists()
    nonces = race(8, lambda _: int(RunDirectory.open(url, create=True).nonce[:7], 16))
    assert {int(RunDirectory.open(url).nonce[:7], 16)} == set(nonces)
    run = RunDirectory.open(f"file://{url}")
    run.store.make_directory(run.attempt_path("000000200.a"))
    run.store.make_directory(run.attempt_path("000000100.b"))
    run.store.make_directory("steps/other")
    assert run.attempts() == ["000000100.b", "000000200.a"]
    assert run.attempt_path("000000200.a", "MANIFEST") == "steps/000000200.a/MANIFEST"
    with pytest.raises(ValueError, match="not an attempt's name"):
        run.attempt_path("../x")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b'{"name":"holdfast","major":2,"minor":0,"nonce":"a"}', Incompatible, "format 2.0; this version.*reads 1.x"),
        (b'{"name":"other","major":1,"minor":0,"nonce":"a"}', Incompatible, "another program"),
        (b'{"name":"holdfast"}', Corrupt, "cannot be read"),
        (b"", Corrupt, "cannot be read"),
        (b"x" * 5000, Corrupt, "at most 4096"),
        (b'{"name":"holdfast","major":1,"minor":0,"nonce":"../a"}', Corrupt, "nonce"),
        (None, Corrupt, "missing although there is a log"),
    ],
)
def test_open_refuses_what_it_cannot_read(
    tmp_path: Path, content: bytes | None, error: type[CkptError], message: str
) -> None:
    RunDirectory.open(tmp_path, create=True).log.append(lambda _: a_request("a"))
    path = tmp_path / "FORMAT.json"
    path.unlink() if content is None else path.write_bytes(content)
    for create in (False, True):
        with pytest.raises(error, match=message):
            RunDirectory.open(tmp_path, create=create)


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("a/../run").url == str(tmp_path / "run")
    assert open_store("file:///a%20b/run").url == "/a b/run"
    assert open_store("s3://bucket/some//").url == "s3://bucket/some"
    for url in ("s3://bucket/a//b", "s3://bucket/../b"):
        with pytest.raises(StorageError, match=r"no \. and no \.\."):
            open_store(url)
    for name in ("gcsfs", "ckpt.stores.gcs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"pip install 'holdfast\[gcs\]'"):
        open_store("gs://bucket/run")
    with pytest.raises(StorageError, match="cannot open 'what://bucket/run'"):
        open_store("what://bucket/run")
    with pytest.raises(StorageError, match=r"did you mean s3://bucket/run\?"):
        open_store("s3:/bucket/run")
    for url in ("", "file://host/run", "memory://run", "simplecache::s3://bucket/run", "s3://"):
        with pytest.raises(StorageError, match="expected a path"):
            open_store(url)


# Helpers


def _no_links(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_nothing_is_made_in_a_directory_of_another_program(tmp_path: Path) -> None:
    (tmp_path / "FORMAT.json").write_text('{"name": "other"}')
    with pytest.raises(Incompatible, match="another program"):
        RunDirectory.open(tmp_path, create=True)
    assert [path.name for path in tmp_path.iterdir()] == ["FORMAT.json"]


def test_a_path_of_bytes(tmp_path: Path) -> None:
    assert open_store(os.fsencode(tmp_path)).url == str(tmp_path)  # type: ignore[arg-type]
