"""Changes that are planned lose no step: all ranks stop at one step, the next generation goes on from exactly that."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from agents import Cluster
from test_elastic_cli import elastic, end_of

from ckpt.board import Board, Place
from ckpt.run import RunDirectory


def as_host(name: str) -> list[str]:
    """A host name of its own."""
    return ["unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]


def add(cluster: Cluster, name: str, nodes: str = "1:3") -> None:
    at_once = {"ELASTIC_JOIN_WINDOW_S": "0", "ELASTIC_MIN_INTERVAL_S": "0"}
    cluster.add(name, nodes, before=as_host(f"host-{name}"), loop=["steps"], **at_once)


def goes_on(cluster: Cluster, nodes: set[str], after: int) -> int:
    """Wait until `nodes` train in a later generation; it began where the one before it had stopped."""
    found = cluster.trains(nodes, after=after)
    assert found == after + 1
    begun = {worker["step"] for worker in cluster.workers(found).values()}
    assert begun == {cluster.last_step(after)}, "it goes on from exactly the agreed step"
    return found


def check_steps(cluster: Cluster) -> None:
    """Every step was made once by every rank of one generation, and none is missing."""
    steps = [event for event in cluster.said() if event["what"] == "step"]
    by_step: dict[int, list[tuple[int, int, int]]] = {}
    for event in steps:
        by_step.setdefault(event["step"], []).append((event["generation"], event["rank"], event["world"]))
    assert sorted(by_step) == list(range(1, max(by_step) + 1))
    for step, made in by_step.items():
        assert sorted(made) == [(made[0][0], rank, made[0][2]) for rank in range(made[0][2])], f"step {step}: {made}"
    wrong = [event for event in cluster.said() if event["what"] == "restored" and not event["right"]]
    assert not wrong, f"restored something else than what was saved: {wrong}"


def test_planned_changes_lose_no_step(tmp_path: Path) -> None:
    """A node joins, one is drained, the leader gets SIGTERM, a worker has its node leave, the last one gets SIGTERM."""
    with Cluster(tmp_path) as cluster:
        add(cluster, "a")
        add(cluster, "b")
        cluster.until("two nodes train", lambda: len(cluster.workers(cluster.generation())) == 2)
        generation = cluster.trains({"a", "b"}, after=cluster.generation() - 1)
        add(cluster, "c")
        generation = goes_on(cluster, {"a", "b", "c"}, generation)

        leader = cluster.leader()
        drained, other = sorted({"a", "b", "c"} - {leader})
        code, said = end_of(elastic(tmp_path, "drain", f"host-{drained}", "run"))
        assert code == 0, said
        generation = goes_on(cluster, {leader, other}, generation)
        assert cluster.agents[drained].wait() == 143
        assert cluster.log_has(leader, f"host-{drained} leaves: it is cordoned")

        cluster.agents[leader].process.send_signal(signal.SIGTERM)
        generation = goes_on(cluster, {other}, generation)
        assert cluster.agents[leader].wait() != 0
        assert not cluster.log_has(other, "counter stood still for [1-9].*host-"), "a leader that leaves says so"

        add(cluster, "d")
        generation = goes_on(cluster, {other, "d"}, generation)
        (cluster.events / "leave-d").touch()
        generation = goes_on(cluster, {other}, generation)
        assert cluster.agents["d"].wait() == 143
        assert cluster.log_has(other, "host-d leaves: a test wants it")

        cluster.agents[other].process.send_signal(signal.SIGTERM)
        assert cluster.agents[other].wait() != 0
        view = RunDirectory.open(cluster.run).log.read()
        assert view.head is not None
        assert view.head.step == cluster.last_step(), "everything is saved"
        check_steps(cluster)


@pytest.mark.prove
def test_all_of_four_nodes_get_sigterm_at_once_and_the_next_job_goes_on_from_there(tmp_path: Path) -> None:
    """As where a whole allocation is preempted: everything is saved, and nothing is computed again."""
    with Cluster(tmp_path) as cluster:
        for name in "abcd":
            add(cluster, name, "4:4")
        cluster.until("four nodes train", lambda: len(cluster.workers(cluster.generation())) == 4)
        generation = cluster.generation()
        cluster.until("they make steps", lambda: cluster.last_step(generation) > 5)
        for agent in cluster.agents.values():
            agent.process.send_signal(signal.SIGTERM)
        codes = {name: agent.wait() for name, agent in cluster.agents.items()}
        assert 0 not in codes.values(), codes
        head = RunDirectory.open(cluster.run).log.read().head
        assert head is not None
        assert head.step == cluster.last_step(), "everything is saved"
        for name in "abcd":
            add(cluster, name, "4:4")
        cluster.until("four nodes train again", lambda: len(cluster.workers(cluster.generation())) == 4)
        cluster.until("they make steps", lambda: cluster.last_step() > head.step + 5)
        cluster.finish()
        assert {agent.wait() for agent in cluster.agents.values()} == {0}
        check_steps(cluster)


def test_a_board_carries_what_either_end_says(tmp_path: Path) -> None:
    board = Board()
    assert board.workers() == []
    place = Place.of({"CKPT_BOARD": board.path, "LOCAL_RANK": "3"})
    assert place is not None
    assert not place.asked
    (seen,) = board.workers()
    assert (seen.local_rank, seen.pid, seen.heeds, seen.paused, seen.leaves) == (3, os.getpid(), False, False, None)
    place.heed()
    place.moved(1 << 40)
    place.leave("é" * 100, 1.5)
    board.ask()
    assert place.asked
    place.pause()
    place.heed()
    (seen,) = board.workers()
    assert (seen.step, seen.heeds, seen.paused) == (1 << 40, True, True)
    assert seen.leaves == ("é" * 64, 1.5)
    board.close()
    assert place.asked, "who has it keeps it"


def test_without_a_board_there_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x")
    (tmp_path / "other").write_bytes(bytes(257 * 256))
    for path in ("", str(tmp_path / "nothing"), str(tmp_path / "short"), str(tmp_path / "other")):
        assert Place.of({"CKPT_BOARD": path, "LOCAL_RANK": "0"}) is None
    board = Board()
    for rank in ("", "x", "256"):
        assert Place.of({"CKPT_BOARD": board.path, "LOCAL_RANK": rank}) is None
    board.close()
