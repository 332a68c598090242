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


def many_saves(rank: int, world: int, url: Path, saves: int) -> tuple[dict[str, int], dict[str, int]]:
    """What this process, its keeper and the RAM tier held after the first 40 overlapped saves of 66 MiB, and later."""
    model = torch.nn.Linear(2400, 2400)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optim": optimizer}
    ram = os.environ["CKPT_RAM_DIR"]

    def held() -> dict[str, int]:
        (keeper,) = keepers(ram)
        files = list(Path(ram).rglob("*.safetensors"))
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "descriptors of the keeper": len(os.listdir(f"/proc/{keeper}/fd")),
            "snapshots": len(files),
            "bytes of snapshots": sum(path.stat().st_blocks * 512 for path in files),
            "memory": _status("RssAnon"),
            "memory of the keeper": _status("RssAnon", keeper),
        }

    with ckpt.Checkpointer(url) as checkpointer:

        def some(first: int, count: int) -> dict[str, int]:
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
            return held()

        return some(0, 40), some(40, saves - 40)


def nothing_stays(url: Path, saves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later saves hold what the first ones held: counts to the last one, memory to 4 MiB."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))  # what is freed is given back, and so not counted
    forget()
    (outcome,) = run_job(many_saves, 1, url, saves, deadline_s=3000)
    assert outcome.error is None, outcome.output
    first, later = outcome.result
    for what, count in first.items():
        if what.startswith("memory"):
            assert later[what] - count < 4 << 20, what
        else:
            assert later[what] == count, what
    forget()  # no keeper and no file


def test_many_overlapped_saves_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_stays(tmp_path, 120, monkeypatch)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_a_thousand_overlapped_saves_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_stays(tmp_path, 1000, monkeypatch)
