"""One save, on all ranks together: layout, plan, a copy of the state; what follows is the keepers' work.

The layout and its plan are computed when the layout changes and used again until then; data never is. Everything
collective happens in the calling thread, before `save` returns.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ckpt.adapt import Collected, Fence, Versions, collect_state
from ckpt.agreement import Signal, is_one, on_first, raise_together, together, word
from ckpt.arguments import checked_metrics, step_number
from ckpt.echo import tell_echo
from ckpt.errors import CkptError, Incompatible, SaveFailed
from ckpt.exchange import (
    agree_on_world,
    as_message,
    check_replicas,
    check_values,
    digest_of_values,
    replica_digests,
)
from ckpt.figures import Reporter, Reporters, SaveFailure, SaveFigures, log_line
from ckpt.handle import SaveHandle
from ckpt.holder import Holder
from ckpt.keeper.address import own_address
from ckpt.keeper.courier import Courier, Pending, error_of
from ckpt.keeper.orders import Job, Layouts, Order, Replicas, Slot, Summary
from ckpt.keeper.ram import (
    SHARE_OF_FREE_MEMORY,
    SNAPSHOTS_LIMIT,
    RamTier,
    free_bytes,
    node_name,
    snapshots_that_fit,
)
from ckpt.layout import OWNERSHIP, World
from ckpt.manifest import digest
from ckpt.plan import RUN_BYTES, SavePlan, plan_save
from ckpt.process import no_collection
from ckpt.ranks import Ranks
from ckpt.records import attempt_name
from ckpt.retention import Keep
from ckpt.run import RunDirectory
from ckpt.stage import RING_PLACES, Arena, CopyPlan, Ring, Stage, plan_copy
from ckpt.store import by_requests
from ckpt.symbolic import encode_layout, encode_world

log = logging.getLogger("ckpt")

COPY_THREADS_LIMIT = 4
FINISHED_LIMIT = 64  # costs of saves that nobody has asked for yet


@dataclass(frozen=True)
class Options:
    """How a Checkpointer saves."""

    overlap: bool = True
    newest_only: bool = False
    ram_budget_bytes: int | None = None
    timeout_s: float = 600
    reporters: Sequence[Reporter] = ()
    keep: Keep | None = None
    compression: str = ""


class _Began(msgspec.Struct, frozen=True, array_like=True):
    """The start in whose name this job saves, as rank 0 tells it."""

    generation: int
    nonce: str
    head_step: int
    names: str  # attempts are named after it: several savers may work under one start


@dataclass(frozen=True)
class _Request:
    """What this rank wants saved, checked and described."""

    step: int
    metrics: dict[str, float]
    collected: Collected
    layout_bytes: bytes
    values: bytes  # digest


@dataclass(frozen=True)
class _Nodes:
    """Which ranks share this node, and where the coordinator is (None: here)."""

    local_world: int
    coordinator: tuple[str, int] | None
    token: bytes


@dataclass
class _Layout:
    """What follows from the layout alone, kept until it changes."""

    digest: bytes
    world: World
    plan: SavePlan
    slots: tuple[Slot, ...]
    layouts: Layouts
    shared: dict[bytes, list[str]]  # replicas of more than a name: group -> keys
    copies: dict[frozenset[str], CopyPlan] = field(default_factory=dict)

    def copy_plan(self, overlapped: frozenset[str]) -> CopyPlan:
        if overlapped not in self.copies:
            self.copies = {overlapped: plan_copy(self.plan, overlapped)}
        return self.copies[overlapped]


class Saver:
    """Saves states of one run. Methods are collective unless they say otherwise."""

    def __init__(self, ranks: Ranks, run: RunDirectory, holder: Holder | None, options: Options) -> None:
        self._ranks, self._run, self._holder, self._options = ranks, run, holder, options
        ram = RamTier.of(run)
        self.ram = ram
        self._courier = Courier(ram, run.url, ranks.rank, self._on_change)
        self._stage = Stage(ram, ranks.rank)
        self._fence = Fence()
        self._layout: _Layout | None = None
        self._nodes: _Nodes | None = None
        self._began: _Began | None = None
        self._settled = False
        self._index = 0
        self._handles: list[_Save] = []
        self.skipped = 0
        self._skipped_before = 0
        self._finished: deque[tuple[float, float]] = deque(maxlen=FINISHED_LIMIT)
        self._report = Reporters((log_line, *options.reporters))

    # Saving

    def save(self, step: int, state: Any, metrics: Mapping[str, float], *, must: bool) -> SaveHandle:
        """Copy `state`, now or while training goes on, and have it committed as `step`.

        With `must` the step is never left out. Raises on every rank what any rank cannot do, and what an earlier save
        failed of; nothing of this step exists then.
        """
        with no_collection():
            return self._save(step, state, metrics, must)

    def _save(self, step: int, state: Any, metrics: Mapping[str, float], must: bool) -> SaveHandle:
        called = time.monotonic()
        self._begin()
        request: _Request | None = None
        failure: BaseException | None = None
        try:
            self._raise_untold()
            self._forget_old()
            request = self._request(step, state, metrics)
            may_skip = self._options.newest_only and not must
            if not may_skip:
                self._wait_for_room(request)
        except BaseException as error:
            failure = error
        request = self._agree(request, failure)
        if request is None:
            self.skipped += 1
            return self._skip(step)
        layout = self._layout
        assert layout is not None
        return self._copy(request, layout, called, must)

    def _request(self, step: int, state: Any, metrics: Mapping[str, float]) -> _Request:
        number, values = step_number(step), checked_metrics(metrics)
        assert self._began is not None
        last = max([self._began.head_step, *(s.step for s in self._handles if not s.failed)])
        if number <= last:
            raise Incompatible(
                f"step {number} has already been passed: this run is at step {last}. Steps only grow within a lineage; "
                f"to train step {number} again, first go back with restore(state, step=N) for some N below {number}"
            )
        collected = collect_state(state, self._ranks.rank, self._ranks.size)
        layout = encode_layout(collected.layout())
        tell_echo("save", collected, self._ranks.rank, step=number, world=self._ranks.size, metrics=values)
        return _Request(number, values, collected, layout, digest_of_values(collected))

    def _agree(self, request: _Request | None, failure: BaseException | None) -> _Request | None:
        """One word among the ranks: go on (a new layout is exchanged here), or leave it out (None), or raise."""
        changed = request is not None and (self._layout is None or digest(request.layout_bytes) != self._layout.digest)
        busy = not changed and self._layout is not None and not self._stage.has_room()
        at = request.step if request else 0
        mine = Signal(at, failed=failure is not None, layout_changed=changed, busy=busy)
        heard = self._ranks.maximum(mine.encode() + word(request.values if request else bytes(8)))
        if Signal.any_failed(heard):
            self._raise(failure)
        assert request is not None
        signal = Signal.decode(heard[:16], at)
        if signal.layout_changed:
            self._exchange(request)
        elif signal.busy:
            return None
        if not is_one(heard[16:]):
            assert self._layout is not None
            check_values(self._ranks, self._layout.world, request.collected)
        return request

    def _copy(self, request: _Request, layout: _Layout, called: float, must: bool) -> SaveHandle:
        assert self._began is not None
        collected = request.collected
        # A ring is emptied in the order in which it was filled; a store that is sent parts wants that of the file.
        in_file_order = not self._stage.holds and by_requests(self._run.store)
        overlap = self._options.overlap and not in_file_order
        overlapped = collected.overlappable() if overlap else frozenset[str]()
        copy_plan = layout.copy_plan(overlapped)
        tensors = collected.tensors
        digests_now = replica_digests(layout.shared, collected, request.step, lambda key: key not in overlapped)
        place = self._stage.take(self._options.timeout_s)
        self._index += 1
        order = self._order(request, layout, copy_plan, place, must)
        if isinstance(place, Arena):
            place.rename_to(order.job.attempt)
        pending = self._courier.begin(order, layout.layouts, place.fd if isinstance(place, Ring) else None)
        save = _Save(request.step, pending, called)
        if self._handles:
            self._handles[-1].following = save
        self._handles.append(save)
        versions = Versions.of({key: tensors[key] for key in overlapped})

        def checked() -> Replicas:
            later = replica_digests(layout.shared, collected, request.step, lambda key: key in overlapped)
            if moved := versions.changed():
                raise SaveFailed(
                    f"{', '.join(moved[:8])} changed while they were copied, and not by step() of an optimizer in the "
                    "state. Call handle.wait_copied() before such writes, or Checkpointer(overlap=False)."
                )
            return as_message(layout.shared, {**digests_now, **later})

        self._fence.guard(collected.optimizers if overlapped else [], pending.wait_copied)
        sources = [tensors[chunk.owned.key] for chunk in layout.plan.chunks]
        self._stage.begin(place, pending, copy_plan, sources, checked, streamed=must)
        save.blocked_s = time.monotonic() - called
        return self._handle_of(save)

    def _order(self, request: _Request, layout: _Layout, copy_plan: CopyPlan, place: Arena | Ring, must: bool) -> Order:
        began, nodes, collected = self._began, self._nodes, request.collected
        assert began is not None
        assert nodes is not None
        name = digest(f"{began.names} {self._index}".encode()).hex()[:12]
        job = Job(
            attempt=attempt_name(request.step, name),
            step=request.step,
            index=self._index,
            generation=began.generation,
            holder=began.nonce,
            world_size=self._ranks.size,
            deadline_s=self._options.timeout_s,
            newest_only=self._options.newest_only and not must,
        )
        return Order(
            job=job,
            rank=self._ranks.rank,
            data_bytes=layout.plan.file.data_bytes,
            slots=layout.slots,
            runs=copy_plan.places,
            values={name: collected.values[name] for name in layout.plan.values},
            rank_values=dict(sorted(collected.rank_values.items())),
            ring=RING_PLACES if isinstance(place, Ring) else 0,
            place_bytes=RUN_BYTES,
            local_world=nodes.local_world,
            layouts=layout.layouts.digest,
            coordinator=nodes.coordinator,
            token=nodes.token,
            summary=Summary(OWNERSHIP, request.metrics, self._options.keep) if self._ranks.rank == 0 else None,
            compression=self._options.compression,
        )

    def _handle_of(self, save: _Save) -> SaveHandle:
        return SaveHandle(save.step, save.pending, lambda: self._handle_of(save.following) if save.following else None)

    def _skip(self, step: int) -> SaveHandle:
        before = self._handles[-1] if self._handles else None  # what the stage is busy with
        return SaveHandle(
            step, None, lambda: self._handle_of(before.following) if before and before.following else None
        )

    def _wait_for_room(self, request: _Request) -> None:
        if self._layout is not None and digest(request.layout_bytes) == self._layout.digest:
            self._stage.wait_for_room(self._options.timeout_s)

    # What the ranks must know of each other

    def _begin(self) -> None:
        """Take the run, once: after what earlier workers left was settled."""
        if self._began is not None:
            return
        self.settle()
        self._courier.start()  # the keeper is there by the time that something is copied

        def first() -> bytes:
            assert self._holder is not None
            start = self._holder.ensure_started("first save")
            self._run.check_unchanged()
            head = self._holder.view.head
            return msgspec.msgpack.encode(
                _Began(start.generation, start.nonce, head.step if head else -1, secrets.token_hex(8))
            )

        self._began = msgspec.msgpack.decode(on_first(self._ranks, first), type=_Began)

    def settle(self) -> None:
        """Before a start: let the keepers commit what earlier workers of this run left in RAM."""
        if not self._settled:
            together(self._ranks, lambda: self._courier.settle(self._options.timeout_s))
            self._settled = True

    def forget_start(self) -> None:
        """Another start may have been appended; every save of the one before is resolved."""
        self._began = None
        self._handles = []  # what has passed since is decided by the log alone

    def _exchange(self, request: _Request) -> None:
        """Learn every rank's layout, each distinct one once; prove that together they hold everything once."""
        together(self._ranks, lambda: self.wait(self._options.timeout_s))
        self._layout = None
        world = agree_on_world(self._ranks, request.layout_bytes)
        groups = check_replicas(self._ranks, world, request.collected)
        nodes = self._find_nodes()
        self._layout = together(self._ranks, lambda: self._plan(world, groups, request.layout_bytes, nodes))

    def _plan(self, world: World, groups: dict[bytes, list[str]], layout_bytes: bytes, nodes: _Nodes) -> _Layout:
        plan = plan_save(world, self._ranks.rank)
        slots = tuple(Slot(c.owned.key, c.owned.box.offset, c.owned.box.shape, c.spec.dtype, c.at, c.nbytes)
                      for c in plan.chunks)  # fmt: skip
        data = encode_world(world)
        self._nodes = nodes
        self._prepare_stage(plan, nodes.local_world)
        return _Layout(digest(layout_bytes), world, plan, slots, Layouts(digest(data), data), groups)

    def _prepare_stage(self, plan: SavePlan, local_world: int) -> None:
        root, budget = self.ram.root, self._options.ram_budget_bytes
        try:
            room = free_bytes(root)
            budget = int(room * SHARE_OF_FREE_MEMORY) if budget is None else min(budget, room)
        except OSError as error:
            raise SaveFailed(f"CKPT_RAM_DIR: {root}: {error.strerror}. Point it to a tmpfs directory.") from error
        held = snapshots_that_fit(plan.file.data_bytes, budget // local_world, SNAPSHOTS_LIMIT)
        ahead = held if self._options.newest_only else min(held, 2)
        threads = max(1, min(COPY_THREADS_LIMIT, (os.cpu_count() or 1) // local_world))
        if not held:
            log.warning(
                "rank %d: %d bytes of memory are not enough for a snapshot of %d bytes on each of %d ranks: saves "
                "stream through a small ring instead, and nothing survives there. Raise ram_budget_bytes, or give "
                "CKPT_RAM_DIR a larger tmpfs.",
                self._ranks.rank, budget, plan.file.data_bytes, local_world,
            )  # fmt: skip
        self._stage.prepare(plan.file.data_bytes, held, ahead, threads)

    def _find_nodes(self) -> _Nodes:
        """Who shares this node; where there are several nodes, rank 0's keeper lets the others in."""
        if self._nodes is not None:
            return self._nodes
        names = self._ranks.gather(together(self._ranks, lambda: node_name(self.ram.root)).encode())
        local_world = names.count(names[self._ranks.rank])
        if len(set(names)) == 1:
            return _Nodes(local_world, None, b"")

        def listen() -> bytes:
            host, token = own_address(), secrets.token_bytes(32)
            port = self._courier.listen(host, token, self._options.timeout_s)
            return msgspec.msgpack.encode((host, port, token))

        answer = on_first(self._ranks, listen)
        host, port, token = msgspec.msgpack.decode(answer, type=tuple[str, int, bytes])
        return _Nodes(local_world, None if names[self._ranks.rank] == names[0] else (host, port), token)

    # What becomes of it

    def untold(self) -> CkptError | None:
        """The failure of an earlier save that nobody was told of yet. Not collective."""
        for save in self._handles:
            if save.failed and not save.pending.told:
                assert save.pending.outcome is not None
                return error_of(save.pending.outcome)
        return None

    def _raise_untold(self) -> None:
        if error := self.untold():
            raise error

    def raise_together(self) -> None:
        """On every rank: the failure of an earlier save, if any rank knows of one."""
        self._raise(self.untold())

    def _raise(self, failure: BaseException | None) -> None:
        """Raise on every rank what any of them brings; what was told once is not told again."""
        failed = [save.pending.order.job.index for save in self._handles if save.failed]
        everyone = self._ranks.gather(max(failed, default=0).to_bytes(8, "big"))
        newest = max(int.from_bytes(data, "big") for data in everyone)
        for save in self._handles:
            if save.pending.order.job.index <= newest:
                save.pending.told = True
        raise_together(self._ranks, failure, SaveFailed)

    def wait(self, timeout_s: float | None) -> None:
        """Return once every save is decided; raise if one failed and nobody was told. Not collective."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for save in list(self._handles):
            save.pending.wait(None if deadline is None else max(deadline - time.monotonic(), 0.0))
        failure = self.untold()
        for save in self._handles:
            save.pending.told = True
        if failure is not None:
            raise failure

    def _forget_old(self) -> None:
        """Let go of saves that nobody has to hear of: all but the newest, and the newest that did not fail."""
        told = [save for save in self._handles if save.pending.outcome is not None and (save.told or not save.failed)]
        kept = {*[save for save in told if not save.failed][-1:], *self._handles[-1:]}
        for save in told:
            if save not in kept and not save.left_out:
                save.following = None  # who holds a handle for long holds no chain of later ones
        self._handles = [save for save in self._handles if save in kept or save not in told]

    @property
    def saving(self) -> bool:
        """Whether a save is on its way."""
        return any(save.pending.outcome is None for save in self._handles)

    def _on_change(self, pending: Pending) -> None:
        """In the courier's thread: memory may be free again; what a save cost is known."""
        self._stage.changed()
        outcome = pending.outcome
        save = next((save for save in self._handles if save.pending is pending), None)
        if outcome is None or save is None or (outcome.left_out and self._ranks.rank):
            return
        if outcome.left_out:
            self.skipped += 1
        elif outcome.commit is None and self._ranks.rank == 0:
            self._report(SaveFailure(save.step, outcome.kind, outcome.message))
        elif self._ranks.rank == 0:
            figures = self._figures(save)
            self._finished.append((figures.blocked_s, figures.durable_s))
            self._report(figures)

    def finished(self) -> list[tuple[float, float]]:
        """Of every save that became durable since the last call: seconds blocked, and until durable. On rank 0."""
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def _figures(self, save: _Save) -> SaveFigures:
        pending, outcome = save.pending, save.pending.outcome
        assert outcome is not None
        assert outcome.commit is not None
        skipped, self._skipped_before = self.skipped - self._skipped_before, self.skipped
        return SaveFigures(
            step=save.step,
            nbytes=outcome.commit.nbytes,
            blocked_s=save.blocked_s,
            copied_s=pending.copied_at - save.called,
            durable_s=pending.resolved_at - save.called,
            written_bytes_per_s=outcome.stored_bytes / outcome.stored_s if outcome.stored_s else 0.0,
            limit_bytes_per_s=outcome.limit_bytes_per_s or None,
            skipped=skipped,
            in_flight=sum(other.pending.outcome is None for other in self._handles),
        )

    def close(self, goodbye: bool) -> None:
        """Let go of memory and keeper; with `goodbye` the keeper need not wait for this worker. Not collective."""
        self._fence.close()
        self._stage.close()
        self._courier.close(goodbye)


@dataclass(eq=False)
class _Save:
    """One save of this rank, with what it cost the caller."""

    step: int
    pending: Pending
    called: float
    blocked_s: float = 0.0
    following: _Save | None = None

    @property
    def failed(self) -> bool:
        outcome = self.pending.outcome
        return outcome is not None and outcome.commit is None and not outcome.left_out

    @property
    def left_out(self) -> bool:
        return self.pending.outcome is not None and self.pending.outcome.left_out

    @property
    def told(self) -> bool:
        return self.pending.told
