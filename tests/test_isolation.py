"""Several writers, a reader, retention and freezes, in random order over one run: what isolation means, step by step.

Each writer is a process on a node of its own (with a RAM tier and a keeper of its own); so is the reader. Whatever one
does may be stopped at any instant (SIGSTOP of the process, its keeper, or both) and go on much later. Throughout:

- a save that begins when somebody else holds the run ends in `Fenced`, and what it wrote is never selected
- a step that was acknowledged is in the lineage, for ever
- a reader finds a whole step of the lineage, and none older than what had been acknowledged when it began
"""

from __future__ import annotations

import json
import os
import random
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import ROOT
from keepers import is_clean, keepers, until

import ckpt
from ckpt.errors import CkptError, NotFound
from ckpt.log import View
from ckpt.records import Commit
from ckpt.run import RunDirectory

WRITERS = 4
ACTIONS = 40
DEADLINE_S = 120

# A process: one command a line, one answer a line


def state(step: int, value: int) -> dict[str, Any]:
    return {"a": torch.full((100_000,), float(value)), "b": torch.full((300,), float(value)), "n": step, "value": value}


def seen(found: dict[str, Any]) -> list[int]:
    """Step and value of a state that is whole."""
    assert all(bool((found[name] == found["value"]).all()) for name in "ab"), "a mix"
    return [found["n"], found["value"]]


class Hands:
    """What a process does when it is told."""

    def __init__(self) -> None:
        self._checkpointer: ckpt.Checkpointer | None = None
        self._step = 0

    def open(self, path: str, last: int) -> list[int]:
        """Take the run over; step and value of what was restored."""
        self.close()
        keep = ckpt.Keep(last=last) if last else None
        self._checkpointer = ckpt.Checkpointer(path, takeover=True, keep=keep)
        target = state(0, 0)
        self._step = self._checkpointer.restore(target) or 0
        assert self._step == target["n"]
        return seen(target)

    def save(self, value: int) -> int:
        assert self._checkpointer is not None
        self._step += 1
        self._checkpointer.save(self._step, state(self._step, value), metrics={"value": value}).wait()
        return self._step

    def load(self, path: str) -> list[int]:
        try:
            return seen(ckpt.load(path))
        except NotFound:
            return [0, 0]

    def close(self) -> None:
        if self._checkpointer is not None:
            with suppress(CkptError):  # what it still held was told to whoever saved
                self._checkpointer.close()
        self._checkpointer = None


def main() -> None:
    torch.set_num_threads(1)
    hands = Hands()
    while line := sys.stdin.readline():
        name, arguments = json.loads(line)
        try:
            answer = {"result": getattr(hands, name)(*arguments)}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)


# The driver


@dataclass
class Doing:
    """A command that was given, and what was known when it was."""

    name: str
    value: int = 0
    stale: bool = False  # somebody else held the run
    acknowledged: int = 0  # the newest step that was


class Node:
    """One of the processes, with a RAM tier of its own."""

    def __init__(self, ram: Path) -> None:
        ram.mkdir()
        self.ram, self.doing, self.frozen = ram, None, list[int]()
        self.doing: Doing | None
        self.has_opened = False
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import test_isolation; test_isolation.main()"],
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                "CKPT_RAM_DIR": str(ram),
                "OMP_NUM_THREADS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.pid = self._process.pid

    def give(self, doing: Doing, *arguments: Any) -> None:
        assert self._process.stdin is not None
        self.doing = doing
        self._process.stdin.write(json.dumps([doing.name, arguments]).encode() + b"\n")

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            assert selector.select(DEADLINE_S), f"no answer to {self.doing} within {DEADLINE_S} s"
        self.doing = None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def freeze(self, what: str) -> None:
        pids = [self.pid] if what != "keeper" else []
        self.frozen = pids + (keepers(self.ram) if what != "process" else [])
        for pid in self.frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in self.frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.frozen = []

    def end(self) -> None:
        self.thaw()
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


@dataclass
class Story:
    """One run directory, what happens to it, and what must hold."""

    path: Path
    draw: random.Random
    writers: list[Node]
    reader: Node
    acknowledged: dict[int, int] = field(default_factory=dict)  # value -> step
    never: set[int] = field(default_factory=set)  # values of stale writers
    told: list[str] = field(default_factory=list)
    fenced: int = 0
    values: int = 0

    def play(self, actions: int) -> None:
        self.begin(self.writers[0], "open")
        self.finish(self.writers[0])
        for _ in range(actions):
            self.act()
        for node in [*self.writers, self.reader]:
            node.thaw()
            self.finish(node)
        for name in ("open", "save"):
            self.begin(self.writers[0], name)
            self.finish(self.writers[0])
        self.begin(self.reader, "load")
        self.finish(self.reader)
        assert list(self.acknowledged)[-1] == self.lineage()[-1].metrics["value"]

    def act(self) -> None:
        """Something that is possible now."""
        node = self.draw.choice([*self.writers, self.reader])
        if node.frozen:
            if self.draw.random() < 0.5:
                self.note("thaw", node)
                node.thaw()
        elif node.doing is not None:
            self.finish(node)
        elif node is self.reader:
            self.begin(node, "load")
        else:
            self.begin(node, "save" if node.has_opened and self.draw.random() < 0.75 else "open")
        if node.doing is not None and not node.frozen and self.draw.random() < 0.5:
            time.sleep(self.draw.uniform(0, 0.2))  # the instant is the test's subject
            what = self.draw.choice(["process", "keeper", "both"])
            self.note(f"freeze {what}", node)
            node.freeze(what)

    def begin(self, node: Node, name: str) -> None:
        self.note(name, node)
        doing = Doing(name, acknowledged=max(self.acknowledged.values(), default=0))
        if name == "save":
            self.values += 1
            doing.value, holder = self.values, self.view().holder
            doing.stale = holder is not None and holder.pid != node.pid
            node.give(doing, doing.value)
        elif name == "open":
            node.has_opened = True
            node.give(doing, str(self.path), self.draw.choice([0, 1, 2]))
        else:
            node.give(doing, str(self.path))

    def finish(self, node: Node) -> None:
        """Wait for what `node` does, and judge it."""
        if (doing := node.doing) is None:
            return
        answer = node.answer()
        self.note(f"{doing.name} {doing.value or ''}: {answer}", node)
        if doing.name == "save":
            self.judge_save(node, doing, answer)
        else:
            assert "result" in answer, answer
            step, value = answer["result"]
            assert step >= doing.acknowledged, f"step {step}, but {doing.acknowledged} had been acknowledged"
            assert (step, value) in {(0, 0), *((each.step, each.metrics["value"]) for each in self.lineage())}
        values = {commit.metrics["value"] for commit in self.lineage()}
        assert values >= set(self.acknowledged), "an acknowledged step is not in the lineage"
        assert not values & self.never, "a stale writer's step was selected"

    def judge_save(self, node: Node, doing: Doing, answer: dict[str, Any]) -> None:
        if "result" in answer:
            assert not doing.stale, "a stale writer was not fenced"
            self.acknowledged[doing.value] = answer["result"]
            return
        assert answer["error"] == "Fenced", answer
        holder = self.view().holder
        assert holder is not None
        assert holder.pid != node.pid, "fenced, though nobody took over"
        self.fenced += 1
        if doing.stale:
            self.never.add(doing.value)

    def view(self) -> View:
        return RunDirectory.open(self.path).log.read()

    def lineage(self) -> tuple[Commit, ...]:
        return self.view().lineage()

    def note(self, what: str, node: Node) -> None:
        who = "reader" if node is self.reader else f"writer {self.writers.index(node)}"
        self.told.append(f"{who}: {what}")


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    root = Path(os.environ["CKPT_RAM_DIR"])
    made = [Node(root / f"node-{number}") for number in range(WRITERS + 1)]
    try:
        yield made
    finally:
        for node in made:
            node.end()
        for node in made:
            until("its keepers are gone", lambda ram=node.ram: is_clean(ram))
            node.ram.rmdir()


def play(nodes: list[Node], path: Path, seed: int) -> int:
    """How many saves were fenced."""
    draw = random.Random(seed)
    story = Story(path, draw, nodes[: draw.randint(2, WRITERS)], nodes[-1])
    try:
        story.play(ACTIONS)
        for node in story.writers:
            node.give(Doing("close"))
            node.answer()
            node.has_opened = False
    except BaseException as error:
        raise AssertionError(f"seed {seed}: {error}\n" + "\n".join(story.told)) from error
    print(f"seed {seed}: {len(story.writers)} writers, {len(story.acknowledged)} saved, {story.fenced} fenced")
    return story.fenced


@pytest.mark.parametrize("seeds", [1, pytest.param(60, marks=[pytest.mark.prove, pytest.mark.timeout(3600)])])
def test_writers_readers_and_freezes(nodes: list[Node], tmp_path: Path, seeds: int) -> None:
    first = random.randrange(1 << 32)
    fenced = sum(play(nodes, tmp_path / str(seed), seed) for seed in range(first, first + seeds))
    assert fenced > 0 or seeds < 60
