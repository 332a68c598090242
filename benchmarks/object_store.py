"""Object stores against the client library itself: the same bytes, the same parts, the same requests at a time.

    python benchmarks/object_store.py [--server ceph|rclone] [--mb 128] [--rounds 5] [--write]

s3fs by itself: `pipe_file` in parts of 16 MiB, 16 at a time; ranges of 4 MiB, 16 at a time. Ours: a data file written
as the keeper does, from runs of 4 MiB with a digest of every block; read as a restore does, every block verified.
Server and client share the machine, so the server takes most of it: only the ratio counts.
"""

import argparse
import os
import random
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import fsspec
import servers
import torch
from machine import busy, describe
from results import write_section

from ckpt.adapt.tensors import bytes_view
from ckpt.buffers import aligned, each
from ckpt.datafile import open_data
from ckpt.manifest import BLOCK_BYTES, Chunk, digest
from ckpt.plan import RUN_BYTES, Target, plan_load
from ckpt.reading import read_data
from ckpt.sharding import Whole, pieces_of
from ckpt.store import REQUESTS, Store
from ckpt.stores import open_store
from ckpt.stores.s3 import PART_BYTES, S3Bucket

TENSOR_BYTES = 64 << 20
PATH = "steps/000000001.a/r00000.safetensors"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--server", choices=("ceph", "rclone"), default="ceph")
    options.add_argument("--mb", type=int, default=128)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--write", action="store_true", help="put the result into RESULTS.md")
    given = options.parse_args()
    notes = [describe(Path("/tmp")), busy()]
    with ExitStack() as stack:
        endpoint = stack.enter_context(getattr(servers, given.server)())
        os.environ.update(servers.s3_environment(endpoint))
        bucket = S3Bucket("bucket")
        if given.server != "rclone":
            bucket._call("make", "", "create_bucket")
        found = measure(f"bucket/{uuid.uuid4()}", given.mb << 20, given.rounds)
    text = report(found, given, [note for note in notes if note])
    print(text)
    if given.write:
        write_section("object_store", text)


def measure(place: str, nbytes: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and client CPU seconds of each round, after one that does not count."""
    store, content = open_store(f"s3://{place}"), aligned(nbytes)
    content.copy_(torch.randint(0, 256, (nbytes,), dtype=torch.uint8))
    fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, config_kwargs={
        "max_pool_connections": 64, "response_checksum_validation": "when_required"})  # fmt: skip
    data, chunks = bytes(bytes_view(content)), chunks_of(content)
    tensors = [torch.ones((TENSOR_BYTES,), dtype=torch.uint8) for _ in chunks]
    plan = plan_load([Target(c.key, pieces_of(Whole(), c.shape, 0), c.shape, direct=True) for c in chunks], {0: chunks})
    starts = list(range(0, nbytes, RUN_BYTES))
    key = f"{place}/by-itself"
    acts: dict[str, Callable[[], object]] = {
        "write, s3fs": lambda: fs.pipe_file(key, data, chunksize=PART_BYTES, max_concurrency=REQUESTS),
        "write, holdfast": lambda: write(store, content),
        "read, s3fs": lambda: fs.cat_ranges(
            [key] * len(starts), starts, [s + RUN_BYTES for s in starts], batch_size=REQUESTS, max_gap=None
        ),
        "read, holdfast": lambda: read_data(lambda *_: open_data(store, PATH), plan, tensors, threads=REQUESTS),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in acts}
    for number in range(rounds + 1):
        for kind in ("write", "read"):
            names = [name for name in acts if name.startswith(kind)]
            random.Random(number).shuffle(names)
            for name in names:
                wall, cpu = time.monotonic(), time.process_time()
                acts[name]()
                if number:
                    found[name].append((time.monotonic() - wall, time.process_time() - cpu))
    assert torch.equal(torch.cat(tensors), content)
    return found


def chunks_of(content: torch.Tensor) -> list[Chunk]:
    memory = bytes_view(content)
    return [
        Chunk(str(at), (0,), (TENSOR_BYTES,), "uint8", "", at, TENSOR_BYTES, "raw",
              b"".join(digest(memory[b : b + BLOCK_BYTES]) for b in range(at, at + TENSOR_BYTES, BLOCK_BYTES)))
        for at in range(0, len(memory), TENSOR_BYTES)
    ]  # fmt: skip


def write(store: Store, content: torch.Tensor) -> None:
    memory = bytes_view(content)
    writer = store.write_data(PATH, len(memory))

    def act(at: int, buffer: torch.Tensor) -> None:
        run = memory[at : at + RUN_BYTES]
        for block in range(0, len(run), BLOCK_BYTES):
            digest(run[block : block + BLOCK_BYTES])
        writer.write(at, run)

    each(range(0, len(memory), RUN_BYTES), act, REQUESTS, 0)
    writer.finish()


def report(found: dict[str, list[tuple[float, float]]], given: argparse.Namespace, notes: list[str]) -> str:
    lines = [
        "## Object stores",
        "",
        f"`python benchmarks/object_store.py --server {given.server} --mb {given.mb} --write`; {notes[0]}",
        "",
        f"{given.mb} MiB to and from {given.server} on the same machine, {given.rounds} rounds. To reach: throughput "
        ">= 0.8 of the client library by itself. Ratios are formed within a round: median (lowest - highest).",
        *[f"\n{note}" for note in notes[1:]],
        "",
        "| | MB/s | client CPU s | throughput against s3fs |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, rounds in found.items():
        peer = found[f"{name.partition(',')[0]}, s3fs"]
        ratios = sorted(theirs[0] / ours[0] for ours, theirs in zip(rounds, peer, strict=True))
        rate = (given.mb << 20) / 1e6 / statistics.median(wall for wall, _ in rounds)
        cpu = statistics.median(cpu for _, cpu in rounds)
        against = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"
        lines.append(f"| {name} | {rate:.0f} | {cpu:.2f} | {'' if name.endswith('s3fs') else against} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
