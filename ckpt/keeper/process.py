"""The keeper's process, started by a worker in a session of its own: serves, and ends by itself.

It ends when all workers closed the run and nothing is left to store, or some time after the last worker was lost.
Then nothing of it stays in memory or on the tmpfs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from pathlib import Path

import msgspec

from ckpt.errors import CkptError, NotFound
from ckpt.keeper.coordinator import LOST_S
from ckpt.keeper.hub import GONE_S, TICK_S, Hub, Remote
from ckpt.keeper.node import Link, Node
from ckpt.keeper.orders import (
    Abort,
    Copied,
    Goodbye,
    Hello,
    Layouts,
    Listen,
    Listening,
    Order,
    Progress,
    Quiet,
    Settle,
    Settled,
    ToKeeper,
)
from ckpt.keeper.ram import Claim, RamTier, node_name
from ckpt.run import RunDirectory
from ckpt.wire import Channel, Outbox, serve_unix

log = logging.getLogger("ckpt.keeper")

CLAIM_S = 1.0
GRACE_S = 600.0  # after the last worker was lost: a restart finds its state in RAM meanwhile


def grace_s() -> float:
    return float(os.environ.get("CKPT_KEEPER_GRACE_S", GRACE_S))


class _Worker:
    """A connected worker. `rank` is unknown until it says Hello; `gives`: it has ordered something."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.rank, self.gives = channel, -1, False
        self._outbox = Outbox(channel)
        self.tell = self._outbox.tell
        self.close = self._outbox.close


class Keeper:
    """The node's snapshots, the coordinator if this is its node, and everybody who is connected."""

    def __init__(self, run: RunDirectory, ram: RamTier) -> None:
        self._ram = ram
        self._name = node_name(ram.root)
        self._node = Node(run, ram)
        self._hub = Hub(run, self._name, self._node.heard)
        self._remotes: dict[tuple[str, int], Remote] = {}
        self._workers: set[_Worker] = set()
        self._lost: int = 0  # workers that went without Goodbye, and did not come back
        self._alone_since = self._worker_seen = time.monotonic()
        self._settling = 0
        self._gone_s = GONE_S
        self._hurry = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._end_soon)
        server = serve_unix(self._ram.file("socket"), ToKeeper, self._serve)
        await self._listen_again()
        self._node.adopt(self._link_of)
        while not self._may_end():
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            if self._workers:
                self._worker_seen = now
            nobody_comes = now - self._worker_seen > grace_s()
            if nobody_comes:
                self._hub.settle()
            self._hub.tick()
            if self._settling or nobody_comes:
                self._give_up_lost_coordinators()
        server.close()

    def _end_soon(self) -> None:
        self._hurry = True  # store what there is, then end without waiting for workers to come back

    def _may_end(self) -> bool:
        """Whether nobody is here, nothing is left to do, and (where a worker was lost) nobody came in time."""
        if self._workers or self._node.open or not self._hub.idle:
            self._alone_since = time.monotonic()
            return False
        if time.monotonic() - self._alone_since < (grace_s() if self._lost and not self._hurry else 2 * TICK_S):
            return False
        users = Claim.take(self._ram.file("users"))
        if users is None and self._ram.exists():
            return False  # a worker is about to connect
        self._ram.remove()  # `users` stays claimed until this process ends
        return True

    def _give_up_lost_coordinators(self) -> None:
        for address, remote in list(self._remotes.items()):
            if remote.lost_at is not None and time.monotonic() > remote.lost_at + self._gone_s:
                why = f"the keeper at {address[0]}:{address[1]}, which commits, cannot be reached any more."
                self._node.give_up_on(remote, why)
                remote.close()
                del self._remotes[address]

    # Workers

    async def _serve(self, channel: Channel) -> None:
        worker = _Worker(channel)
        self._workers.add(worker)
        said_goodbye = False
        try:
            while (message := await channel.receive()) is not None:
                if isinstance(message, Goodbye):
                    said_goodbye = True
                else:
                    await self._take(worker, message)
        except CkptError as error:
            log.warning("worker of rank %d: %s", worker.rank, error)
        finally:
            worker.close()
            self._workers.discard(worker)
            self._lost += not said_goodbye
            self._node.worker_gone(worker)
            if worker.gives:
                self._say_if_quiet(self._hub)
                for remote in self._remotes.values():
                    self._say_if_quiet(remote)

    def _say_if_quiet(self, link: Link) -> None:
        """A coordinator for which a new start waits then knows what will never come."""
        if not any(worker.gives for worker in self._workers):
            link.tell(Quiet())

    async def _take(self, worker: _Worker, message: ToKeeper) -> None:
        match message:
            case Hello():
                worker.rank = message.rank
                self._lost = 0  # somebody came back
            case Layouts():
                self._node.layouts(message)
            case Order():
                worker.gives = True
                self._node.order(message, worker.channel.take_fd(), worker, self._link_of(message))
            case Progress():
                self._node.progress(message)
            case Copied():
                self._node.copied(message)
            case Abort():
                self._node.aborted(message)
            case Listen():
                await self._listen(worker, message)
            case Settle():
                task = asyncio.get_running_loop().create_task(self._settle(worker, message.lost))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _link_of(self, order: Order) -> Link:
        if order.coordinator is None:
            return self._hub
        if order.coordinator not in self._remotes:
            self._remotes[order.coordinator] = Remote(
                order.coordinator, order.token, self._name, self._node.heard, self._repeat_to
            )
        return self._remotes[order.coordinator]

    def _repeat_to(self, remote: Remote) -> None:
        self._node.repeat_to(remote)
        self._say_if_quiet(remote)

    async def _settle(self, worker: _Worker, lost: bool) -> None:
        self._settling += 1
        self._gone_s = LOST_S if lost else self._gone_s
        try:
            self._hub.settle(lost=lost)
            await self._node.settle()
        finally:
            self._settling -= 1
            if not self._settling:
                self._gone_s = GONE_S
        worker.tell(Settled())

    # The coordinator's address

    async def _listen(self, worker: _Worker, said: Listen) -> None:
        try:
            port = await self._hub.listen(said.host, 0, said.token)
        except OSError as error:
            worker.tell(Listening(0, f"listen at {said.host}: {error.strerror}"))
            return
        self._ram.write(self._ram.file("address"), msgspec.msgpack.encode((said.host, port, said.token)))
        worker.tell(Listening(port))

    async def _listen_again(self) -> None:
        """Where a coordinator was lost, the others look for it at its old address."""
        with contextlib.suppress(FileNotFoundError):
            data = Path(self._ram.file("address")).read_bytes()
            host, port, token = msgspec.msgpack.decode(data, type=tuple[str, int, bytes])
            with contextlib.suppress(OSError):
                await self._hub.listen(host, port, token)


def _claim(ram: RamTier) -> Claim | None:
    """The keeper's lock. Whoever looks whether a keeper lives holds it for an instant: that is waited for."""
    deadline = time.monotonic() + CLAIM_S
    while (claim := Claim.take(ram.file("lock"))) is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return claim


def serve(root: str, name: str) -> int:
    """Be the keeper of the tier `name` on this node until it may end; the exit code. At once if another one lives."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    ram = RamTier(root, name)
    claim = _claim(ram)
    if claim is None:
        return 0
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the workers
    with contextlib.suppress(OSError):
        os.nice(10)  # training comes first
    try:
        run = RunDirectory.open(Path(ram.file("run")).read_text())
    except NotFound:
        run = None
    if run is None or run.nonce != ram.run_nonce:
        log.error("the run that this memory belongs to is gone")
        ram.remove()
        return 1
    asyncio.run(Keeper(run, ram).run())
    return 0
