"""The rendezvous handler that torchrun finds under the name `elastic`, and the store that it gives to the agent.

    torchrun --rdzv-backend elastic --rdzv-endpoint <run url or shared directory> --max-restarts 1000000 \\
             --nnodes MIN:MAX ...

Here the environment becomes an `Agent` and its `Service`; what torchrun asks is answered from their memory.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch._C._distributed_c10d import Store
from torch.distributed.elastic.rendezvous.api import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

from ckpt.errors import CkptError, Incompatible
from ckpt.events import point
from ckpt.records import is_name
from elastic import network
from elastic.agent import Agent
from elastic.hooks import Event, Excluded, Hooks, changes, load
from elastic.membership import Member, Membership
from elastic.messages import Job
from elastic.options import Options, from_environment
from elastic.registry import serves
from elastic.roster import Roster
from elastic.service import Service
from elastic.workers import Workers

log = logging.getLogger("elastic")

BACKEND = "elastic"
EXIT_EXCLUDED = 1
EXCHANGE_LIMIT_S = 60.0  # for members to say how many workers they start
HOOKS_LIMIT_S = 5.0  # for hooks to hear of the end
ROLE_INFO, ASSIGNED_RANKS = "torchelastic/role_info/", "torchelastic/assigned_ranks/"


def handlers() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """The entry point: what makes a handler."""
    return create


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """The handler of this agent. SystemExit, with the reason in the log, if it cannot take part."""
    _log_to_stderr()
    try:
        options = from_environment(parameters.min_nodes, parameters.max_nodes)
        hooks = load(options.hooks, options.hook_limit_s)
        hooks.pre_join()
        return Handler(parameters, options, hooks)
    except Excluded as error:
        log.error("%s", error)
        raise SystemExit(EXIT_EXCLUDED) from error
    except CkptError as error:
        log.error("%s", error)
        raise SystemExit(error.exit_code) from error


class Handler(RendezvousHandler):
    """What torchrun's agent asks; every answer is in memory."""

    def __init__(self, parameters: RendezvousParameters, options: Options, hooks: Hooks) -> None:
        self._run_id = parameters.run_id
        run_id = None if self._run_id in ("", "none") else self._run_id
        self._hooks = hooks
        name = socket.gethostname()
        node = f"{_as_name(name)}-{secrets.token_hex(4)}"
        addresses = network.addresses(options.address or parameters.local_addr or "")
        me = Member(node, name, addresses, 0)
        self._roster = roster = Roster.open(parameters.endpoint, me, run_id)
        self._url, self._run_nonce = roster.run.url, roster.run.nonce
        self._workers = Workers(node)
        limits = options.limits
        job = Job(self._run_id, _command(), f"{limits.minimum}:{limits.maximum}:{limits.unit}", _version())
        agent = Agent(me, job, limits, options.timing)
        self._service = Service(agent, roster, options, self._workers, hooks)
        host = "0.0.0.0" if len(addresses) > 1 else addresses[0]
        try:
            port = self._service.start(host, options.port)
        except OSError as error:
            self._service.stop()
            where = "set ELASTIC_PORT to a free one, or leave it unset" if options.port else "check ELASTIC_ADDRESS"
            what = f"this agent cannot listen at {host}:{options.port}: {error.strerror}"
            raise Incompatible(f"{what}; {where}") from error
        agent.me = roster.me = Member(node, name, addresses, port)
        self._node = node
        self._before: tuple[str, ...] = ()
        self._service.begin()
        self._names: dict[str, str] = {}
        atexit.register(self._leave, "the process ends")
        self._left = False
        with contextlib.suppress(ValueError):  # not in the main thread: then there is no notice by signal
            signal.signal(signal.SIGUSR1, lambda number, frame: self._service.leave("this agent got SIGUSR1"))

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True  # the store of a generation is fresh, and lives in the leader's agent

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until this node works, in whatever generation. SystemExit with the job's code when it is over."""
        membership, master = self._service.await_membership()
        rank = membership.rank(self._node)
        assert rank is not None
        self._set_environment(membership)
        point("join", generation=membership.generation, rank=rank, leads=membership.leader == self._node)
        self._tell_hooks(membership, rank)
        log.warning(
            "generation %d: rank %d of %d nodes (%s)",
            membership.generation,
            rank,
            len(membership.members),
            membership.reason,
        )
        store = AgentStore(self._service, membership, rank)
        return RendezvousInfo(store, rank, len(membership.members), RendezvousStoreInfo(master, membership.store_port))

    def _set_environment(self, membership: Membership) -> None:
        """What the workers, which torchrun starts next, inherit from this process."""
        os.environ["ELASTIC_GENERATION"] = str(membership.generation)
        os.environ["ELASTIC_URL"] = self._url
        os.environ["ELASTIC_NODES"] = ",".join(member.name for member in membership.members)
        os.environ["ELASTIC_REASON"] = membership.reason
        os.environ["CKPT_BOARD"] = self._service.crew.begin()
        os.environ["CKPT_START"] = f"{self._run_nonce}/{membership.generation}/{membership.nonce}"
        if not serves(self._url):  # else there are no checkpoints
            os.environ.setdefault("CKPT_URL", self._url)

    def _tell_hooks(self, membership: Membership, rank: int) -> None:
        self._names.update({member.node: member.name for member in membership.members})
        joined, left = changes(self._before, membership.nodes, self._names)
        self._before = membership.nodes
        names = tuple(member.name for member in membership.members)
        self._hooks.tell("on_membership", Event(membership.generation, names, rank, membership.reason, joined, left))

    def num_nodes_waiting(self) -> int:
        """1 when the workers must start again; they are dead by then."""
        return int(self._service.broken)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """An agent that errs does not close the job for the others."""

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self._leave("the job is over")
        return True

    def _leave(self, reason: str) -> None:
        if not self._left:
            self._left = True
            self._hooks.tell("on_leave", reason)
            self._service.stop()
            self._roster.close()
            self._hooks.finish(HOOKS_LIMIT_S)


class AgentStore(Store):
    """The few things for which torchrun's agent uses a store: how many workers each node starts, and the end.

    When the generation ends in the middle of the exchange, there is no way to tell the agent so. It gets an
    assignment that no worker can use (the store is gone, the world never meets), and learns at once that it must start
    again; its workers are killed as they appear.
    """

    def __init__(self, service: Service, membership: Membership, rank: int) -> None:
        super().__init__()
        self._service, self._generation = service, membership.generation
        self._rank, self._size = rank, len(membership.members)

    def set(self, key: str, value: str | bytes) -> None:
        self._service.share(key, value.encode() if isinstance(value, str) else bytes(value))

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def get(self, key: str) -> bytes:
        found = self._service.value(self._generation, key, EXCHANGE_LIMIT_S)
        if found is not None:
            return found
        self._service.end_generation(f"a member did not say within {EXCHANGE_LIMIT_S:g} s how many workers it starts")
        if key.startswith(ROLE_INFO):
            return json.dumps({"role": "default", "rank": self._rank, "local_world_size": 1}).encode()
        return json.dumps([self._rank, self._size, self._rank, self._size]).encode()

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def add(self, key: str, amount: int) -> int:
        """Part of the exit barrier, which `wait` is: never complete here."""
        return 0

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """The exit barrier: this node's workers ended well. Returns when the job has ended, however long that takes."""
        self._service.finish()


def _as_name(host: str) -> str:
    text = "".join(c if is_name(c) else "-" for c in host.lower())[:60]
    return text if is_name(text) else "node"


def _version() -> str:
    try:
        return version("holdfast")
    except PackageNotFoundError:
        return "unknown"


def _command() -> str:
    """A digest of what the workers run, as far as torchrun's command line tells; empty where it does not."""
    from torch.distributed.run import get_args_parser

    try:
        found: Any = get_args_parser().parse_args(sys.argv[1:])
    except (SystemExit, Exception):
        return ""
    return hashlib.sha256(json.dumps([found.training_script, found.training_script_args]).encode()).hexdigest()[:16]


def _log_to_stderr() -> None:
    """Say what happens where torchrun says it, unless the application configured logging itself."""
    if not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("elastic %(asctime)s %(process)d %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(os.environ.get("ELASTIC_LOG_LEVEL", "INFO"))
