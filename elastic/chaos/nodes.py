"""Nodes on one machine: something with an agent, its own memory, and a link, that can be lost as a whole.

`Boxed` nodes have network, mount, pid, ipc and uts namespaces, so that losing one is what the kernel does when its
first process dies; they need root, and end with the process that made them, however that ends. `Plain` nodes are
processes in sessions of their own, with folders of their own, on the machine's own network.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic.chaos import node_init, processes
from elastic.chaos.cgroups import Cgroup, GroundError
from elastic.chaos.held import Held
from elastic.chaos.listen import NODE_VARIABLE
from elastic.evidence import Life

CLOCK_VARIABLE = "HOLDFAST_CHAOS_CLOCK"
NETWORK = "10.231.77"
TMPFS_MB = 4096
WORDS = 4  # lines of a log that are shown
START_LIMIT_S = 20.0
COMMAND_LIMIT_S = 10


@dataclass(frozen=True)
class Place:
    """What every node of a run shares. `keep`: folders that nodes must see, wherever they lie."""

    folder: Path
    command: Sequence[str]
    environment: dict[str, str]
    keep: tuple[str, ...]
    names: tuple[str, ...]  # of all nodes that there may be


class Node(ABC):
    """One node. `life` is what the run will say of it; `on_end` is called when its agent has ended."""

    def __init__(self, name: str, place: Place, life: Life, on_end: Callable[[], None]) -> None:
        self.name, self.place, self.life, self._on_end = name, place, life, on_end
        self.log = place.folder / f"{name}.log"
        self.clock = place.folder / f"{name}.clock"  # by how many seconds its wall clock is off

    @abstractmethod
    async def start(self) -> None:
        """Start the agent; GroundError if the machine does not allow it."""

    @abstractmethod
    async def power_off(self) -> None:
        """Every process here ends at once, and what was in memory is gone. Idempotent."""

    @abstractmethod
    def agent(self) -> int | None:
        """The process id of the agent, as this process sees it; None if it is not there."""

    @abstractmethod
    def processes(self) -> list[int]:
        """Every process of the node."""

    @property
    @abstractmethod
    def ram(self) -> Path:
        """Where the node's RAM tier lies, as this process sees it."""

    @property
    def runs(self) -> bool:
        """Whether its agent has not ended yet."""
        return self.life.ended is None

    @property
    def state(self) -> str:
        """What it does, for a person."""
        if self.life.taken:
            return self.life.taken
        return "works" if self.runs else f"ended with {self.life.code}"

    def workers(self) -> list[int]:
        """The processes that train, by local rank; those that ended are not among them."""
        agent = self.agent()
        below = [] if agent is None else processes.children(agent)
        return sorted(pid for pid in below if processes.lives(pid) and _is_worker(pid))

    def last_words(self) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()
            said = [line for line in lines if line.strip() and not line.startswith("unshare: ")]
            return "\n".join(said[-WORDS:])
        return ""

    def keepers(self) -> list[int]:
        return [pid for pid in self.processes() if processes.is_keeper(pid)]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.place.environment, NODE_VARIABLE: self.name, CLOCK_VARIABLE: str(self.clock)}


def _is_worker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return any(e.startswith(b"LOCAL_RANK=") for e in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return False


class Boxed(Node):
    """A node in namespaces of its own, on the bridge of a `Hub`."""

    def __init__(
        self, name: str, place: Place, life: Life, on_end: Callable[[], None], hub: Hub, before: Sequence[str] = ()
    ) -> None:
        super().__init__(name, place, life, on_end)
        self._hub, self._before = hub, before
        self._box: asyncio.subprocess.Process | None = None
        self.init = 0  # process id of the node's first process, as we see it
        self._agent: int | None = None
        self._watch: asyncio.Task[None] | None = None
        self.cgroups: dict[str, Cgroup] = {}  # by controller

    async def start(self) -> None:
        spec = self.place.folder / f"{self.name}.json"
        spec.write_text(json.dumps(self._spec()))
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._box = await asyncio.create_subprocess_exec(
            *self._before, "unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child=KILL",
            "--propagation", "private", "--mount-proc", sys.executable, "-I", "-S", node_init.__file__, str(spec),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
        )  # fmt: skip
        os.close(log)
        await self._told("ready")
        self.init = processes.children(self._box.pid)[0]
        self._hub.plug(self.name, self.init)
        for cgroup in self.cgroups.values():
            (cgroup.path / "cgroup.procs").write_text(str(self.init))
        assert self._box.stdin is not None
        self._box.stdin.write(b"go\n")
        await self._told("started")
        self._agent = next(iter(processes.children(self.init)), None)  # None: it has ended already
        self._watch = asyncio.create_task(self._await_end())

    def _spec(self) -> dict[str, object]:
        hosts = "".join(f"{NETWORK}.{i} {name}\n" for i, name in enumerate(self.place.names, 1))
        environment = self._environment()
        for name in ("CKPT_RAM_DIR", "TMPDIR", "GLOO_SOCKET_IFNAME"):
            environment.pop(name, None)
        return {
            "name": self.name,
            "own": str(self.place.folder / f"{self.name}.own"),
            "keep": [path for path in self.place.keep if os.path.exists(path)],
            "files": {
                "/etc/hosts": f"127.0.0.1 localhost\n{hosts}",
                "/proc/sys/kernel/random/boot_id": f"{uuid.uuid4()}\n",  # each start of a node is a boot
            },
            "tmpfs_mb": TMPFS_MB,
            "log": str(self.log),
            "command": list(self.place.command),
            "environment": environment,
            "folder": os.getcwd(),
        }

    async def _told(self, what: str) -> None:
        assert self._box is not None
        assert self._box.stdout is not None
        try:
            async with asyncio.timeout(START_LIMIT_S):
                line = await self._box.stdout.readline()
        except TimeoutError:
            line = b"nothing in time"
        if line.strip() != what.encode():
            raise GroundError(f"node {self.name} could not be made: {self.log} says why ({line.decode().strip()})")

    async def _await_end(self) -> None:
        assert self._box is not None
        assert self._box.stdout is not None
        while line := await self._box.stdout.readline():
            if line.startswith(b"ended "):
                self.life.code = int(line.split()[1])
                break
        self._agent = None
        self._on_end()

    async def power_off(self) -> None:
        if self._box is not None and self._box.returncode is None:
            if "freezer" in self.cgroups:
                self.cgroups["freezer"].freeze(False)  # what is frozen does not die
            processes.kill([self.init or self._box.pid])  # the kernel kills the others with it
            await self._box.wait()
        if self._watch is not None:
            await self._watch
        for cgroup in self.cgroups.values():
            cgroup.remove()
        shutil.rmtree(self.place.folder / f"{self.name}.own", ignore_errors=True)

    def agent(self) -> int | None:
        return self._agent

    def processes(self) -> list[int]:
        return processes.descendants(self.init) if self.init else []

    @property
    def ram(self) -> Path:
        return Path(f"/proc/{self.init}/root/dev/shm")


class Plain(Node):
    """A node that is a group of processes: no root needed, and no network of its own to cut."""

    def __init__(self, name: str, place: Place, life: Life, on_end: Callable[[], None]) -> None:
        super().__init__(name, place, life, on_end)
        root = Path(os.environ.get("CKPT_RAM_DIR") or "/dev/shm")
        self._mark = f"{name}/{uuid.uuid4().hex}"
        self._ram = root / f"holdfast-chaos-{self._mark.replace('/', '-')}"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._ram.mkdir()
        environment = {
            **self._environment(),
            NODE_VARIABLE: self._mark,
            "CKPT_RAM_DIR": str(self._ram),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        with open(self.log, "ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.place.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._watch = asyncio.create_task(self._await_end())

    async def _await_end(self) -> None:
        assert self._process is not None
        code = await self._process.wait()
        if self.life.code is None and not self.life.taken:
            self.life.code = code
        self._on_end()

    async def power_off(self) -> None:
        """Agent, workers and keeper, in this order, until none is left: a worker would start a keeper."""
        if self._process is None:
            return
        dying = {self._process.pid} if self.runs else set[int]()
        processes.kill(dying)
        while (left := self.processes()) or any(processes.lives(pid) for pid in dying):
            dying.update(processes.kill(left))  # what dies is no longer among them
            await asyncio.sleep(0.01)
        await self._watch
        shutil.rmtree(self._ram, ignore_errors=True)

    def agent(self) -> int | None:
        return self._process.pid if self._process is not None and self.runs else None

    def processes(self) -> list[int]:
        return processes.marked(NODE_VARIABLE, self._mark)

    @property
    def ram(self) -> Path:
        return self._ram


class Hub:
    """A bridge in a network namespace of its own, and a cable to each node. Ends with this process."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._held = Held("net")
        self._pid = 0
        self._generations: dict[str, int] = {}

    def open(self) -> None:
        """Make the bridge. GroundError if the machine does not allow it."""
        self._pid = self._held.open()
        self._run("ip", "link", "add", "br0", "type", "bridge")
        self._run("ip", "link", "set", "br0", "up")

    def close(self) -> None:
        self._held.close()

    def plug(self, name: str, pid: int) -> None:
        """Give the namespace of `pid` an eth0 with the address of the node `name`."""
        port, number = self.port(name), self._names.index(name) + 1
        with contextlib.suppress(GroundError):
            self._run("ip", "link", "del", port)  # of a node of this name that was lost
        self._run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self._run("ip", "link", "set", port, "master", "br0", "up")
        for words in (
            "link set lo up",
            f"link set eth0 address 02:00:00:00:00:{number:02x}",
            f"addr add {NETWORK}.{number}/24 dev eth0",
            "link set eth0 up",
        ):
            inside(pid, "ip", *words.split())

    def cut(self, name: str) -> None:
        """Nothing arrives any more, and neither end is told: the port leaves the bridge, the carrier stays."""
        self._run("ip", "link", "set", self.port(name), "nomaster")

    def heal(self, name: str) -> None:
        self._run("ip", "link", "set", self.port(name), "master", "br0")

    def is_cut(self, name: str) -> bool:
        return "master br0" not in self._run("ip", "-o", "link", "show", self.port(name))

    @staticmethod
    def port(name: str) -> str:
        return f"to-{name}"

    def address(self, name: str) -> str:
        return f"{NETWORK}.{self._names.index(name) + 1}"

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    def _run(self, *command: str) -> str:
        return inside(self._pid, *command)


def inside(pid: int, *command: str) -> str:
    """Run a command in the network namespace of `pid`; what it printed. GroundError if it fails."""
    done = subprocess.run(
        ["nsenter", "-t", str(pid), "-n", *command],
        capture_output=True,
        text=True,
        timeout=COMMAND_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise GroundError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
