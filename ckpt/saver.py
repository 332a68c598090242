"""One save, on all ranks together: layout, plan, data files, parts, commit.

The layout and its plan are computed when the layout changes and used again until then; data never is.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from ckpt.adapt import Collected, Local, bytes_view, collect_state
from ckpt.agreement import Signal, digest8, disagreements, on_first, raise_together, together
from ckpt.errors import CkptError, DeadlineExceeded, Incompatible, SaveFailed
from ckpt.holder import Holder
from ckpt.layout import OWNERSHIP, Layout, World, cover_faults, replicas
from ckpt.manifest import (
    Chunk,
    Manifest,
    Part,
    PartRef,
    data_name,
    decode_layout,
    digest,
    encode_layout,
    encode_part,
    part_name,
)
from ckpt.plan import SavePlan, plan_save
from ckpt.ranks import Ranks
from ckpt.records import Commit
from ckpt.run import RunDirectory
from ckpt.transfer import write_data

log = logging.getLogger("ckpt")


class _Written(msgspec.Struct, array_like=True):
    """What rank 0 must know of each rank's part."""

    ref: PartRef
    content_digest: bytes


class Saver:
    """Saves states of one run. All methods are collective."""

    def __init__(self, ranks: Ranks, run: RunDirectory, holder: Holder | None) -> None:
        self._ranks, self._run, self._holder = ranks, run, holder
        self._layout_bytes = b""
        self._world: World | None = None
        self._plan: SavePlan | None = None

    def save(self, step: int, state: Any, metrics: Mapping[str, float]) -> Commit:
        """Write `state` as `step` and commit it.

        Raises on every rank if it fails on any; then nothing was committed and every older step is as it was.
        """
        began = time.monotonic()
        collected, layout, layout_bytes, failure = self._collect(state)
        changed = layout_bytes != self._layout_bytes
        said = Signal(step, failed=failure is not None, layout_changed=changed)
        heard = Signal.decode(self._ranks.maximum(said.encode()), step)
        if heard.failed:
            raise_together(self._ranks, failure)
        assert collected is not None
        assert layout is not None
        if heard.layout_changed:
            self._exchange(layout, layout_bytes, collected)
        world, plan = self._world, self._plan
        assert world is not None
        assert plan is not None
        self._check_values(world, collected)
        attempt = on_first(self._ranks, lambda: self._first().new_attempt(step).encode()).decode()
        written = self._write_together(attempt, plan, collected)
        everyone = self._ranks.gather(msgspec.msgpack.encode(written))
        record = on_first(
            self._ranks, lambda: msgspec.msgpack.encode(self._commit(step, attempt, world, everyone, metrics))
        )
        commit = msgspec.msgpack.decode(record, type=Commit)
        if self._ranks.rank == 0:
            took = time.monotonic() - began
            log.info("saved step %d: %d bytes in %.2f s, generation %d", step, commit.nbytes, took, commit.generation)
        return commit

    def _collect(self, state: Any) -> tuple[Collected | None, Layout | None, bytes, Exception | None]:
        try:
            collected = collect_state(state, self._ranks.rank, self._ranks.size)
            layout = collected.layout()
            return collected, layout, encode_layout(layout), None
        except Exception as error:
            return None, None, b"", error

    def _first(self) -> Holder:
        assert self._holder is not None
        return self._holder

    def _exchange(self, layout: Layout, layout_bytes: bytes, collected: Collected) -> None:
        """Learn every rank's layout, each distinct one once; prove that together they hold everything once."""
        self._layout_bytes = b""
        digests = self._ranks.gather(digest(layout_bytes))
        first = {found: rank for rank, found in reversed(list(enumerate(digests)))}
        order = sorted(first, key=lambda found: first[found])
        layouts = tuple(decode_layout(self._ranks.share(layout_bytes, first[found])) for found in order)
        world = World(layouts, tuple(order.index(found) for found in digests))
        if faults := cover_faults(world):
            raise Incompatible(
                "the ranks' tensors do not fit together:\n  " + "\n  ".join(faults[:20]) + "\nRanks that hold other "
                "tensors (pipeline stages) need other keys; local shards are declared with ckpt.Shard(tensor, "
                "global_shape, offset); what differs on purpose goes into ckpt.PerRank(obj)."
            )
        self._check_replicas(world, collected)
        self._plan = together(self._ranks, lambda: plan_save(world, self._ranks.rank))
        self._world, self._layout_bytes = world, layout_bytes

    def _check_replicas(self, world: World, collected: Collected) -> None:
        """Tensors that several ranks hold by the same name must be byte-equal; of buffers the lowest rank's count."""
        groups = _replica_groups(world, self._ranks.rank)
        keys = {key for keys in groups.values() for key in keys}
        digests = together(self._ranks, lambda: {key: _local_digest(collected.locals[key]) for key in sorted(keys)})
        said = [group + digest8(b"".join(digests[key] for key in keys)) for group, keys in groups.items()]
        questions = [
            (group, key)
            for group, rank in sorted(_disagreeing(self._ranks.gather(b"".join(said))).items())
            for key in _replica_groups(world, rank)[group]
        ]
        answers = [digests[key] if group in groups else None for group, key in questions]
        different = {questions[i][1] for i in disagreements(self._ranks, answers)}
        if rest := sorted(different - world.buffers):
            raise Incompatible(
                "ranks hold different values under the same key: " + ", ".join(rest[:20]) + ". If they are replicas, "
                "they have drifted apart. Pipeline stages need keys of their own, local shards ckpt.Shard(tensor, "
                "global_shape, offset), and what differs on purpose ckpt.PerRank(obj)."
            )
        if different and self._ranks.rank == 0:
            names = ", ".join(sorted(different))
            log.warning("buffers differ among ranks; the lowest rank's are stored: %s", names)

    def _check_values(self, world: World, collected: Collected) -> None:
        names = sorted(world.value_owner)
        digests = [digest8(collected.values[n]) if n in collected.values else None for n in names]
        if different := [names[i] for i in disagreements(self._ranks, digests)]:
            raise Incompatible(
                "these values differ from rank to rank: " + ", ".join(different[:20]) + ". Make them equal, or wrap "
                'them: ckpt.PerRank(value, on_resize="first").'
            )

    def _write_together(self, attempt: str, plan: SavePlan, collected: Collected) -> _Written:
        """Every rank's part, durable; where one fails, the attempt is removed and all raise."""
        result: _Written | None = None
        failure: Exception | None = None
        try:
            result = self._write(attempt, plan, collected)
        except Exception as error:
            failure = error
        try:
            self._ranks.meet()
        except DeadlineExceeded as error:
            raise SaveFailed(f"{attempt} was not committed: {error} Every older step is as it was.") from error
        try:
            raise_together(self._ranks, failure)
        except Exception:
            if self._ranks.rank == 0:
                with contextlib.suppress(CkptError):
                    self._run.store.delete(self._run.attempt_path(attempt))  # a full disk needs the room
            raise
        assert result is not None
        return result

    def _write(self, attempt: str, plan: SavePlan, collected: Collected) -> _Written:
        rank, store = self._ranks.rank, self._run.store
        directory = self._run.attempt_path(attempt)
        path = store.local_path(f"{directory}/{data_name(rank)}")
        assert path is not None
        tensors = {chunk.owned.key: collected.locals[chunk.owned.key].make() for chunk in plan.chunks}
        digests = write_data(path, plan, [tensors[chunk.owned.key] for chunk in plan.chunks])
        chunks = tuple(
            Chunk(c.owned.key, c.owned.box.offset, c.owned.box.shape, c.spec.dtype, "", c.at, c.nbytes, "raw", found)
            for c, found in zip(plan.chunks, digests, strict=True)
        )
        values = {name: collected.values[name] for name in plan.values}
        part = Part(rank, attempt, plan.data_bytes, chunks, values, dict(sorted(collected.rank_values.items())))
        data = encode_part(part)
        store.put(f"{directory}/{part_name(rank)}", data)
        store.sync_directory(directory)
        return _Written(PartRef(len(data), digest(data), plan.data_bytes), part.content_digest())

    def _commit(
        self, step: int, attempt: str, world: World, everyone: list[bytes], metrics: Mapping[str, float]
    ) -> Commit:
        holder = self._first()
        parts = [msgspec.msgpack.decode(data, type=_Written) for data in everyone]
        assert holder.start is not None
        head = holder.view.head
        content = b"".join(digest(encode_layout(layout)) for layout in world.layouts)
        content += b"".join(part.content_digest for part in parts)
        return holder.commit(
            Manifest(
                step=step,
                generation=holder.start.generation,
                attempt=attempt,
                parent=head.attempt if head else None,
                world=world,
                ownership=OWNERSHIP,
                parts=tuple(part.ref for part in parts),
                content_digest=digest(content),
                metrics={name: float(value) for name, value in metrics.items()},
            )
        )


def _replica_groups(world: World, rank: int) -> dict[bytes, list[str]]:
    """What this rank holds like others by name alone: the keys, by a name of 8 bytes for the ranks that hold them."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for ranks, key in replicas(world, rank):
        groups.setdefault(ranks, []).append(key)
    return {digest8(repr(ranks).encode()): keys for ranks, keys in groups.items()}


def _disagreeing(everyone: list[bytes]) -> dict[bytes, int]:
    """Groups whose ranks brought different digests, each with a rank of it. Records: 8 bytes group, 8 bytes digest."""
    first: dict[bytes, tuple[int, bytes]] = {}
    found: dict[bytes, int] = {}
    for rank, data in enumerate(everyone):
        for at in range(0, len(data), 16):
            group, mine = data[at : at + 8], data[at + 8 : at + 16]
            reporter, expected = first.setdefault(group, (rank, mine))
            if mine != expected:
                found[group] = reporter
    return found


def _local_digest(local: Local) -> bytes:
    tensor = local.make().cpu().contiguous()
    return digest8(bytes_view(tensor))
