"""One run: starts the nodes, injects the faults at their instants, waits for the end, and brings home the evidence."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ckpt.check import check_log, check_step
from ckpt.errors import CkptError, Incompatible
from elastic.chaos.cgroups import GroundError
from elastic.chaos.fault import Fault
from elastic.chaos.faults import FAULTS
from elastic.chaos.ground import Ground, left_behind, outlived
from elastic.chaos.listen import Hold
from elastic.chaos.nodes import Node
from elastic.chaos.scenario import Planned, Scenario
from elastic.chaos.watch import Glance
from elastic.evidence import Evidence, Injection, Mark

SAVE_MARKS = ("save", "copy", "saved", "seal", "part", "manifest", "record", "commit")
LEFT_LIMIT_S = 45.0  # longer than keepers wait for workers that were lost
PICK_LIMIT_S = 30.0
LOOK_S = 0.25
Tell = Callable[[str], None]
Look = Callable[[Glance], None]


def conduct(
    scenario: Scenario,
    command: Sequence[str],
    folder: Path,
    *,
    seed: int,
    can: frozenset[str],
    reference: bool = False,
    tell: Tell = lambda text: None,
    look: Look = lambda glance: None,
) -> Evidence:
    """Run `command` through `scenario` below `folder`, which is new; blocking. GroundError if nodes cannot be made,
    Incompatible for a folder with something in it.

    At SIGINT and SIGTERM everything is removed first. `reference`: run it undisturbed before, for the metrics that it
    would have reported. `tell` hears what happens, `look` sees how it is, a few times a second.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise Incompatible(f"{folder} is not empty, and a run in it would go on where another one ended: remove it")
    undisturbed = None
    if reference:
        tell("undisturbed first, for comparison")
        calm = replace(scenario, faults=(), store="directory", store_mb=0)
        undisturbed = asyncio.run(_Conductor(calm, command, folder / "reference", seed, can, tell, look).run())
    evidence = asyncio.run(_Conductor(scenario, command, folder, seed, can, tell, look).run())
    if undisturbed is not None:
        evidence.reference = {mark.step: mark.facts["metrics"] for mark in metrics_of(undisturbed)}
    return evidence


def metrics_of(evidence: Evidence) -> list[Mark]:
    """The steps of rank 0 that reported something."""
    return [mark for mark in evidence.named("step") if mark.rank == 0 and mark.facts.get("metrics")]


class _Conductor:
    def __init__(
        self, scenario: Scenario, command: Sequence[str], folder: Path, seed: int, can: frozenset[str], tell: Tell,
        look: Look,
    ) -> None:  # fmt: skip
        self._scenario, self._can, self._tell, self._look = scenario, can, tell, look
        self._awaits = "the nodes"
        folder.mkdir(parents=True, exist_ok=True)
        self._ground = Ground(scenario, folder.resolve(), command, can, seed, time.monotonic())
        self._listener = self._ground.listener
        kind = "namespaces" if "boxes" in can else "processes"
        self._evidence = Evidence(asdict(scenario), list(command), seed, kind)
        self._healing: list[asyncio.Task[None]] = []

    async def run(self) -> Evidence:
        ground, evidence = self._ground, self._evidence
        directing: asyncio.Task[None] | None = None
        watching = asyncio.create_task(self._watch())
        this = asyncio.current_task()
        assert this is not None
        with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread: then nobody asks
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
        try:
            await ground.open()
            await asyncio.gather(*(ground.add() for _ in range(self._scenario.nodes)))
            directing = asyncio.create_task(self._direct())
            async with asyncio.timeout(self._scenario.limit_s):
                await self._ended(directing)
            evidence.seconds = ground.now()
            for node in ground.nodes.values():
                if node.life.code not in (0, self._scenario.promise.exit_code, None) and not node.life.taken:
                    self._tell(f"{node.name} ended with {node.life.code}; its log ends:\n{node.last_words()}")
            evidence.left = await left_behind(ground, LEFT_LIMIT_S)
        except TimeoutError:
            evidence.timed_out, evidence.seconds = True, ground.now()
            self._tell(f"not over within {self._scenario.limit_s:g} s")
        finally:
            watching.cancel()
            if directing is not None:
                directing.cancel()
            for task in self._healing:
                task.cancel()
            evidence.marks, evidence.lives = self._listener.marks, ground.lives
            try:
                with contextlib.suppress(CkptError, OSError):
                    await asyncio.to_thread(self._check)
            finally:
                await asyncio.shield(ground.close())
        evidence.left += outlived(ground)
        evidence.looked_for = ground.looked_for
        return evidence

    async def _watch(self) -> None:
        while True:
            self._look(self._glance())
            await asyncio.sleep(LOOK_S)

    def _glance(self) -> Glance:
        listener = self._listener
        nodes = tuple((name, node.state, listener.steps.get(name, 0)) for name, node in self._ground.nodes.items())
        return Glance(self._ground.now(), listener.last_step, listener.generation, listener.leader, self._awaits, nodes)

    async def _ended(self, directing: asyncio.Task[None]) -> None:
        """Every agent has ended, and no fault is on its way that would start another."""
        while True:
            await self._ground.all_ended()
            waiting = [task for task in self._healing if not task.done()]
            if not waiting:
                break
            await asyncio.wait(waiting)
        directing.cancel()
        await asyncio.wait([directing])
        if not directing.cancelled() and (error := directing.exception()) is not None:
            raise error

    def _check(self) -> None:
        """Read and verify every step that can be restored, and the log."""
        with self._ground.opened() as run:
            view = run.log.read()
            found = list(check_log(view))
            for commit in view.standing():
                found += check_step(run, commit).findings
                self._evidence.checked_steps.append(commit.step)
        self._evidence.damage = [str(finding) for finding in found]

    # Faults

    async def _direct(self) -> None:
        """One fault after the other."""
        before: Injection | None = None
        planned = list(self._scenario.faults)
        try:
            while planned:
                if before is not None and not planned[0].during_recovery:
                    await self._recovered(before)
                self._awaits = f"the instant of {planned[0].kind}"
                try:
                    before = await self._act(planned[0])
                except GroundError as error:
                    self._evidence.missed.append(f"{planned[0].kind}: {error}")
                    self._tell(f"not injected: {error}")
                planned.pop(0)
            if before is not None:
                await self._recovered(before)
        finally:
            self._evidence.missed += [f"{one.kind}: the run was over before its instant came" for one in planned]

    async def _act(self, planned: Planned) -> Injection:
        hold = await self._instant(planned)
        try:
            fault = await self._fault(planned, hold.caught.result().node if hold else "")
            at, listener = self._ground.now(), self._listener
            injection = Injection(
                planned.kind, fault.nodes, at, "", listener.generation, listener.last_step, fault.restarts
            )
            injection.storage, injection.live = fault.storage, fault.live
            injection.what = await fault.inject()
            if fault.live:  # at a step that came meanwhile
                injection.at, injection.generation = self._ground.now(), listener.generation
                injection.step = listener.last_step
        finally:
            if hold is not None:
                hold.released.set()
        self._tell(f"{at:6.1f} s  {injection.what}")
        self._evidence.faults.append(injection)
        if planned.heal_s is not None:
            self._healing.append(asyncio.create_task(self._heal(fault, injection, planned.heal_s)))
        return injection

    async def _instant(self, planned: Planned) -> Hold | None:
        """Wait for it; with a mark, a process is held there."""
        trigger, listener = planned.trigger, self._listener
        if trigger.step is not None:
            await listener.until(lambda: listener.last_step >= (trigger.step or 0))
            return None
        await listener.until(lambda: listener.last_step > 0)
        if trigger.mark is not None:
            hold = listener.hold(lambda mark: self._is_at(planned, mark))
            await hold.caught
            return hold
        first = next(mark.at for mark in listener.marks if mark.name == "step")
        await asyncio.sleep(max(first + trigger.seconds - self._ground.now(), 0))
        return None

    def _is_at(self, planned: Planned, mark: Mark) -> bool:
        trigger, leader = planned.trigger, self._listener.leader
        if mark.name != trigger.mark or (mark.name in SAVE_MARKS and mark.step <= trigger.after_step):
            return False
        named = {"leader": mark.node == leader, "follower": mark.node != leader, "any": True}
        return named.get(planned.node, mark.node == planned.node)

    async def _fault(self, planned: Planned, held: str) -> Fault:
        """The fault, once there is a node that it can be done to: after a restart workers are not there at once."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PICK_LIMIT_S):
                while (node := self._node(planned, held)) is None:
                    await asyncio.sleep(0.05)
                return FAULTS[planned.kind](self._ground, node, planned.amount)
        raise GroundError(f"{planned.kind}: no node is {planned.node}, or it has no worker")

    def _node(self, planned: Planned, held: str) -> Node | None:
        return self._ground.nodes[held] if held else self._ground.pick(planned.node)

    async def _heal(self, fault: Fault, injection: Injection, after_s: float) -> None:
        await asyncio.sleep(after_s)
        try:
            await fault.heal()
        except (CkptError, OSError) as error:
            self._evidence.missed.append(f"{injection.kind} was injected, and could not be healed: {error}")
            raise
        injection.healed_at, injection.met = self._ground.now(), fault.met
        self._tell(f"{injection.healed_at:6.1f} s  {injection.kind} of {', '.join(injection.nodes)} is healed")

    async def _recovered(self, injection: Injection) -> None:
        """Wait for the first step that only a run which has recovered can make."""
        self._awaits = f"a step after {injection.kind}"
        found: list[Mark] = []

        def seen() -> bool:
            since = injection.at if injection.restarts else injection.healed_at or injection.at
            if not injection.restarts and injection.healed_at is None and FAULTS[injection.kind].heals:
                return False
            for mark in self._listener.named_since(since):
                later = mark.generation > injection.generation or not injection.restarts
                if mark.name == "step" and later:
                    found.append(mark)
                    return True
            return False

        await self._listener.until(seen)
        for one in self._evidence.faults:  # those during whose recovery this one came, too
            one.recovered_at = one.recovered_at or found[0].at
        self._awaits = "the end"
        self._tell(f"{found[0].at:6.1f} s  step {found[0].step}, in generation {found[0].generation}")
