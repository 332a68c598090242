"""Real agents for the tests: torchrun with the elastic handler, one process a node, killed for good at the end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from keepers import keepers, kill_keepers, until

from ckpt.run import RunDirectory

ROOT = Path(__file__).parent.parent
MARK = "ELASTIC_TEST"
NODE_TIMEOUT_S = 2
DEADLINE_S = 90


class Agent:
    """One torchrun. `name` is what its workers and its log are known by."""

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        nnodes: str,
        before: Sequence[str],
        run_id: str,
        loop: Sequence[str],
        more: dict[str, str],
    ) -> None:
        self.name = name
        self.log = cluster.folder / f"{name}.log"
        ram = cluster.ram / name
        ram.mkdir(exist_ok=True)
        self.ram = ram
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "CKPT_RAM_DIR": str(ram),
            "CKPT_KEEPER_GRACE_S": "30",
            "ELASTIC_NODE_TIMEOUT_S": str(NODE_TIMEOUT_S),
            "ELASTIC_JOIN_WINDOW_S": "60",  # MAX nodes start at once; tests that want fewer say so
            "ELASTIC_MIN_INTERVAL_S": "1",
            "ELASTIC_SETTLE_S": "5",
            "TEST_NODE": name,
            MARK: cluster.mark,
            **more,
        }
        command = [
            *before, sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "elastic",
            "--rdzv-endpoint", cluster.endpoint or str(cluster.run), "--max-restarts", "1000000", "--nnodes", nnodes,
            *(["--rdzv-id", run_id] if run_id else []), "--nproc-per-node", "1",
            str(cluster.worker), str(cluster.run), str(cluster.events), *loop,
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=cluster.folder
            )

    def kill(self) -> None:
        """SIGKILL for the agent alone, as when it runs out of memory."""
        self.process.kill()
        self.process.wait()

    def lose_node(self, worker: int) -> None:
        """SIGKILL for agent, worker and keeper, in this order: a worker would start a keeper. As when power is lost."""
        self.process.kill()
        os.kill(worker, signal.SIGKILL)
        kill_keepers(self.ram)
        self.process.wait()

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"agent {self.name} has not ended within {deadline_s:g} s") from None


class Cluster:
    """Agents of one run, what their workers said, and the end of them all. Use as a context manager."""

    def __init__(
        self, folder: Path, worker: Path = ROOT / "tests" / "elastic_worker.py", endpoint: str | None = None
    ) -> None:
        self.worker, self.endpoint = worker, endpoint
        self.folder, self.events = folder, folder / "events"
        self.run: Path | str = folder / "run"  # or a bucket
        self.events.mkdir()
        self.ram = Path(os.environ["CKPT_RAM_DIR"]) / f"nodes-{uuid.uuid4().hex[:8]}"
        self.ram.mkdir()
        self.mark = uuid.uuid4().hex
        self.agents: dict[str, Agent] = {}

    def add(
        self,
        name: str,
        nnodes: str,
        *,
        before: Sequence[str] = (),
        run_id: str = "job",
        loop: Sequence[str] = (),
        **more: str,
    ) -> Agent:
        """Start an agent; `more` is its environment, `before` stands before its command, `loop` after the worker's."""
        self.agents[name] = Agent(self, name, nnodes, before, run_id, loop, more)
        return self.agents[name]

    # What the workers said

    def said(self) -> list[dict[str, Any]]:
        """Everything, each process's in order."""
        found = []
        for path in sorted(self.events.glob("*.jsonl")):
            found += [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return found

    def generation(self) -> int:
        return max((event["generation"] for event in self.said()), default=0)

    def workers(self, generation: int) -> dict[str, dict[str, Any]]:
        """By node, what the workers of a generation said on having restored."""
        return {e["node"]: e for e in self.said() if e["what"] == "restored" and e["generation"] == generation}

    def last_step(self, generation: int | None = None) -> int:
        steps = [e["step"] for e in self.said() if e["what"] == "step" and generation in (None, e["generation"])]
        return max(steps, default=0)

    def trains(self, nodes: set[str], after: int = 0) -> int:
        """Wait until exactly `nodes` have made steps in one generation above `after`; that generation."""
        found = 0

        def working() -> bool:
            nonlocal found
            for generation in range(self.generation(), after, -1):
                events = [e for e in self.said() if e["what"] == "step" and e["generation"] == generation]
                at = {e["node"]: e["step"] for e in events}
                if set(at) == nodes and all(e["world"] == len(nodes) for e in events) and len(events) >= 3 * len(nodes):
                    found = generation
                    return True
            return False

        self.until(f"{sorted(nodes)} train in a generation after {after}", working)
        self.until(f"generation {found} has committed, so its keepers are up", lambda: self.has_committed(found))
        return found

    def has_committed(self, generation: int) -> bool:
        view = RunDirectory.open(self.run).log.read()
        return any(commit.generation == generation for commit in view.commits.values())

    def leader(self) -> str:
        """The name of the agent that leads, by the newest start in the run's log."""
        start = RunDirectory.open(self.run).log.read().holder
        assert start is not None
        return next(name for name, agent in self.agents.items() if _is_or_under(start.pid, agent.process.pid))

    def ledger(self) -> list[list[int]]:
        """The samples of each step that counts, of all ranks together: of the newest generation that made it."""
        made: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for event in self.said():
            if event["what"] == "data":
                made.setdefault((event["step"], event["generation"]), []).append(event)
        head = RunDirectory.open(self.run).log.read().head
        assert head is not None
        found = []
        for step in range(1, head.step + 1):
            events = made[step, max(generation for at, generation in made if at == step)]
            assert len(events) == events[0]["world"], (
                f"of step {step} not every rank said what it was made of: {events}"
            )
            found.append([i for event in events for i in event["indices"]])
        return found

    def pid_of_worker(self, node: str, generation: int) -> int:
        return int(self.workers(generation)[node]["pid"])

    def finish(self, code: int = 0) -> None:
        """Have the workers end, in one step."""
        part = self.events / "finish.part"
        part.write_text(str(code))
        part.rename(self.events / "finish")

    def until(self, what: str, condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
        until(what, condition, deadline_s)

    def log_has(self, name: str, pattern: str) -> bool:
        return re.search(pattern, self.agents[name].log.read_text(errors="replace")) is not None

    # The end

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        left = self.end()
        if kind is not None:
            for agent in self.agents.values():
                print(f"==== {agent.name}: {agent.process.returncode}")
                print(agent.log.read_text(errors="replace")[-6000:])
            print("==== events", *self.said()[-20:], sep="\n")
        elif left:
            raise AssertionError(f"left running after all agents had ended: {left}")

    def end(self) -> list[str]:
        """Kill what is left, keepers too; what of agents and workers there was though every agent had ended."""
        all_ended = all(agent.process.poll() is not None for agent in self.agents.values())
        if all_ended:
            with contextlib.suppress(AssertionError):
                until("no worker outlives its agent", lambda: not self.processes())
        left = [f"{pid} {command}" for pid, command in self.processes()] if all_ended else []
        for agent in self.agents.values():
            if agent.process.poll() is None:
                agent.kill()
        kill_keepers(self.ram)
        for pid, _ in self.processes():
            os.kill(pid, signal.SIGKILL)
        until("everything is gone", lambda: not self.processes() and not keepers(self.ram))
        subprocess.run(["rm", "-rf", str(self.ram)], check=True)
        return left

    def processes(self) -> list[tuple[int, str]]:
        """Every process that one of our agents started, keepers aside."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                try:
                    environment = (entry / "environ").read_bytes().split(b"\0")
                    command = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if f"{MARK}={self.mark}".encode() in environment and b"ckpt.keeper" not in command:
                    found.append((int(entry.name), b" ".join(command).decode(errors="replace")[:200]))
        return found


def _is_or_under(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False
