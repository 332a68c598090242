"""Object stores: each real server passes what every store must do; those that lie are found out; runs live in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pytest
import servers
from click.testing import CliRunner
from jobs import Pool, run_job
from keepers import forget, kill_keepers, until
from layouts import assert_same_state, build, full_state
from test_kill import TIMEOUT_S, check_restart, state_of, steps_seen

import ckpt
from ckpt.bench import measure
from ckpt.cli import cli
from ckpt.doctor import examine
from ckpt.errors import Corrupt, Incompatible, StorageError
from ckpt.manifest import digest
from ckpt.records import Request
from ckpt.run import RunDirectory, RunLog
from ckpt.store import OutcomeUnknown, Store
from ckpt.stores import anyfs, open_store, s3
from ckpt.stores.azure import AzureBucket
from ckpt.stores.bucket import Retried
from ckpt.stores.objects import ObjectStore
from ckpt.testing.conformance import StoreConformance, pages
from ckpt.testing.proxy import ALL, QUICK, Proxy, faulty


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    with servers.moto() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def ceph_server() -> Iterator[str]:
    with servers.ceph() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def rclone_server() -> Iterator[str]:
    with servers.rclone() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def azurite_server() -> Iterator[str]:
    with servers.azurite() as connection:
        yield connection


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[str]:
    with servers.gcs() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def swift_server() -> Iterator[str]:
    with servers.swift() as endpoint:
        yield endpoint


def reach(monkeypatch: pytest.MonkeyPatch, endpoint: str, key: str = servers.KEY) -> None:
    """This process and its children reach the server from now on."""
    for name, value in servers.s3_environment(endpoint, key).items():
        monkeypatch.setenv(name, value)


def bucket(monkeypatch: pytest.MonkeyPatch, endpoint: str, key: str = servers.KEY) -> str:
    """The URL of a new bucket of the server, which is reached from now on."""
    reach(monkeypatch, endpoint, key)
    from ckpt.stores.s3 import S3Bucket

    name = f"bucket-{uuid.uuid4()}"
    S3Bucket(name)._call("make", "", "create_bucket")
    return f"s3://{name}"


class ObjectConformance(StoreConformance):
    directories = False


class TestMoto(ObjectConformance):
    @pytest.fixture
    def open_again(self, moto_server: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Store]:
        url = f"{bucket(monkeypatch, moto_server)}/some/run"
        return lambda: open_store(url)

    def test_it_fences(self, store: Store) -> None:
        assert store.capabilities.fences


class TestCeph(ObjectConformance):
    @pytest.fixture
    def open_again(self, ceph_server: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Store]:
        url = f"{bucket(monkeypatch, ceph_server)}/some/run"
        return lambda: open_store(url)

    def test_it_fences(self, store: Store) -> None:
        assert store.capabilities.fences


@pytest.mark.prove  # four servers in Python, which take their time
class TestSwift(ObjectConformance):
    racing = False

    @pytest.fixture
    def open_again(self, swift_server: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Store]:
        url = f"{bucket(monkeypatch, swift_server, servers.SWIFT_KEY)}/some/run"
        return lambda: open_store(url)

    def test_only_the_race_speaks_against_it(self, store: Store) -> None:
        found = examine(store)
        print([(trial.name, trial.seen) for trial in found.trials if not trial.ok])
        assert found.usable
        assert {trial.name for trial in found.trials if not trial.ok} <= {"race"}


class TestAzurite(ObjectConformance):
    @pytest.fixture
    def open_again(self, azurite_server: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Store]:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azurite_server)
        import fsspec

        name = f"container-{uuid.uuid4()}"
        fsspec.filesystem("az", skip_instance_cache=True).mkdir(name)
        url = f"az://{name}/some/run"
        return lambda: open_store(url)

    def test_it_fences(self, store: Store) -> None:
        assert store.capabilities.fences


class TestRclone(ObjectConformance):
    racing = False

    @pytest.fixture
    def open_again(self, rclone_server: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Store]:
        reach(monkeypatch, rclone_server)
        url = f"s3://bucket/{uuid.uuid4()}"
        return lambda: open_store(url)

    def test_it_is_not_believed(self, store: Store) -> None:
        assert not store.capabilities.exclusive_create
        assert not store.capabilities.fences

    def test_create_is_exclusive_and_makes_parents(self, store: Store, open_again: Callable[[], Store]) -> None:
        pytest.skip("it lies: creates overwrite")


@pytest.mark.prove
def test_gcs_pieces_become_one_object_or_go_with_their_attempt(
    gcs_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gcsfs", reason="gcsfs is not installed here: `make prove` brings it")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server)
    from ckpt.stores.gcs import GcsBucket

    bucket, attempt = GcsBucket("gs", "bucket"), f"{uuid.uuid4()}/attempt"
    pieces = [bytes([48 + index]) * (index + 1) for index in range(70)]  # more than one request composes
    upload, _ = bucket.upload(f"{attempt}/data", sum(map(len, pieces)))
    for index in reversed(range(70)):
        upload.part(index, pieces[index])
    upload.complete()
    assert bucket.get(f"{attempt}/data", 0, None) == b"".join(pieces)
    left, _ = bucket.upload(f"{attempt}/other", 2)
    left.part(0, b"1")
    left.part(1, b"2")
    assert len(bucket.list(f"{attempt}/", deep=True)) == 3
    store = open_store(f"gs://bucket/{attempt}")
    open_store(f"gs://bucket/{attempt.partition('/')[0]}").clear("attempt", lambda name: False)
    assert store.list("") == ["data"]


@pytest.mark.prove  # its server is in Python, too
class TestGcs(ObjectConformance):
    """Google's own service refuses a second create; its emulator does not know the condition."""

    racing = False

    @pytest.fixture
    def open_again(self, gcs_server: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Store]:
        pytest.importorskip("gcsfs", reason="gcsfs is not installed here: `make prove` brings it")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server)
        url = f"gs://bucket/{uuid.uuid4()}"
        return lambda: open_store(url)

    def test_it_is_not_believed(self, store: Store) -> None:
        assert not store.capabilities.fences

    def test_create_is_exclusive_and_makes_parents(self, store: Store, open_again: Callable[[], Store]) -> None:
        pytest.skip("it lies: creates overwrite")


# What is found out about them


@pytest.mark.parametrize("server", ["moto_server", "ceph_server"])
def test_doctor_trusts_what_can_be_trusted(
    server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket(monkeypatch, request.getfixturevalue(server))
    found = examine(open_store(f"{url}/run"))
    assert [trial.seen for trial in found.trials if not trial.ok] == []
    assert found.fences
    assert not open_store(url).exists("run")


def test_bench_measures_a_bucket_and_leaves_it_as_it_was(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket(monkeypatch, moto_server)
    rates = measure(open_store(f"{url}/run"), 8 << 20, digest, lambda nbytes: None)
    assert min(asdict(rates).values()) > 0
    assert not open_store(url).exists("run")


def test_doctor_finds_the_liar_out(rclone_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reach(monkeypatch, rclone_server)
    found = examine(ObjectStore(Retried(s3.S3Bucket("bucket"), retry_s=2.0), str(uuid.uuid4())))
    assert found.usable
    assert not found.fences
    assert [trial.name for trial in found.trials if not trial.ok] == ["create", "race"]


def test_a_store_that_lies_needs_a_promise(
    rclone_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reach(monkeypatch, rclone_server)
    url = f"s3://bucket/{uuid.uuid4()}"
    with pytest.raises(Incompatible, match="strict_fencing=False"):
        ckpt.Checkpointer(url)
    with ckpt.Checkpointer(url, strict_fencing=False) as checkpointer:
        assert "your promise" in caplog.text
        checkpointer.save(1, {"n": 1}, blocking=True)
        checkpointer.save(2, {"n": 2}, blocking=True)
        checkpointer.save(3, {"n": 3}, blocking=True)
    forget()
    for command in (["pin", url, "1"], ["gc", url, "--last", "1", "--takeover"], ["cp", url, f"{url}2"]):
        with pytest.raises(Incompatible, match="--no-strict-fencing"):
            CliRunner().invoke(cli, command, catch_exceptions=False)
        assert command[0] == "cp" or ckpt.load(url, step=2) == {"n": 2}, "nothing was written"
        CliRunner().invoke(cli, [*command, "--no-strict-fencing"], catch_exceptions=False)
    assert [commit.step for commit in RunDirectory.open(url).log.read().standing()] == [1, 3]
    assert ckpt.load(f"{url}2") == {"n": 3}


def test_an_upload_without_a_byte(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 does not complete one without a part."""
    store = open_store(f"{bucket(monkeypatch, moto_server)}/run")
    store.write_data("steps/000000001.a/r00000.packed", 5000).finish(0)
    assert store.size("steps/000000001.a/r00000.packed") == 0


def test_a_name_far_behind_the_end_of_the_log(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can write there makes a reader ask for a few slots, not for two billion."""
    url = f"{bucket(monkeypatch, moto_server)}/run"
    RunDirectory.open(url, create=True)
    open_store(url).put("log/1999999999.json", b"")
    asked: list[str] = []
    get = s3.S3Bucket.get
    monkeypatch.setattr(s3.S3Bucket, "get", lambda self, key, *where: (asked.append(key), get(self, key, *where))[1])
    with pytest.raises(Corrupt, match="is missing although later records exist"):
        RunDirectory.open(url).log.read()
    assert len(asked) < 300


# Faults on the way


def requests_and_data(store: Store, direct: Store, fail: Callable[[bool], None]) -> None:
    """A run is made, six records and two files are written through faults: what was acknowledged stands there once."""
    log = RunDirectory.at(store, create=True).log
    log._sleep = lambda seconds: None
    for number in range(6):
        log.append(lambda view, number=number: Request(nonce=f"n{number}", verb="pin", arguments={}))  # type: ignore[misc]
    with pages(12 << 20) as data:
        for name in ("r00000.safetensors", "r00001.safetensors"):
            writer = store.write_data(f"steps/000000001.a/{name}", len(data))
            for at in range(0, len(data), 3 << 20):
                writer.write(at, data[at : at + (3 << 20)])
            writer.finish()
        store.put("steps/000000001.a/MANIFEST", b"all")
        fail(False)
        for name in ("r00000.safetensors", "r00001.safetensors"):
            assert direct.read(f"steps/000000001.a/{name}", limit_bytes=len(data)) == data
    view = RunLog(direct).read()
    assert [request.nonce for _, request in view.requests] == [f"n{number}" for number in range(6)]
    assert not view.ignored
    assert direct.read("steps/000000001.a/MANIFEST", limit_bytes=3) == b"all"
    direct.delete("steps/000000001.a")
    assert direct.list("") == ["FORMAT.json", "log"]


def through_faults(
    server: str, seed: int, monkeypatch: pytest.MonkeyPatch, *faults: str, rate: float = 0.25
) -> dict[str, int]:
    url = bucket(monkeypatch, server)
    direct = ObjectStore(Retried(s3.S3Bucket(url.removeprefix("s3://"))), "run")
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    with faulty(server, seed, rate, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = ObjectStore(Retried(s3.S3Bucket(url.removeprefix("s3://"))), "run")

        def fail(on: bool) -> None:
            proxy.failing = on

        requests_and_data(store, direct, fail)
        found = direct._bucket._bucket._call("list", "", "list_multipart_uploads").get("Uploads", [])  # type: ignore[attr-defined]
        assert not found, "unfinished uploads are left"
        return dict(proxy.met)


@pytest.mark.parametrize("seed", range(4))
def test_what_was_acknowledged_stands_there_once(seed: int, moto_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    met = through_faults(moto_server, seed, monkeypatch, *QUICK)
    print(f"seed {seed}: {met}")
    assert sum(met.values()) > met[""]


@pytest.mark.prove
def test_what_was_acknowledged_stands_there_once_500_times(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(100, 100 + int(os.environ.get("HOLDFAST_STORE_SEEDS", "500"))):
        print(f"seed {seed}")
        through_faults(moto_server, seed, monkeypatch, *QUICK)


def test_a_store_that_stalls_or_trickles_is_asked_again(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "REQUEST_S", 6.0)
    monkeypatch.setattr(s3, "SILENT_S", 4)
    met = through_faults(moto_server, 3, monkeypatch, "stall", "trickle", rate=0.08)
    assert met.get("stall", 0) + met.get("trickle", 0) > 0


def azure_bucket(monkeypatch: pytest.MonkeyPatch, connection: str, name: str) -> AzureBucket:
    """The container `name`, which is made if it is not there, reached by `connection`."""
    kind = fsspec.get_filesystem_class("az")
    kind.clear_instance_cache()  # an instance is known by its arguments, not by the environment
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
    return AzureBucket("az", name)


def before_azure(proxy: Proxy, connection: str) -> str:
    endpoint = urlsplit(connection.partition("BlobEndpoint=")[2].partition(";")[0])
    return connection.replace(f"{endpoint.scheme}://{endpoint.netloc}", proxy.url)


@pytest.mark.parametrize("seed", range(2))
def test_what_was_acknowledged_stands_there_once_in_azure(
    seed: int, azurite_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anyfs, "REQUEST_S", 5.0)  # its client would wait for longer before it asks again
    name = f"container-{uuid.uuid4()}"
    bucket = azure_bucket(monkeypatch, azurite_server, name)
    bucket._fs.mkdir(name)
    direct = ObjectStore(Retried(bucket), "run")
    with faulty(azurite_server.partition("BlobEndpoint=")[2], seed, 0.25, QUICK) as proxy:
        faulted = azure_bucket(monkeypatch, before_azure(proxy, azurite_server), name)

        def fail(on: bool) -> None:
            proxy.failing = on

        requests_and_data(ObjectStore(Retried(faulted), "run"), direct, fail)
        print(f"seed {seed}: {proxy.met}")
        assert sum(proxy.met.values()) > proxy.met[""]


def once(fault: str) -> int:
    """The requests of an exclusive create, at most: aiohttp repeats one whose kept connection was closed."""
    return 2 if fault in ("reset", "lost", "cut") else 1


@pytest.mark.parametrize("fault", ["stall", "503"])
def test_a_storm_before_azure_ends_at_its_deadline(
    fault: str, azurite_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its client thinks of when to ask again."""
    monkeypatch.setattr(anyfs, "REQUEST_S", 1.0)
    with faulty(azurite_server.partition("BlobEndpoint=")[2], 0, rate=1.0, faults=[fault]) as proxy:
        bucket = azure_bucket(monkeypatch, before_azure(proxy, azurite_server), "c")
        store = ObjectStore(Retried(bucket, retry_s=3.0), "run")
        began = monotonic()
        for act in (lambda: store.put("x", b"data"), lambda: store.size("x"), lambda: store.list("x")):
            with pytest.raises(StorageError, match=r"gave up after \d+ tries in \d s, the last"):
                act()
        asked = proxy.met.total()
        with pytest.raises(OutcomeUnknown, match=r"create az://c/run/y"):
            store.create("y", b"data")
        assert monotonic() - began < 40
        assert proxy.met.total() <= asked + once(fault), "an exclusive create was asked for again"


@pytest.mark.prove  # its server is in Python, too
@pytest.mark.parametrize("fault", ["500", "503", "429", "reset"])
def test_google_is_asked_once_for_an_exclusive_create(
    fault: str, gcs_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gcsfs", reason="gcsfs is not installed here: `make prove` brings it")
    from ckpt.stores.gcs import GcsBucket

    fsspec.get_filesystem_class("gs").clear_instance_cache()
    with faulty(gcs_server, 0, rate=1.0, faults=[fault]) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        store = ObjectStore(Retried(GcsBucket("gs", "bucket")), "run")
        with pytest.raises(OutcomeUnknown, match=r"create gs://bucket/run/y"):
            store.create("y", b"data")
        assert proxy.met.total() <= once(fault)


@pytest.mark.parametrize("fault", ALL)
def test_a_storm_ends_at_its_deadline(fault: str, moto_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket(monkeypatch, moto_server)
    monkeypatch.setattr(s3, "REQUEST_S", 1.0)
    with faulty(moto_server, 0, rate=1.0, faults=[fault]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = ObjectStore(Retried(s3.S3Bucket(url.removeprefix("s3://")), retry_s=3.0), "run")
        with pytest.raises(StorageError, match=r"put s3://bucket-.*/run/x: gave up after \d+ tries in \d s, the last"):
            store.put("x", b"data")
        asked = proxy.met.total()
        with pytest.raises(OutcomeUnknown, match=r"create s3://bucket-.*/run/y"):
            store.create("y", b"data")
        assert proxy.met.total() <= asked + once(fault), "an exclusive create was asked for again"


def test_an_unknown_bucket_and_wrong_keys_say_what_to_do(moto_server: str, ceph_server: str, monkeypatch: Any) -> None:
    bucket(monkeypatch, ceph_server)
    with pytest.raises(StorageError, match=r"NoSuchBucket.*is the name of the bucket right"):
        ckpt.load(f"s3://{uuid.uuid4()}/run")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="check the credentials"):
        ckpt.load(f"s3://{uuid.uuid4()}/run")


# Runs that live there


def save_there(rank: int, world: int, url: str, environment: dict[str, str]) -> dict[str, Any]:
    os.environ.update(environment)
    training = build("fsdp2", rank, world, seed=1)
    with ckpt.Checkpointer(url) as checkpointer:
        for step in (1, 2, 3):
            training.train(1)
            checkpointer.save(step, training.state)
    return full_state(training.model, training.optim)


def restore_from_there(rank: int, world: int, url: str, environment: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    os.environ.update(environment)
    training = build("fsdp2", rank, world, seed=2)
    with ckpt.Checkpointer(url) as checkpointer:
        step = checkpointer.restore(training.state)
    return step, full_state(training.model, training.optim)


@pytest.mark.prove
def test_a_run_moves_between_world_sizes(pool: Pool, ceph_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url, environment = f"{bucket(monkeypatch, ceph_server)}/run", servers.s3_environment(ceph_server)
    saved = pool.results(save_there, 2, url, environment)
    forget()  # what is restored comes from the bucket
    for world in (1, 3):
        restored = pool.results(restore_from_there, world, url, environment)
        assert {step for step, _ in restored} == {3}
        assert_same_state(saved, [full for _, full in restored])
    assert json.loads(_ckpt("ls", url, "--json"))["head"] == 3
    assert "every digest matches" in _ckpt("check", url, "--all")


def _ckpt(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "ckpt.cli", *words], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout


def save_through_faults(rank: int, world: int, url: str, environment: dict[str, str]) -> list[int]:
    os.environ.update(environment)
    with ckpt.Checkpointer(url, keep=ckpt.Keep(last=2)) as checkpointer:
        for step in range(1, 6):
            checkpointer.save(step, state_of(step, world))
        checkpointer.wait_until_finished(100)
        until("all but the two newest steps are deleted", lambda: checkpointer.all_steps() == [4, 5], 60)
        return checkpointer.all_steps()


@pytest.mark.parametrize("seed", [11])
def test_saves_and_retention_through_faults(seed: int, moto_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{bucket(monkeypatch, moto_server)}/run"
    with faulty(moto_server, seed, rate=0.15) as proxy:
        outcomes = run_job(save_through_faults, 2, url, servers.s3_environment(proxy.url))
        print(f"seed {seed}: {proxy.met}")
        proxy.failing = False
        assert [outcome.result for outcome in outcomes] == [[4, 5]] * 2, [outcome.output for outcome in outcomes]
        forget()
    assert json.loads(_ckpt("check", url, "--all", "--json"))["ok"]
    state = ckpt.load(url)
    assert steps_seen(state) == {5.0}


def die_after_copy(rank: int, world: int, url: str, environment: dict[str, str], kill_keeper: bool) -> None:
    os.environ.update(environment)
    checkpointer = ckpt.Checkpointer(url, commit_timeout_s=TIMEOUT_S)
    checkpointer.save(1, state_of(1, world), blocking=True)
    checkpointer.save(2, state_of(2, world)).wait_copied()
    if kill_keeper and rank == 0:
        kill_keepers(os.environ["CKPT_RAM_DIR"])
    os._exit(9)


@pytest.mark.parametrize("kill_keeper", [False, True])
def test_workers_and_keeper_die(
    kill_keeper: bool, pool: Pool, moto_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, environment = f"{bucket(monkeypatch, moto_server)}/run", servers.s3_environment(moto_server)
    run_job(die_after_copy, 2, url, environment, kill_keeper)
    pool.results(set_environment, 2, environment)
    check_restart(pool, url, 2, {1, 2} if kill_keeper else {2})


def set_environment(rank: int, world: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
