"""A step written by one process alone, without a keeper or a copy in RAM: for tools, imports and foreign savers.

Bytes come from whoever has them, run by run, are digested and go straight into the store; the commit then makes the
step exist. Nothing is staged: a writer holds one buffer of RUN_BYTES for each thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from ckpt.adapt.tensors import bytes_view
from ckpt.buffers import each
from ckpt.errors import Incompatible
from ckpt.holder import commit_parts
from ckpt.layout import World
from ckpt.manifest import (
    BLOCK_BYTES,
    RAW,
    Chunk,
    Manifest,
    Part,
    PartRef,
    content_digest_of,
    data_name,
    encode_part,
    part_name,
)
from ckpt.plan import PlannedChunk, Run, SavePlan
from ckpt.records import Commit, Start
from ckpt.run import RunDirectory

Fill = Callable[[PlannedChunk, int, int, torch.Tensor], None]
"""fill(chunk, start, stop, memory): put raw bytes [start, stop) of the chunk into `memory`; from any thread."""

WRITE_THREADS: Final = 3


def check_follows(run: RunDirectory, step: int) -> None:
    """Raises Incompatible where the run has passed `step`."""
    head = run.log.view.head
    if head is not None and step <= head.step:
        raise Incompatible(
            f"step {step} cannot be added to {run.url}, whose newest step is {head.step}: steps only grow. "
            "Nothing was written; choose a larger step, or another place"
        )


def write_part(
    run: RunDirectory, attempt: str, rank: int, plan: SavePlan, fill: Fill, values: Mapping[str, bytes]
) -> PartRef:
    """Write the data file of `plan` and its part, both durable when this returns; no commit names them yet."""
    digests: list[dict[int, bytes]] = [{} for _ in plan.chunks]
    file = plan.file
    writer = run.store.write_data(run.attempt_path(attempt, data_name(rank)), file.data_bytes)

    def act(item: Run, buffer: torch.Tensor) -> None:
        memory = buffer[: item.nbytes].zero_()
        if not item.pieces:
            bytes_view(memory)[:] = file.header[item.at : item.at + item.nbytes]
        for index, start, stop, at in item.pieces:
            fill(plan.chunks[index], start, stop, memory[at : at + stop - start])
            view = bytes_view(memory)[at : at + stop - start]
            for block in range(0, stop - start, BLOCK_BYTES):
                digests[index][start + block] = run.digest(view[block : block + BLOCK_BYTES])
        writer.write(item.at, bytes_view(memory))

    try:
        each([*file.header_runs, *file.runs], act, WRITE_THREADS)
    except BaseException:
        writer.abandon()
        raise
    writer.finish()
    chunks = [
        Chunk(
            c.owned.key, c.owned.box.offset, c.owned.box.shape, c.spec.dtype, "", c.at, c.nbytes, RAW,
            b"".join(found[start] for start in sorted(found)),
        )
        for c, found in zip(plan.chunks, digests, strict=True)
    ]  # fmt: skip
    part = Part(rank, attempt, file.data_bytes, tuple(chunks), dict(values), {})
    data = encode_part(part)
    run.store.put(run.attempt_path(attempt, part_name(rank)), data)
    return PartRef(len(data), run.digest(data), part.data_bytes, part.content_digest())


def commit_step(
    run: RunDirectory,
    start: Start,
    step: int,
    attempt: str,
    world: World,
    ownership: str,
    parts: Sequence[PartRef],
) -> Commit:
    """Write the MANIFEST over parts that are durable, and append the commit."""
    check_follows(run, step)
    manifest = Manifest(
        step=step,
        generation=start.generation,
        attempt=attempt,
        parent=None,
        world=world,
        ownership=ownership,
        parts=tuple(parts),
        content_digest=content_digest_of(world, [ref.content_digest for ref in parts]),
        metrics={},
    )
    return commit_parts(run, manifest, start.nonce)
