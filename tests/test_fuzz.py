"""Hostile bytes behind right digests, in a process with little memory; `make prove` tries many more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fuzzing
import pytest

SCRIPT = Path(__file__).with_name("fuzzing.py")
GUIDED = 20_000


@pytest.mark.parametrize("examples", [150, pytest.param(20_000, marks=pytest.mark.prove)])
def test_decoders_refuse_or_return_what_is_valid(examples: int) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(examples)], capture_output=True, text=True, check=False, timeout=3000
    )
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    counted = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert set(counted) == {target.__name__ for target in fuzzing.TARGETS}
    for target, outcomes in counted.items():
        assert json.loads(outcomes)["refused"] > examples // 4, f"{target} was not fed what is wrong: {outcomes}"


@pytest.mark.prove
@pytest.mark.parametrize("target", fuzzing.TARGETS, ids=lambda target: target.__name__)
def test_decoders_under_a_fuzzer_that_sees_their_branches(target: Callable[..., None], tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed here: `make prove` does that")
    command = [sys.executable, str(SCRIPT.with_name("fuzzing_guided.py")), target.__name__, str(GUIDED), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    print(target.__name__, outcomes)
    assert sum(outcomes.values()) > GUIDED // 2, "most inputs were too short to be anything"
