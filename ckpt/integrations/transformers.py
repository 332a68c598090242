"""`transformers.Trainer` kept alive: saved while it trains, gone on with in the middle of an epoch.

Owns when the Trainer's hooks save and restore. The Trainer itself finds its place in the data, as for a checkpoint
directory of its own: it is given one that holds its `trainer_state.json` and nothing else.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ckpt.adapt import PerRank
from ckpt.checkpointer import Checkpointer
from ckpt.errors import Incompatible
from ckpt.integrations.rng import HeldRng
from ckpt.interval import Every


class HoldfastCallback(TrainerCallback):  # type: ignore[misc]
    """Saves a Trainer's run under `url` as `every` says; `train(trainer)` goes on from the newest step.

    `HoldfastCallback(url, every=ckpt.Every(steps=200)).train(trainer)` stands for `trainer.train()`. Saved are model,
    optimizer, scheduler, scaler, random generators and the TrainerState. Further arguments are `Checkpointer`'s.
    SIGTERM on any rank: all save one agreed step and the Trainer returns, with `stopped` set. What the Trainer logs
    and evaluates is kept with the step as its metrics.
    """

    def __init__(
        self, url: str | os.PathLike[str] | None = None, *, every: Every | None = None, **settings: Any
    ) -> None:
        self._url, self._settings = url, {"every": every, **settings}
        self._checkpointer: Checkpointer | None = None
        self._steps: Iterator[int] = iter(())
        self._begun = False
        self._rng = HeldRng()

    @property
    def stopped(self) -> bool:
        """Whether training ended early because a stop was requested: exit with 143 then."""
        return self._checkpointer is not None and self._checkpointer.stopped

    def train(self, trainer: Trainer, **arguments: Any) -> Any:
        """`trainer.train(**arguments)`, from the newest step on where there is one."""
        if trainer.is_deepspeed_enabled:
            raise Incompatible("DeepSpeed keeps model and optimizer to itself; save with DeepSpeed's own checkpoints")
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        progress = _Progress(trainer)
        with Checkpointer(self._url, **self._settings) as self._checkpointer:
            found = self._checkpointer.restore({"trainer": PerRank(progress, "first")}, only=["trainer"])
            if found is None:
                return trainer.train(**arguments)
            with tempfile.TemporaryDirectory(prefix="holdfast-") as folder, _nothing_to_load(trainer):
                progress.write(Path(folder))
                return trainer.train(resume_from_checkpoint=folder, **arguments)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Everything stands: model, optimizer and scheduler are made and wrapped. Restores them."""
        if self._checkpointer is None:
            raise Incompatible("call HoldfastCallback(...).train(trainer) instead of trainer.train(): it also restores")
        parts = {
            "model": objects["model"],
            "optim": objects["optimizer"],
            "sched": objects["lr_scheduler"],
            "scaler": self._trainer.accelerator.scaler,
            "trainer": PerRank(_Progress(self._trainer), "first"),
            "rng": self._rng,
        }
        members = {name: part for name, part in parts.items() if part is not None}
        self._steps = self._checkpointer.steps(state.max_steps, members)
        self._begun = False
        first = next(self._steps, state.max_steps)
        if first != state.global_step:
            raise Incompatible(
                f"step {first} was restored where the Trainer stands at {state.global_step}; start again"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """The step before is over, also its log and evaluation, and the batch of this one is fetched. Saves if due."""
        if self._begun:
            self._end_step(control)
        self._begun = True
        self._rng.release()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """The last step has none after it. Before the Trainer loads the best model back, if it is asked to."""
        if state.global_step >= state.max_steps:
            self._end_step(control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **objects: Any,
    ) -> None:
        if self._checkpointer is not None:
            self._checkpointer.report(**{k: v for k, v in (logs or {}).items() if isinstance(v, int | float)})

    def _end_step(self, control: TrainerControl) -> None:
        if next(self._steps, None) is None:
            control.should_training_stop = True


class _Progress:
    """The TrainerState as it is saved; what is restored is for `write`, as the Trainer makes its own from that."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._restored: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        callbacks = [*self._trainer.callback_handler.callbacks, self._trainer.control]
        now = replace(self._trainer.state, stateful_callbacks=[c for c in callbacks if isinstance(c, ExportableState)])
        return asdict(now)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = state

    def write(self, folder: Path) -> None:
        TrainerState(**self._restored).save_to_json(str(folder / TRAINER_STATE_NAME))


@contextmanager
def _nothing_to_load(trainer: Trainer) -> Iterator[None]:
    """Within, the Trainer reads no weights from the directory it goes on from: there are none, we restore them."""
    name = "_load_from_checkpoint"  # not public: without it a Trainer could not be given a directory without weights
    if not hasattr(trainer, name):
        raise Incompatible(
            f"this version of transformers has no Trainer.{name}; install one that holdfast was tried with"
        )
    setattr(trainer, name, lambda *_, **__: None)
    try:
        yield
    finally:
        delattr(trainer, name)
