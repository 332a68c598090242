"""Random generators for frameworks that restore before they begin an epoch, which draws from them."""

from __future__ import annotations

from typing import Any

from ckpt.adapt import Rng


class HeldRng(Rng):
    """Holds back what is restored until `release`, to be called when the first batch is there."""

    _held: dict[str, Any] | None = None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._held = state

    def release(self) -> None:
        if self._held is not None:
            super().load_state_dict(self._held)
        self._held = None
