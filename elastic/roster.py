"""What agents keep in the run's directory, besides the log: a token, the leader's counter, and who seeks.

    elastic/token            32 random bytes in hex: who can read the directory may join
    elastic/pulse.json       the leader's counter, put anew every second
    elastic/nodes/<node>.json  an agent that knows no leader
    elastic/cordons/<name>.json  a host, or an agent, that shall not work any more

Blocking; one thread at a time. Nothing is decided here.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import socket
import time

import msgspec

from ckpt.errors import Corrupt, Fenced, Incompatible, NotFound
from ckpt.events import point
from ckpt.holder import boot_id, is_gone
from ckpt.log import decide_start
from ckpt.run import RunDirectory
from ckpt.signing import signing_key
from ckpt.store import AlreadyExists
from elastic.actions import Look, Propose, Seen
from elastic.membership import Member, Membership, of_start, to_record
from elastic.registry import Registry, join_run, serves

TOKEN = "elastic/token"
PULSE = "elastic/pulse.json"
NODES = "elastic/nodes"
CORDONS = "elastic/cordons"
FILE_LIMIT_BYTES = 16 * 1024
ANNOUNCE_S = 5.0  # an announcement is put anew so often
STALE_S = 60.0  # the leader removes one that did not change for so long


class Pulse(msgspec.Struct, frozen=True):
    node: str
    generation: int
    count: int
    over: bool = False
    done: bool = False
    waiting: tuple[str, ...] = ()
    avoided: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()


class Announcement(msgspec.Struct, frozen=True):
    me: Member
    count: int


class Cordon(msgspec.Struct, frozen=True):
    """`name`: of a host, or the node name of one agent. `drain`: it leaves at once, not when its generation ends."""

    name: str
    drain: bool


class Roster:
    """The directory of one run, for one agent."""

    def __init__(self, run: RunDirectory, me: Member, run_id: str | None, registry: Registry | None = None) -> None:
        self.run, self.me, self._run_id, self._registry = run, me, run_id, registry
        self._count = 0
        self._announced_at: float | None = None
        self._known: dict[str, tuple[Announcement, float]] = {}

    @classmethod
    def open(cls, url: str, me: Member, run_id: str | None) -> Roster:
        """The run at `url`, made if there is none. Raises Incompatible if its store cannot keep two leaders apart."""
        if serves(url):
            run, registry = join_run(url, run_id)
            return cls(run, me, run_id, registry)
        run = RunDirectory.open(url, create=True)
        if not run.store.capabilities.fences:
            raise Incompatible(
                f"{run.url}: this store cannot make a file exclusively and whole, so two leaders could not be kept "
                "apart. Give torchrun --rdzv-endpoint a shared directory or a bucket that can (`ckpt doctor` shows it)"
            )
        return cls(run, me, run_id)

    def close(self) -> None:
        """Where this agent serves the records, they are gone with it."""
        if self._registry is not None:
            self._registry.close()

    def token(self) -> bytes:
        """What agents of this run prove to know: that they have the signing key, else that they can read a file.

        The first agent makes the file.
        """
        if (key := signing_key()) is not None:
            return hmac.digest(key, b"elastic " + self.run.nonce.encode(), "sha256")
        with contextlib.suppress(NotFound):
            return self._read_token()
        with contextlib.suppress(AlreadyExists):
            self.run.store.create(TOKEN, secrets.token_hex(32).encode())
        return self._read_token()

    def _read_token(self) -> bytes:
        data = self.run.store.read(TOKEN, limit_bytes=FILE_LIMIT_BYTES)
        try:
            token = bytes.fromhex(data.decode())
        except ValueError as error:
            raise Corrupt(
                f"{self.run.url}/{TOKEN} is damaged ({error}): stop the job, remove it, start again"
            ) from error
        if len(token) != 32:
            raise Corrupt(f"{self.run.url}/{TOKEN} is damaged: stop the job, remove it, start again")
        return token

    # Looking

    def look(self, ask: Look) -> Seen:
        """Do what `ask` says, then tell what is there."""
        if ask.pulse is not None:
            self._count += 1
            said = (ask.over, ask.done, ask.waiting, ask.avoided, ask.slow)
            pulse = Pulse(self.me.node, ask.pulse, self._count, *said)
            self.run.store.put(PULSE, msgspec.json.encode(pulse))
        self._announce(ask.announce)
        view = self.run.log.read()
        membership = of_start(view.holder)
        found, pulse_now = self._announcements(remove_stale=ask.pulse is not None), read_pulse(self.run)
        over = done = False
        if membership is not None:
            began = next((start for start in view.starts if start.nonce == membership.began), None)
            mine = pulse_now is not None and pulse_now.node == membership.leader
            if pulse_now is not None and mine and (began is None or pulse_now.generation >= began.generation):
                over, done = pulse_now.over, pulse_now.done
            over = over or is_gone(began)
        elif view.holder is not None:  # a job without elastic has the run, or had it
            over = is_gone(view.holder)
        head = view.head.attempt if view.head else None
        cordons = read_cordons(self.run)
        return Seen(
            view.generation,
            membership,
            head,
            repr(pulse_now),
            over,
            done,
            tuple(found),
            frozenset(cordon.name for cordon in cordons),
            frozenset(cordon.name for cordon in cordons if cordon.drain),
        )

    def _announce(self, wanted: bool) -> None:
        path, now = f"{NODES}/{self.me.node}.json", time.monotonic()
        if wanted and (self._announced_at is None or now - self._announced_at >= ANNOUNCE_S):
            self._count += 1
            self.run.store.put(path, msgspec.json.encode(Announcement(self.me, self._count)))
            self._announced_at = now
        elif not wanted:
            self.withdraw()

    def withdraw(self) -> None:
        """Take our announcement back."""
        if self._announced_at is not None:
            self.run.store.delete(f"{NODES}/{self.me.node}.json")
            self._announced_at = None

    def _announcements(self, *, remove_stale: bool) -> list[Member]:
        try:
            names = self.run.store.list(NODES)
        except NotFound:
            return []
        now, known = time.monotonic(), self._known
        self._known = {}
        for name in names:
            with contextlib.suppress(NotFound, Corrupt, msgspec.MsgspecError):
                data = self.run.store.read(f"{NODES}/{name}", limit_bytes=FILE_LIMIT_BYTES)
                said = msgspec.json.decode(data, type=Announcement)
                since = known[name][1] if name in known and known[name][0] == said else now
                if remove_stale and now - since > STALE_S:
                    self.run.store.delete(f"{NODES}/{name}")
                else:
                    self._known[name] = (said, since)
        return [said.me for said, _ in self._known.values() if said.me != self.me]

    # The log

    def propose(self, ask: Propose, store_port: int) -> Membership | None:
        """Append the start of a membership that we lead; None if a newer generation has begun.

        Raises Fenced if another job, by its run id, has the run.
        """
        nonce, me = secrets.token_hex(8), self.me
        self.run.check_unchanged()
        point("decide", generation=ask.generation + 1, reason=ask.reason)
        try:
            start = self.run.log.append(
                lambda view: decide_start(
                    view,
                    nonce=nonce,
                    run_id=self._run_id,
                    reason=ask.reason[:500],
                    holder_gone=is_gone(view.holder) or (ask.leader_gone and of_start(view.holder) is not None),
                    expected_generation=ask.generation,
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    boot_id=boot_id(),
                    unix_s=time.time(),
                    addresses=[f"{address}:{me.port}" for address in me.addresses],
                    members=to_record(ask.members, me.node, store_port, nonce, ask.failures),
                )
            )
        except Fenced:
            if self.run.log.read().generation != ask.generation:
                return None
            raise
        return of_start(start)


def read_pulse(run: RunDirectory) -> Pulse | None:
    """The leader's counter; None if there is none, or not a whole one."""
    with contextlib.suppress(NotFound, msgspec.MsgspecError):
        return msgspec.json.decode(run.store.read(PULSE, limit_bytes=FILE_LIMIT_BYTES), type=Pulse)
    return None


def read_cordons(run: RunDirectory) -> list[Cordon]:
    """Who shall not work any more; a damaged file counts for nobody."""
    found = []
    with contextlib.suppress(NotFound):
        for name in run.store.list(CORDONS):
            with contextlib.suppress(NotFound, msgspec.MsgspecError):
                data = run.store.read(f"{CORDONS}/{name}", limit_bytes=FILE_LIMIT_BYTES)
                found.append(msgspec.json.decode(data, type=Cordon))
    return found


def put_cordon(run: RunDirectory, cordon: Cordon) -> None:
    """Have it heeded from the leader's next look on."""
    run.store.put(_cordon_path(cordon.name), msgspec.json.encode(cordon))


def remove_cordon(run: RunDirectory, name: str) -> None:
    """Nodes of this name may work again, if they are started. Raises NotFound if there is none of this name."""
    if not any(cordon.name == name for cordon in read_cordons(run)):
        raise NotFound(f"{run.url}: {name} is not cordoned; `elastic status` names who is")
    run.store.delete(_cordon_path(name))


def _cordon_path(name: str) -> str:
    return f"{CORDONS}/{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"  # a host's name may be no file's
