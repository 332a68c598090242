"""How keepers reach each other: the coordinator's side (Hub) and the way to it from another node (Remote)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from ckpt.errors import CkptError
from ckpt.holder import apply_retention, discard
from ckpt.keeper.coordinator import LOST_S, Action, Attempt, Commits, Ledger, base_for, commit, failure
from ckpt.keeper.orders import (
    Broken,
    FromCoordinator,
    Job,
    Joined,
    Ordered,
    Outcome,
    Persist,
    Quiet,
    Sealed,
    Stored,
    ToCoordinator,
)
from ckpt.retention import Keep
from ckpt.run import RunDirectory
from ckpt.wire import Channel, Outbox, Server, dial_tcp, serve_tcp

log = logging.getLogger("ckpt.keeper")

TICK_S = 0.25
REDIAL_S = 0.5
GONE_S = 10.0  # a coordinator that cannot be reached for so long, once a new start waits, is given up


class Hub:
    """The coordinator of a run: takes what the nodes say, and does what the ledger decides."""

    def __init__(self, run: RunDirectory, name: str, heard_here: Callable[[FromCoordinator], None]) -> None:
        self._run, self._name, self._heard_here = run, name, heard_here
        self.ledger = Ledger()
        self._outboxes: dict[str, Outbox] = {}
        self._server: Server | None = None
        self._log_lock = asyncio.Lock()
        self._bases: dict[str, tuple[Persist, frozenset[str]]] = {}  # by attempt that is being stored
        self._tasks: set[asyncio.Task[None]] = set()

    def tell(self, message: ToCoordinator) -> None:
        """From this node; answers may come before this returns."""
        self._take(self._name, message)

    def _take(self, node: str, message: ToCoordinator) -> None:
        match message:
            case Ordered():
                self._act(self.ledger.ordered(node, message, time.monotonic()))
            case Sealed():
                self._act(self.ledger.sealed(message))
            case Stored():
                self._act(self.ledger.stored(message))
            case Broken():
                self._act(self.ledger.broken(message))
            case Quiet():
                self.ledger.quiet(node)
                self.tick()
            case Joined():
                pass

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Commits):
                self._spawn(self._commit(action.attempt))
            elif isinstance(action, Persist):
                self._tell_all(self._persist(action))
            else:
                self._tell_all(action)
                if isinstance(action, Outcome) and action.kind not in ("", "Fenced"):
                    self._spawn(self._discard(action.attempt))

    def _persist(self, plain: Persist) -> Persist:
        """What to say for it: the same whenever it is said, and what it refers to stays until it is resolved."""
        attempt = self.ledger.open.get(plain.attempt)
        if attempt is None:
            return plain
        assert attempt.summary is not None
        self._bases = {name: chosen for name, chosen in self._bases.items() if name in self.ledger.open}
        if plain.attempt not in self._bases:
            self._bases[plain.attempt] = base_for(self._run.log.view, attempt.job, attempt.summary)
        return self._bases[plain.attempt][0]

    def _tell_all(self, message: FromCoordinator) -> None:
        for outbox in list(self._outboxes.values()):
            outbox.tell(message)
        asyncio.get_running_loop().call_soon(self._heard_here, message)

    async def _commit(self, attempt: Attempt) -> None:
        name = attempt.job.attempt
        try:
            async with self._log_lock:
                done = await asyncio.to_thread(commit, self._run, attempt)
            outcome = Outcome(name, commit=done)
        except Exception as error:
            outcome = failure(name, error)
        actions = self.ledger.resolved(outcome)
        self._tell_all(outcome)
        self._act([action for action in actions if action != outcome])
        if outcome.commit is not None and attempt.summary is not None:
            self._spawn(self._retire(attempt.job, attempt.summary.keep))

    async def _retire(self, job: Job, keep: Keep | None) -> None:
        """Delete what need not stay, now that there is something newer. What fails waits for the next time."""
        try:
            async with self._log_lock:
                open_ones = set(self.ledger.open)
                held = open_ones.union(*(held for name, (_, held) in self._bases.items() if name in open_ones))
                await asyncio.to_thread(apply_retention, self._run, keep, job.generation, job.holder, held)
        except Exception as error:
            log.warning("nothing was deleted after step %d: %s", job.step, error)

    async def _discard(self, attempt: str) -> None:
        async with self._log_lock:
            await asyncio.to_thread(discard, self._run, attempt)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def idle(self) -> bool:
        return not self.ledger.open and not self._tasks

    def tick(self) -> None:
        self._act(self.ledger.tick(time.monotonic(), {self._name, *self._outboxes}))

    def settle(self, *, lost: bool = False) -> None:
        """A new start waits: do not wait long for ranks whose keeper is gone, and hardly where its node is `lost`."""
        if self.ledger.open:
            self.ledger.grace_s = LOST_S if lost else self.ledger.grace_s
            if self.ledger.settling_since is None:
                self.ledger.settling_since = time.monotonic()
            self.tick()

    async def listen(self, host: str, port: int, token: bytes) -> int:
        """Let the keepers of other nodes in; returns the port."""
        await self.close()
        self._server = serve_tcp(host, port, token, ToCoordinator, self._serve)
        return self._server.port

    async def _serve(self, channel: Channel) -> None:
        joined = await channel.receive()
        if not isinstance(joined, Joined):
            channel.close()
            return
        outbox = self._outboxes[joined.node] = Outbox(channel)
        try:
            while (message := await channel.receive()) is not None:
                self._take(joined.node, message)
        finally:
            outbox.close()
            if self._outboxes.get(joined.node) is outbox:
                del self._outboxes[joined.node]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for outbox in list(self._outboxes.values()):
            outbox.close()


class Remote:
    """The way to a coordinator on another node; connects again, and says everything again, until it is closed."""

    def __init__(
        self,
        address: tuple[str, int],
        token: bytes,
        name: str,
        heard: Callable[[FromCoordinator], None],
        connected: Callable[[Remote], None],
    ) -> None:
        self.address, self._token, self._name = address, token, name
        self._heard, self._connected = heard, connected
        self._outbox: Outbox | None = None
        self.lost_at: float | None = time.monotonic()
        self._task = asyncio.get_running_loop().create_task(self._stay_connected())

    def tell(self, message: ToCoordinator) -> None:
        if self._outbox is not None:
            self._outbox.tell(message)  # else it is said on connecting

    async def _stay_connected(self) -> None:
        while True:
            with contextlib.suppress(CkptError, OSError):
                await self._talk()
            if self.lost_at is None:
                self.lost_at = time.monotonic()
            await asyncio.sleep(REDIAL_S)

    async def _talk(self) -> None:
        channel = await dial_tcp(*self.address, self._token, FromCoordinator)
        self._outbox = Outbox(channel)
        try:
            self._outbox.tell(Joined(self._name))
            self.lost_at = None
            self._connected(self)
            while (message := await channel.receive()) is not None:
                self._heard(message)
        finally:
            self._outbox.close()
            self._outbox = None

    def close(self) -> None:
        self._task.cancel()
