"""What agents say to each other. Plain data; none of it is stored.

    dialling -> dialled   Hello; then, if it stays, Join
    dialled -> dialling   Welcome, Refused
    follower -> leader    Stopped, Ready, Finished, Leave, Hung, Stacks, Paces, Share, Ping
    leader -> follower    Pause, Inspect, Lost, Stop, Go, Leave, Share, End, Ping

A leader is followed; so is a candidate, which gathers nodes while there is no leader.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from elastic.decide import Pace
from elastic.failures import NO_FAILURES, Failures
from elastic.membership import Member, Membership


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class Job(msgspec.Struct, frozen=True, array_like=True):
    """What agents must have in common to work together."""

    run_id: str
    command: str
    limits: str
    version: str

    def differs(self, other: Job) -> str:
        """How `other` differs, in words; empty if it does not. (A command is a digest here, which tells nobody.)"""
        found = []
        for name in self.__struct_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append("another script, or other arguments" if name == "command" else
                             f"{name.replace('_', ' ')} {theirs!r} instead of {mine!r}")  # fmt: skip
        return ", ".join(found)


class Hello(_Message, frozen=True):
    me: Member
    job: Job


class Welcome(_Message, frozen=True):
    """`leads`: of `generation`, the newest this node knows. `follows`: whom to ask instead.

    `yields`: leads only if nobody else does.
    """

    leads: bool
    generation: int
    follows: Member | None
    yields: bool


class Refused(_Message, frozen=True):
    """`works`: who says so has a generation, or follows somebody; else it only waits to begin, as who asks does."""

    reason: str
    works: bool = True


class Join(_Message, frozen=True):
    """The dialling node follows from now on."""

    me: Member
    ready: bool
    finished: bool
    leaving: str = ""


class Stopped(_Message, frozen=True):
    """My workers do not run any more. `failed`: they ended by themselves, and not well, `step` steps being done.

    `hopeless`: one of them with a state or a setting that does not fit (ckpt.Incompatible).
    """

    failed: bool
    step: int = 0
    hopeless: bool = False


class Ready(_Message, frozen=True):
    """I wait for the next generation: what my workers left in memory is settled."""


class Finished(_Message, frozen=True):
    """My workers ended well; I wait for the others'."""


class Leave(_Message, frozen=True):
    """Up: take me out of the job, as planned. Down: be taken out of it. That agent ends once its workers have."""

    reason: str


class Share(_Message, frozen=True):
    """A value that every member of the generation shall have."""

    generation: int
    key: str
    value: bytes


class Ping(_Message, frozen=True):
    pass


class Hung(_Message, frozen=True):
    """A worker of mine makes no step."""

    reason: str


class Stack(msgspec.Struct, frozen=True, array_like=True):
    """Where a rank's main thread is. `waits`: in a collective, for others."""

    rank: int
    where: str
    waits: bool


class Stacks(_Message, frozen=True):
    """Where my workers are; those that could not say are left out."""

    found: tuple[Stack, ...]


class Paces(_Message, frozen=True):
    """How fast my workers were in the last seconds."""

    found: tuple[Pace, ...]


class Inspect(_Message, frozen=True):
    """Have your workers say where they are: the job hangs."""


class Pause(_Message, frozen=True):
    """Have your workers stop where all agree, with that step saved: this generation is about to be over."""

    reason: str


class Stop(_Message, frozen=True):
    """Kill your workers: this generation is over. `failures`: what the leader counted, in seconds before now."""

    reason: str
    failures: Failures = NO_FAILURES


class Lost(_Message, frozen=True):
    """A member is lost with all that it had: no keeper waits for it."""


class Go(_Message, frozen=True):
    membership: Membership


class End(_Message, frozen=True):
    """The job is over; agents exit with `code`."""

    code: int
    reason: str


Up: TypeAlias = Hello | Join | Stopped | Ready | Finished | Leave | Hung | Stacks | Paces | Share | Ping
Down: TypeAlias = Welcome | Refused | Pause | Inspect | Lost | Stop | Go | Leave | Share | End | Ping
