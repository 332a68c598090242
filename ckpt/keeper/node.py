"""One node's snapshots, from order to outcome: what the keeper does, without how it is started or reached.

Runs on one asyncio loop; digests, files and the log are worked on in threads. Speaks to workers through their
channels and to the coordinator through a link, which on the coordinator's own node is a plain call.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, TypeVar

import msgspec

from ckpt.errors import CkptError, Corrupt, Fenced, SaveFailed
from ckpt.events import point
from ckpt.holder import discard
from ckpt.keeper.coordinator import failure, world_of
from ckpt.keeper.orders import (
    Abort,
    Broken,
    Complete,
    Copied,
    Freed,
    FromCoordinator,
    Job,
    Layouts,
    Order,
    Ordered,
    Outcome,
    Persist,
    Progress,
    Sealed,
    Stored,
    ToCoordinator,
    ToWorker,
)
from ckpt.keeper.packer import Packer, most_bytes
from ckpt.keeper.persist import Copying, Digests, Maps, Memory, Regrouped, part_of, sample, take_in
from ckpt.keeper.ram import RamTier
from ckpt.keeper.stock import Stock, without
from ckpt.layout import owned_by
from ckpt.log import check_fence
from ckpt.manifest import PACKED, Chunk, Part, PartRef, data_name, decode_part, digest, encode_part, part_name
from ckpt.packing import measure, pays
from ckpt.run import RunDirectory
from ckpt.store import REQUESTS, DataWriter

log = logging.getLogger("ckpt.keeper")

T = TypeVar("T")
_Chunks: TypeAlias = tuple[Chunk, ...]
_Written: TypeAlias = tuple[_Chunks, int, _Chunks]  # the chunks of a data file, its bytes; the same chunks in memory

THREADS_LIMIT = 64
IO_THREADS = 4  # for all ranks of the node together; two writers reach the limit of one disk
PACKING_SAMPLE_BYTES = 1 << 20
OUTCOMES_LIMIT = 64  # outcomes kept for workers that ask again


class Link(Protocol):
    """The way to the coordinator; messages arrive in order, or again after a new connection."""

    def tell(self, message: ToCoordinator) -> None: ...


class Worker(Protocol):
    """The way to a worker."""

    rank: int

    def tell(self, message: ToWorker) -> None: ...


@dataclass(eq=False)
class Snapshot:
    """What one rank gave for one attempt."""

    order: Order
    memory: Memory
    copying: Copying
    worker: Worker | None
    link: Link
    deadline: float
    copied: asyncio.Event = field(default_factory=asyncio.Event)
    wanted: asyncio.Event = field(default_factory=asyncio.Event)
    wants: Persist | None = None  # set with `wanted`, unless the attempt ended first
    replicas: tuple[tuple[bytes, tuple[str, ...], bytes], ...] = ()
    part: Part | None = None  # of the copy in RAM, once it is sealed
    sealed: Sealed | None = None
    stored: Stored | None = None
    ended: bool = False
    task: asyncio.Task[None] | None = None
    writing_s: float = 0.0
    written_bytes: int = 0

    @property
    def attempt(self) -> str:
        return self.order.job.attempt

    @property
    def rank(self) -> int:
        return self.order.rank


class Node:
    """All snapshots of one run on one node."""

    def __init__(self, run: RunDirectory, ram: RamTier) -> None:
        self._run, self._ram = run, ram
        self.open: dict[tuple[str, int], Snapshot] = {}
        self.limit_bytes_per_s = 0.0
        self.changed = asyncio.Condition()
        self._outcomes: dict[str, Outcome] = {}
        self._made_in: dict[str, int] = {}  # generation of each attempt in RAM
        self._checked: set[bytes] = set()
        self._maps = Maps()
        self._stock = Stock()
        self._stores_per_s = 0.0  # bytes, by the last save that was not packed; 0: not known
        self._resolving: set[asyncio.Task[None]] = set()
        self._pool = ThreadPoolExecutor(THREADS_LIMIT, thread_name_prefix="keeper")

    # From workers

    def layouts(self, said: Layouts) -> None:
        if digest(said.data) != said.digest:
            raise SaveFailed("layouts arrived damaged")
        path = self._ram.file(f"layouts/{said.digest.hex()}")
        if not os.path.exists(path):
            self._ram.write(path, said.data)

    def order(self, order: Order, fd: int | None, worker: Worker | None, link: Link) -> None:
        """Begin to care for a snapshot; one that is known gets its worker back."""
        attempt, rank = order.job.attempt, order.rank
        if (known := self._outcomes.get(attempt)) or (attempt, rank) in self.open:
            if fd is not None:
                os.close(fd)
            if known is None:
                self.open[attempt, rank].worker = worker
            elif worker is not None:
                worker.tell(known)
            return
        try:
            snapshot = self._admit(order, fd, worker, link)
        except (CkptError, OSError, ValueError) as error:
            link.tell(Ordered(order.job, rank, order.local_world, b"", None))
            link.tell(_broken(attempt, rank, error))
            return
        self.open[attempt, rank] = snapshot
        self._made_in[attempt] = order.job.generation
        link.tell(self._ordered(order))
        snapshot.task = asyncio.get_running_loop().create_task(self._care_for(snapshot))

    def _admit(self, order: Order, fd: int | None, worker: Worker | None, link: Link) -> Snapshot:
        path = self._ram.data(order.job.attempt, order.rank)
        opened = fd if fd is not None else os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        memory = Memory(order, self._maps.of(opened, Memory.bytes_of(order)))
        self._check_slots(order)
        if not order.ring:
            self._ram.write(self._ram.beside(order.job.attempt, order.rank, "order"), msgspec.msgpack.encode(order))
        deadline = time.monotonic() + order.job.deadline_s
        return Snapshot(order, memory, Copying(len(order.runs)), worker, link, deadline)

    def _check_slots(self, order: Order) -> None:
        """What a rank stores must be what the layouts assign to it: with that, no element is left out or stale."""
        told = digest(msgspec.msgpack.encode((order.layouts, order.rank, order.slots)))
        if told in self._checked:
            return
        world = world_of(self._layouts(order.layouts))
        expected = [(owned.key, owned.box.offset, owned.box.shape) for owned in owned_by(world, order.rank)]
        if expected != [(slot.key, slot.offset, slot.shape) for slot in order.slots]:
            raise SaveFailed(f"rank {order.rank} plans to store other slices than its layout assigns to it")
        self._checked = {told, *list(self._checked)[:256]}

    def _layouts(self, name: bytes) -> bytes:
        with open(self._ram.file(f"layouts/{name.hex()}"), "rb") as file:
            return file.read()

    def _ordered(self, order: Order) -> Ordered:
        layouts = self._layouts(order.layouts) if order.summary is not None else b""
        return Ordered(order.job, order.rank, order.local_world, layouts, order.summary)

    def progress(self, said: Progress) -> None:
        if snapshot := self.open.get((said.attempt, said.rank)):
            snapshot.copying.advance(said.runs)

    def copied(self, said: Copied) -> None:
        if snapshot := self.open.get((said.attempt, said.rank)):
            snapshot.replicas = said.replicas
            snapshot.copying.advance(len(snapshot.order.runs))
            snapshot.copied.set()

    def aborted(self, said: Abort) -> None:
        if snapshot := self.open.get((said.attempt, said.rank)):
            snapshot.copying.give_up(said.message)
            snapshot.link.tell(Broken(said.attempt, said.rank, said.kind, said.message))

    def worker_gone(self, worker: Worker) -> None:
        """What it had copied goes on; what it was copying cannot be finished."""
        for snapshot in list(self.open.values()):
            if snapshot.worker is worker:
                snapshot.worker = None
                if not snapshot.copied.is_set():
                    why = "died, or closed the run, while its state was being copied."
                    snapshot.copying.give_up(f"rank {snapshot.rank} {why}")
                    snapshot.link.tell(Broken(snapshot.attempt, snapshot.rank, "SaveFailed", why))

    # From the coordinator

    def heard(self, message: FromCoordinator) -> None:
        mine = [snapshot for snapshot in self.open.values() if snapshot.attempt == message.attempt]
        if isinstance(message, Persist):
            for snapshot in mine:
                snapshot.wants = snapshot.wants or message
                snapshot.wanted.set()
        elif isinstance(message, Complete):
            self._on_complete(message, mine)
        elif mine or message.attempt not in self._outcomes:
            mine = [snapshot for snapshot in mine if not snapshot.ended]  # an outcome that is told twice ends each once
            for snapshot in mine:
                snapshot.ended = True
            task = asyncio.get_running_loop().create_task(self._resolve(message, mine))
            self._resolving.add(task)
            task.add_done_callback(self._resolving.discard)

    def _on_complete(self, message: Complete, mine: list[Snapshot]) -> None:
        for snapshot in mine:
            if snapshot.worker is not None:
                snapshot.worker.tell(message)
        if mine and not mine[0].order.ring:
            self._drop_before(mine[0].order.job.generation)

    def _drop_before(self, generation: int) -> None:
        """Forget what earlier generations left in RAM: their workers are gone, and there is something newer."""
        held = self._ram.attempts()
        for attempt in held:
            if self._made_in.get(attempt, generation) < generation and not self._is_open(attempt):
                self._ram.drop_attempt(attempt)
        self._made_in = {attempt: made_in for attempt, made_in in self._made_in.items() if attempt in held}
        self._maps.trim()

    def _is_open(self, attempt: str) -> bool:
        return any(name == attempt for name, _ in self.open)

    async def _resolve(self, outcome: Outcome, mine: list[Snapshot]) -> None:
        """End the work on an attempt, keep it in RAM if it was committed, and tell its workers."""
        cut_short = any(snapshot.wants is not None and snapshot.stored is None for snapshot in mine)
        for snapshot in mine:
            snapshot.copying.give_up(outcome.message or "a newer step took its place")
            snapshot.wanted.set()
            snapshot.copied.set()
            if snapshot.task is not None:
                await snapshot.task
        if cut_short and outcome.kind not in ("", "Fenced"):  # it was written to after the coordinator removed it
            await self._thread(discard, self._run, outcome.attempt)
        seconds = max((snapshot.writing_s for snapshot in mine), default=0.0)
        written = sum(snapshot.written_bytes for snapshot in mine)
        if outcome.commit is not None and seconds:
            self.limit_bytes_per_s = max(self.limit_bytes_per_s, written / seconds)
        said = msgspec.structs.replace(
            outcome, stored_s=seconds, stored_bytes=written, limit_bytes_per_s=self.limit_bytes_per_s
        )
        self._outcomes[outcome.attempt] = said
        while len(self._outcomes) > OUTCOMES_LIMIT:
            del self._outcomes[next(iter(self._outcomes))]
        for snapshot in mine:
            del self.open[snapshot.attempt, snapshot.rank]
            snapshot.memory.close()
            if outcome.commit is None:
                self._ram.drop(snapshot.attempt, snapshot.rank, keep_data=snapshot.worker is not None)
            if snapshot.worker is not None:
                snapshot.worker.tell(said)
        self._maps.trim()
        async with self.changed:
            self.changed.notify_all()

    async def settle(self) -> None:
        """Return once nothing that earlier workers left is unresolved; what cannot be used is gone then."""
        async with self.changed:
            await self.changed.wait_for(lambda: not self.open)
        for attempt in self._ram.attempts():
            if attempt not in self._outcomes or self._outcomes[attempt].commit is None:
                self._ram.drop_attempt(attempt)
        self._maps.trim()

    # One snapshot

    async def _care_for(self, snapshot: Snapshot) -> None:
        try:
            await _first_of(snapshot.wanted, snapshot.copied)
            if not snapshot.wanted.is_set() and snapshot.part is None:
                await self._seal_copy(snapshot)
            await snapshot.wanted.wait()
            if not snapshot.ended and snapshot.stored is None:
                await self._store(snapshot)
        except Exception as error:
            error = await self._thread(self._reason, snapshot.order.job, error)
            if not snapshot.ended:
                snapshot.link.tell(_broken(snapshot.attempt, snapshot.rank, error))

    def _reason(self, job: Job, error: Exception) -> Exception:
        """`error`, or that a newer start has the run: it removes what a stale one still writes."""
        if isinstance(error, Fenced):
            return error
        try:
            check_fence(RunDirectory.at(self._run.store).log.read(), job.generation, job.holder)
        except Fenced as fenced:
            return fenced
        except CkptError:
            return error
        return error

    async def _store(self, snapshot: Snapshot) -> None:
        """Bring a snapshot to the store: what is not there yet, and the part."""
        assert snapshot.wants is not None
        await self._thread(self._run.check_unchanged)
        if snapshot.part is None and not snapshot.order.ring and self._stock.is_worth_it(snapshot.wants, snapshot.rank):
            await self._seal_copy(snapshot)
        sealed = snapshot.part
        there = self._stock.in_store(snapshot.wants, sealed.chunks) if sealed is not None else {}
        chunks, data_bytes, copied = await self._write(snapshot, there)
        await snapshot.copied.wait()
        if snapshot.ended:
            return
        part = part_of(snapshot.order, chunks, data_bytes)
        if sealed is None:
            self._seal(snapshot, part_of(snapshot.order, copied, snapshot.order.data_bytes))
        elif part.content_digest() != sealed.content_digest():
            raise Corrupt(f"the copy of {snapshot.attempt} in RAM changed after it was sealed: is its memory sound?")
        await self._put(snapshot, part)

    async def _write(self, snapshot: Snapshot, there: dict[int, Chunk]) -> _Written:
        """Write the data file without the chunks that are `there`; all chunks as they lie then."""
        new = len(there) < len(snapshot.order.slots)  # a file without a tensor is no packed one
        packs = new and await self._thread(self._packs, snapshot)
        path = self._run.attempt_path(snapshot.attempt, data_name(snapshot.rank, packs))
        began = time.monotonic()
        write = self._write_packed if packs else self._write_changed if there else self._write_whole
        chunks, data_bytes, copied = await write(snapshot, path, there)
        seconds = time.monotonic() - began
        snapshot.writing_s, snapshot.written_bytes = seconds, data_bytes
        if not packs and data_bytes > PACKING_SAMPLE_BYTES:
            self._stores_per_s = data_bytes * snapshot.order.local_world / max(seconds, 1e-9)
        if there:
            written = iter(chunks)
            chunks = tuple(there.get(index) or next(written) for index in range(len(snapshot.order.slots)))
        return chunks, data_bytes, copied

    async def _write_whole(self, snapshot: Snapshot, path: str, there: dict[int, Chunk]) -> _Written:
        order = snapshot.order
        into = await self._thread(self._run.store.write_data, path, order.data_bytes)
        chunks = (await self._take_in(snapshot, order, snapshot.memory, into)).chunks(order)
        return chunks, order.data_bytes, chunks

    async def _write_changed(self, snapshot: Snapshot, path: str, there: dict[int, Chunk]) -> _Written:
        order, file = without(snapshot.order, there)
        places = [slot.at for index, slot in enumerate(snapshot.order.slots) if index not in there]
        snapshot.copying = Copying(len(order.runs))
        snapshot.copying.advance(len(order.runs))
        into = await self._thread(self._run.store.write_data, path, order.data_bytes)
        chunks = (await self._take_in(snapshot, order, Regrouped(snapshot.memory, file, places), into)).chunks(order)
        return chunks, order.data_bytes, chunks

    async def _write_packed(self, snapshot: Snapshot, path: str, there: dict[int, Chunk]) -> _Written:
        order, copying = snapshot.order, snapshot.copying
        into = await self._thread(self._run.store.write_data, path, most_bytes(order))
        packer = Packer(order, into, there, lambda: copying.gave_up, snapshot.deadline)
        copied = (await self._take_in(snapshot, order, snapshot.memory, packer)).chunks(order)
        return packer.chunks(copied), packer.data_bytes, copied

    def _packs(self, snapshot: Snapshot) -> bool:
        """Whether the data file is stored packed; for "auto", a sample of what is copied says whether it pays."""
        order = snapshot.order
        if order.compression != "auto":
            return order.compression == PACKED
        last = (min(order.ring, len(order.runs)) if order.ring else len(order.runs)) - 1
        snapshot.copying.wait_for(last, snapshot.deadline)
        rate, ratio = measure(sample(order, snapshot.memory, last, PACKING_SAMPLE_BYTES))
        return pays(ratio, rate * min(IO_THREADS, os.cpu_count() or 1), self._stores_per_s)

    async def _put(self, snapshot: Snapshot, part: Part) -> None:
        """Write the part; from here on this rank's share of the attempt stands in the store, and is not touched."""
        data, attempt, rank = encode_part(part), snapshot.attempt, snapshot.rank
        await self._thread(lambda: point("part", step=snapshot.order.job.step, rank=rank))
        await self._thread(self._run.store.put, self._run.attempt_path(attempt, part_name(rank)), data)
        ref = PartRef(len(data), self._run.digest(data), part.data_bytes, part.content_digest())
        sources = tuple(sorted({chunk.source for chunk in part.chunks if chunk.file}))
        snapshot.stored = Stored(attempt, rank, ref, sources)
        if not snapshot.order.ring:
            self._ram.write(self._ram.beside(attempt, rank, "stored"), msgspec.msgpack.encode(snapshot.stored))
        self._stock.add(part)
        snapshot.link.tell(snapshot.stored)

    async def _take_in(
        self, snapshot: Snapshot, order: Order, memory: Memory | Regrouped, into: DataWriter | None
    ) -> Digests:
        loop = asyncio.get_running_loop()

        def freed(runs: int) -> None:
            if order.ring:
                loop.call_soon_threadsafe(self._tell_freed, snapshot, runs)

        copying, run_digest = snapshot.copying, self._run.digest
        threads = max(1, (REQUESTS if into is not None and into.in_order else IO_THREADS) // order.local_world)
        return await self._thread(
            lambda: take_in(
                order, memory, copying, into, run_digest, threads=threads, deadline=snapshot.deadline, freed=freed
            )
        )

    def _tell_freed(self, snapshot: Snapshot, runs: int) -> None:
        if snapshot.worker is not None:
            snapshot.worker.tell(Freed(snapshot.attempt, snapshot.rank, runs))

    async def _seal_copy(self, snapshot: Snapshot) -> None:
        """Digest what is copied, and seal it."""
        chunks = (await self._take_in(snapshot, snapshot.order, snapshot.memory, None)).chunks(snapshot.order)
        await snapshot.copied.wait()
        if not snapshot.ended:
            self._seal(snapshot, part_of(snapshot.order, chunks, snapshot.order.data_bytes))

    def _seal(self, snapshot: Snapshot, part: Part) -> None:
        """Write down what is known of a copied snapshot; from here on it can be stored without its worker."""
        attempt, rank = snapshot.attempt, snapshot.rank
        point("seal", step=snapshot.order.job.step, rank=rank)
        snapshot.part, snapshot.sealed = part, Sealed(attempt, rank, part.content_digest(), snapshot.replicas)
        if not snapshot.order.ring:
            self._ram.write(self._ram.beside(attempt, rank, "part"), encode_part(part))
            self._ram.write(self._ram.beside(attempt, rank, "sealed"), msgspec.msgpack.encode(snapshot.sealed))
        snapshot.link.tell(snapshot.sealed)

    async def _thread(self, act: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, act, *args)

    # After a keeper was lost

    def adopt(self, link_to: Callable[[Order], Link]) -> None:
        """Take over what another keeper had sealed on this node; what was not yet sealed, its worker sends again."""
        for attempt in self._ram.attempts():
            for rank in self._ram.ranks(attempt, "sealed"):
                try:
                    order = msgspec.msgpack.decode(_read(self._ram.beside(attempt, rank, "order")), type=Order)
                    sealed = msgspec.msgpack.decode(_read(self._ram.beside(attempt, rank, "sealed")), type=Sealed)
                    part = decode_part(_read(self._ram.beside(attempt, rank, "part")), f"part {rank} of {attempt}")
                    ordered, content = (order.job.attempt, order.rank), part.content_digest()
                    if ordered != (attempt, rank) or sealed.content_digest != content:
                        raise Corrupt(f"the part of {attempt} in RAM is not the one that was sealed")
                    self._adopt(order, part, sealed, link_to(order))
                except (CkptError, OSError, ValueError, msgspec.MsgspecError) as error:
                    log.warning("a snapshot of %s in RAM cannot be used: %s", attempt, error)
                    self._ram.drop(attempt, rank)

    def _adopt(self, order: Order, part: Part, sealed: Sealed, link: Link) -> None:
        snapshot = self._admit(order, None, None, link)
        snapshot.replicas, snapshot.part, snapshot.sealed = sealed.replicas, part, sealed
        if os.path.exists(stored := self._ram.beside(snapshot.attempt, snapshot.rank, "stored")):
            snapshot.stored = msgspec.msgpack.decode(_read(stored), type=Stored)
        snapshot.copying.advance(len(order.runs))
        snapshot.copied.set()
        self.open[snapshot.attempt, snapshot.rank] = snapshot
        self._made_in[snapshot.attempt] = order.job.generation
        self._repeat(snapshot)
        snapshot.task = asyncio.get_running_loop().create_task(self._care_for(snapshot))

    def repeat_to(self, link: Link) -> None:
        """Say again to a coordinator that may be a new one what it must know of the unresolved snapshots."""
        for snapshot in self.open.values():
            if snapshot.link is link:
                self._repeat(snapshot)

    def _repeat(self, snapshot: Snapshot) -> None:
        snapshot.link.tell(self._ordered(snapshot.order))
        if snapshot.sealed is not None:
            snapshot.link.tell(snapshot.sealed)
        if snapshot.stored is not None:
            snapshot.link.tell(snapshot.stored)

    def give_up_on(self, link: Link, why: str) -> None:
        """The coordinator behind `link` is gone for good."""
        for attempt in {snapshot.attempt for snapshot in self.open.values() if snapshot.link is link}:
            self.heard(Outcome(attempt, kind="SaveFailed", message=f"{attempt} was not committed: {why}"))


def _broken(attempt: str, rank: int, error: BaseException) -> Broken:
    said = failure(attempt, error)
    return Broken(attempt, rank, said.kind, said.message)


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
