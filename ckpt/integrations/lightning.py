"""`lightning.Trainer` kept alive: saved while it fits, gone on with in the middle of an epoch.

Owns when the Trainer's hooks save and restore. Where an epoch stands the Trainer's own loop says, in its state dict;
a loader that has a state dict, as torchdata's, gives its own. Fabric needs nothing: its objects stand in a state.
"""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from ckpt.adapt import PerRank
from ckpt.checkpointer import Checkpointer
from ckpt.integrations.rng import HeldRng
from ckpt.interval import Every


class HoldfastCallback(Callback):  # type: ignore[misc]
    """Saves what `Trainer.fit` trains under `url` as `every` says, and goes on from the newest step by itself.

    Saved are the module, optimizers, schedulers, the precision plugin, the datamodule, other callbacks, the loop with
    its loaders, and the random generators; what the Trainer's `callback_metrics` hold is kept as the step's metrics.
    A step is one of `trainer.global_step`. Further arguments are `Checkpointer`'s. SIGTERM on any rank: all save one
    step and `fit` returns, with `stopped` set. Leave `ckpt_path` out.
    """

    stopped = False
    """Whether training ended early because a stop was requested: exit with 143 then."""

    def __init__(
        self, url: str | os.PathLike[str] | None = None, *, every: Every | None = None, **settings: Any
    ) -> None:
        self._url, self._settings = url, {"every": every, **settings}
        self._rng = HeldRng()
        self._checkpointer: Checkpointer | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimizers are made, loaders and loop not begun. Restores all of them."""
        self._checkpointer = Checkpointer(self._url, **self._settings)
        self._state = self._members(trainer, pl_module)
        self._checkpointer.restore(self._state)
        self._saved = self._at = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes SIGTERM from the Trainer, which would end after the batch, unsaved."""
        self.stopped = self._opened.stop_requested(self._at)

    def on_train_batch_start(self, *_: Any) -> None:
        self._rng.release()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step == self._at:  # gradients are being accumulated
            return
        self._at = step
        self.stopped = self._opened.stop_requested(step)
        if self.stopped or self._opened.due(step):
            self._save(trainer)
        trainer.should_stop = trainer.should_stop or self.stopped

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._at != self._saved:
            self._save(trainer)
        self._opened.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._checkpointer is not None:
            self._checkpointer.__exit__(type(exception), exception, exception.__traceback__)

    @property
    def _opened(self) -> Checkpointer:
        assert self._checkpointer is not None  # since `on_fit_start`
        return self._checkpointer

    def _save(self, trainer: Trainer) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._opened.save(self._at, self._state, metrics=metrics)
        self._saved = self._at

    def _members(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        others = {c.state_key: c for c in trainer.callbacks if c is not self}
        return {
            "model": module,
            "optim": list(trainer.optimizers),
            "sched": [config.scheduler for config in trainer.lr_scheduler_configs],
            "precision": trainer.precision_plugin,
            "data": trainer.datamodule,
            "callbacks": {name: PerRank(callback, "first") for name, callback in others.items()},
            "loop": PerRank(trainer.fit_loop),
            "rng": self._rng,
        }
