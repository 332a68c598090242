"""What a run stands on: the folder, the run's disk, the hub, the nodes, and everything that is removed at the end."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from random import Random

import ckpt
import elastic
from ckpt.events import VARIABLE
from ckpt.run import RunDirectory
from elastic.chaos import processes
from elastic.chaos.bucket import NAME, PROGRAM, URL, Bucket
from elastic.chaos.cgroups import Cgroup, GroundError, root_of
from elastic.chaos.disk import Disk
from elastic.chaos.listen import Listener
from elastic.chaos.nodes import Boxed, Hub, Node, Place, Plain
from elastic.chaos.scenario import S3, TIMING, TORCHRUN, Scenario
from elastic.evidence import Life

log = logging.getLogger(__name__)
CONTROLLERS = ("freezer", "memory", "cpu")
TORCHRUN_PORT = 29400
CLOCK_SITE = Path(__file__).with_name("clock_site")
NEEDED = {"disk": ("mkfs.ext4", "fsfreeze"), "tc": ("tc",), "strace": ("strace",)}  # programs, by ability


def abilities(boxes: bool = True) -> frozenset[str]:
    """What faults can ask for here: `boxes` (namespaces and a network), control groups, `s3`, and tools.

    Without `boxes`, what nodes that are plain processes can be put through.
    """
    plain = frozenset({"s3"} if importlib.util.find_spec("s3fs") and shutil.which(PROGRAM) else ())
    tools = all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip", "mount"))
    if not boxes or os.geteuid() != 0 or not tools:
        return plain
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, timeout=30, check=False
    )
    if tried.returncode:
        return plain
    found = {"boxes", *(controller for controller in CONTROLLERS if _writable(controller))}
    return plain | found | {name for name, programs in NEEDED.items() if all(map(shutil.which, programs))}


def _writable(controller: str) -> bool:
    found = root_of(controller)
    return found is not None and os.access(found[0], os.W_OK)


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
        self.url = URL if scenario.store == S3 else str(self.run)
        self.names = tuple(f"n{i}" for i in range(1, scenario.nodes + 1 + len(scenario.faults)))
        self.place = Place(
            folder,
            agent_command(scenario, self.url, self.names[0] if "boxes" in can else "127.0.0.1", command),
            self._environment(),
            self._kept(command),
            self.names,
        )
        self.nodes: dict[str, Node] = {}
        self.lives: list[Life] = []
        self.hub: Hub | None = None
        self.disk: Disk | None = None
        self.bucket: Bucket | None = None
        self.ended = asyncio.Event()  # set whenever an agent has ended
        self.looked_for = ["processes", "shared memory"]

    async def open(self) -> None:
        await self.listener.open()
        if "boxes" in self.can:
            self.hub = Hub((*self.names, NAME))
            self.hub.open()
            self.looked_for += ["mounts", "control groups"]
        if self.scenario.store_mb:
            if "disk" not in self.can:
                raise GroundError(f"{self.scenario.name} needs a disk of its own, which only root can make")
            self.disk = Disk(self.run, self.scenario.store_mb)
            self.disk.open()
        if self.scenario.store == S3:
            self.bucket = Bucket(self.hub, self.random.randrange(2**32))
            await self.bucket.open()
            self.place = replace(self.place, environment={**self.place.environment, **self.bucket.environment})
            self.looked_for.append("multipart uploads")

    @property
    def store(self) -> Path:
        """Where this process finds the run. GroundError if it lies in a bucket."""
        if self.bucket is not None:
            raise GroundError("the run lies in a bucket, whose files cannot be touched")
        return self.disk.seen_at if self.disk is not None else self.run

    @contextmanager
    def opened(self) -> Iterator[RunDirectory]:
        """The run, for reading."""
        with self.bucket.reached() if self.bucket is not None else nullcontext(str(self.store)) as place:
            yield RunDirectory.open(place)

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
        if self.disk is not None:
            with suppress(GroundError):
                await asyncio.to_thread(self.disk.thaw)  # what waits for it does not die
        done = await asyncio.gather(*(node.power_off() for node in self.nodes.values()), return_exceptions=True)
        await self.listener.close()
        for part in (self.hub, self.disk):
            if part is not None:
                part.close()
        if self.bucket is not None:
            await self.bucket.close()
        self.hub = self.disk = self.bucket = None
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
            "CKPT_URL": self.url,
            VARIABLE: str(self.listener.path),
            **self.scenario.environment,
            **({"PYTHONPATH": _first_on_path(CLOCK_SITE, self.scenario.environment)} if self._clocks() else {}),
        }

    def _clocks(self) -> bool:
        """Whether clocks of nodes shall jump."""
        return any(fault.kind == "clock-jump" for fault in self.scenario.faults)

    def _kept(self, command: Sequence[str]) -> tuple[str, ...]:
        """What must be seen though it may lie in /tmp: parents before what lies in them."""
        named = [Path(word).resolve() for word in command if os.path.exists(word)]
        paths = [self.folder, self.run, self.sockets, Path.cwd(), Path(sys.prefix), Path(sys.base_prefix), *named]
        paths += [Path(path).resolve() for path in sys.path if path]
        # Where they are installed as a checkout, nothing of sys.path leads to them.
        paths += [Path(package.__file__).resolve().parent.parent for package in (ckpt, elastic) if package.__file__]
        return tuple(str(path) for path in sorted(set(paths)))


def agent_command(scenario: Scenario, url: str, host: str, command: Sequence[str]) -> list[str]:
    """What a node runs: the launcher, with the user's command as its workers. The store of torchrun is on `host`."""
    words = list(command[1:] if list(command[:1]) == ["--"] else command)
    if words and os.path.basename(words[0]) in ("python", "python3"):
        words = words[1:]  # the launcher adds its own
    nodes = f"{scenario.minimum}:{scenario.maximum}"
    if scenario.launcher == TORCHRUN:
        return [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", str(scenario.workers),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{TORCHRUN_PORT}", "--rdzv-id", "chaos",
            "--max-restarts", "1000", *words,
        ]  # fmt: skip
    return [
        sys.executable, "-m", "elastic.cli", "run", "--nodes", nodes, "--workers", str(scenario.workers), url,
        "--", *words,
    ]  # fmt: skip


def _first_on_path(folder: Path, environment: Mapping[str, str]) -> str:
    before = environment.get("PYTHONPATH") or os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([str(folder), *([before] if before else [])])


async def left_behind(ground: Ground, limit_s: float) -> list[str]:
    """After every agent has ended: what outlives it. Keepers are given `limit_s` to end by themselves."""
    found: list[str] = []
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        found = _left(ground)
        if not found:
            break
        await asyncio.sleep(0.05)
    if ground.bucket is not None:
        try:
            found += await asyncio.to_thread(_uploads, ground)
        except Exception as error:  # of the store's client: the run was good or bad without it
            ground.looked_for.remove("multipart uploads")
            log.warning("unfinished uploads could not be listed: %s", error)
    return found


def _uploads(ground: Ground) -> list[str]:
    """Unfinished uploads that nothing removes: those below a step are removed with it."""
    assert ground.bucket is not None
    with ground.opened() as run:
        kept = tuple(f"run/steps/{commit.attempt}/" for commit in run.log.read().standing())
    return [f"an unfinished upload of {key}" for key in ground.bucket.unfinished() if not key.startswith(kept)]


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
