"""Records at tcp://host:port keep what any store promises, belong to one job, and end with the agent that has them."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agents import Cluster
from netns import network
from test_elastic_cli import elastic, end_of
from test_rendezvous import check_end

from ckpt.errors import Fenced, Incompatible, NotFound, StorageError
from ckpt.run import RunDirectory
from ckpt.store import Store
from ckpt.testing.conformance import RecordConformance
from elastic import registry
from elastic.registry import Records, Registry, RegistryStore, address_of, join_run, open_run, token_of

TOKEN = b"t" * 32


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class TestRegistry(RecordConformance):
    directories = False

    @pytest.fixture
    def open_again(self) -> Iterator[Callable[[], Store]]:
        port, opened = free_port(), list[RegistryStore]()
        served = Registry("127.0.0.1", port, TOKEN)

        def again() -> Store:
            opened.append(RegistryStore("127.0.0.1", port, TOKEN))
            return opened[-1]

        yield again
        for store in opened:
            store.close()
        served.close()


@pytest.mark.parametrize(
    "url", ["tcp://", "tcp://host", "tcp://host:0", "tcp://host:70000", "tcp://h:1/x", "tcp://a b:"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(Incompatible, match="expected tcp://host:port"):
        address_of(url)


def test_a_job_needs_a_name_and_another_job_is_refused() -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    assert address_of("tcp://[::1]:29") == ("::1", 29)
    with pytest.raises(Incompatible, match="--rdzv-id"):
        token_of(url, None)
    run, served = join_run(url, "job")
    assert served is not None
    try:
        other, none = join_run(url, "job")
        assert none is None, "another agent of that host"
        assert other.nonce == run.nonce
        assert open_run(url, "job").nonce == run.nonce
        with pytest.raises(Incompatible, match="belongs to another job"):
            join_run(url, "other")
        with pytest.raises(StorageError, match="no checkpoints"):
            run.store.write_data("steps/x", 1)
    finally:
        served.close()


def test_one_that_was_started_again_is_not_taken_for_the_first_and_one_that_is_gone_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "APPEAR_LIMIT_S", 0.0)
    monkeypatch.setattr(registry, "APPEAR_WAIT_S", 0.01)
    url = f"tcp://127.0.0.1:{free_port()}"
    run, served = join_run(url, "job")
    assert served is not None
    served.close()
    with pytest.raises(StorageError, match="log at tcp://127"):
        run.log.read()
    _, served = join_run(url, "job")
    assert served is not None
    with pytest.raises(Fenced, match="was started again") as caught:
        run.log.read()
    assert caught.value.exit_code == 75, "not as where another job has the run: to start again helps"
    served.close()
    monkeypatch.setattr(registry, "CALL_LIMIT_S", 0.05)
    with pytest.raises(StorageError, match=r"Nobody serves tcp://192\.0\.2\.1:9"):
        join_run("tcp://192.0.2.1:9", "job")


def test_it_is_bounded() -> None:
    records = Records(limit_bytes=10)
    assert records.answer(registry.Ask("put", "a", b"12345")).error == ""
    assert records.answer(registry.Ask("put", "b", b"123456")).error == "StorageError"
    assert records.answer(registry.Ask("eat", "b")).error == "StorageError"


def test_nodes_without_shared_storage_lose_one_and_go_on(tmp_path: Path) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    with Cluster(tmp_path, endpoint=url) as cluster:
        for name in "ab":
            cluster.add(name, "1:2")
        cluster.until("two train", lambda: len(cluster.workers(cluster.generation())) == 2)
        generation = cluster.generation()
        code, said = end_of(elastic(tmp_path, "status", "--run-id", "job", "--json", url))
        assert code == 0, said
        assert (json.loads(said)["state"], len(json.loads(said)["members"])) == ("led", 2)
        keeps = next(name for name in "ab" if cluster.log_has(name, "this agent keeps the job's records"))
        lost = next(name for name in "ab" if name != keeps)
        cluster.agents[lost].lose_node(cluster.pid_of_worker(lost, generation))
        cluster.until("the other goes on", lambda: set(cluster.workers(cluster.generation())) == {keeps})
        cluster.finish()
        assert cluster.agents[keeps].wait() == 0
        assert not [event for event in cluster.said() if event["what"] == "restored" and not event["right"]]
        head = RunDirectory.open(cluster.run).log.read().head
        assert head is not None
        assert head.step == cluster.last_step()
    with pytest.raises(StorageError):
        open_run(url, "job")
    with pytest.raises(NotFound):
        open_run(str(tmp_path / "none"), None)


@pytest.mark.prove
def test_nodes_with_networks_of_their_own_lose_a_worker_a_link_and_the_leader(tmp_path: Path) -> None:
    """Only the node whose address is named must stay; a link that is cut ends no job, and the node comes back.

    That steps were saved between two failures is known though the records are not where the checkpoints are.
    """
    with network() as net, Cluster(tmp_path, endpoint=f"tcp://10.231.77.1:{free_port()}") as cluster:
        for name in "abc":
            before = net.add(name)
            cluster.add(name, "1:3", before=before, GLOO_SOCKET_IFNAME="", ELASTIC_FRUITLESS_LIMIT="2")
        first = cluster.trains({"a", "b", "c"})
        assert cluster.log_has("a", "this agent keeps the job's records")
        os.kill(cluster.pid_of_worker("b", first), signal.SIGKILL)
        second = cluster.trains({"a", "b", "c"}, after=first)
        net.cut("c")
        third = cluster.trains({"a", "b"}, after=second)
        net.heal("c")
        fourth = cluster.trains({"a", "b", "c"}, after=third)
        lost = leader if (leader := cluster.leader()) != "a" else "b"
        cluster.agents[lost].lose_node(cluster.pid_of_worker(lost, fourth))
        left = {"a", "b", "c"} - {lost}
        cluster.trains(left, after=fourth)
        check_end(cluster, *left)


@pytest.mark.prove
def test_when_the_agent_with_the_records_is_lost_all_start_again_and_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    with Cluster(tmp_path, endpoint=f"tcp://127.0.0.1:{free_port()}") as cluster:
        for name in "ab":
            cluster.add(name, "2:2")
        generation = cluster.trains({"a", "b"})
        keeps = next(name for name in "ab" if cluster.log_has(name, "this agent keeps the job's records"))
        other = next(name for name in "ab" if name != keeps)
        cluster.agents[keeps].lose_node(cluster.pid_of_worker(keeps, generation))
        cluster.until("the other has stopped", lambda: cluster.log_has(other, "this node's workers end"))
        before = cluster.last_step()
        cluster.add(keeps, "2:2")
        assert cluster.agents[other].wait() == 75
        cluster.add(other, "2:2")
        cluster.until("both train again", lambda: cluster.last_step() > before + 3)
        assert not [event for event in cluster.said() if event["what"] == "restored" and not event["right"]]
        cluster.finish()
        assert [cluster.agents[name].wait() for name in "ab"] == [0, 0]
