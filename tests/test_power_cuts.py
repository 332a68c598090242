"""The disk of a mounted file system is copied at random instants of a job that saves: the copy is a power cut.

Each time it is mounted, and read: what `wait()` had acknowledged is there, whatever stands is whole, a new job goes on.
"""

from __future__ import annotations

import random

import pytest
from power_cuts import KINDS, cut_power


@pytest.mark.parametrize("cuts", [2, pytest.param(100, marks=[pytest.mark.prove, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("kind", KINDS)
def test_power_cuts(kind: str, cuts: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"{kind}: seed {seed}")
    seen = cut_power(kind, cuts, seed, timeout_s=200 if cuts < 100 else 3500)["newest"]
    print(f"the newest step found: {seen}")
    assert len(seen) == cuts
    assert cuts < 100 or len(set(seen)) > 10, "the cuts were not at many instants"
