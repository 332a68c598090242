"""What a run stands on: the folder, the run's disk, the hub, the nodes, and everything that is removed at the end."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from random import Random

import ckpt
import elastic
from ckpt.events import VARIABLE
from elastic.chaos import processes
from elastic.chaos.cgroups import Cgroup, GroundError, root_of
from elastic.chaos.evidence import Life
from elastic.chaos.listen import Listener
from elastic.chaos.nodes import Boxed, Hub, Node, Place, Plain
from elastic.chaos.scenario import TIMING, Scenario

CONTROLLERS = ("freezer", "memory", "cpu")
DISK_LIMIT_S = 20.0


def abilities() -> frozenset[str]:
    """What faults can ask for here: `boxes` (namespaces and a network), `disk`, and the control groups."""
    tools = all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip", "mount"))
    if os.geteuid() != 0 or not tools:
        return frozenset()
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, timeout=30, check=False
    )
    if tried.returncode:
        return frozenset()
    found = {"boxes", "disk", *(controller for controller in CONTROLLERS if _writable(controller))}
    return frozenset(found | ({"tc"} if shutil.which("tc") else set()))


def _writable(controller: str) -> bool:
    found = root_of(controller)
    return found is not None and os.access(found[0], os.W_OK)


class Disk:
    """A small file system of its own for the run, in a mount namespace that ends with this process."""

    def __init__(self, place: Path, size_mb: int) -> None:
        self._place, self._size_mb = place, size_mb
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "--fork", "--kill-child=KILL", "cat"],
            stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._pid = 0

    def open(self) -> None:
        deadline = time.monotonic() + DISK_LIMIT_S
        while not (found := processes.children(self._holder.pid)):
            if self._holder.poll() is not None or time.monotonic() > deadline:
                raise GroundError("no mount namespace can be made here; root is needed")
        self._pid = found[0]
        self._place.mkdir(exist_ok=True)
        self._mount("-t", "tmpfs", "-o", f"size={self._size_mb}m", "tmpfs", str(self._place))

    @property
    def before(self) -> list[str]:
        """What stands before a command that shall see the disk."""
        return ["nsenter", "-t", str(self._pid), "-m"]

    @property
    def seen_at(self) -> Path:
        """Where this process, which is outside, finds it."""
        return Path(f"/proc/{self._pid}/root{self._place}")

    def fill(self) -> int:
        """Leave no room; how many bytes that took."""
        room = os.statvfs(self.seen_at)
        nbytes = room.f_bavail * room.f_frsize
        with open(self.seen_at / ".ballast", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(nbytes, 1))
        return nbytes

    def free(self) -> None:
        (self.seen_at / ".ballast").unlink(missing_ok=True)

    def read_only(self, yes: bool) -> None:
        """Refuse every write, or none. Tried again while a file is open for writing."""
        deadline = time.monotonic() + DISK_LIMIT_S
        while True:
            try:
                return self._mount("-o", f"remount,{'ro' if yes else 'rw'}", str(self._place))
            except GroundError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def close(self) -> None:
        """The file system goes with the last process that sees it."""
        processes.kill([self._pid] if self._pid else [])
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait()

    def _mount(self, *arguments: str) -> None:
        done = subprocess.run([*self.before, "mount", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise GroundError(f"mount {' '.join(arguments)}: {done.stderr.strip()}")


class Ground:
    """The nodes of one run, by name, and all that faults act on. `abilities` empty: nodes are plain processes."""

    def __init__(
        self, scenario: Scenario, folder: Path, command: Sequence[str], can: frozenset[str], seed: int, began: float
    ) -> None:
        self.scenario, self.folder, self.can, self.began = scenario, folder, can, began
        self.random = Random(seed)
        self.identity = uuid.uuid4().hex[:8]
        self.sockets = Path(tempfile.mkdtemp(prefix="holdfast-"))  # a socket's path must be short
        self.listener = Listener(self.sockets / "marks", began)
        self.run = folder / "run"
        self.names = tuple(f"n{i}" for i in range(1, scenario.nodes + 1 + len(scenario.faults)))
        self.place = Place(
            folder,
            agent_command(scenario, str(self.run), command),
            self._environment(),
            self._kept(command),
            self.names,
        )
        self.nodes: dict[str, Node] = {}
        self.lives: list[Life] = []
        self.hub: Hub | None = None
        self.disk: Disk | None = None
        self.ended = asyncio.Event()  # set whenever an agent has ended
        self.looked_for = ["processes", "shared memory"]

    async def open(self) -> None:
        await self.listener.open()
        if "boxes" in self.can:
            self.hub = Hub(self.names)
            self.hub.open()
            self.looked_for += ["namespaces", "mounts", "control groups"]
        if self.scenario.store_mb:
            if "disk" not in self.can:
                raise GroundError(f"{self.scenario.name} needs a disk of its own, which only root can make")
            self.disk = Disk(self.run, self.scenario.store_mb)
            self.disk.open()

    @property
    def store(self) -> Path:
        """Where this process finds the run."""
        return self.disk.seen_at if self.disk is not None else self.run

    async def add(self, name: str | None = None) -> Node:
        """Start a node, or a lost one anew."""
        name = name or next(name for name in self.names if name not in self.nodes)
        life = Life(name, self.now())

        def on_end() -> None:
            life.ended = self.now()
            self.ended.set()

        node: Node
        if self.hub is not None:
            node = Boxed(name, self.place, life, on_end, self.hub, self.disk.before if self.disk else ())
            for controller in CONTROLLERS:
                if controller in self.can:
                    group = Cgroup.make(controller, f"holdfast-chaos-{self.identity}-{name}-{len(self.lives)}")
                    node.cgroups[controller] = group
        else:
            node = Plain(name, self.place, life, on_end)
        self.lives.append(life)
        self.nodes[name] = node
        await node.start()
        return node

    async def all_ended(self) -> None:
        """Return once no agent is left."""
        while any(node.runs for node in self.nodes.values()):
            self.ended.clear()
            await self.ended.wait()

    async def close(self) -> None:
        """End and remove everything but the folder. Idempotent."""
        done = await asyncio.gather(*(node.power_off() for node in self.nodes.values()), return_exceptions=True)
        await self.listener.close()
        for part in (self.hub, self.disk):
            if part is not None:
                part.close()
        self.hub = self.disk = None
        shutil.rmtree(self.sockets, ignore_errors=True)
        for failure in done:
            if failure is not None:
                raise failure

    def now(self) -> float:
        return time.monotonic() - self.began

    def pick(self, wanted: str) -> Node | None:
        """The node that `wanted` names: a name, `leader`, `follower`, `any`; None if there is none such."""
        running = [node for node in self.nodes.values() if node.runs and node.workers()]
        leader = self.listener.leader
        found = {
            "leader": [node for node in running if node.name == leader],
            "follower": [node for node in running if node.name != leader],
            "any": running,
        }.get(wanted, [node for node in running if node.name == wanted])
        return self.random.choice(found) if found else None

    def _environment(self) -> dict[str, str]:
        return {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            **TIMING,
            "CKPT_URL": str(self.run),
            VARIABLE: str(self.listener.path),
            **self.scenario.environment,
        }

    def _kept(self, command: Sequence[str]) -> tuple[str, ...]:
        """What must be seen though it may lie in /tmp: parents before what lies in them."""
        named = [Path(word).resolve() for word in command if os.path.exists(word)]
        paths = [self.folder, self.run, self.sockets, Path.cwd(), Path(sys.prefix), Path(sys.base_prefix), *named]
        paths += [Path(path).resolve() for path in sys.path if path]
        # Where they are installed as a checkout, nothing of sys.path leads to them.
        paths += [Path(package.__file__).resolve().parent.parent for package in (ckpt, elastic) if package.__file__]
        return tuple(str(path) for path in sorted(set(paths)))


def agent_command(scenario: Scenario, url: str, command: Sequence[str]) -> list[str]:
    """What a node runs: `elastic run`, with the user's command as its workers."""
    words = list(command[1:] if list(command[:1]) == ["--"] else command)
    if words and os.path.basename(words[0]) in ("python", "python3"):
        words = words[1:]  # the launcher adds its own
    nodes = f"{scenario.minimum}:{scenario.maximum}"
    return [
        sys.executable, "-m", "elastic.cli", "run", "--nodes", nodes, "--workers", str(scenario.workers), url,
        "--", *words,
    ]  # fmt: skip


async def left_behind(ground: Ground, limit_s: float) -> list[str]:
    """After every agent has ended: what outlives it. Keepers are given `limit_s` to end by themselves."""
    found: list[str] = []
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        found = _left(ground)
        if not found:
            break
        await asyncio.sleep(0.05)
    return found


def _left(ground: Ground) -> list[str]:
    found: list[str] = []
    for node in ground.nodes.values():
        if not node.life.taken:
            found += [f"{node.name}: process {processes.described(pid)}" for pid in node.processes()]
            if node.ram.is_dir():
                found += [f"{node.name}: {path.name} in shared memory" for path in node.ram.iterdir() if path.is_dir()]
    return found


def outlived(ground: Ground) -> list[str]:
    """After the ground was closed: what is still there of its namespaces, mounts and control groups."""
    found = [
        f"control group {path}"
        for controller in CONTROLLERS
        if (root := root_of(controller)) is not None
        for path in root[0].glob(f"holdfast-chaos-{ground.identity}-*")
    ]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [f"mount {line.split()[4]}" for line in mounts if str(ground.folder) in line.split()[4]]
    found += [f"process {processes.described(pid)}" for pid in processes.marked(VARIABLE, str(ground.listener.path))]
    return found
