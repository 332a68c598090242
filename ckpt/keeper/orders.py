"""What workers, keepers and the coordinator say to each other. Plain data; none of it is stored in a run.

    worker -> keeper        Hello, Settle, Listen, Layouts, Order, Progress, Copied, Abort, Goodbye
    keeper -> worker        Settled, Listening, Freed, Complete, Outcome
    keeper -> coordinator   Joined, Ordered, Sealed, Stored, Broken
    coordinator -> keeper   Persist, Complete, Outcome

An attempt goes: ordered -> copied -> sealed (its digests are known) -> complete (sealed on every node) -> stored ->
committed; or it fails on the way, or a newer one takes its place.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ckpt.manifest import BLOCK_BYTES, PartRef
from ckpt.records import Commit
from ckpt.retention import Keep

Replicas: TypeAlias = tuple[tuple[bytes, tuple[str, ...], bytes], ...]
"""Groups of ranks that hold equal tensors: name of the group, keys, 8 bytes of digest for each key."""


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class Slot(msgspec.Struct, frozen=True, array_like=True):
    """A chunk as it is planned: everything that the part says of it but its digests."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    at: int
    nbytes: int

    @property
    def blocks(self) -> int:
        return -(-self.nbytes // BLOCK_BYTES)


class Job(msgspec.Struct, frozen=True, array_like=True):
    """One attempt to save a step, as all of its ranks know it alike."""

    attempt: str
    step: int
    index: int  # of this save within its generation; commits follow this order
    generation: int
    holder: str  # nonce of the start in whose name it is committed
    world_size: int
    deadline_s: float
    newest_only: bool  # the store may leave it out for a newer one


class Summary(msgspec.Struct, frozen=True, array_like=True):
    """What rank 0 alone says of an attempt."""

    ownership: str
    metrics: dict[str, float]
    keep: Keep | None = None


class Hello(_Message, frozen=True):
    rank: int
    pid: int


class Settle(_Message, frozen=True):
    """Resolve everything that earlier workers left, then answer Settled. `lost`: a node is, with all it had."""

    lost: bool = False


class Listen(_Message, frozen=True):
    """Be the coordinator of a run on several nodes, at this address of this node."""

    host: str
    token: bytes


class Layouts(_Message, frozen=True):
    """The distinct layouts of a world and who has which, as `encode_world` made them."""

    digest: bytes
    data: bytes


class Order(_Message, frozen=True):
    """Seal and store what this rank is about to copy.

    `runs` are the pieces (first byte, size) of the data file in the order in which they are copied. In RAM they lie
    where they lie in the file; with `ring` > 0, run i lies in place i % ring of a descriptor sent along.
    """

    job: Job
    rank: int
    data_bytes: int
    slots: tuple[Slot, ...]
    runs: tuple[tuple[int, int], ...]
    values: dict[str, bytes]
    rank_values: dict[str, bytes]
    ring: int
    place_bytes: int
    local_world: int  # ranks on this node
    layouts: bytes  # digest of the layouts that were sent before
    coordinator: tuple[str, int] | None  # None: this node's keeper
    token: bytes
    summary: Summary | None  # of rank 0
    compression: str = ""  # "", "zstd", or "auto": where that makes it faster


class Progress(_Message, frozen=True):
    """The first `runs` runs are copied."""

    attempt: str
    rank: int
    runs: int


class Copied(_Message, frozen=True):
    attempt: str
    rank: int
    replicas: Replicas


class Abort(_Message, frozen=True):
    """The copy failed; nothing of this attempt can be used."""

    attempt: str
    rank: int
    kind: str
    message: str


class Goodbye(_Message, frozen=True):
    """This worker closed the run; it will not come back."""


class Settled(_Message, frozen=True):
    pass


class Listening(_Message, frozen=True):
    port: int
    problem: str = ""


class Freed(_Message, frozen=True):
    """The places of the first `runs` runs in the ring may be used again."""

    attempt: str
    rank: int
    runs: int


class Joined(_Message, frozen=True):
    node: str


class Quiet(_Message, frozen=True):
    """Every worker of this node that had given anything is gone: what it has not ordered by now never comes."""


class Ordered(_Message, frozen=True):
    job: Job
    rank: int
    local_world: int
    layouts: bytes
    summary: Summary | None


class Sealed(_Message, frozen=True):
    """All blocks of this rank are digested; `content_digest` is that of its part. Kept beside it in RAM."""

    attempt: str
    rank: int
    content_digest: bytes
    replicas: Replicas


class Stored(_Message, frozen=True):
    """Data and part of this rank are durable in the store; chunks that were there already lie in `sources`.

    Kept in RAM: what was said is never written again.
    """

    attempt: str
    rank: int
    ref: PartRef
    sources: tuple[str, ...]


class Broken(_Message, frozen=True):
    attempt: str
    rank: int
    kind: str
    message: str


class Persist(_Message, frozen=True):
    """Bring this attempt to the store.

    What it has in common with the committed attempt `base` need not be stored again: that and its sources stay until
    this one is resolved; those that are `lasting` stay for reasons of their own.
    """

    attempt: str
    base: str | None = None
    lasting: frozenset[str] = frozenset()


class Complete(_Message, frozen=True):
    """Every rank's part is sealed in RAM, and together they are the whole state: older snapshots may go."""

    attempt: str


class Outcome(_Message, frozen=True):
    """How an attempt ended: committed, failed (`kind`, `message`), or left out for a newer one (`left_out`)."""

    attempt: str
    commit: Commit | None = None
    kind: str = ""
    message: str = ""
    left_out: bool = False
    stored_s: float = 0.0  # seconds of writing on this node
    stored_bytes: int = 0  # written on this node
    limit_bytes_per_s: float = 0.0  # best rate that this node's store was seen to take


ToKeeper = Hello | Settle | Listen | Layouts | Order | Progress | Copied | Abort | Goodbye
ToWorker = Settled | Listening | Freed | Complete | Outcome
ToCoordinator = Joined | Quiet | Ordered | Sealed | Stored | Broken
FromCoordinator = Persist | Complete | Outcome
