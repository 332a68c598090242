"""Loops over epochs and a prepared loader, as Accelerate's are, that go on in the middle of an epoch.

Owns where in the data a step stands. Prepared models, optimizers and schedulers need nothing: they stand in the state.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from accelerate import skip_first_batches
from accelerate.data_loader import SeedableRandomSampler, get_sampler
from accelerate.state import GradientState
from torch.utils.data import RandomSampler

from ckpt.adapt import Rng
from ckpt.checkpointer import Checkpointer
from ckpt.errors import Incompatible


def epochs(
    checkpointer: Checkpointer, loader: Any, total: int, state: dict[str, Any]
) -> Iterator[tuple[int, Iterator[tuple[int, Any]]]]:
    """Yield (epoch, batches) for each of `total` epochs that is still to run; batches are (index in the epoch, batch).

    For `for epoch in range(total)` around `for index, batch in enumerate(loader)`. Restores first, saves as
    `Checkpointer.steps` does, on SIGTERM and at the end too. A step is one update of the parameters: with
    `accumulate`, `gradient_accumulation_steps` batches, so no save falls between them. The order of the data goes on
    exactly; what a dataset in this process draws at random for the batch that the loader holds ready does not.

    `Incompatible` for a loader whose order cannot be found again, for a run whose epochs had another number of steps
    (of which `state` gets a member), and if a loop over batches is left early.
    """
    updates, each = _updates(loader)
    state["steps_in_epoch"] = _StepsInEpoch(updates)
    steps = checkpointer.steps(total * updates, state)
    step = next(steps, None)

    def batches(epoch: int, index: int) -> Iterator[tuple[int, Any]]:
        nonlocal step
        for batch in _from(loader, index):
            yield index, batch
            index += 1
            if GradientState().sync_gradients:
                step = next(steps, None)
                if step is None:
                    return

    while step is not None:
        epoch, done = divmod(step, updates)
        loader.set_epoch(epoch)
        yield epoch, batches(epoch, done * each)
        if step is not None and step // updates == epoch:
            raise Incompatible(
                f"epoch {epoch} was left after {step % updates} of {updates} steps, so the next one cannot be counted. "
                "Leave both loops, or save by hand: checkpointer.save(step, state)."
            )


class _StepsInEpoch:
    """As it was when the run was saved, or a step would stand for another place in the data."""

    def __init__(self, count: int) -> None:
        self._count = count

    def state_dict(self) -> int:
        return self._count

    def load_state_dict(self, saved: int) -> None:
        if saved != self._count:
            raise Incompatible(
                f"an epoch had {saved} steps when this run was saved, and has {self._count} now: the number of ranks, "
                "the batch size, accumulation or the data changed. Start it as before, or go on by hand from "
                "checkpointer.restore(state) and an epoch of your choice. Nothing was saved."
            )


def _updates(loader: Any) -> tuple[int, int]:
    """(updates of the parameters in an epoch, batches for each), of a loader whose epochs are in a known order."""
    sampler = get_sampler(loader)
    if isinstance(sampler, RandomSampler) and not isinstance(sampler, SeedableRandomSampler):
        raise Incompatible(
            "the order of this loader follows from all that was drawn before, so no epoch can be begun in its middle. "
            "Use Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)). Nothing was read."
        )
    accumulation = GradientState()
    each = accumulation.num_steps
    if not accumulation.sync_with_dataloader and len(loader) % each:
        raise Incompatible(
            f"{len(loader)} batches of an epoch do not divide into updates of {each}, and sync_with_dataloader is off: "
            "an update spans two epochs. Turn it on, or let them divide. Nothing was read."
        )
    return -(-len(loader) // each), each


def _from(loader: Any, index: int) -> Iterator[Any]:
    """The batches of the loader's epoch from `index` on.

    To begin an epoch draws from the random generators. Begun in its middle it must not: it was begun before.
    """
    if index == 0:
        return iter(loader)
    rng = Rng()
    drawn = rng.state_dict()
    found = iter(skip_first_batches(loader, index))
    first = next(found)
    rng.load_state_dict(drawn)
    return chain([first], found)
