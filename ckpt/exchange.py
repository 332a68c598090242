"""What the ranks must know of each other for a save: their layouts, and that what they share is equal.

The collective part runs when a layout is new. Later saves compare replicas by samples, which travel to the
coordinator beside the parts, and only values still by a word among the ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from ckpt.adapt import Collected, Local, bytes_view
from ckpt.agreement import digest8, disagreements, together
from ckpt.errors import Incompatible
from ckpt.keeper.orders import Replicas
from ckpt.layout import World, cover_faults, replicas
from ckpt.manifest import digest
from ckpt.ranks import Ranks
from ckpt.symbolic import decode_layout

log = logging.getLogger("ckpt")

_SAMPLED_ABOVE_BYTES = 256 * 1024
_SAMPLE_ELEMENTS = 1024


def agree_on_world(ranks: Ranks, layout_bytes: bytes) -> World:
    """Learn every rank's layout, each distinct one once; prove that together they hold everything once."""
    digests = ranks.gather(digest(layout_bytes))
    first = {found: rank for rank, found in reversed(list(enumerate(digests)))}
    order = sorted(first, key=lambda found: first[found])
    layouts = tuple(decode_layout(ranks.share(layout_bytes, first[found])) for found in order)
    world = World(layouts, tuple(order.index(found) for found in digests))
    if faults := cover_faults(world):
        raise Incompatible(
            "the ranks' tensors do not fit together:\n  " + "\n  ".join(faults[:20]) + "\nRanks that hold other "
            "tensors (pipeline stages) need other keys; local shards are declared with ckpt.Shard(tensor, "
            "global_shape, offset); what differs on purpose goes into ckpt.PerRank(obj)."
        )
    return world


def check_replicas(ranks: Ranks, world: World, collected: Collected) -> dict[bytes, list[str]]:
    """Tensors that several ranks hold by the same name must be byte-equal; of buffers the lowest rank's count.

    Returns what this rank shares that must stay equal: keys by a name of the group of ranks that hold them.
    """
    groups = _replica_groups(world, ranks.rank)
    keys = sorted({key for keys in groups.values() for key in keys})
    digests = together(ranks, lambda: {key: _local_digest(collected.locals[key], None) for key in keys})
    said = [group + digest8(b"".join(digests[key] for key in keys)) for group, keys in groups.items()]
    questions = [
        (group, key)
        for group, rank in sorted(_disagreeing(ranks.gather(b"".join(said))).items())
        for key in _replica_groups(world, rank)[group]
    ]
    answers = [digests[key] if group in groups else None for group, key in questions]
    different = {questions[i][1] for i in disagreements(ranks, answers)}
    if rest := sorted(different - world.buffers):
        raise Incompatible(
            "ranks hold different values under the same key: " + ", ".join(rest[:20]) + ". If they are replicas, "
            "they have drifted apart. Pipeline stages need keys of their own, local shards ckpt.Shard(tensor, "
            "global_shape, offset), and what differs on purpose ckpt.PerRank(obj)."
        )
    if different and ranks.rank == 0:
        names = ", ".join(sorted(different))
        log.warning("buffers differ among ranks; the lowest rank's are stored: %s", names)
    return {group: [key for key in keys if key not in world.buffers] for group, keys in groups.items()}


def replica_digests(
    shared: dict[bytes, list[str]], collected: Collected, sample: int, chosen: Callable[[str], bool]
) -> dict[str, bytes]:
    """8 bytes for each chosen key that others hold too; of a large parameter, samples that move with `sample`."""
    keys = {key for keys in shared.values() for key in keys}
    return {key: _local_digest(collected.locals[key], sample) for key in keys if chosen(key)}


def as_message(shared: dict[bytes, list[str]], digests: dict[str, bytes]) -> Replicas:
    """What the coordinator compares before it commits."""
    return tuple(
        (group, tuple(keys), b"".join(digests[key] for key in keys)) for group, keys in sorted(shared.items()) if keys
    )


def digest_of_values(collected: Collected) -> bytes:
    """8 bytes that are equal on all ranks where all values that are one for all ranks are."""
    return digest8(b"".join(digest8(name.encode()) + digest8(data) for name, data in sorted(collected.values.items())))


def check_values(ranks: Ranks, world: World, collected: Collected) -> None:
    """Values that are one for all ranks must be equal on all; those that one stage alone has are not compared."""
    names = sorted(world.value_owner)
    digests = [digest8(collected.values[n]) if n in collected.values else None for n in names]
    if different := [names[i] for i in disagreements(ranks, digests)]:
        raise Incompatible(
            "these values differ from rank to rank: " + ", ".join(different[:20]) + ". Make them equal, or wrap "
            'them: ckpt.PerRank(value, on_resize="first").'
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
