"""Real jobs under stock torchrun whose workers, agents and leaders are killed: the training goes on, and ends well."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import servers
from agents import ROOT, Cluster
from elastic_worker import GLOBAL_BATCH, SAMPLES
from netns import network
from test_elastic_cli import elastic, end_of
from test_objects import bucket

from ckpt.records import Start
from ckpt.run import RunDirectory
from elastic.chaos.ground import CLOCK_SITE

BATCHES = -(-SAMPLES // GLOBAL_BATCH)
LAST_BATCH = SAMPLES - (BATCHES - 1) * GLOBAL_BATCH


def check_restores(cluster: Cluster) -> None:
    """Every state that was restored was the saved one."""
    wrong = [event for event in cluster.said() if event["what"] == "restored" and not event["right"]]
    assert not wrong, f"restored something else than what was saved: {wrong}"


def check_ledger(cluster: Cluster) -> None:
    """Every committed step has a whole batch, and every pass over the data has each sample exactly once."""
    ledger = cluster.ledger()
    for first in range(0, len(ledger), BATCHES):
        of_pass = ledger[first : first + BATCHES]
        assert [len(batch) for batch in of_pass] == [*[GLOBAL_BATCH] * (BATCHES - 1), LAST_BATCH][: len(of_pass)]
        samples = [i for batch in of_pass for i in batch]
        assert len(set(samples)) == len(samples), f"steps from {first + 1} on have a sample twice: {of_pass}"


def check_end(cluster: Cluster, *alive: str) -> None:
    cluster.finish()
    codes = {name: cluster.agents[name].wait() for name in alive}
    assert set(codes.values()) == {0}, f"agents ended with {codes}"
    check_restores(cluster)
    check_ledger(cluster)


def check_report(folder: Path) -> None:
    """What the agents wrote tells of the killed worker, three generations, and where the time went."""
    code, said = end_of(elastic(folder, "report", "run", "--json", "--html", "report.html"))
    assert code == 0, said
    found = json.loads(said)
    assert found["figures"]["generations"] == 3
    assert any("was killed by signal 9" in one["what"] and one["generation"] == 1 for one in found["failures"]), found
    assert all(one["recovered_at"] is not None for one in found["failures"]), found
    spent = found["figures"]["split_s"]
    assert abs(sum(spent.values()) - found["figures"]["seconds"]) < 1, found
    assert "rendezvous" in (folder / "report.html").read_text()


def test_a_worker_and_then_the_leader_are_killed(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        for name in "abc":
            told = {"ELASTIC_HOOKS": "elastic_hooks:Told", "TEST_TOLD": str(tmp_path / f"{name}.told")}
            cluster.add(name, "1:3", TEST_DIES="order before 5", TEST_LOADERS="1", **told)
        second = cluster.trains({"a", "b", "c"}, after=1)
        ranks = {name: worker["rank"] for name, worker in cluster.workers(1).items()}
        at = cluster.last_step(1)
        late = [name for name in "abc" if cluster.log_has(name, "may be lost")]
        assert not late, f"the keepers of {late} waited for a rank that could not come any more"
        assert {name: worker["rank"] for name, worker in cluster.workers(second).items()} == ranks
        begun = {worker["step"] for worker in cluster.workers(second).values()}
        assert len(begun) == 1
        assert begun.pop() >= at - 1, "a killed worker costs one step at most: the keeper stores what was copied"

        leader = cluster.leader()
        left = {"a", "b", "c"} - {leader}
        worker = cluster.pid_of_worker(leader, second)
        cluster.agents[leader].lose_node(worker)
        cluster.trains(left, after=second)
        late = [name for name in left if cluster.log_has(name, "may be lost")]
        assert not late, f"the keepers of {late} waited for the one that was lost"
        assert not Path(f"/proc/{worker}").exists(), "the workers of an agent that died are dead, too"
        check_end(cluster, *left)

    check_report(tmp_path)
    last = min(left)
    told = [json.loads(line) for line in (tmp_path / f"{last}.told").read_text().splitlines()]
    assert [(e["world"], len(e["joined"]), len(e["left"])) for e in told if e["hook"] == "on_membership"] == [
        (3, 3, 0), (3, 0, 0), (2, 0, 1)
    ]  # fmt: skip
    assert told[-1]["hook"] == "on_leave"
    failed = [
        line for name in "abc" for line in (tmp_path / f"{name}.told").read_text().splitlines() if "exit_code" in line
    ]
    assert any(json.loads(line)["signal"] == 9 for line in failed)


def as_host(name: str) -> list[str]:
    """A host name of its own, so that nobody can tell from here whether its processes live."""
    return ["unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]


def test_a_spare_takes_over_and_below_min_the_job_waits(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        for name in "abc":
            cluster.add(name, "2:2")
        cluster.until("two nodes train", lambda: cluster.last_step() > 2)
        working = set(cluster.workers(1))
        (spare,) = set("abc") - working
        first = cluster.trains(working)
        ranks = {name: worker["rank"] for name, worker in cluster.workers(first).items()}
        leader = cluster.leader()
        (victim,) = working - {leader}

        cluster.agents[victim].kill()
        second = cluster.trains({leader, spare}, after=first)
        assert cluster.workers(second)[spare]["rank"] == ranks[victim]
        assert cluster.workers(second)[leader]["rank"] == ranks[leader]

        cluster.agents[spare].kill()
        cluster.until("the job says what it waits for", lambda: cluster.log_has(leader, "at least 2 are needed"))
        assert cluster.generation() == second
        cluster.add("d", "2:2")
        cluster.trains({leader, "d"}, after=second)
        cluster.add("e", "2:2")
        cluster.until("there is a spare", lambda: cluster.log_has("e", "follows"))
        check_end(cluster, leader, "d", "e")


@pytest.mark.prove  # planned joins, and a lost leader, are in `make test` one by one
def test_a_node_joins_and_then_its_host_leads_alone(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.add("a", "1:2", before=as_host("host-a"), ELASTIC_JOIN_WINDOW_S="0")
        first = cluster.trains({"a"})
        stranger = cluster.add("stranger", "1:2", run_id="another-job")
        cluster.add("b", "1:2", before=as_host("host-b"))
        second = cluster.trains({"a", "b"}, after=first)
        assert stranger.wait() == 11
        assert cluster.log_has("stranger", "another job than host-a.*run_id")
        grown = cluster.workers(second)
        assert {worker["rank"] for worker in grown.values()} == {0, 1}
        assert grown["a"]["rank"] == 0
        assert grown["a"]["step"] >= cluster.last_step(first) - 2, "a larger membership begins right after a commit"

        cluster.agents["a"].kill()
        cluster.trains({"b"}, after=second)
        assert cluster.log_has("b", "counter stood still"), "one of two waits until the leader's counter stands still"
        check_end(cluster, "b")


def test_a_rank_that_hangs_is_named_and_the_job_starts_again(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        for name in "ab":
            cluster.add(name, "2:2", loop=["steps"], TEST_HANGS="1", ELASTIC_HANG_LIMIT_S="5")
        cluster.until("rank 1 hangs", (cluster.events / "hung").exists)
        hung = cluster.generation()
        cluster.trains({"a", "b"}, after=hung)
        (one,) = {name for name, worker in cluster.workers(hung).items() if worker["rank"] == 1}
        (other,) = {"a", "b"} - {one}
        assert cluster.log_has(
            cluster.leader(), r"ends: rank . has made no step for . s, since step .*: rank 1 in hang_once "
        )
        assert cluster.log_has(one, "in hang_once"), "the log has all stacks in full"
        assert cluster.log_has(other, "in broadcast|in all_reduce|in wait")
        check_end(cluster, "a", "b")


def test_with_too_few_nodes_the_job_ends_in_time(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        agent = cluster.add("a", "2:3", ELASTIC_JOIN_WINDOW_S="0", ELASTIC_MIN_WAIT_S="1")
        assert agent.wait() == 75
        assert cluster.log_has("a", "1 nodes are here, at least 2 are needed")
        assert not cluster.said()


def test_the_leaders_link_dies_and_comes_back(tmp_path: Path) -> None:
    """Nobody is told: the others go on without it; it reaches storage, and must neither begin anything nor commit."""
    with network() as net, Cluster(tmp_path) as cluster:
        for name in "abc":
            cluster.add(name, "2:3", before=net.add(name), GLOO_SOCKET_IFNAME="")
        first = cluster.trains({"a", "b", "c"})
        leader = cluster.leader()
        others = {"a", "b", "c"} - {leader}
        cut = cluster.pid_of_worker(leader, first)
        began = starts(cluster)[-1].generation

        net.cut(leader)
        second = cluster.trains(others, after=first)
        assert not Path(f"/proc/{cut}").exists(), "the workers of the node that was cut off are dead"
        assert cluster.leader() in others
        net.heal(leader)
        cluster.trains({"a", "b", "c"}, after=second)
        by_old_leader = [s for s in starts(cluster) if s.generation > began and s.pid == starts(cluster)[began - 1].pid]
        assert not by_old_leader, "it began a generation though the others had a majority"
        check_end(cluster, "a", "b", "c")


def starts(cluster: Cluster) -> tuple[Start, ...]:
    return RunDirectory.open(cluster.run).log.read().starts


@pytest.mark.prove
def test_a_bucket_is_all_that_the_nodes_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their clocks are hours apart; the bucket is away for 20 s; a lost leader, a killed worker."""
    with servers.moto_process() as (endpoint, server), Cluster(tmp_path) as cluster:
        cluster.run = f"{bucket(monkeypatch, endpoint)}/run"
        for name, off_s in (("a", 5 * 3600), ("b", -7 * 3600), ("c", -3 * 3600)):
            (clock := tmp_path / f"{name}.clock").write_text(str(off_s))
            path = f"{CLOCK_SITE}:{ROOT}:{ROOT / 'tests'}"
            cluster.add(name, "1:3", PYTHONPATH=path, HOLDFAST_CHAOS_CLOCK=str(clock))
        first = cluster.trains({"a", "b", "c"})
        server.send_signal(signal.SIGSTOP)
        time.sleep(20)
        at = cluster.last_step(first)
        server.send_signal(signal.SIGCONT)
        cluster.until("the training goes on", lambda: cluster.last_step(first) > at + 3)
        assert cluster.generation() == first, "a store that is away ends no generation"
        leader = cluster.leader()
        cluster.agents[leader].lose_node(cluster.pid_of_worker(leader, first))
        left = {"a", "b", "c"} - {leader}
        second = cluster.trains(left, after=first)
        os.kill(cluster.pid_of_worker(min(left), second), signal.SIGKILL)
        cluster.trains(left, after=second)
        check_end(cluster, *left)
        starts = RunDirectory.open(cluster.run).log.read().starts
        assert all(abs(start.unix_s - time.time()) > 3600 for start in starts), "their clocks were right"
