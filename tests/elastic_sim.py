"""Agents in a world that is made up: a clock, a network and a storage that fail as a seed says. No process, no socket.

The agents are the real ones (`elastic.agent.Agent`); here are only their surroundings. What is checked while it runs:

- a generation has one membership, and only its members ever work in it;
- no two generations work at the same time for longer than it takes to notice (a generation works while all of its
  members run their workers and reach each other), unless the older one's leader cannot reach storage;
- nobody takes the run from a leader whose counter moves, but more than half of its members;
- no commit counts that was made after a newer generation had begun;
- workers that were asked to stop do so only together, as one all-reduce decides it;
- once faults stop, all nodes that live work together, or the job has ended on all of them; who was to leave has left.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ckpt.errors import CkptError
from ckpt.log import View, decide_commit, decide_start
from ckpt.records import Commit, Entry, attempt_name
from elastic import actions as a
from elastic.agent import Agent
from elastic.decide import Limits, Timing
from elastic.leading import EXIT_LEFT
from elastic.membership import Member, Membership, of_start, to_record
from elastic.messages import Job, Join, Stack

TICK_S = 0.1
TIMING = Timing(
    node_timeout_s=2,
    join_window_s=1,
    min_interval_s=3,
    grow_wait_s=5,
    min_wait_s=1e9,
    stop_limit_s=10,
    pause_limit_s=6,
    quarantine_window_s=20,
    fruitless_limit=0,
)
JOB = Job("job", "train", "1:8", "1")


class Broken(AssertionError):
    """The agents did what they must never do."""


@dataclass
class Node:
    """An agent and what it has: whether it lives, is frozen, reaches storage; connections by the other end's name."""

    agent: Agent
    alive: bool = True
    frozen: bool = False
    storage: bool = True
    links: dict[str, bool] = field(default_factory=dict)  # to followers
    up: str | None = None
    probes: set[str] = field(default_factory=set)
    busy_until: float = 0.0  # with what it asked storage for, one after the other
    done: int | None = None
    finished_work: bool = False
    asked: bool = False  # its workers are to stop


class World:
    def __init__(self, seed: int, nodes: int, limits: Limits, timing: Timing = TIMING) -> None:
        self.random = random.Random(seed)
        self.limits, self.timing = limits, timing
        self.now = 100.0
        self.view = View()
        self.counter, self.counter_at, self.steady_since = ("", 0), 0.0, 0.0
        self.announced: dict[str, Member] = {}
        self.cut: set[frozenset[str]] = set()
        self.queue: list[tuple[float, int, object]] = []
        self.count = 0
        self.wires: dict[tuple[str, str], list[tuple[float, Callable[[], object]]]] = {}  # in order; a cut only delays
        self.nodes: dict[str, Node] = {}
        self.trace: list[str] = []
        self.overlap_since = self.now
        self.heeds = self.random.random() < 0.7  # whether workers stop where they are asked to
        self.cordoned: set[str] = set()
        self.drained: set[str] = set()
        for _ in range(nodes):
            self.add()

    # Surroundings

    def add(self) -> str:
        name = f"n{len(self.nodes)}x{self.random.randrange(1000):03d}"
        agent = Agent(Member(name, name, ("10.0.0.1",), 1), JOB, self.limits, self.timing)
        self.nodes[name] = Node(agent)
        self.later(self.random.random() * 0.5, name, lambda: agent.wait())
        return name

    def later(self, delay: float, name: str, act: object) -> None:
        self.count += 1
        self.queue.append((self.now + delay, self.count, (name, act)))

    def reach(self, one: str, other: str) -> bool:
        return frozenset((one, other)) not in self.cut

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.step()

    def step(self) -> None:
        self.now += TICK_S
        due = sorted((item for item in self.queue if item[0] <= self.now), key=lambda item: item[:2])
        self.queue = [item for item in self.queue if item[0] > self.now]
        for _, _, (name, act) in due:
            node = self.nodes[name]
            if not node.alive:
                continue
            if node.frozen:
                self.later(TICK_S, name, act)
                continue
            act()
            self.carry_out(name)
        self.deliver()
        for name, node in self.nodes.items():
            if node.alive and not node.frozen and node.done is None:
                node.agent.tick(self.now)
                self.carry_out(name)
        self.check()

    def deliver(self) -> None:
        for (source, target), messages in list(self.wires.items()):
            while messages and messages[0][0] <= self.now and self.reach(source, target):
                if not self.nodes[target].alive or self.nodes[target].frozen:
                    break
                messages.pop(0)[1]()
                self.carry_out(target)

    # Faults

    def kill(self, name: str) -> None:
        self.note(name, "is killed")
        node = self.nodes[name]
        node.alive = False
        self.announced.pop(name, None)
        for other in self.nodes:
            self.break_link(name, other)

    def break_link(self, one: str, other: str) -> None:
        """Both ends hear of it, where a packet can still reach them."""
        for here, there in ((one, other), (other, one)):
            self.wires[here, there] = []
            node = self.nodes[here]
            if node.up == there:
                node.up = None
                if self.reach(one, other):
                    self.later(0.02, here, lambda a=node.agent, t=there: a.upstream == t and a.lost(None, self.now))
            if node.links.pop(there, None) and self.reach(one, other):
                self.later(0.02, here, lambda a=node.agent, t=there: a.lost(t, self.now))

    def fail_workers(self, name: str) -> None:
        node = self.nodes[name]
        if node.alive and node.agent.mine is not None and node.done is None:
            self.note(name, "workers fail")
            node.agent.stopped(self.now, failed=True)
            self.carry_out(name)
            self.later(0.3, name, lambda: node.agent.wait())

    def leave(self, name: str) -> None:
        """A notice, or (half of the time) an operator."""
        self.note(name, "is to leave")
        match self.random.randrange(4):
            case 0:
                self.cordoned.add(name)
            case 1:
                self.cordoned.add(name)
                self.drained.add(name)
            case _:
                self.nodes[name].agent.leave("notice")
                self.carry_out(name)

    def pause(self, generation: int) -> None:
        """All workers of a generation come to the same step, if all of them still run and reach each other."""
        together = [
            (name, n) for name, n in self.nodes.items() if n.agent.mine and n.agent.mine.generation == generation
        ]
        membership = together[0][1].agent.mine if together else None
        names = {name for name, node in together if node.alive and not node.frozen}
        apart = any(not self.reach(x, y) for x in names for y in names if x != y)
        if membership is None or names != set(membership.nodes) or apart or not any(n.asked for _, n in together):
            return
        for name, node in together:
            self.later(
                self.random.random() * 0.3, name, lambda n=node, m=membership: n.agent.mine == m and n.agent.paused()
            )

    def finish(self) -> None:
        """The workers of the newest generation reach their last step, a little apart."""
        for name, node in self.nodes.items():
            mine = node.agent.mine
            if node.alive and mine is not None and mine.generation == self.view.generation:
                self.later(
                    self.random.random() * 0.3, name, lambda n=node, m=mine: n.agent.mine == m and n.agent.finish()
                )

    def commit(self) -> None:
        """Whoever believes to work tries to commit a step; the log decides."""
        for node in self.nodes.values():
            mine = node.agent.mine
            if not (node.alive and node.storage and mine and mine.leader == node.agent.me.node):
                continue
            step = (self.view.head.step if self.view.head else 0) + 1
            try:
                record = decide_commit(
                    self.view, generation=mine.generation, holder_nonce=mine.nonce, nonce=f"c{self.count}", step=step,
                    attempt=attempt_name(step, f"c{self.count}"), manifest_digest="00", manifest_bytes=1,
                    content_digest="00", metrics={}, world=1, unix_s=0.0, nbytes=1,
                )  # fmt: skip
            except CkptError:
                continue
            self.append(record)

    def append(self, record: Entry) -> None:
        self.count += 1
        following = self.view.after(record)
        if len(following.ignored) > len(self.view.ignored):
            raise Broken(f"a record without effect: {following.ignored[-1].reason}")
        if isinstance(record, Commit) and record.generation != self.view.generation:
            raise Broken("a commit of an older generation")
        self.view = following

    # What agents ask for

    def carry_out(self, name: str) -> None:
        node = self.nodes[name]
        for action in node.agent.actions():
            self.trace.append(f"{self.now:8.2f} {name} {action}")
            self.do(name, node, action)

    def do(self, name: str, node: Node, action: a.Action) -> None:
        agent = node.agent
        match action:
            case a.Send():
                self.send(name, node, action)
            case a.Close(node=other):
                target = node.up if other is None else other
                if target is not None:
                    if other is None:
                        node.up = None
                    else:
                        node.links.pop(target, None)
                    self.break_link(name, target)
            case a.Seek(targets=targets):
                self.later(0.3, name, lambda: agent.sought(self.ask(name, targets), self.now))
            case a.Follow(node=other):
                if other is not None:
                    node.up = other
            case a.Look():
                self.in_storage(name, node, lambda: self.look(name, node, action))
            case a.Propose():
                self.in_storage(name, node, lambda: self.propose(name, node, action))
            case a.Halt():
                node.asked = True
                if agent.mine is None:
                    raise Broken(f"{name} is asked to stop workers that do not run")
                self.later(0.5, name, lambda g=agent.mine.generation: self.pause(g))
            case a.Trace():
                if self.random.random() < 0.8:
                    self.later(0.4, name, lambda: agent.stacks((Stack(0, "here", False),)))
            case a.Kill():
                self.later(0.2, name, lambda: agent.stopped(self.now, failed=False))
                self.later(0.4, name, lambda: agent.wait())
            case a.Release(membership=membership):
                if membership.rank(name) is None:
                    raise Broken(f"{name} works in generation {membership.generation} and is no member")
                standing = next(s for s in self.view.starts if s.nonce == membership.nonce)
                if of_start(standing) != membership:
                    raise Broken(f"generation {membership.generation} has two memberships")
                node.asked, agent.heeds = False, self.heeds
            case a.Exit(code=code):
                node.done = code
                if code == EXIT_LEFT:
                    if not agent.leaving:
                        raise Broken(f"{name} has left, and nobody wanted it to")
                    self.later(0.6, name, lambda: self.kill(name))
                if code in (0, EXIT_LEFT) and agent.leads and agent.membership and node.storage:
                    self.counter = (f"over {agent.membership.generation}", self.count)
                for other in self.nodes:
                    self.later(0.5, name, lambda o=other: self.break_link(name, o))
            case a.Note() | a.Forsake():
                pass

    def in_storage(self, name: str, node: Node, act: object) -> None:
        node.busy_until = max(node.busy_until, self.now + 0.01 + self.random.random() * 0.2)
        self.later(node.busy_until - self.now, name, act)

    def send(self, name: str, node: Node, action: a.Send) -> None:
        other = node.up if action.node is None else action.node
        if other is None:
            return
        target, message = self.nodes[other], action.message

        def arrive() -> None:
            if isinstance(message, Join):
                if node.up == other and target.done is None:
                    target.links[name] = True
                    target.agent.joined(message, self.now)
            elif action.node is None:
                target.agent.heard(name, message, self.now)
            elif target.up == name:
                target.agent.told(message, self.now)

        self.wires.setdefault((name, other), []).append((self.now + 0.01, arrive))

    def ask(self, name: str, targets: tuple[Member, ...]) -> dict[str, object]:
        answers: dict[str, object] = {}
        for target in targets:
            other = self.nodes[target.node]
            there = other.alive and not other.frozen and other.done is None and self.reach(name, target.node)
            answers[target.node] = other.agent.hello(a_hello(self.nodes[name].agent)) if there else None
        return answers

    def look(self, name: str, node: Node, action: a.Look) -> None:
        if node.done is not None:
            return
        if not node.storage:
            node.agent.look_failed(self.now)
            return
        if action.announce:
            self.announced[name] = node.agent.me
        else:
            self.announced.pop(name, None)
        if action.pulse is not None:
            self.count += 1
            self.counter = (f"{'over ' if action.over else ''}{action.pulse}", self.count)
            if self.now - self.counter_at > self.timing.node_timeout_s / 2:
                self.steady_since = self.now
            self.counter_at = self.now
        membership = of_start(self.view.holder)
        over = membership is not None and self.counter[0] == f"over {membership.generation}"
        node.agent.looked(
            a.Seen(
                self.view.generation, membership, self.view.head.attempt if self.view.head else None,
                str(self.counter), over, False, tuple(self.announced.values()),
                frozenset(self.cordoned), frozenset(self.drained),
            ),
            self.now,
        )  # fmt: skip

    def propose(self, name: str, node: Node, action: a.Propose) -> None:
        membership: Membership | None = None
        self.count += 1
        if node.storage:
            before = of_start(self.view.holder)
            try:
                start = decide_start(
                    self.view, nonce=f"s{self.count}", run_id="job", reason=action.reason,
                    expected_generation=action.generation,
                    members=to_record(action.members, name, 7, f"s{self.count}", action.failures),
                )  # fmt: skip
                self.append(start)
                membership = of_start(start)
            except CkptError:
                pass
            else:
                self.check_right(name, node, before)
        node.agent.proposed(membership, self.now)

    # Checks

    def check_right(self, name: str, node: Node, before: Membership | None) -> None:
        """Whether who took the run had a right to: the leader's counter had stood still, or most members went along."""
        if before is None or name == before.leader or self.counter[0] != str(before.generation):
            return
        group = {name, *node.agent.followers} | node.agent._finished
        limit = self.timing.node_timeout_s
        moved = self.now - self.counter_at < limit - 1 and self.now - self.steady_since > limit + 1
        if moved and 2 * sum(member in group for member in before.nodes) <= len(before.members):
            raise Broken(f"{name} took the run with {sorted(group)} from a leader that leads")

    def check(self) -> None:
        working: dict[int, list[str]] = {}
        for name, node in self.nodes.items():
            if node.alive and node.agent.mine is not None and node.done is None:
                working.setdefault(node.agent.mine.generation, []).append(name)
        whole = []
        for generation, names in working.items():
            start = next(s for s in self.view.starts if s.generation == generation)
            membership = of_start(start)
            assert membership is not None
            leader = self.nodes[membership.leader]
            if set(names) == set(membership.nodes) and leader.storage:
                frozen = any(self.nodes[n].frozen for n in names)
                apart = any(not self.reach(x, y) for x in names for y in names if x != y)
                if not frozen and not apart:
                    whole.append(generation)
        if len(whole) < 2:
            self.overlap_since = self.now
        elif self.now - self.overlap_since > self.timing.node_timeout_s + 1:
            raise Broken(f"generations {whole} work at the same time")

    def settled(self) -> bool:
        """Whether all that live work in the newest generation, or wait as spares of it, or have ended."""
        alive = {name: node for name, node in self.nodes.items() if node.alive}
        if any(node.agent.leaving and node.done is None for node in alive.values()):
            return False
        if any(name in self.drained and node.agent.mine is not None for name, node in alive.items()):
            return False
        if all(node.done is not None for node in alive.values()):
            return True
        membership = of_start(self.view.holder)
        if membership is None or self.limits.fit(len(alive)) != len(membership.members):
            return False
        return all(
            (node.agent.mine is not None and node.agent.mine.nonce == membership.nonce)
            if membership.rank(name) is not None
            else node.agent.upstream == membership.leader
            for name, node in alive.items()
        )

    def note(self, name: str, text: str) -> None:
        self.trace.append(f"{self.now:8.2f} {name} {text.upper()}")


def a_hello(agent: Agent) -> object:
    from elastic.messages import Hello

    return Hello(agent.me, agent.job)


def play(seed: int, seconds: float = 40.0) -> World:
    """One schedule: faults at random for `seconds`, then healed; the world at its end. Raises Broken."""
    chance = random.Random(seed)
    count = chance.randint(1, 6)
    world = World(seed, count, Limits(1, chance.randint(max(1, count - 1), 8)))
    world.run(4.0)
    end = world.now + seconds
    while world.now < end:
        world.run(chance.choice((0.1, 0.3, 1.0, 2.5)))
        inject(world, chance)
    heal(world)
    for _ in range(120):
        world.run(1.0)
        world.commit()
        if world.settled():
            break
    else:
        raise Broken(f"no progress after the faults: {world.view.holder}")
    if chance.random() < 0.5:
        end_job(world, chance)
    return world


def end_job(world: World, chance: random.Random) -> None:
    """The workers end well, perhaps while a node dies or fails: every agent that is left must end, within seconds."""
    world.finish()
    names = [name for name, node in world.nodes.items() if node.alive and node.done is None]
    if names and chance.random() < 0.5:
        world.run(chance.random() * 0.5)
        name = chance.choice(names)
        if len(names) > 1 and chance.random() < 0.5:
            world.kill(name)
        else:
            world.fail_workers(name)
    for _ in range(60):
        world.run(0.5)
        world.finish()  # who had to go on reaches the last step, too
        if all(node.done is not None for node in world.nodes.values() if node.alive):
            break
    else:
        raise Broken("the job is done and agents remain")
    codes = {name: world.nodes[name].done for name in names if world.nodes[name].alive}
    if any(codes.values()):
        raise Broken(f"the job ended well with exit codes {codes}")


def inject(world: World, chance: random.Random) -> None:
    names = [name for name, node in world.nodes.items() if node.alive and node.done is None]
    if not names:
        return
    name, other = chance.choice(names), chance.choice(names)
    match chance.randrange(13):
        case 0 if len(names) > 1:
            world.kill(name)
        case 1:
            if len(world.nodes) < 9:
                world.add()
        case 2 | 3:
            world.fail_workers(name)
        case 12:
            world.nodes[name].agent.hung("no step", world.now)
            world.carry_out(name)
        case 4 if name != other:
            world.cut.add(frozenset((name, other)))
        case 5:
            half = set(chance.sample(names, len(names) // 2))
            world.cut |= {frozenset((x, y)) for x in names for y in names if (x in half) != (y in half)}
        case 6:
            world.cut.clear()
        case 7:
            world.nodes[name].frozen = not world.nodes[name].frozen
        case 11 if len(names) > 1:
            world.leave(name)
        case 8:
            world.nodes[name].storage = not world.nodes[name].storage
        case _:
            world.commit()


def heal(world: World) -> None:
    world.cut.clear()
    world.cordoned = set(world.drained)
    for node in world.nodes.values():
        node.frozen, node.storage = False, True
