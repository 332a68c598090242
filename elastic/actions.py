"""What an agent can be asked to do, and what storage can tell it. Plain values, so that decisions can be printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from elastic.failures import NO_FAILURES, Failures
from elastic.membership import Member, Membership
from elastic.messages import Down, Up


@dataclass(frozen=True)
class Send:
    """To a follower, or (node None) to whom we follow."""

    node: str | None
    message: Up | Down


@dataclass(frozen=True)
class Close:
    """Let go of a follower, or (None) of whom we follow."""

    node: str | None


@dataclass(frozen=True)
class Seek:
    """Ask these, in order; the answers come back as `sought`."""

    targets: tuple[Member, ...]


@dataclass(frozen=True)
class Follow:
    """Keep the connection to this one of those that answered, and close the others (None: all)."""

    node: str | None


@dataclass(frozen=True)
class Look:
    """Read the log, the counter and the announcements. `pulse`: advance the counter of the generation we lead.

    `over`: say there that its leader leads no more; `done`: and that the job is done. `announce`: let others find us.
    `waiting`, `avoided`: names of spares, and of those that are quarantined; `slow`: which ranks are; for
    `elastic status`.
    """

    pulse: int | None
    announce: bool
    over: bool = False
    done: bool = False
    waiting: tuple[str, ...] = ()
    avoided: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()


@dataclass(frozen=True)
class Propose:
    """Append the start of `members`, if `generation` is still the newest; the outcome comes back as `proposed`.

    `failures`: what was counted, in seconds before now.
    """

    members: tuple[Member, ...]
    generation: int
    reason: str
    leader_gone: bool
    failures: Failures = NO_FAILURES


@dataclass(frozen=True)
class Halt:
    """Ask the workers to stop at a step on which all ranks agree; it is heard as `paused` when they have."""

    reason: str


@dataclass(frozen=True)
class Trace:
    """Have the workers write their stacks; where they are is heard as `stacks`."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL the workers, then have the main thread come back."""

    reason: str


@dataclass(frozen=True)
class Forsake:
    """Have this node's keeper not wait for a node that is lost."""


@dataclass(frozen=True)
class Release:
    """The main thread may start the workers of `membership`."""

    membership: Membership


@dataclass(frozen=True)
class Exit:
    code: int
    reason: str


@dataclass(frozen=True)
class Note:
    """For the log."""

    text: str


Action: TypeAlias = (
    Send | Close | Seek | Follow | Look | Propose | Halt | Trace | Kill | Forsake | Release | Exit | Note
)


@dataclass(frozen=True)
class Seen:
    """What storage says. `counter` is compared for being equal only; `over`: the newest leader's end is certain;

    `done`: the newest generation has finished the job. `cordoned`: names of hosts, or nodes, that shall not work any
    more once their generation ends; `drained`: those of them that leave it at once.
    """

    generation: int = 0
    membership: Membership | None = None
    head: str | None = None
    counter: str = ""
    over: bool = False
    done: bool = False
    announced: tuple[Member, ...] = ()
    cordoned: frozenset[str] = frozenset()
    drained: frozenset[str] = frozenset()
