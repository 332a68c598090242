"""Runs an `Agent` beside torchrun's main thread: sockets, storage and clock on a thread of its own.

The main thread only waits on memory and says what its workers do. Storage is reached from one helper thread, one call
at a time: where it hangs, what runs goes on, and no membership changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

from torch._C._distributed_c10d import TCPStore

from ckpt.errors import CkptError, Fenced, Incompatible
from ckpt.wire import Channel, Server, serve_tcp
from elastic.actions import (
    Action,
    Close,
    Exit,
    Follow,
    Forsake,
    Halt,
    Kill,
    Look,
    Note,
    Propose,
    Release,
    Seek,
    Send,
    Trace,
)
from elastic.agent import Agent
from elastic.crew import Crew
from elastic.hooks import Failure, Hooks
from elastic.leading import EXIT_LEFT
from elastic.ledger import Ledger, write_batch
from elastic.links import Link, ask, read_all
from elastic.membership import Member, Membership
from elastic.messages import Hello, Join, Refused, Up
from elastic.notices import Notices
from elastic.options import Options
from elastic.registry import serves
from elastic.roster import Roster
from elastic.settling import settle
from elastic.workers import Ended, Workers, error_file_of, watch

log = logging.getLogger("elastic")
T = TypeVar("T")

TICK_S = 0.1
EXIT_BROKEN = 70  # EX_SOFTWARE
POLL_S = 0.5  # how often the waiting main thread looks for signals
LINGER_S = 2.0  # for followers to hear the end, before the leader's process does
STORE_TIMEOUT_S = 300.0
STORE_PORT_LIMIT_S = 60.0  # for which a port that is in use is asked for again


class Service:
    """The thread, and what it shares with the main thread under one lock."""

    def __init__(self, agent: Agent, roster: Roster, options: Options, workers: Workers, hooks: Hooks) -> None:
        self._agent, self._roster, self._options = agent, roster, options
        self._workers, self._hooks = workers, hooks
        self._storage = ThreadPoolExecutor(1, thread_name_prefix="elastic-storage")
        self._settling = ThreadPoolExecutor(2, thread_name_prefix="elastic-settle")
        self._changed = threading.Condition()
        self._assigned: Membership | None = None
        self._master = ""
        self._broken = False  # the workers that run, or are about to, must not
        self._killing = False  # they are being killed: what the main thread sees of that is no failure of theirs
        self._exit: Exit | None = None
        self._notices = Notices(options.notice_file, options.notice_url, options.notice_header)
        self.crew = Crew(options.timing.hang_limit_s)
        self._ledger = Ledger(agent.me.node, agent.me.name)
        self._values: dict[str, bytes] = {}
        self._generation = 0
        # of the loop's thread alone
        self._up: Link | None = None
        self._down: dict[str, Link] = {}
        self._probes: dict[str, Link] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._store: TCPStore | None = None
        self._offered: TCPStore | None = None
        self._watched: dict[int, str] = {}  # workers, and where each writes what it failed of
        self._asked = False  # a worker ended because it was asked to
        self._failed = False  # one had failed before that
        self._hopeless = False  # of what another start does not change
        self._settles = False  # the keeper is asked to come to an end with what the workers left
        self._forsaken = False  # a node of this generation is lost
        self._away = False  # storage does not answer, which was said
        self._saved = 0  # the newest step that workers here had saved
        self._refused_since: float | None = None  # the port for the workers' store cannot be had
        self._token = roster.token()
        self._loop = asyncio.new_event_loop()
        self._server: Server | None = None
        self._stopping = asyncio.Event()
        self._ticking: asyncio.Task[None] | None = None
        self._writing: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="elastic", daemon=True)

    def start(self, host: str, port: int) -> int:
        """Listen and begin; the port. Raises OSError if the address cannot be had."""
        listening: dict[str, Any] = {}
        ready = threading.Event()

        async def listen() -> None:
            try:
                self._server = serve_tcp(host, port, self._token, Up, self._serve)
                listening["port"] = self._server.port
            except OSError as error:
                listening["error"] = error
            ready.set()

        self._thread.start()
        asyncio.run_coroutine_threadsafe(listen(), self._loop)
        ready.wait()
        if "error" in listening:
            raise listening["error"]
        return int(listening["port"])

    def begin(self) -> None:
        """Take part from now on: the agent's address is known."""

        def tick() -> None:
            self._ticking = self._spawn(self._tick())

        self._post(tick)

    # For the main thread

    @property
    def broken(self) -> bool:
        return self._broken

    def leave(self, reason: str) -> None:
        """Take this node out of the job, as planned. From any thread, or a signal handler."""
        self._post(lambda: self._agent.leave(reason))

    def await_membership(self) -> tuple[Membership, str]:
        """Wait until this node works: its membership, and where the leader is. SystemExit when the job is over."""
        with self._changed:
            failed = self._generation > 0 and not self._broken and not self._killing
            self._assigned, self._broken = None, False
        self._post(lambda: self._came_back(failed))
        with self._changed:
            while self._assigned is None and self._exit is None:
                self._changed.wait(POLL_S)
            if self._exit is not None:
                raise SystemExit(self._exit.code)
            assert self._assigned is not None
            return self._assigned, self._master

    def share(self, key: str, value: bytes) -> None:
        """Have every member of the generation know a value."""
        self._post(lambda: self._agent.share(key, value))

    def value(self, generation: int, key: str, timeout_s: float) -> bytes | None:
        """What a member shared; None if the generation ended, or nothing came in time."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while key not in self._values:
                left = deadline - time.monotonic()
                if self._broken or self._exit is not None or self._generation != generation or left <= 0:
                    return None
                self._changed.wait(min(POLL_S, left))
            return self._values[key]

    def finish(self) -> None:
        """The workers ended well: wait until the job has."""
        self._post(self._agent.finish)
        with self._changed:
            while self._exit is None:
                self._changed.wait(POLL_S)

    def end_generation(self, reason: str) -> None:
        """Have all members start again: something of this generation does not work here."""
        self._post(lambda: self._do(Kill(reason)))

    def stop(self) -> None:
        """Let go of everything; followers hear the end first, if it is one."""
        if self._thread.is_alive():
            self._post(self._stopping.set)
            self._thread.join(timeout=3 * LINGER_S + 2)  # one for each of what it still waits for
        self._workers.farewell()

    def _post(self, act: Callable[[], Any]) -> None:
        """Do something on the loop's thread, and then what the agent wants done."""

        def run() -> None:
            act()
            self._carry_out()

        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(run)

    # The loop's thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._until_stopped())
        self._loop.close()

    async def _until_stopped(self) -> None:
        await self._stopping.wait()
        self._notices.close()
        if self._ticking is not None:  # what is said last of the leader's counter stands
            self._ticking.cancel()
        leads = self._agent.leads and self._agent.membership is not None
        if leads:  # others need not wait for the counter to stand still
            done = self._exit is not None and self._exit.code == 0
            assert self._agent.membership is not None
            ask_over = Look(self._agent.membership.generation, announce=False, over=True, done=done)
            with contextlib.suppress(Exception):
                async with asyncio.timeout(LINGER_S):
                    await self._in_storage(lambda: self._roster.look(ask_over))
        else:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(LINGER_S):
                    await self._in_storage(self._roster.withdraw)
        await self._write_ledger()
        if leads and self._exit is not None:
            readers = [link.reader for link in self._down.values() if link.reader is not None]
            if readers:
                await asyncio.wait(readers, timeout=LINGER_S)
        for task in list(self._tasks):
            task.cancel()
        for link in (self._up, *self._down.values(), *self._probes.values()):
            if link is not None:
                link.close()
        if self._server is not None:
            self._server.close()
        self._storage.shutdown(wait=False, cancel_futures=True)
        self._settling.shutdown(wait=False, cancel_futures=True)

    async def _tick(self) -> None:
        while True:
            self._agent.tick(time.monotonic())
            self._carry_out()
            if self._broken:
                self._workers.kill()  # those that were being started when the generation ended
            elif self._agent.mine is not None:
                self._watch_workers()
                self._look_at_crew()
            if reason := self._notices.reason():
                self._agent.leave(reason)
            if self._ledger.due() and (self._writing is None or self._writing.done()):
                self._writing = self._spawn(self._write_ledger())
            await asyncio.sleep(TICK_S)

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an error in elastic itself ends this agent", exc_info=error)
            self._end(Exit(EXIT_BROKEN, f"{type(error).__name__}: {error}"))

    async def _in_storage(self, act: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._storage, act)

    # What the main thread came back with

    def _came_back(self, failed: bool) -> None:
        failed = failed and (self._failed or not self._asked)
        self._agent.stopped(time.monotonic(), failed=failed, step=self.crew.step(), hopeless=self._hopeless)
        self._spawn(self._settle())

    async def _settle(self) -> None:
        """Let this node's keeper store what the workers left, before a new generation fences it."""
        self._workers.kill()
        self._settles = True
        await self._ask_keeper()
        self._settles = False
        self._agent.wait()
        self._carry_out()

    def _forsake(self) -> None:
        """A node is lost: the keeper that is asked hears it now, the one that will be asked hears it then."""
        self._forsaken = True
        if self._settles:
            self._spawn(self._ask_keeper())

    async def _ask_keeper(self) -> None:
        run, limit_s, lost = self._roster.run, self._options.settle_s, self._forsaken
        await self._loop.run_in_executor(self._settling, lambda: settle(run, limit_s, lost=lost))

    def _watch_workers(self) -> None:
        for pid in self._workers.pids():
            if pid not in self._watched:
                self._watched[pid] = ""
                watch(pid, self._loop.add_reader, self._loop.remove_reader, self._worker_ended)
            self._watched[pid] = self._watched[pid] or error_file_of(pid)

    def _look_at_crew(self) -> None:
        """What the workers say of themselves."""
        seen = self.crew.look(len(self._workers.pids()))
        self._ledger.follow(self.crew.workers())
        self._agent.heeds = seen.heeds
        if seen.paused:
            self._agent.paused()
        if seen.hangs:
            self._agent.hung(seen.hangs, time.monotonic())
        if seen.paces:
            self._agent.paces(seen.paces)
        if seen.leaves is not None and not self._agent.leaving:
            reason, deadline_s = seen.leaves
            self._agent.leave(reason)
            self._loop.call_later(deadline_s, self._do, Kill(f"{reason}; its time is up"))
        self._carry_out()

    async def _write_ledger(self) -> None:
        """As far as the store lets us. Where records are in an agent's memory, there is no ledger."""
        if serves(self._roster.run.url):
            return
        with contextlib.suppress(CkptError, OSError, TimeoutError, RuntimeError):  # or this process is ending
            batch = self._ledger.batch()
            async with asyncio.timeout(LINGER_S):
                await self._in_storage(lambda: write_batch(self._roster.run, batch))
            self._ledger.written()

    async def _trace(self) -> None:
        self._agent.stacks(await self._loop.run_in_executor(self._settling, self.crew.trace))
        self._carry_out()

    def _worker_ended(self, how: Ended) -> None:
        if how.code == 128 + signal.SIGTERM:
            self._asked = True
        elif not how.well and not self._broken:
            self._failed |= not self._asked
            self._hopeless |= how.code == Incompatible.exit_code
            what = f"was killed by signal {how.signal}" if how.signal else f"exited with {how.code}"
            log.warning("worker %d %s", how.pid, what)
            code = how.code if how.code is not None else -(how.signal or 0)
            rank = next((worker.rank for worker in self.crew.workers() if worker.pid == how.pid), -1)
            self._ledger.failed(rank, code, what, self.crew.step())
            path = self._watched.get(how.pid, "")
            written = path if path and os.path.exists(path) else None
            self._hooks.tell("on_worker_failure", Failure(how.pid, how.code, how.signal, written))

    # What the agent wants done

    def _carry_out(self) -> None:
        for action in self._agent.actions():
            self._do(action)
        with self._changed:
            self._values = dict(self._agent.shared)
            self._changed.notify_all()

    def _do(self, action: Action) -> None:
        match action:
            case Send(node=node, message=message):
                link = self._up if node is None else self._down.get(node)
                if link is not None:
                    link.tell(message)
            case Close(node=node):
                self._close(node)
            case Seek(targets=targets):
                self._spawn(self._seek(targets))
            case Follow(node=node):
                self._follow(node)
            case Look():
                self._spawn(self._look(action))
            case Propose():
                self._spawn(self._propose(action))
            case Halt(reason=reason):
                log.warning("this node's workers are to stop at one step with all others: %s", reason)
                self.crew.ask()
            case Trace():
                self._spawn(self._trace())
            case Forsake():
                self._forsake()
            case Kill(reason=reason):
                self._kill(reason)
            case Release(membership=membership):
                self._release(membership)
            case Exit():
                self._end(action)
            case Note(text=text):
                log.info("%s", text)

    def _close(self, node: str | None) -> None:
        link = self._up if node is None else self._down.pop(node, None)
        if node is None:
            self._up = None
        if link is not None:
            link.close()

    def _kill(self, reason: str) -> None:
        """In this order: no worker runs any more when the main thread hears of it."""
        log.warning("this node's workers end: %s", reason)
        self._store, self._killing = None, True
        self._workers.kill()
        self._ledger.killed(reason, self.crew.workers())
        with self._changed:
            self._broken = True
            self._changed.notify_all()

    def _release(self, membership: Membership) -> None:
        self._watched.clear()
        self._asked = self._forsaken = self._failed = self._hopeless = False
        names = [member.name for member in membership.members]
        self._ledger.begun(membership.generation, names, membership.reason)
        with self._changed:
            self._assigned, self._generation = membership, membership.generation
            self._broken = self._killing = (
                False  # what was said of the workers before has come late for the main thread
            )
            self._values = {}
            self._master = self._up.address if self._up is not None else self._agent.me.addresses[0]
            self._changed.notify_all()

    def _end(self, action: Exit) -> None:
        level = {0: logging.INFO, EXIT_LEFT: logging.WARNING}.get(action.code, logging.ERROR)
        log.log(level, "%s", action.reason)
        self._ledger.left(action.reason, action.code, self.crew.workers())
        with self._changed:
            self._exit = action
            self._broken = True
            self._changed.notify_all()

    # Storage

    async def _look(self, action: Look) -> None:
        try:
            seen = await self._in_storage(lambda: self._roster.look(action))
        except Fenced as error:
            self._agent.refuse(str(error), error.exit_code)
        except (CkptError, OSError) as error:
            if not self._away:
                log.warning("%s cannot be read, and is asked again until it can: %s", self._roster.run.url, error)
            self._away = True
            self._agent.look_failed(time.monotonic())
        else:
            if self._away:
                log.warning("%s can be read again", self._roster.run.url)
            self._away = False
            if serves(self._roster.run.url):  # its log knows of no commits
                self._saved = max(self._saved, self.crew.saved())
                seen = replace(seen, head=f"step {self._saved}" if self._saved else None)
            self._agent.looked(seen, time.monotonic())
        self._carry_out()

    async def _propose(self, action: Propose) -> None:
        self._store = self._offered = None  # a fixed port must be free again

        def propose() -> Membership | None:
            self._offered = TCPStore(
                "localhost",
                self._options.store_port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=STORE_TIMEOUT_S),
            )
            return self._roster.propose(action, self._offered.port)

        membership: Membership | None = None
        try:
            membership = await self._in_storage(propose)
            self._refused_since = None
        except Fenced as error:
            self._agent.refuse(str(error), error.exit_code)
        except (CkptError, OSError) as error:
            log.warning("no generation could be begun: %s", error)
        except RuntimeError as error:  # the store for the workers
            log.warning("no generation could be begun: %s", error)
            self._refused_since = self._refused_since or time.monotonic()
            if self._options.store_port and time.monotonic() - self._refused_since > STORE_PORT_LIMIT_S:
                what = f"port {self._options.store_port} is in use: free it, or leave ELASTIC_STORE_PORT unset"
                self._agent.refuse(what, Incompatible.exit_code)
        self._store, self._offered = self._offered if membership is not None else None, None
        self._agent.proposed(membership, time.monotonic())
        self._carry_out()

    # Other agents

    async def _seek(self, targets: tuple[Member, ...]) -> None:
        hello = Hello(self._agent.me, self._agent.job)
        limit_s = min(2.0, self._options.timing.node_timeout_s / 2)
        found = await asyncio.gather(*(ask(target, self._token, hello, limit_s) for target in targets))
        answers = {}
        for target, answer in zip(targets, found, strict=True):
            answers[target.node] = answer[1] if answer is not None else None
            if answer is not None:
                self._probes[target.node] = answer[0]
        self._agent.sought(answers, time.monotonic())
        self._carry_out()

    def _follow(self, node: str | None) -> None:
        probes, self._probes = self._probes, {}
        for name, link in probes.items():
            if name == node:
                self._up = link
                link.reader = self._spawn(self._read_up(link))
            else:
                link.close()

    async def _read_up(self, link: Link) -> None:
        def heard(message: Any) -> None:
            if self._up is link:
                self._agent.told(message, time.monotonic())
                self._carry_out()

        await read_all(link, heard)
        if self._up is link:
            self._up = None
            self._agent.lost(None, time.monotonic())
            self._carry_out()

    async def _serve(self, channel: Channel) -> None:
        """A node that asks whom to follow, and perhaps stays."""
        hello = await channel.receive()
        if not isinstance(hello, Hello):
            return
        link, node = Link(channel), hello.me.node
        link.reader = asyncio.current_task()
        answer = self._agent.hello(hello)
        link.tell(answer)
        if isinstance(answer, Refused):
            log.warning("%s was refused: %s", hello.me.name, answer.reason)

        def heard(message: Any) -> None:
            if isinstance(message, Join):
                if self._down.get(node) is not None and self._down[node] is not link:
                    self._down[node].close()
                self._down[node] = link
                self._agent.joined(message, time.monotonic())
            elif self._down.get(node) is link:
                self._agent.heard(node, message, time.monotonic())
            self._carry_out()

        await read_all(link, heard)
        if self._down.get(node) is link:
            del self._down[node]
            self._agent.lost(node, time.monotonic())
            self._carry_out()
