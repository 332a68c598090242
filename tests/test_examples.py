"""The examples run as a user would run them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

import ckpt
from ckpt.run import RunDirectory

EXAMPLES = Path(__file__).parent.parent / "examples"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def _run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=120, env={**os.environ, **ONE_THREAD}
    ).stdout


def test_the_minimal_example_goes_on_after_a_kill(tmp_path: Path) -> None:
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    undisturbed = _run("minimal.py", whole, "4000")
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / "minimal.py"), killed, "4000"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ONE_THREAD},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("step   1000")
        assert process.stdout.readline().startswith("step   2000")
        process.send_signal(signal.SIGKILL)
    assert ckpt.Checkpointer(killed).latest_step() in (1000, 2000)
    assert _run("minimal.py", killed, "4000").splitlines()[-1] == undisturbed.splitlines()[-1]


def test_a_page_without_the_library_reads_the_format() -> None:
    golden = Path(__file__).parent / "golden" / "v1"
    printed = _run("read_format.py", str(golden)).splitlines()
    assert printed[0] == "step 7"
    shown = {line.split("  ")[0]: line for line in printed[1:]}
    loaded = {key: value for key, value in ckpt.load(golden).items() if hasattr(value, "dtype")}
    assert set(shown) == set(loaded)
    assert shown["uneven"].endswith("torch.float32  [7, 5]  sum 595")
    assert shown["declared"].endswith("torch.int64  [8]  sum 28")


def test_the_page_reads_what_is_packed_and_what_is_stored_elsewhere(tmp_path: Path) -> None:
    state = {"base": torch.randn(200_000), "live": torch.randn(70_000).bfloat16(), "n": 0}
    with ckpt.Checkpointer(tmp_path, compression="zstd") as checkpointer:
        for step in range(1, 5):
            state["live"] += 1
            checkpointer.save(step, state, blocking=True)
    assert RunDirectory.open(tmp_path).log.read().standing()[-1].sources
    printed = dict(line.split("  ", 1) for line in _run("read_format.py", str(tmp_path)).splitlines()[1:])
    for name in ("base", "live"):
        assert printed[name].endswith(f"sum {state[name].to(torch.complex128).sum().real:.6g}")
