"""What a save and a restore take beside the state itself: a bounded number of buffers, and nothing that stays."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from jobs import run_job
from keepers import forget, keepers

import ckpt
from ckpt.plan import RUN_BYTES
from ckpt.reading import READ_THREADS

ALLOWED_BYTES = (64 << 20) + READ_THREADS * RUN_BYTES


def _grown_by(act: Callable[[], object]) -> int:
    """Bytes by which the process was larger at its peak during `act` than before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    act()
    return _status("VmHWM") - before


def _status(field: str, process: int | str = "self") -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peaks(rank: int, world: int, url: str, budget: int | None) -> tuple[int, int, int]:
    state = {f"t{i}": torch.nn.Parameter(torch.ones(8 << 20)) for i in range(8)}  # 256 MiB
    state["columns"] = torch.nn.Parameter(torch.ones(4096, 4096).t())  # must go through a buffer
    with ckpt.Checkpointer(url, ram_budget_bytes=budget) as checkpointer:
        saving = _grown_by(lambda: checkpointer.save(1, state, blocking=True))
        dist.barrier()
        (keeper,) = keepers(os.environ["CKPT_RAM_DIR"])
        keeping = _status("RssAnon", keeper)
        dist.barrier()
    return saving, _grown_by(lambda: ckpt.restore(url, state)), keeping


STATE_BYTES = 320 << 20


@pytest.mark.parametrize("held", [0, 1])
def test_a_save_and_a_restore_take_what_is_held_and_a_few_buffers(tmp_path: Path, held: int) -> None:
    """Of two replicas each rank holds half of the state; with no snapshot held, it streams."""
    forget()
    for outcome in run_job(peaks, 2, str(tmp_path), held * (STATE_BYTES + (1 << 20))):
        assert outcome.error is None, outcome.output
        saving, restoring, keeping = outcome.result
        assert saving <= held * STATE_BYTES // 2 + ALLOWED_BYTES, saving
        assert restoring <= ALLOWED_BYTES, restoring
        assert keeping <= ALLOWED_BYTES, keeping


def test_a_hundred_saves_leave_no_descriptor_thread_or_memory_behind(tmp_path: Path) -> None:
    state = {"t": torch.nn.Parameter(torch.ones(1 << 20))}
    with ckpt.Checkpointer(tmp_path) as checkpointer:

        def some(first: int) -> tuple[int, int]:
            for step in range(first, first + 50):
                checkpointer.save(step, state, blocking=True)
            return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

        settled, resident = some(0), _status("VmRSS")
        assert some(50) == settled
        assert _status("VmRSS") - resident < 16 << 20
