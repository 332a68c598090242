"""Saves that go on while training does: what is stored is the state at the time of the call, whatever comes after.

The store is held up, where a test needs that, by stopping the keeper (SIGSTOP); memory is made scarce by a budget or
by a small tmpfs.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from jobs import ROOT, Pool
from keepers import forget, is_clean, keepers, until
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckpt
from ckpt import Checkpointer, DeadlineExceeded, Every, SaveFailed
from ckpt.keeper import courier
from ckpt.keeper.courier import Pending
from ckpt.keeper.ram import Claim, RamTier
from ckpt.run import RunDirectory

BIG = 300_000  # elements of a parameter: several runs


def training(seed: int = 0, **optimizer: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(600, 600), torch.nn.BatchNorm1d(600), torch.nn.Linear(600, 600))
    return net, torch.optim.AdamW(net.parameters(), lr=1e-2, **optimizer)


def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    data = torch.randn(8, 600, generator=torch.Generator().manual_seed(seed))
    net(data).square().mean().backward()
    optimizer.step()


def clone(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    held = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    states = [state[name] for state in held for name in sorted(state)]
    tensors = [*net.state_dict().values(), *states]
    return [getattr(tensor, "_local_tensor", tensor).detach().clone() for tensor in tensors]


@contextlib.contextmanager
def stopped_keeper(root: str) -> Iterator[None]:
    """The store takes nothing meanwhile."""
    pids = keepers(root)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def train_and_save(url: str, saves: int, **options: Any) -> dict[int, list[torch.Tensor]]:
    """Save after every step without waiting for anything; what the state was at each."""
    net, optimizer = training()
    state, seen = {"model": net, "optim": optimizer}, {}
    with Checkpointer(url, **options) as checkpointer:
        for number in range(1, saves + 1):
            step(net, optimizer, number)
            seen[number] = clone(net, optimizer)
            checkpointer.save(number, state)
    return seen


def check(url: str, number: int, expected: list[torch.Tensor]) -> None:
    net, optimizer = training(seed=1)
    ckpt.restore(url, {"model": net, "optim": optimizer}, step=number)
    assert all(map(torch.equal, clone(net, optimizer), expected)), number


@pytest.mark.parametrize("budget", [None, 20 << 20, 7 << 20, 0], ids=["three", "two", "one", "ring"])
@pytest.mark.parametrize("overlap", [True, False])
def test_every_step_is_stored_as_it_was(tmp_path: Path, budget: int | None, overlap: bool) -> None:
    seen = train_and_save(str(tmp_path), 6, overlap=overlap, ram_budget_bytes=budget)
    for number, expected in seen.items():
        check(str(tmp_path), number, expected)


def test_save_returns_before_the_store_has_it(tmp_path: Path) -> None:
    net, optimizer = training()
    state = {"model": net, "optim": optimizer}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, blocking=True)
        with stopped_keeper(os.environ["CKPT_RAM_DIR"]):
            handle = checkpointer.save(2, state)
            handle.wait_copied()
            assert not handle.done()
            assert checkpointer.all_steps() == [1]
            with pytest.raises(ckpt.DeadlineExceeded):
                handle.wait(timeout_s=0.05)
        assert handle.wait(60).step == 2
        assert handle.done()
        assert handle.exception() is None
        assert checkpointer.all_steps() == [1, 2]


DIES = """
import os, sys
if "ckpt.keeper" in sys.orig_argv and not os.path.exists(os.environ["HOLDFAST_SPARED"]):
    if os.environ["HOLDFAST_ONCE"]:
        open(os.environ["HOLDFAST_SPARED"], "w").close()
    os.kill(os.getpid(), 9)
"""


def test_a_keeper_that_does_not_start_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernel kills it for memory. If none starts, the save says so, and the next one tries anew."""
    forget()
    (tmp_path / "sitecustomize.py").write_text(DIES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("HOLDFAST_SPARED", str(tmp_path / "spared"))
    monkeypatch.setenv("HOLDFAST_ONCE", "")
    monkeypatch.setattr(courier, "START_LIMIT_S", 6.0)
    with Checkpointer(tmp_path / "run") as checkpointer:
        with pytest.raises(SaveFailed, match="the keeper of this node could not be started"):
            checkpointer.save(1, {"a": torch.zeros(10)}, blocking=True)
        monkeypatch.setattr(courier, "START_LIMIT_S", 30.0)
        monkeypatch.setenv("HOLDFAST_ONCE", "1")
        checkpointer.save(2, {"a": torch.ones(10)}, blocking=True)
    assert (tmp_path / "spared").exists()
    assert ckpt.load(tmp_path / "run")["a"].sum() == 10


def test_busy_skip_leaves_out_what_the_store_cannot_take_and_counts_it(tmp_path: Path) -> None:
    net, optimizer = training()
    state = {"model": net, "optim": optimizer}
    with Checkpointer(tmp_path, busy="skip") as checkpointer:
        checkpointer.save(1, state, blocking=True)
        with stopped_keeper(os.environ["CKPT_RAM_DIR"]):
            handles = [checkpointer.save(number, state) for number in range(2, 9)]
        checkpointer.save(20, state, blocking=True)  # never left out
        stored = [handle.wait(60).step for handle in handles]
        assert stored == sorted(stored)
        assert set(stored) <= set(checkpointer.all_steps())
        skipped = [handle for handle in handles if handle.skipped]
        assert skipped
        assert checkpointer.skipped == len(skipped)
        assert checkpointer.latest_step() == 20


def test_saves_that_nobody_waits_for_are_not_kept(tmp_path: Path) -> None:
    def held() -> int:
        gc.collect()
        return sum(type(found) is Pending for found in gc.get_objects())

    net, optimizer = training()
    state, before = {"model": net, "optim": optimizer}, held()
    with Checkpointer(tmp_path) as checkpointer:
        kept = checkpointer.save(1, state)  # leads to no later one
        for number in range(2, 42):
            step(net, optimizer, number)
            last = checkpointer.save(number, state)
        last.wait(60)
        step(net, optimizer, 42)
        assert held() - before <= 6
        assert kept.wait(60).step == 1
        with pytest.raises(ckpt.Incompatible, match="already been passed"):
            checkpointer.save(41, state)


def test_a_ring_is_announced_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ckpt"):
        train_and_save(str(tmp_path), 3, ram_budget_bytes=0)
    assert sum("ring" in record.message for record in caplog.records) == 1


def test_a_tmpfs_that_is_too_small_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid():
        pytest.skip("needs root, to mount a tmpfs of 2 MiB")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(small)], check=True)
    try:
        monkeypatch.setenv("CKPT_RAM_DIR", str(small))
        seen = train_and_save(str(tmp_path / "run"), 3)
        check(str(tmp_path / "run"), 3, seen[3])
        until("the keeper has cleaned up", lambda: is_clean(small))
    finally:  # once the keeper has not only cleaned up, but ended
        until("it can be unmounted", lambda: subprocess.run(["umount", str(small)], check=False).returncode == 0)


def test_a_write_by_hand_during_the_copy_fails_the_save_loudly(tmp_path: Path) -> None:
    """The one documented limit, where the version counter sees it."""
    big = torch.nn.Parameter(torch.zeros(30_000_000))  # 115 MiB do not fit into a ring of 32
    state = {"big": big, "sgd": torch.optim.SGD([big], lr=0.1)}
    with Checkpointer(tmp_path, ram_budget_bytes=0) as checkpointer:
        checkpointer.save(1, state, blocking=True)
        with stopped_keeper(os.environ["CKPT_RAM_DIR"]):  # so the copy cannot end
            handle = checkpointer.save(2, state)
            with torch.no_grad():
                big.add_(1)
        with pytest.raises(SaveFailed, match="big changed while they were copied"):
            handle.wait(60)
        checkpointer.save(3, state, blocking=True)
        assert checkpointer.all_steps() == [1, 3]


def test_failure_surfaces_at_the_next_call_and_nothing_older_is_lost(tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("needs root, to mount a file system that is soon full")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(disk)], check=True)
    net, optimizer = training()
    state = {"model": net, "optim": optimizer}
    try:
        checkpointer = Checkpointer(disk / "run")
        step(net, optimizer, 1)
        checkpointer.save(1, state, blocking=True)
        handle = checkpointer.save(2, state)
        until("it is decided", handle.done)
        assert isinstance(handle.exception(), ckpt.StorageError)
        with pytest.raises(ckpt.StorageError, match="ENOSPC"):
            checkpointer.save(3, state)
        checkpointer.save(4, {"small": 1}, blocking=True)  # it was told; the next one is tried
        assert checkpointer.all_steps() == [1, 4]
        checkpointer.save(5, state)
        with pytest.raises(ckpt.StorageError, match="ENOSPC"):
            checkpointer.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


ENDS = """
import os, sys, torch, ckpt
checkpointer = ckpt.Checkpointer(sys.argv[1])
checkpointer.save(1, {"t": torch.ones(int(sys.argv[2]))})
print("trained")
"""


@pytest.mark.parametrize(("elements", "code"), [(1000, 0), (20_000_000, 1)])
def test_a_process_that_just_ends_waits_and_says_whether_it_was_saved(tmp_path: Path, elements: int, code: int) -> None:
    if os.getuid():
        pytest.skip("needs root, to mount a file system that is too small")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(disk)], check=True)
    try:
        command = [sys.executable, "-c", ENDS, str(disk / "run"), str(elements)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert done.returncode == code, done.stderr
        assert done.stdout == "trained\n"
        assert ("ENOSPC" in done.stderr) == bool(code)
        assert ckpt.checkpointer.RunDirectory.open(disk / "run").log.read().head is not None or code
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def drifting(rank: int, world: int, url: str) -> tuple[str, list[int]]:
    state = {"w": torch.nn.Parameter(torch.ones(BIG)), "small": torch.nn.Parameter(torch.ones(5))}
    with Checkpointer(url) as checkpointer:
        checkpointer.save(1, state, blocking=True)
        if rank == 1:
            with torch.no_grad():
                state["w"][0] += 1
        try:
            checkpointer.save(2, state).wait(60)
        except ckpt.Incompatible as error:
            return str(error), checkpointer.all_steps()
    return "", []


def test_replicas_that_drift_apart_are_not_committed(pool: Pool, tmp_path: Path) -> None:
    for message, steps in pool.results(drifting, 2, str(tmp_path)):
        assert "w" in message
        assert "drifted" in message
        assert steps == [1]


def fsdp(rank: int, world: int, url: str, options: dict[str, Any]) -> bool:
    mesh = init_device_mesh("cpu", (world,))
    net, _ = training()
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, **options)
    state, seen = {"model": net, "optim": optimizer}, {}
    with Checkpointer(url, every=Every(steps=1)) as checkpointer:
        for number in range(1, 9):
            step(net, optimizer, number)
            seen[number] = clone(net, optimizer)
            checkpointer.save(number, state)
    for number, expected in seen.items():
        ckpt.restore(url, state, step=number)
        if not all(map(torch.equal, clone(net, optimizer), expected)):
            return False
    return True


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_fsdp2_trains_on_while_it_is_saved(pool: Pool, tmp_path: Path, options: dict[str, Any]) -> None:
    assert pool.results(fsdp, 2, str(tmp_path), options) == [True, True]


def on_two_nodes(rank: int, world: int, url: str, ram: str) -> list[int]:
    os.makedirs(f"{ram}/node{rank}", exist_ok=True)
    net, _ = training()
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    state = {"model": net, "optim": torch.optim.AdamW(net.parameters())}
    with mock.patch.dict(os.environ, CKPT_RAM_DIR=f"{ram}/node{rank}"), Checkpointer(url) as checkpointer:
        for number in range(1, 5):
            step(net, state["optim"], number)
            checkpointer.save(number, state)
        checkpointer.wait_until_finished(60)
        assert len(keepers(os.environ["CKPT_RAM_DIR"])) == 1
        expected = clone(net, state["optim"])
        assert checkpointer.restore(state) == 4
        assert all(map(torch.equal, clone(net, state["optim"]), expected))
        dist.barrier()
        return checkpointer.all_steps()


def test_two_nodes_commit_without_a_collective(pool: Pool, tmp_path: Path) -> None:
    """Two nodes as two RAM directories, each with a keeper of its own; they speak over TCP."""
    ram = os.environ["CKPT_RAM_DIR"]
    assert pool.results(on_two_nodes, 2, str(tmp_path), ram) == [[1, 2, 3, 4]] * 2
    for rank in range(2):
        node = Path(ram) / f"node{rank}"
        until("its keeper has ended", lambda node=node: is_clean(node))
        node.rmdir()


def test_nothing_is_left_after_close(tmp_path: Path) -> None:
    before = set(keepers(os.environ["CKPT_RAM_DIR"]))
    seen = train_and_save(str(tmp_path), 3)
    assert seen
    until("its keeper has ended", lambda: set(keepers(os.environ["CKPT_RAM_DIR"])) <= before)


def test_a_closed_checkpointer_fails_what_was_not_saved(tmp_path: Path) -> None:
    net, optimizer = training()
    state = {"model": net, "optim": optimizer}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state, blocking=True)
    with stopped_keeper(os.environ["CKPT_RAM_DIR"]):
        handle = checkpointer.save(2, state)
        with contextlib.suppress(RuntimeError), checkpointer:
            raise RuntimeError("as a training loop would")
        with pytest.raises(DeadlineExceeded, match="closed before"):
            handle.wait(1)


def test_a_look_at_its_lock_turns_no_starting_keeper_away(tmp_path: Path) -> None:
    train_and_save(str(tmp_path), 1)
    forget()
    root, run = os.environ["CKPT_RAM_DIR"], RunDirectory.open(str(tmp_path))
    assert run is not None
    tier = RamTier.of(run)
    tier.make()
    tier.write(tier.file("run"), run.url.encode())
    look = Claim.take(tier.file("lock"))
    assert look is not None
    subprocess.run([sys.executable, "-m", "ckpt.keeper", root, tier.name], cwd=ROOT, check=True, timeout=30)
    (pid,) = keepers(root)
    until("it waits, or has gone", lambda: not keepers(root) or "nanosleep" in Path(f"/proc/{pid}/wchan").read_text())
    assert keepers(root) == [pid]
    look.release()
    until("it listens", lambda: Path(tier.file("socket")).exists())
    forget()
