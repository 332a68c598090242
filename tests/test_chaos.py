"""Every fault really happens and heals, on nodes of both kinds; and a real run survives some, judged by the oracles."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos_agent import PORT
from chaos_ground import CAN, DEADLINE_S, ground_of, soon
from click.testing import CliRunner
from jobs import Pool

import ckpt
from ckpt.check import check_step
from ckpt.errors import CkptError
from ckpt.run import RunDirectory
from elastic.chaos import faults, processes
from elastic.chaos.cgroups import Cgroup, GroundError, root_of
from elastic.chaos.command import scenario_of, shipped
from elastic.chaos.ground import Ground, abilities
from elastic.chaos.nodes import Boxed, Plain, inside
from elastic.chaos.scenario import Planned, Scenario
from elastic.cli import cli
from elastic.evidence import Life

TESTS = Path(__file__).parent
SCRIPT, EXAMPLE = str(TESTS / "chaos_script.py"), str(TESTS / "chaos_example.py")

boxed = pytest.mark.skipif("boxes" not in CAN, reason="needs root for namespaces")


def on_both(test: Callable[[Ground], Awaitable[None]]) -> Callable[[Path, frozenset[str]], None]:
    """Run a test on nodes in namespaces, and on nodes that are plain processes."""

    @pytest.mark.parametrize(
        "can", [pytest.param(CAN, id="namespaces", marks=boxed), pytest.param(frozenset(), id="processes")]
    )
    def run(tmp_path: Path, can: frozenset[str]) -> None:
        async def act() -> None:
            async with ground_of(tmp_path, can) as ground:
                await test(ground)

        asyncio.run(act())

    return run


def on_boxes(
    nodes: int = 2, needs: str = "boxes", **more: Any
) -> Callable[[Callable[[Ground], Awaitable[None]]], Callable[[Path], None]]:
    """Run a test on nodes in namespaces that can do what it `needs`; `more`: of the scenario."""

    def decorate(test: Callable[[Ground], Awaitable[None]]) -> Callable[[Path], None]:
        @boxed
        @pytest.mark.skipif(needs not in CAN, reason=f"needs {needs}: `make servers` installs it, as root")
        def run(tmp_path: Path) -> None:
            async def act() -> None:
                async with ground_of(tmp_path, CAN, nodes, **more) as ground:
                    await test(ground)

            asyncio.run(act())

        return run

    return decorate


def on_nothing(folder: Path) -> tuple[Ground, Plain]:
    """A ground without nodes that run, for faults of the store alone."""
    ground = Ground(Scenario("faults", "faults themselves", ()), folder, [], frozenset(), 0, time.monotonic())
    return ground, Plain("n1", ground.place, Life("n1", 0.0), lambda: None)


def reaches(ground: Ground, one: str, other: str) -> bool:
    """Whether a datagram from one node comes to the other, and the answer back."""
    assert ground.hub is not None
    ask = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(0.3); "
        f"s.sendto(b'x', ('{ground.hub.address(other)}', {PORT})); s.recv(9)"
    )
    node = ground.nodes[one]
    assert isinstance(node, Boxed)
    try:
        inside(node.init, sys.executable, "-I", "-S", "-c", ask)
    except GroundError:
        return False
    return True


@on_both
async def test_a_worker_is_killed(ground: Ground) -> None:
    node = ground.nodes["n1"]
    (worker,) = node.workers()
    await faults.WorkerKill(ground, node).inject()
    await soon(lambda: not processes.lives(worker))
    assert node.runs
    with pytest.raises(GroundError, match="no worker"):
        await faults.WorkerKill(ground, node).inject()


@on_both
async def test_an_agent_is_killed(ground: Ground) -> None:
    node = ground.nodes["n1"]
    agent = node.agent()
    assert agent is not None
    await faults.AgentKill(ground, node).inject()
    await soon(lambda: not processes.lives(agent) and not node.runs)
    assert node.life.taken


@on_both
async def test_a_node_is_lost_with_its_memory_and_comes_back(ground: Ground) -> None:
    node = ground.nodes["n2"]
    (node.ram / "kept").touch()
    before = node.processes()
    assert len(before) >= 2
    await (fault := faults.NodeLoss(ground, node)).inject()
    assert not any(processes.lives(pid) for pid in before)
    assert not node.runs
    assert not node.ram.exists()
    await fault.heal()
    again = ground.nodes["n2"]
    assert again is not node
    await soon(again.workers)
    assert not (again.ram / "kept").exists()


@on_both
async def test_two_nodes_are_lost_at_once(ground: Ground) -> None:
    before = [pid for node in ground.nodes.values() for pid in node.processes()]
    await faults.TwoNodes(ground, ground.nodes["n1"]).inject()
    assert not any(processes.lives(pid) for pid in before)
    assert all(node.life.taken for node in ground.nodes.values())


@on_both
async def test_a_node_is_announced_to_go_and_goes(ground: Ground) -> None:
    node = ground.nodes["n1"]
    before = node.processes()
    await (fault := faults.Maintenance(ground, node, 0.2)).inject()
    assert not node.runs
    assert not any(processes.lives(pid) for pid in before)
    await fault.heal()
    await soon(ground.nodes["n1"].workers)


@on_both
async def test_a_host_stands_still_and_goes_on(ground: Ground) -> None:
    node = ground.nodes["n1"]

    def steps() -> int:
        return sum(mark.node == "n1" for mark in ground.listener.marks)

    await (fault := faults.Freeze(ground, node)).inject()
    if isinstance(node, Boxed):
        assert node.cgroups["freezer"].is_frozen()
    else:
        await soon(lambda: {processes.state(pid) for pid in node.processes()} == {"T"})
    await asyncio.sleep(0.1)
    still = steps()
    await asyncio.sleep(0.2)
    assert steps() == still
    await fault.heal()
    await soon(lambda: steps() > still)


@on_both
async def test_a_worker_hangs(ground: Ground) -> None:
    node = ground.nodes["n1"]
    (worker,) = node.workers()
    await faults.Hang(ground, node).inject()
    await soon(lambda: processes.state(worker) == "T")
    processes.kill([worker])


@on_both
async def test_a_worker_raises_once(ground: Ground) -> None:
    (worker,) = ground.nodes["n1"].workers()
    await faults.WorkerError(ground, ground.nodes["n1"]).inject()
    await soon(lambda: not processes.lives(worker))
    assert "Injected: a fault was injected at step" in ground.nodes["n1"].log.read_text()
    assert ground.nodes["n2"].workers()


@on_both
async def test_a_program_fails_wherever_it_comes_to_a_step(ground: Ground) -> None:
    at = ground.listener.last_step + 5
    workers = [pid for node in ground.nodes.values() for pid in node.workers()]
    await faults.SoftwareCrash(ground, ground.nodes["n1"], at).inject()
    await soon(lambda: not any(processes.lives(pid) for pid in workers))
    assert ground.listener.last_step == at


@on_both
async def test_a_node_is_added(ground: Ground) -> None:
    await (fault := faults.NodeGain(ground, ground.nodes["n1"])).inject()
    assert fault.nodes == ["n3"]
    await soon(ground.nodes["n3"].workers)


@on_both
async def test_a_process_is_held_at_a_mark_until_it_is_released(ground: Ground) -> None:
    hold = ground.listener.hold(lambda mark: mark.name == "step" and mark.node == "n1")
    held = await hold.caught
    await asyncio.sleep(0.2)
    assert max(mark.step for mark in ground.listener.marks if mark.pid == held.pid) == held.step
    hold.released.set()
    await soon(lambda: max(mark.step for mark in ground.listener.marks if mark.pid == held.pid) > held.step)


@on_boxes()
async def test_a_link_is_cut_and_heals(ground: Ground) -> None:
    assert reaches(ground, "n1", "n2")
    await (fault := faults.LinkCut(ground, ground.nodes["n2"])).inject()
    assert not reaches(ground, "n1", "n2")
    await fault.heal()
    await soon(lambda: reaches(ground, "n1", "n2"))


@on_boxes()
async def test_one_direction_of_a_link_is_lost(ground: Ground) -> None:
    await (fault := faults.OneWayLoss(ground, ground.nodes["n2"])).inject()
    assert not reaches(ground, "n2", "n1")
    assert not reaches(ground, "n1", "n2"), "the answer is lost"
    await fault.heal()
    await soon(lambda: reaches(ground, "n2", "n1"))


@on_boxes()
async def test_a_link_flaps(ground: Ground) -> None:
    flapping = asyncio.create_task(faults.Flap(ground, ground.nodes["n2"], 0.1).inject())
    assert ground.hub is not None
    hub = ground.hub
    await soon(lambda: hub.is_cut("n2"))
    await flapping
    assert reaches(ground, "n1", "n2")


@on_boxes()
async def test_a_link_becomes_slow(ground: Ground) -> None:
    node = ground.nodes["n1"]
    assert isinstance(node, Boxed)
    await (fault := faults.SlowLink(ground, node)).inject()
    assert "tbf" in inside(node.init, "tc", "qdisc", "show", "dev", "eth0")
    assert reaches(ground, "n1", "n2")
    await fault.heal()
    assert "tbf" not in inside(node.init, "tc", "qdisc", "show", "dev", "eth0")


@on_boxes()
async def test_a_node_becomes_slow(ground: Ground) -> None:
    node = ground.nodes["n1"]
    assert isinstance(node, Boxed)
    await (fault := faults.Straggler(ground, node, 0.5)).inject()
    assert node.cgroups["cpu"].cpu_limit() == 0.5
    await fault.heal()
    assert node.cgroups["cpu"].cpu_limit() is None


@on_boxes()
async def test_the_kernel_kills_a_worker_for_memory(ground: Ground) -> None:
    node = ground.nodes["n1"]
    (worker,) = node.workers()
    await faults.OutOfMemory(ground, node).inject()
    await soon(lambda: not processes.lives(worker))
    assert node.runs, "the largest was killed, and nobody else"


@on_boxes(nodes=1, store_mb=16)
async def test_the_store_is_full_and_has_room_again(ground: Ground) -> None:
    await (fault := faults.DiskFull(ground, ground.nodes["n1"])).inject()
    with pytest.raises(OSError, match="No space left"):
        (ground.store / "more").write_bytes(bytes(1 << 20))
    await fault.heal()
    (ground.store / "more").write_bytes(bytes(1 << 20))


@on_boxes(nodes=1, store_mb=16)
async def test_the_store_turns_read_only_and_back(ground: Ground) -> None:
    node = ground.nodes["n1"]
    assert isinstance(node, Boxed)
    inside_node = Path(f"/proc/{node.init}/root{ground.run}")
    await (fault := faults.ReadOnly(ground, node)).inject()
    with pytest.raises(OSError, match="Read-only"):
        (inside_node / "more").touch()
    await fault.heal()
    (inside_node / "more").touch()
    assert (ground.store / "more").exists()


@on_boxes(nodes=1, needs="disk", store_mb=32)
async def test_who_writes_to_a_store_that_stands_still_waits_until_it_goes_on(ground: Ground) -> None:
    await (fault := faults.DiskStall(ground, ground.nodes["n1"])).inject()
    writer = await asyncio.create_subprocess_exec("touch", str(ground.store / "more"))
    await soon(lambda: processes.state(writer.pid) == "D")
    writer.kill()
    await asyncio.sleep(0.1)
    assert processes.state(writer.pid) == "D", "not even a signal ends it"
    await fault.heal()
    await writer.wait()
    (ground.store / "again").touch()


def last_step(ground: Ground, node: str) -> dict[str, Any]:
    """What a worker said after its newest step."""
    return next(mark.facts for mark in reversed(ground.listener.marks) if mark.name == "step" and mark.node == node)


@on_boxes(needs="strace")
async def test_fsync_fails_on_one_node_alone(ground: Ground) -> None:
    await (fault := faults.FsyncFails(ground, ground.nodes["n2"])).inject()
    await soon(lambda: last_step(ground, "n2")["failed"] == errno.EIO)
    assert not any(mark.facts.get("failed") for mark in ground.listener.marks if mark.node == "n1")
    await fault.heal()
    await soon(lambda: last_step(ground, "n2")["failed"] == 0)


@on_boxes(nodes=1, needs="strace")
async def test_a_disk_becomes_slow(ground: Ground) -> None:
    await (fault := faults.SlowDisk(ground, ground.nodes["n1"], 300.0)).inject()
    await soon(lambda: last_step(ground, "n1")["fsync_s"] > 0.3)
    await fault.heal()
    assert not any(processes.is_traced(pid) for pid in ground.nodes["n1"].processes())


@on_boxes(faults=(Planned("clock-jump"),))
async def test_a_clock_jumps_on_one_node_alone(ground: Ground) -> None:
    def hours_off(node: str) -> int:
        return round((last_step(ground, node)["unix_s"] - time.time()) / 3600)

    assert [hours_off(node) for node in ("n1", "n2")] == [0, 0]
    await (fault := faults.ClockJump(ground, ground.nodes["n2"], -7.0)).inject()
    await soon(lambda: hours_off("n2") == -7)
    assert hours_off("n1") == 0
    await fault.heal()
    await soon(lambda: hours_off("n2") == 0)


@on_both
async def test_the_live_state_of_one_worker_is_damaged(ground: Ground) -> None:
    assert last_step(ground, "n2")["live"] == 1.5
    await faults.LiveBitFlip(ground, ground.nodes["n2"]).inject()
    await soon(lambda: last_step(ground, "n2")["live"] not in (1.5, None))
    assert last_step(ground, "n2")["live"] == 1.0
    await faults.LiveNaN(ground, ground.nodes["n2"]).inject()
    await soon(lambda: math.isnan(last_step(ground, "n2")["live"]))
    assert last_step(ground, "n1")["live"] == 1.5


def asked(ground: Ground) -> int:
    """The status with which the bucket answers a node; 0 if it does not within 2 s, or ends the connection."""
    assert ground.bucket is not None
    node, endpoint = ground.nodes["n1"], ground.bucket.endpoint
    ask = (
        "import sys, urllib.request as r, urllib.error as e\n"
        f"try: a = r.urlopen({endpoint!r} + '/bucket', timeout=2); a.read(); print(a.status)\n"
        "except e.HTTPError as error: print(error.code)\n"
        "except OSError: print(0)\n"
        "except Exception: print(0)"
    )
    command = [sys.executable, "-I", "-S", "-c", ask]
    if isinstance(node, Boxed):
        return int(inside(node.init, *command))
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout)


@pytest.mark.skipif("s3" not in CAN, reason="needs moto_server: run `make servers`")
@pytest.mark.parametrize(
    "boxes", [pytest.param(True, marks=boxed, id="namespaces"), pytest.param(False, id="processes")]
)
def test_a_bucket_fails_as_it_is_told_and_heals(tmp_path: Path, boxes: bool) -> None:
    async def act() -> None:
        async with ground_of(tmp_path, abilities(boxes), 1, store="s3") as ground:
            node = ground.nodes["n1"]
            assert await asyncio.to_thread(asked, ground) == 200
            for kind, answers in (
                (faults.StoreErrors, {500, 503, 429, 0}),
                (faults.LostReplies, {0}),
                (faults.StoreStall, {0}),
                *([(faults.StoreAway, {0})] if boxes else []),
            ):
                await (fault := kind(ground, node, 1.0)).inject()
                assert await asyncio.to_thread(asked, ground) in answers, kind
                await fault.heal()
                assert await asyncio.to_thread(asked, ground) == 200, kind
            assert ground.bucket is not None
            assert ground.bucket.met >= 3
            with ground.bucket.reached() as url:
                RunDirectory.open(url, create=True)
            with ground.opened() as run:
                assert run.log.read().head is None
            assert ground.bucket.unfinished() == []

    asyncio.run(act())


def save_on_each_rank(rank: int, world: int, url: str) -> None:
    with ckpt.Checkpointer(url) as checkpointer:
        for step in (4, 5):
            mine = ckpt.Shard(torch.full((1000,), 10.0 * step + rank), (world * 1000,), (rank * 1000,))
            checkpointer.save(step, {"w": mine}, blocking=True)


@pytest.mark.parametrize("kind", ["bit-rot", "torn-write", "swapped-shards"])
def test_the_newest_step_is_damaged_and_refused(tmp_path: Path, pool: Pool, kind: str) -> None:
    ground, node = on_nothing(tmp_path)
    pool.results(save_on_each_rank, 2, str(ground.run))
    run = RunDirectory.open(ground.run)
    head = run.log.read().head
    assert head is not None
    assert check_step(run, head).ok
    said = asyncio.run(faults.FAULTS[kind](ground, node).inject())
    assert "of step 5" in said
    assert not check_step(run, head).ok
    state = {"w": torch.zeros(2000)}
    with pytest.raises(ckpt.Corrupt):
        ckpt.restore(str(ground.run), state)
    assert ckpt.restore(str(ground.run), state, fallback=True) == 4
    assert torch.equal(state["w"], torch.tensor([40.0, 41.0]).repeat_interleave(1000))
    asyncio.run(ground.close())


def test_files_are_not_exchanged_where_there_is_one(tmp_path: Path) -> None:
    ground, node = on_nothing(tmp_path)
    with ckpt.Checkpointer(ground.run) as checkpointer:
        checkpointer.save(5, {"w": torch.arange(9.0)}, blocking=True)
    with pytest.raises(GroundError, match="two ranks"):
        asyncio.run(faults.FAULTS["swapped-shards"](ground, node).inject())
    asyncio.run(ground.close())


@on_both
async def test_copies_in_memory_rot_and_the_store_has_the_step(ground: Ground) -> None:
    """The copy that rots is the one that a keeper sealed here; it lies in the node's memory for the fault to find."""
    node, saved = ground.nodes["n1"], {"w": torch.arange(9000.0)}
    (worker,) = node.workers()
    with pytest.raises(CkptError):
        await faults.FAULTS["rot-in-ram"](ground, node).inject()
    with ckpt.Checkpointer(ground.run) as checkpointer:
        checkpointer.save(5, saved, blocking=True)
        (mine,) = Path(os.environ["CKPT_RAM_DIR"]).glob(f"holdfast-*/{RunDirectory.open(ground.run).nonce}-*")
        theirs = node.ram / mine.parent.name / mine.name
        shutil.copytree(mine / "steps", theirs / "steps")
        said = await faults.FAULTS["rot-in-ram"](ground, node).inject()
        await soon(lambda: not processes.lives(worker))
        shutil.rmtree(mine / "steps")
        shutil.copytree(theirs / "steps", mine / "steps")
        state = {"w": torch.zeros(9000)}
        assert checkpointer.restore(state) == 5
    assert "a bit changed in byte" in said
    assert torch.equal(state["w"], saved["w"])


@boxed
def test_a_node_has_its_own_name_memory_and_addresses(tmp_path: Path) -> None:
    async def act() -> None:
        async with ground_of(tmp_path, CAN) as ground:
            one, other = (ground.nodes[name] for name in ("n1", "n2"))
            assert isinstance(one, Boxed)
            assert isinstance(other, Boxed)
            (one.ram / "mine").touch()
            assert not (other.ram / "mine").exists()
            assert not Path("/dev/shm/mine").exists()
            looks = ["nsenter", "-t", str(one.init), "-a", "sh", "-c"]
            said = subprocess.run(
                [*looks, "hostname; cat /proc/sys/kernel/random/boot_id; cat /etc/hosts; ls /tmp"],
                capture_output=True, text=True, check=True, timeout=10,
            ).stdout  # fmt: skip
            assert said.startswith("n1\n")
            assert Path("/proc/sys/kernel/random/boot_id").read_text() not in said
            assert "10.231.77.2 n2" in said
            assert socket.gethostname() != "n1"

    asyncio.run(act())


@boxed
def test_a_script_in_the_folder_for_temporary_files_is_seen_by_nodes_and_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # where nodes have a folder of their own
        script = Path(folder) / "train.py"
        script.write_text("print('mine')\n")
        monkeypatch.chdir(folder)

        async def act() -> None:
            async with ground_of(tmp_path, CAN, nodes=1, command=[str(script)]) as ground:
                (node,) = ground.nodes.values()
                seen = Path(f"/proc/{node.processes()[0]}/root{script}")
                assert seen.read_text() == "print('mine')\n"

        asyncio.run(act())
        assert script.read_text() == "print('mine')\n"


@boxed
def test_nothing_outlives_a_chaos_run_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL for the conductor: nodes, hub and disk end with it."""
    code = f"""
import asyncio, sys, time
sys.path[:0] = [{str(TESTS)!r}]
from pathlib import Path
from chaos_ground import CAN, ground_of

async def main():
    async with ground_of(Path({str(tmp_path)!r}), CAN, 1, store_mb=16) as ground:
        print(ground.listener.path, ground.identity, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    path, identity = child.stdout.readline().split()
    assert processes.marked("HOLDFAST_EVENTS", path)
    child.kill()
    child.wait()
    deadline = time.monotonic() + DEADLINE_S
    while processes.marked("HOLDFAST_EVENTS", path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    for left in Path("/sys/fs/cgroup").glob(f"*/holdfast-chaos-{identity}-*"):
        Cgroup(left, 1).remove()  # the one thing that the kernel keeps
    subprocess.run(["rm", "-rf", str(Path(path).parent)], check=True)


# Real runs


Chaos = Callable[..., dict[str, Any]]


def patient(name: str, limit_s: float = 1800) -> Scenario:
    """A shipped scenario, with a machine that others use in mind: no time decides."""
    scenario = shipped()[name]
    return replace(scenario, limit_s=limit_s, promise=replace(scenario.promise, recovery_s=limit_s))


def test_a_run_survives_a_killed_worker_and_a_lost_node(chaos: Chaos) -> None:
    report = chaos(patient("worker-then-node", 270), [SCRIPT, "60"])
    assert {one["verdict"] for one in report["oracles"]} == {"green"}
    assert report["figures"]["generations"] >= 3
    assert report["ground"] == ("namespaces" if "boxes" in CAN else "processes")


LONGER = {"node-gain": "800", "clock-jump": "300", "freeze-thaw": "400", "store-errors": "200", "store-stall": "120"}
"""Steps where what is injected takes longer: an agent takes seconds to come."""


@pytest.mark.prove
@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_scenario_is_survived(chaos: Chaos, name: str) -> None:
    chaos(patient(name), [SCRIPT, LONGER.get(name, "40")])


@pytest.mark.prove
@pytest.mark.parametrize(
    ("name", "nodes"),
    [("agent-kill", 4), ("node-loss", 4), ("one-way-loss", 4), ("leader-loss", 5), ("two-nodes", 5), ("link-cut", 5),
     ("freeze-thaw", 4), ("during-recovery", 5), ("maintenance", 5), ("spare-takes-over", 5), ("worker-then-node", 6)],
)  # fmt: skip
def test_larger_jobs_survive(chaos: Chaos, name: str, nodes: int) -> None:
    assert chaos(patient(name), [SCRIPT, LONGER.get(name, "60")], nodes=nodes)["figures"]["generations"] >= 2


@pytest.mark.prove
@pytest.mark.parametrize("name", ["worker-kill", "agent-kill", "leader-loss", "node-loss", "link-cut", "two-nodes"])
@pytest.mark.parametrize(("example", "steps"), [("transformers", "160"), ("plain", "1500")])
def test_examples_survive(chaos: Chaos, example: str, steps: str, name: str) -> None:
    """The Trainer's, and the loop in the style of nanoGPT, as they stand: each is its original but for 4 lines."""
    scenario = patient(name)
    late = [replace(one, trigger=replace(one.trigger, step=one.trigger.step and 30)) for one in scenario.faults]
    report = chaos(replace(scenario, faults=tuple(late)), [EXAMPLE, example, steps])  # they save every 20 steps
    assert "restores of" in report["oracles"][2]["evidence"]


@pytest.mark.prove
def test_a_run_survives_on_plain_processes(chaos: Chaos) -> None:
    assert chaos(patient("worker-then-node"), [SCRIPT, "60"], processes=True)["ground"] == "processes"


@pytest.mark.prove
def test_losses_are_those_of_the_undisturbed_run(chaos: Chaos) -> None:
    report = chaos(patient("node-loss"), [SCRIPT, "40"], reference=True)
    assert "40 steps compared" in report["oracles"][7]["evidence"]


FREEZER = root_of("freezer")
MOUNTS = Path("/proc/self/mountinfo").read_text().splitlines()
BOTH = FREEZER and FREEZER[1] == 1 and any(" - cgroup2 " in m and os.access(m.split()[4], os.W_OK) for m in MOUNTS)
WITHOUT_VERSION_1 = """
umount "$1" && shift || exit
"$1" -c 'from elastic.chaos.cgroups import root_of; assert root_of("freezer")[1] == 2' && exec "$@"
"""


@boxed
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not BOTH, reason="needs control groups of both versions; with one of them all tests use that")
@pytest.mark.parametrize(
    "test",
    [
        "test_a_host_stands_still_and_goes_on[namespaces]",
        pytest.param("test_every_shipped_scenario_is_survived[freeze-thaw]", marks=pytest.mark.prove),
    ],
)
def test_control_groups_of_version_2_do_the_same(test: str) -> None:
    """The same test in a mount namespace without the freezer of version 1."""
    assert FREEZER is not None
    place = ["unshare", "--mount", "sh", "-c", WITHOUT_VERSION_1, "sh", str(FREEZER[0])]
    options = ["-q", "-p", "no:cacheprovider", "-m", "prove or not prove", "--timeout=1600"]
    inside = [*place, sys.executable, "-m", "pytest", f"{__file__}::{test}", *options]
    done = subprocess.run(inside, cwd=TESTS.parent, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout


SEEDS = int(os.environ.get("HOLDFAST_CHAOS_SEEDS", "100"))


def survives_random(chaos: Chaos, seed: int, minutes: float, limit_s: float, steps: str) -> None:
    print(f"seed {seed}")
    drawn = scenario_of("random", seed, minutes, CAN)
    patience = replace(drawn, limit_s=limit_s, promise=replace(drawn.promise, recovery_s=limit_s))
    chaos(patience, [SCRIPT, steps, "10"], seed=seed)


def test_a_fault_drawn_by_its_frequency_is_survived(chaos: Chaos) -> None:
    survives_random(chaos, 4, 0.1, 280, "200")


@pytest.mark.prove
@pytest.mark.parametrize("seed", range(SEEDS))
def test_faults_drawn_by_their_frequencies_are_survived(chaos: Chaos, seed: int) -> None:
    survives_random(chaos, seed, 0.5, 1800, "700")


def test_the_list_says_what_each_fault_needs() -> None:
    said = CliRunner().invoke(cli, ["chaos", "--list", "--json"])
    assert said.exit_code == 0, said.output
    found = json.loads(said.output)
    assert {one["kind"] for one in found["faults"]} == faults.FAULTS.keys()
    assert all(one["promise"] for one in found["faults"])
    assert CliRunner().invoke(cli, ["chaos", "nothing-such", "--", SCRIPT]).exit_code != 0
