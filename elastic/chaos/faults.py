"""The faults of processes, nodes and links, and the table of all faults that there are."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from pathlib import Path

from elastic.chaos import processes
from elastic.chaos.cgroups import GroundError
from elastic.chaos.damage import BitRot, RotInRam, SwappedShards, TornWrite
from elastic.chaos.fault import Fault
from elastic.chaos.live import ClockJump, LiveBitFlip, LiveNaN
from elastic.chaos.nodes import Boxed, inside
from elastic.chaos.store_faults import (
    DiskFull,
    DiskStall,
    FsyncFails,
    LostReplies,
    ReadOnly,
    SlowDisk,
    StoreAway,
    StoreErrors,
    StoreStall,
)
from elastic.evidence import Mark

POWER_OFF_S = 1.0
NOTICE_S = 5.0
FLAPS = 3
FLAP_S = 0.5
MARGIN_BYTES, BITE_BYTES, BITES = 16 << 20, 4 << 20, 1024
EATER = """
import os, sys
open(sys.argv[1], "w").write(str(os.getpid()))
open("/proc/self/oom_score_adj", "w").write("-1000")
eaten = []
while os.read(0, 1):
    eaten.append(b"x" * int(sys.argv[2]))
    os.write(1, b"y")
"""  # a bite for each byte that it reads


class WorkerKill(Fault):
    """A worker gets SIGKILL: its GPU fell off the bus. Faulty GPUs were 30.1 % of all causes."""

    kind, stands_for, share = "worker-kill", "a GPU that fails", 30.1

    async def inject(self) -> str:
        processes.kill([pid := self._worker()])
        return f"SIGKILL for worker {pid} of {self.node.name}"


class WorkerError(Fault):
    """A worker raises an exception, once: errors of HBM and SRAM end so; they were 21.7 % of all causes."""

    kind, stands_for, share = "worker-error", "an uncorrectable memory error", 21.7

    async def inject(self) -> str:
        failed: list[int] = []

        def once(mark: Mark) -> bool:
            if failed or mark.name != "step" or mark.node != self.node.name:
                return False
            failed.append(mark.pid)
            return True

        self.ground.listener.fail(once)
        await self.ground.listener.until(lambda: bool(failed))
        return f"an exception in worker {failed[0]} of {self.node.name}"


class SoftwareCrash(Fault):
    """The program fails at the same step whenever it comes there: software bugs were 12.9 % of all causes.

    `amount`: the step. Nothing can help; it must not go on for ever.
    """

    kind, stands_for, share = "software-crash", "a bug that comes back", None
    promise = "stops with code 76 after ELASTIC_FRUITLESS_LIMIT attempts without a new step"

    async def inject(self) -> str:
        step = int(self.amount or self.ground.listener.last_step + 1)
        self.ground.listener.fail(lambda mark: mark.name == "step" and mark.step >= step and mark.rank == 0)
        return f"rank 0 fails whenever it completes step {step}"


class AgentKill(Fault):
    """The agent alone gets SIGKILL, as by the out-of-memory killer; its workers must not go on without it."""

    kind, stands_for = "agent-kill", "an agent that is killed"

    async def inject(self) -> str:
        agent = self.node.agent()
        if agent is None:
            raise GroundError(f"{self.node.name} has no agent")
        self.node.life.taken = "its agent was killed"
        processes.kill([agent])
        return f"SIGKILL for agent {agent} of {self.node.name}"


class NodeLoss(Fault):
    """Power is lost: every process of a node ends at once, and what was in its memory is gone. 0.7 % of all causes.

    Healed, the node is there again, as after a boot.
    """

    kind, stands_for, share, heals = "node-loss", "a server that loses power", 0.7, True

    async def inject(self) -> str:
        self.node.life.taken = "its node was lost"
        await self.node.power_off()
        return f"{self.node.name} lost power"

    async def heal(self) -> None:
        await self.ground.add(self.node.name)


class Maintenance(Fault):
    """The agent gets SIGTERM, and 5 s later the node is gone: host maintenance was 7.6 % of all causes."""

    kind, stands_for, share, heals = "maintenance", "a host taken out for maintenance", 7.6, True
    promise = "all ranks stop at one step, saved, and the others go on from it"

    async def inject(self) -> str:
        agent = self.node.agent()
        if agent is None:
            raise GroundError(f"{self.node.name} has no agent")
        self.node.life.taken = "its node was taken away"
        processes.kill([agent], signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.amount or NOTICE_S):
                while self.node.runs:
                    await asyncio.sleep(0.05)
        await self.node.power_off()
        return f"SIGTERM for {self.node.name}, then its power was cut"

    async def heal(self) -> None:
        await self.ground.add(self.node.name)


class TwoNodes(Fault):
    """Two nodes lose power at the same instant, as when a switch's or a rack's supply fails."""

    kind, stands_for = "two-nodes", "a rack that loses power"

    async def inject(self) -> str:
        other = next((n for n in self.ground.nodes.values() if n.runs and n is not self.node), None)
        if other is None:
            raise GroundError("there are no two nodes to lose")
        self.nodes.append(other.name)
        for node in (self.node, other):
            node.life.taken = "its node was lost"
        await asyncio.gather(self.node.power_off(), other.power_off())
        return f"{self.node.name} and {other.name} lost power"


class LinkCut(Fault):
    """A cable carries nothing any more, and neither end is told: switches and cables were 8.4 % of all causes."""

    kind, stands_for, share, heals = "link-cut", "a switch or cable that fails", 8.4, True
    needs = frozenset({"boxes"})

    async def inject(self) -> str:
        self._boxed()
        assert self.ground.hub is not None
        self.ground.hub.cut(self.node.name)
        return f"the link of {self.node.name} was cut"

    async def heal(self) -> None:
        if self.ground.hub is not None:
            self.ground.hub.heal(self.node.name)


class OneWayLoss(Fault):
    """A node hears everybody and nobody hears it: half of a fibre pair, or a receiver that drops its frames."""

    kind, stands_for, heals = "one-way-loss", "half a fibre pair that fails", True
    needs = frozenset({"boxes"})

    async def inject(self) -> str:
        for address in self._others():
            inside(self._boxed().init, *f"ip neigh replace {address} lladdr 02:ff:ff:ff:ff:ff dev eth0".split())
        return f"frames of {self.node.name} reach nobody"

    async def heal(self) -> None:
        for address in self._others():
            with contextlib.suppress(GroundError):
                inside(self._boxed().init, *f"ip neigh del {address} dev eth0".split())

    def _others(self) -> list[str]:
        hub = self.ground.hub
        assert hub is not None
        return [hub.address(name) for name in hub.names if name != self.node.name]


class Flap(Fault):
    """A link goes for `amount` (0.5) seconds and comes back, three times: shorter than what counts as a loss."""

    kind, stands_for = "flap", "a link that flaps"
    promise = "survived, most often without a new generation"
    needs = frozenset({"boxes"})
    restarts = False

    async def inject(self) -> str:
        self._boxed()
        assert self.ground.hub is not None
        seconds = self.amount or FLAP_S
        for _ in range(FLAPS):
            self.ground.hub.cut(self.node.name)
            await asyncio.sleep(seconds)
            self.ground.hub.heal(self.node.name)
            await asyncio.sleep(seconds)
        return f"the link of {self.node.name} went {FLAPS} times for {seconds:g} s"


class SlowLink(Fault):
    """A node's link carries `amount` Mbit/s (10) instead of all: slow network cards were 1.7 % of all causes."""

    kind, stands_for, share, heals = "slow-link", "a network card that became slow", 1.7, True
    promise = "the run goes on, slower"
    needs = frozenset({"boxes", "tc"})
    restarts = False

    async def inject(self) -> str:
        rate = self.amount or 10
        shape = f"tc qdisc replace dev eth0 root tbf rate {rate:g}mbit burst 32kbit latency 400ms"
        inside(self._boxed().init, *shape.split())
        return f"the link of {self.node.name} carries {rate:g} Mbit/s"

    async def heal(self) -> None:
        with contextlib.suppress(GroundError):
            inside(self._boxed().init, "tc", "qdisc", "del", "dev", "eth0", "root")


class Freeze(Fault):
    """A host stands still, then goes on as if nothing had been: a zombie that must not commit. 1.7 % were hangs."""

    kind, stands_for, share, heals = "freeze", "a host that freezes and thaws", 1.7, True
    promise = "survived: the others go on without it, and nothing that it brings later counts"

    async def inject(self) -> str:
        if isinstance(self.node, Boxed) and "freezer" in self.node.cgroups:
            await asyncio.to_thread(self.node.cgroups["freezer"].freeze, True)
        else:
            processes.kill(self.node.processes(), signal.SIGSTOP)
        return f"{self.node.name} stands still"

    async def heal(self) -> None:
        if isinstance(self.node, Boxed) and "freezer" in self.node.cgroups:
            if self.node.cgroups["freezer"].path.exists():
                await asyncio.to_thread(self.node.cgroups["freezer"].freeze, False)
        else:
            processes.kill(self.node.processes(), signal.SIGCONT)


class Hang(Fault):
    """One worker stops making progress and does not end, as in a collective that lost a peer."""

    kind, stands_for, heals = "hang", "a worker that hangs", False
    promise = "noticed within ELASTIC_HANG_LIMIT_S, named, and restarted"

    async def inject(self) -> str:
        processes.kill([pid := self._worker()], signal.SIGSTOP)
        return f"worker {pid} of {self.node.name} was stopped"


class Straggler(Fault):
    """A node gets `amount` (0.25) of a CPU: it is slow, and all wait for it. Nothing fails."""

    kind, stands_for, heals = "straggler", "a node that became slow", True
    promise = "the run goes on, slower"
    needs = frozenset({"boxes", "cpu"})
    restarts = False

    async def inject(self) -> str:
        cpus = self.amount or 0.25
        self._boxed().cgroups["cpu"].limit_cpu(cpus)
        return f"{self.node.name} has {cpus:g} of a CPU"

    async def heal(self) -> None:
        if self._boxed().cgroups["cpu"].path.exists():
            self._boxed().cgroups["cpu"].limit_cpu(None)


class OutOfMemory(Fault):
    """Another process of a node takes its memory, and the kernel kills a worker for it (exit code 137)."""

    kind, stands_for = "out-of-memory", "a node whose memory runs out"
    needs = frozenset({"boxes", "memory"})

    async def inject(self) -> str:
        worker, group = self._worker(), self._boxed().cgroups["memory"]
        Path(f"/proc/{worker}/oom_score_adj").write_text("1000")  # the first to go, as where containers limit pods
        group.limit_memory(group.memory_bytes() + MARGIN_BYTES)
        eater = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-c", EATER, str(group.path / "cgroup.procs"), str(BITE_BYTES),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert eater.stdin is not None
        assert eater.stdout is not None
        try:
            for _ in range(BITES):
                eater.stdin.write(b"x")
                if await eater.stdout.read(1) != b"y" or not processes.lives(worker):
                    break
        finally:
            eater.stdin.close()
            await eater.wait()
            group.limit_memory(None)
        if processes.lives(worker):
            raise GroundError("the kernel killed nobody")
        return f"memory ran out on {self.node.name}, and worker {worker} was killed for it"


class NodeGain(Fault):
    """A node more is there, and joins: fewer than the maximum must be at work."""

    kind, stands_for = "node-gain", "a server that was repaired"
    promise = "planned: no step is lost"

    async def inject(self) -> str:
        node = await self.ground.add()
        self.nodes = [node.name]
        return f"{node.name} was started"


FAULTS: dict[str, type[Fault]] = {
    fault.kind: fault
    for fault in (
        WorkerKill, WorkerError, SoftwareCrash, AgentKill, NodeLoss, Maintenance, TwoNodes, LinkCut, OneWayLoss, Flap,
        SlowLink, Freeze, Hang, Straggler, OutOfMemory, ClockJump, DiskFull, ReadOnly, DiskStall,
        SlowDisk, FsyncFails, StoreErrors, LostReplies, StoreStall, StoreAway, BitRot, TornWrite, SwappedShards,
        RotInRam, LiveBitFlip, LiveNaN, NodeGain,
    )
}  # fmt: skip
