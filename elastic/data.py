"""The samples of each step, loaded: `batches`. Owns the cursor, which is what training has consumed, and the loader.

Who computes what is decided in `order`; this module loads it through torch's DataLoader, ahead of need, and hands it
out. What was loaded ahead counts for nothing: it is loaded again after a restart.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, count
from typing import Any

import torch.distributed as dist
import xxhash
from torch import Generator
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ckpt.errors import Incompatible
from ckpt.events import point
from elastic.order import ALGORITHM, MicroBatch, Order, plan_step

_OURS = frozenset({"batch_size", "shuffle", "sampler", "batch_sampler", "generator", "in_order"})


def batches(
    dataset: Dataset[Any],
    *,
    global_batch: int,
    micro_batch: int | None = None,
    seed: int = 0,
    drop_last: bool = False,
    rank: int | None = None,
    world: int | None = None,
    **loader: Any,
) -> Batches:
    """The batches of a run over `dataset`, `global_batch` samples in each step, whatever the number of ranks.

    The samples of a pass come in an order that follows from `seed` and the number of the pass alone, each exactly
    once; the last batch of a pass is shorter where they do not come out even, or left out with `drop_last`. Each rank
    loads its share, in micro-batches of at most `micro_batch` samples (default: the whole share).

    `dataset` is any with `len` and an index. `rank` and `world` are those of torch.distributed, or of the
    data-parallel dimension where the ranks of one model replica must see the same samples. `loader` goes to torch's
    DataLoader: num_workers, collate_fn, pin_memory, prefetch_factor, and so on.

    Not collective. ValueError for arguments that cannot be; `Incompatible` for a dataset without a length, and before
    torch.distributed is initialised in a job of several ranks.
    """
    if refused := sorted(_OURS & loader.keys()):
        raise ValueError(f"elastic.batches sets {', '.join(refused)} itself: leave them out, and pass global_batch")
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise Incompatible(
            f"a {type(dataset).__name__} cannot be read in any order: elastic.batches needs a dataset with __len__ and "
            "__getitem__. Index it first, or read it with a loader that has a state of its own."
        )
    if micro_batch is not None and (type(micro_batch) is not int or micro_batch < 1):
        raise ValueError(f"micro_batch is a positive int, not {micro_batch!r:.100}")
    order = Order(len(dataset), global_batch, seed, drop_last)
    at, ranks = _place(rank, world)

    def load(first: int) -> Iterator[Batch]:
        plans = (plan_step(order.batch(number), at, ranks, micro_batch) for number in count(first))
        return _load(dataset, chain.from_iterable(plans), f"{seed}/{first}/{at}", loader)

    return Batches(order, load)


def _place(rank: int | None, world: int | None) -> tuple[int, int]:
    if (rank is None) != (world is None):
        raise ValueError("rank and world are passed together or not at all")
    if rank is None or world is None:
        return _place_of_this_process()
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}: ranks are 0 to world - 1")
    return rank, world


def _place_of_this_process() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if (told := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise Incompatible(
            f"WORLD_SIZE is {told}, but torch.distributed has no process group yet, so every rank would compute every "
            "sample. Call torch.distributed.init_process_group(...) first, or pass rank= and world=."
        )
    return 0, 1


@dataclass(frozen=True)
class Batch:
    """A micro-batch. `data` is what the dataset and `collate_fn` made of the samples `indices`.

    Multiply the mean loss over `data` by `weight` before `backward()`. A rank that has no sample in this step gets
    one that another rank computes, with weight 0 and no `indices`. `last` of the step's micro-batches.
    """

    data: Any
    indices: tuple[int, ...]
    weight: float
    last: bool


class Batches:
    """What `batches` returns. Hold it in the state of the checkpoint: its cursor is one number, equal on all ranks."""

    def __init__(self, order: Order, load: Callable[[int], Iterator[Batch]]) -> None:
        self._order, self._load = order, load
        self._done = 0
        self._stream: Iterator[Batch] | None = None  # stands at the first micro-batch of batch `done`, or is torn
        self._torn = False  # begun, and not handed out to the last

    @property
    def batches_per_pass(self) -> int:
        """How many steps make one pass over the data."""
        return self._order.batches_per_pass

    @property
    def done(self) -> int:
        """How many global batches were handed out; `divmod(done, batches_per_pass)` is where in which pass."""
        return self._done

    def step(self) -> Iterator[Batch]:
        """This rank's micro-batches of the next global batch, as many on every rank.

        The batch counts as done when the last of them is handed out. Left earlier, it is what the next call begins
        again with. RuntimeError if that next call, or `load_state_dict`, came while this one was not at its end.
        """
        if self._stream is None or self._torn:
            self._stream = self._load(self._done)
        stream, self._torn = self._stream, True
        for batch in stream:
            if self._stream is not stream:
                raise RuntimeError("this step() was overtaken by another one, or by a restore: leave its loop first")
            if batch.last:
                self._done, self._torn = self._done + 1, False
            point("batch", number=self._done - batch.last, samples=self._order.samples, indices=list(batch.indices))
            yield batch
            if batch.last:
                return

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and the order in which it counts."""
        return {"done": self._done, "order": ALGORITHM, **asdict(self._order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after batch `done` of `state`. `Incompatible` if that counts in another order than this one."""
        mine, done = self.state_dict(), state.get("done")
        if state.keys() != mine.keys() or type(done) is not int or done < 0:
            raise Incompatible(f"this is not a state of elastic.batches: {dict(state)!r:.200}")
        differ = [name for name in mine if name != "done" and state[name] != mine[name]]
        if differ:
            told = "; ".join(f"{name} {state[name]!r} (here {mine[name]!r})" for name in differ)
            raise Incompatible(
                f"the data of the checkpoint comes in another order: it has {told}. Set that as it was, and the run "
                "goes on where it stood. To begin with other data at its first sample, hold it under another name in "
                "the state and restore once with strict=False."
            )
        self._done, self._stream = done, None


def _load(dataset: Dataset[Any], plan: Iterator[MicroBatch], seed: str, loader: dict[str, Any]) -> Iterator[Batch]:
    """Each micro-batch of `plan`, which has no end, loaded.

    Nothing here may refer to who iterates: processes of a loader that ends in a garbage cycle take 5 s to end.
    """
    asked: deque[MicroBatch] = deque()  # and not given yet; bounded by how far the loader looks ahead

    def ask() -> Iterator[list[int]]:
        for micro in plan:
            asked.append(micro)
            yield list(micro.load)

    # of its own, else a restart would draw from training's generator what an undisturbed run does not
    generator = Generator().manual_seed(xxhash.xxh3_64_intdigest(seed.encode()) >> 1)
    for data in DataLoader(dataset, batch_sampler=ask(), generator=generator, **loader):
        micro = asked.popleft()
        yield Batch(data, micro.indices, micro.weight, micro.last)
