"""Real jobs under stock torchrun whose workers, agents and leaders are killed: the training goes on, and ends well."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from agents import Cluster


def check_restores(cluster: Cluster) -> None:
    """Every state that was restored was the saved one."""
    wrong = [event for event in cluster.said() if event["what"] == "restored" and not event["right"]]
    assert not wrong, f"restored something else than what was saved: {wrong}"


def check_end(cluster: Cluster, *alive: str) -> None:
    cluster.finish()
    codes = {name: cluster.agents[name].wait() for name in alive}
    assert set(codes.values()) == {0}, f"agents ended with {codes}"
    check_restores(cluster)


def test_worker_then_agent_then_leader_are_killed(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        for name in "abc":
            cluster.add(name, "1:3")
        first = cluster.trains({"a", "b", "c"})
        ranks = {name: worker["rank"] for name, worker in cluster.workers(first).items()}

        victim = next(name for name, rank in ranks.items() if rank == 1)
        at = cluster.last_step()
        os.kill(cluster.pid_of_worker(victim, first), signal.SIGKILL)
        second = cluster.trains({"a", "b", "c"}, after=first)
        assert {name: worker["rank"] for name, worker in cluster.workers(second).items()} == ranks
        begun = {worker["step"] for worker in cluster.workers(second).values()}
        assert len(begun) == 1
        assert begun.pop() >= at - 1, "a killed worker costs one step at most: the keeper stores what was copied"

        leader = cluster.leader()
        victim = next(name for name in ranks if name != leader and ranks[name] != 2)
        worker = cluster.pid_of_worker(victim, second)
        cluster.agents[victim].kill()
        left = {"a", "b", "c"} - {victim}
        third = cluster.trains(left, after=second)
        cluster.until("its worker is gone, too", lambda: not Path(f"/proc/{worker}").exists())

        cluster.agents[leader].kill()
        (last,) = left - {leader}
        cluster.trains({last}, after=third)
        check_end(cluster, last)
