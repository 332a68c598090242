"""One save, on all ranks together: layout, plan, data files, parts, commit.

The layout and its plan are computed when the layout changes and used again until then; data never is.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from ckpt.adapt import Collected, Local, bytes_view, collect_state
from ckpt.agreement import Signal, digest8, disagreements, on_first, raise_together, together
from ckpt.errors import DeadlineExceeded, Incompatible, SaveFailed
from ckpt.holder import Holder
from ckpt.layout import OWNERSHIP, World, cover_faults, replicas
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

METRICS_LIMIT_BYTES = 32 * 1024
_SAMPLED_ABOVE_BYTES = 256 * 1024
_SAMPLE_ELEMENTS = 1024


class _Written(msgspec.Struct, array_like=True):
    """What rank 0 must know of each rank's part."""

    ref: PartRef
    content_digest: bytes


@dataclass(frozen=True)
class _Request:
    """What this rank wants saved, checked and described."""

    step: int
    metrics: dict[str, float]
    collected: Collected
    layout_bytes: bytes


class Saver:
    """Saves states of one run. All methods are collective."""

    def __init__(self, ranks: Ranks, run: RunDirectory, holder: Holder | None) -> None:
        self._ranks, self._run, self._holder = ranks, run, holder
        self._layout_bytes = b""
        self._world: World | None = None
        self._plan: SavePlan | None = None
        self._shared: dict[bytes, list[str]] = {}

    def save(self, step: int, state: Any, metrics: Mapping[str, float]) -> Commit:
        """Write `state` as `step` and commit it.

        Raises on every rank if it fails on any; then nothing was committed and every older step is as it was.
        """
        began = time.monotonic()
        request: _Request | None = None
        failure: BaseException | None = None
        try:
            request = self._request(step, state, metrics)
        except BaseException as error:
            failure = error
        at = request.step if request else 0
        changed = request is not None and request.layout_bytes != self._layout_bytes
        said = Signal(at, failed=failure is not None, layout_changed=changed).encode()
        heard = self._ranks.maximum(said)
        if Signal.any_failed(heard):
            raise_together(self._ranks, failure, SaveFailed)
        assert request is not None
        step, collected, metrics = request.step, request.collected, request.metrics
        if Signal.decode(heard, step).layout_changed:
            self._exchange(request)
        else:
            self._check_drift(collected, step)
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

    def _request(self, step: int, state: Any, metrics: Mapping[str, float]) -> _Request:
        number, values = step_number(step), checked_metrics(metrics)
        collected = collect_state(state, self._ranks.rank, self._ranks.size)
        layout = collected.layout()
        return _Request(number, values, collected, encode_layout(layout))

    def _first(self) -> Holder:
        assert self._holder is not None
        return self._holder

    def _exchange(self, request: _Request) -> None:
        """Learn every rank's layout, each distinct one once; prove that together they hold everything once."""
        self._layout_bytes, layout_bytes = b"", request.layout_bytes
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
        groups = _replica_groups(world, self._ranks.rank)
        self._check_replicas(world, groups, request.collected, None)
        # Later saves look at parameters by samples, and at what is small or no parameter as a whole.
        self._shared = {group: [k for k in keys if k not in world.buffers] for group, keys in groups.items()}
        self._plan = together(self._ranks, lambda: plan_save(world, self._ranks.rank))
        self._world, self._layout_bytes = world, layout_bytes

    def _check_drift(self, collected: Collected, step: int) -> None:
        """Replicas that were equal when the layout was first saved may have drifted apart since."""
        assert self._world is not None
        self._check_replicas(self._world, self._shared, collected, step)

    def _check_replicas(
        self, world: World, groups: dict[bytes, list[str]], collected: Collected, sample: int | None
    ) -> None:
        """Tensors that several ranks hold by the same name must be byte-equal; of buffers the lowest rank's count."""
        keys = sorted({key for keys in groups.values() for key in keys})
        digests = together(self._ranks, lambda: {key: _local_digest(collected.locals[key], sample) for key in keys})
        said = [group + digest8(b"".join(digests[key] for key in keys)) for group, keys in groups.items()]
        questions = [
            (group, key)
            for group, rank in sorted(_disagreeing(self._ranks.gather(b"".join(said))).items())
            for key in _replica_groups(world, rank)[group]
            if sample is None or key not in world.buffers
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
        failure: BaseException | None = None
        try:
            result = self._write(attempt, plan, collected)
        except BaseException as error:
            failure = error
        try:
            self._ranks.meet()
        except DeadlineExceeded as error:
            raise SaveFailed(f"{attempt} was not committed: {error} Every older step is as it was.") from error
        try:
            raise_together(self._ranks, failure, SaveFailed)
        except BaseException:
            if self._holder is not None:
                self._holder.discard(attempt)  # a full disk needs the room
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


def _local_digest(local: Local, sample: int | None) -> bytes:
    """Digest of a local tensor; with `sample`, of three places in a large parameter, one of which `sample` moves."""
    tensor = local.make()
    if sample is not None and local.role == "parameter" and tensor.nbytes > _SAMPLED_ABOVE_BYTES:
        flat, n = tensor.reshape(-1), _SAMPLE_ELEMENTS
        moving = sample * 1_000_003 * n % (flat.numel() - n)
        tensor = torch.cat([flat[:n], flat[moving : moving + n], flat[-n:]])
    tensor = tensor.cpu().contiguous()
    return digest8(bytes_view(tensor))


def step_number(step: object) -> int:
    """`step` as a plain int in [0, 2**63); `Incompatible` for anything else."""
    if not isinstance(step, bool) and hasattr(step, "__index__") and 0 <= (number := operator.index(step)) < 1 << 63:
        return int(number)
    raise Incompatible(f"a step is the number of completed steps, an int of 0 or more, not {step!r:.100}")


def checked_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """`metrics` as floats; `Incompatible` for other types, or for more than a log record may hold."""
    try:
        found = {name: float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise Incompatible(f"metrics are numbers by name: {error}") from error
    if any(not isinstance(name, str) or not name.isprintable() for name in found):
        raise Incompatible(f"names of metrics are printable strings, got {list(found)[:4]!r:.200}")
    if (nbytes := sum(len(name.encode()) + 32 for name in found)) > METRICS_LIMIT_BYTES:
        raise Incompatible(f"{len(found)} metrics take about {nbytes} bytes, the limit is {METRICS_LIMIT_BYTES}")
    return found
