"""Who works together: a generation's members in order of rank, as the `start` record of the run's log names them.

Pure. A membership is written once, in the record that begins its generation; nothing else says who belongs to it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from ckpt.errors import Corrupt
from ckpt.records import Start
from elastic.failures import NO_FAILURES, Failures


@dataclass(frozen=True)
class Member:
    """One agent: the process that starts the workers of a node. `node` names this process, `name` the host."""

    node: str
    name: str
    addresses: tuple[str, ...]  # where other agents reach it, the best first
    port: int


@dataclass(frozen=True)
class Membership:
    """The members of one generation in order of rank, and who leads it.

    `store_port`: where the leader lets the workers' process groups meet, fresh for every generation. `began`: nonce of
    the start with which these members began to work; another one than `nonce` once a worker went back to an older step.
    `failures`: what the job's leaders had counted by then, in seconds before it.
    """

    generation: int
    nonce: str
    members: tuple[Member, ...]
    leader: str
    store_port: int
    began: str
    reason: str = ""
    failures: Failures = NO_FAILURES

    def __post_init__(self) -> None:
        names = [member.node for member in self.members]
        if self.generation < 1 or len(set(names)) != len(names) or self.leader not in names:
            raise ValueError(f"not a membership: generation {self.generation}, nodes {names}, leader {self.leader!r}")

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(member.node for member in self.members)

    def rank(self, node: str) -> int | None:
        """The group rank of a node, None if it is no member."""
        return self.nodes.index(node) if node in self.nodes else None

    def member(self, node: str) -> Member | None:
        return next((member for member in self.members if member.node == node), None)

    def is_continued_by(self, other: Membership) -> bool:
        """Whether `other` is this membership under another number: one of its workers went back to an older step."""
        return self.began == other.began


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    node: str
    name: str
    addresses: tuple[str, ...]
    port: int
    store_port: int = 0  # of the leader
    began: str = ""  # of the leader
    failures: Failures = NO_FAILURES  # of the leader


def to_record(
    members: tuple[Member, ...], leader: str, store_port: int, nonce: str, failures: Failures = NO_FAILURES
) -> tuple[dict[str, Any], ...]:
    """What `Start.members` of the start `nonce` holds: plain JSON values. The leader is who has a `store_port`."""
    of_leader: dict[str, Any] = {"store_port": store_port, "began": nonce, "failures": asdict(failures)}
    return tuple(asdict(member) | (of_leader if member.node == leader else {}) for member in members)


def of_start(start: Start | None) -> Membership | None:
    """The membership that a start began; None if it began none. Raises Corrupt if it cannot be understood."""
    if start is None or not start.members:
        return None
    try:
        entries = [msgspec.convert(entry, _Entry) for entry in start.members]
        members = tuple(Member(e.node, e.name, e.addresses, e.port) for e in entries)
        (leads,) = [entry for entry in entries if entry.store_port]
        return Membership(
            start.generation,
            start.nonce,
            members,
            leads.node,
            leads.store_port,
            leads.began,
            start.reason,
            leads.failures,
        )
    except (msgspec.ValidationError, ValueError) as error:
        raise Corrupt(f"the members of generation {start.generation} cannot be understood: {error}") from error
