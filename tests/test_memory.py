"""What a save and a restore take beside the state itself: a bounded number of buffers, and nothing that stays."""

from __future__ import annotations

import os
import shutil
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


def many_saves(url: Path, saves: int) -> None:
    """Overlapped saves of 66 MiB leave descriptors, threads, memory and the RAM tier as they were after a few."""
    forget()
    model = torch.nn.Linear(2400, 2400)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optim": optimizer}
    ram = os.environ["CKPT_RAM_DIR"]

    def usage() -> tuple[dict[str, int], int, int]:
        (keeper,) = keepers(ram)
        files = list(Path(ram).rglob("*.safetensors"))
        counts = {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "descriptors of the keeper": len(os.listdir(f"/proc/{keeper}/fd")),
            "snapshots": len(files),
            "bytes of snapshots": sum(path.stat().st_blocks * 512 for path in files),
        }
        return counts, _status("VmRSS"), _status("RssAnon", keeper)

    with ckpt.Checkpointer(url) as checkpointer:

        def some(first: int, count: int) -> tuple[dict[str, int], int, int]:
            for step in range(first, first + count):
                model(torch.ones(8, 2400)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                handle = checkpointer.save(step, state)
                if step % 20 == 19:
                    handle.wait(60)
                    for old in sorted((url / "steps").iterdir())[:-2]:
                        shutil.rmtree(old)  # room for the next ones
            handle.wait(60)
            return usage()

        counts, resident, kept = some(0, 40)
        later, resident_later, kept_later = some(40, saves - 40)
        assert later == counts
        assert resident_later - resident < 32 << 20
        assert kept_later - kept < 32 << 20
    forget()


def test_many_overlapped_saves_leave_nothing_behind(tmp_path: Path) -> None:
    many_saves(tmp_path, 120)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_a_thousand_overlapped_saves_leave_nothing_behind(tmp_path: Path) -> None:
    many_saves(tmp_path, 1000)
