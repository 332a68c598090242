"""A run that is resized by kills and newcomers has the losses of one that was left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import resize_losses


@pytest.mark.prove
@pytest.mark.parametrize(("worlds", "steps"), [((3, 2, 3), 36), (resize_losses.WORLDS, 240)])
def test_a_resized_run_has_the_losses_of_an_undisturbed_one(
    tmp_path: Path, worlds: tuple[int, ...], steps: int
) -> None:
    (undisturbed,) = resize_losses.train(tmp_path / "undisturbed", (1,), steps)
    resized = resize_losses.train(tmp_path / "resized", worlds, steps)
    resize_losses.check(resized, undisturbed.losses, worlds, steps)
