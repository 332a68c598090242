"""What several ranks must agree on: replicas, values, steps, failures and when to stop. No test may hang."""

from __future__ import annotations

import logging
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from jobs import Pool
from keepers import forget, keepers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import ckpt
import ckpt.ranks

Error = tuple[str, str]
"""Type and message of what a rank raised; type "" and the repr of the result if it raised nothing."""


def told(act: Callable[[], Any]) -> Error:
    try:
        return "", repr(act())
    except Exception as error:
        return type(error).__name__, str(error)


class Warnings(logging.Handler):
    """Collects what ckpt logs while entered."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("ckpt").addHandler(self)
        return self.said

    def __exit__(self, *_: object) -> None:
        logging.getLogger("ckpt").removeHandler(self)


def filled(value: float, n: int = 5) -> dict[str, Any]:
    return {"w": nn.Parameter(torch.full((n,), value))}


# Replicas


def save_replicas(rank: int, world: int, url: str, drifted: str) -> tuple[Error, list[str], Any]:
    """A model whose tensor `drifted` differs from rank to rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        model.state_dict()[drifted].add_(rank)
    with Warnings() as said, ckpt.Checkpointer(url) as checkpointer:
        result = told(lambda: checkpointer.save(1, {"model": model}).wait().step)
        model.zero_grad()
        again = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        restored = checkpointer.restore({"model": again}) and again.state_dict()[drifted].tolist()
    return result, said, restored


def test_parameters_that_drifted_apart_are_refused(pool: Pool, tmp_path: Path) -> None:
    for (kind, message), _, restored in pool.results(save_replicas, 3, str(tmp_path), "0.weight"):
        assert kind == "Incompatible"
        assert "model/0.weight" in message
        assert "model/0.bias" not in message
        assert restored is None


def test_of_buffers_that_differ_the_lowest_ranks_is_stored(pool: Pool, tmp_path: Path) -> None:
    outcomes = pool.results(save_replicas, 3, str(tmp_path), "1.running_mean")
    assert [result for result, _, _ in outcomes] == [("", "1")] * 3
    assert ["model/1.running_mean" in line for _, said, _ in outcomes for line in said] == [True]
    assert [restored for _, _, restored in outcomes] == [[0.0] * 4] * 3


def save_value(rank: int, world: int, url: str) -> list[Error]:
    with ckpt.Checkpointer(url) as checkpointer:
        first = told(lambda: checkpointer.save(1, {"epoch": 3, "seen": {"rank": rank}}).wait().step)
        return [first, told(lambda: checkpointer.save(1, {"epoch": 3, "seen": ckpt.PerRank(rank)}).wait().step)]


def test_values_that_differ_are_refused_unless_they_are_per_rank(pool: Pool, tmp_path: Path) -> None:
    for (kind, message), second in pool.results(save_value, 2, str(tmp_path)):
        assert kind == "Incompatible"
        assert "seen" in message
        assert "epoch" not in message
        assert second == ("", "1")


def save_per_rank(rank: int, world: int, url: str) -> None:
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(1, {"mine": ckpt.PerRank({"at": rank * 10})}, blocking=True)


def restore_per_rank(rank: int, world: int, url: str, how: str) -> Any:
    on_resize = {"sum": lambda states, rank, world: (sum(s["at"] for s in states), rank, world)}.get(how, how)
    mine = ckpt.PerRank(None, on_resize=on_resize)
    error = told(lambda: ckpt.restore(url, {"mine": mine}))
    return mine.obj if not error[0] else error


def test_what_belongs_to_each_rank(pool: Pool, tmp_path: Path) -> None:
    url = str(tmp_path)
    pool.results(save_per_rank, 3, url)
    assert pool.results(restore_per_rank, 3, url, "error") == [{"at": 0}, {"at": 10}, {"at": 20}]
    assert pool.results(restore_per_rank, 2, url, "first") == [{"at": 0}, {"at": 0}]
    assert pool.results(restore_per_rank, 4, url, "sum") == [(30, rank, 4) for rank in range(4)]
    refused = pool.results(restore_per_rank, 2, url, "error")
    assert all(kind == "Incompatible" and "mine" in message for kind, message in refused)


def save_mine_here_and_there(rank: int, world: int, url: str) -> Error:
    """Only rank 0 saved something of its own; then every rank asks for it."""
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(1, {"all": 1} | ({"mine": ckpt.PerRank(7)} if rank == 0 else {}), blocking=True)
        return told(lambda: checkpointer.restore({"all": 0, "mine": ckpt.PerRank(0)}))


def test_a_rank_that_saved_nothing_of_its_own_is_told_so(pool: Pool, tmp_path: Path) -> None:
    for kind, message in pool.results(save_mine_here_and_there, 2, str(tmp_path)):
        assert kind == "Incompatible"
        assert "mine" in message


# Pipeline stages that share the names of their keys


def stage(rank: int, kind: str, fill: float) -> Any:
    """Rank r's stage of a hand-made pipeline, every parameter `fill`: `plain`, or `fsdp2` on pairs of ranks."""
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(fill)
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipe", "dp"))
        fully_shard(model, mesh=mesh["dp"])
    return model


def save_stages(rank: int, world: int, url: str, kind: str, wrapped: bool) -> tuple[Error, Error, bool]:
    number = rank if kind == "plain" else rank // 2
    mine, fresh = stage(rank, kind, 1.0 + number), stage(rank, kind, 0.0)
    with ckpt.Checkpointer(url) as checkpointer:
        hold = ckpt.PerRank if wrapped else lambda module: module
        saved = told(lambda: checkpointer.save(1, {"stage": hold(mine)}).wait().step)
        restored = told(lambda: checkpointer.restore({"stage": hold(fresh)}))
    local = [p.to_local() if hasattr(p, "to_local") else p for p in fresh.parameters()]
    return saved, restored, all(bool((p == 1.0 + number).all()) for p in local)


@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
def test_stages_that_share_names_are_refused(pool: Pool, tmp_path: Path, kind: str) -> None:
    for (error, message), restored, _ in pool.results(save_stages, 4, str(tmp_path), kind, False):
        assert error == "Incompatible", message
        assert "stage/0.weight" in message
        assert "PerRank" in message
        assert restored == ("", "None")


def test_stages_that_share_names_round_trip_per_rank(pool: Pool, tmp_path: Path) -> None:
    for saved, restored, equal in pool.results(save_stages, 4, str(tmp_path), "plain", True):
        assert (saved, restored, equal) == (("", "1"), ("", "1"), True)


def save_named_stages(rank: int, world: int, url: str) -> list[bool]:
    """FSDP2 stages on pairs of ranks, under a key of each stage's own."""
    number = rank // 2
    mine, fresh = stage(rank, "fsdp2", 1.0 + number), stage(rank, "fsdp2", 0.0)
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(1, {f"stage{number}": mine}, blocking=True)
        checkpointer.restore({f"stage{number}": fresh})
    return [bool((p.to_local() == 1.0 + number).all()) for p in fresh.parameters()]


def test_sharded_stages_under_keys_of_their_own(pool: Pool, tmp_path: Path) -> None:
    assert pool.results(save_named_stages, 4, str(tmp_path)) == [[True] * 4] * 4
    assert {name.split("/")[0] for name in ckpt.load(tmp_path)} == {"stage0", "stage1"}


# A run that not all ranks see


def open_apart(rank: int, world: int, urls: list[str], read: bool) -> Error:
    def act() -> Any:
        if read:
            return ckpt.restore(urls[rank], filled(0.0), timeout_s=20)
        with ckpt.Checkpointer(urls[rank], commit_timeout_s=20) as checkpointer:
            return checkpointer.save(1, filled(1.0), blocking=True)

    return told(act)


@pytest.mark.parametrize("read", [False, True])
def test_a_directory_that_is_not_shared_is_refused(pool: Pool, tmp_path: Path, read: bool) -> None:
    shared, other, absent = (str(tmp_path / name) for name in ("shared", "other", "absent"))
    for url in (shared, other):
        with ckpt.Checkpointer(url) as checkpointer:
            checkpointer.save(0, filled(1.0), blocking=True)
    for urls, says in [([shared, other], "another run"), ([shared, absent], "does not see the run")]:
        for kind, message in pool.results(open_apart, 2, urls, read):
            assert kind == "Incompatible"
            assert says in message


# A layout that changes


def save_changed(rank: int, world: int, url: str, how: str) -> list[Error]:
    state: dict[str, Any] = filled(1.0)
    with ckpt.Checkpointer(url) as checkpointer:
        saved = [told(lambda: checkpointer.save(1, state).wait().step)]
        changed = dict(state)
        if rank == 1 and how == "added":
            changed["more"] = torch.full((3,), 7.0)
        if rank == 1 and how == "shape":
            changed["w"] = torch.zeros(6)
        if rank == 1 and how == "dtype":
            changed["w"] = torch.ones(5, dtype=torch.bfloat16)
        saved.append(told(lambda: checkpointer.save(2, changed).wait().step))
        return [*saved, told(lambda: checkpointer.save(3, state).wait().step)]


@pytest.mark.parametrize("how", ["added", "shape", "dtype"])
def test_one_ranks_changed_layout_is_noticed(pool: Pool, tmp_path: Path, how: str) -> None:
    outcomes = pool.results(save_changed, 3, str(tmp_path), how)
    for first, second, third in outcomes:
        assert (first, third) == (("", "1"), ("", "3"))
        if how == "added":
            assert second == ("", "2")
        else:
            assert second[0] == "Incompatible"
            assert "w: ranks hold it as" in second[1]
    if how == "added":
        assert ckpt.load(tmp_path, step=2)["more"].tolist() == [7.0] * 3
    assert set(ckpt.load(tmp_path)) == {"w"}


def save_tied_here(rank: int, world: int, url: str) -> Error:
    """Rank 0 ties two tensors that are two on rank 1."""
    one, other = torch.ones(4), torch.full((4,), 2.0)
    state = {"a": one, "b": one} if rank == 0 else {"a": one, "b": other}
    with ckpt.Checkpointer(url) as checkpointer:
        return told(lambda: checkpointer.save(1, state).wait().step)


def test_a_tie_that_not_all_ranks_have_is_refused(pool: Pool, tmp_path: Path) -> None:
    for kind, message in pool.results(save_tied_here, 2, str(tmp_path)):
        assert kind == "Incompatible", message
        assert "b" in message


# Failures of one rank


def save_other_steps(rank: int, world: int, url: str) -> list[Error]:
    with ckpt.Checkpointer(url, commit_timeout_s=20) as checkpointer:
        apart = told(lambda: checkpointer.save(1 + rank // 2, filled(1.0), blocking=True))
        return [apart, told(lambda: checkpointer.save(2, filled(2.0)).wait().step)]


def test_different_steps_are_refused(pool: Pool, tmp_path: Path) -> None:
    for (kind, message), after in pool.results(save_other_steps, 3, str(tmp_path)):
        assert kind == "Incompatible"
        assert "same step" in message
        assert after == ("", "2")


def save_unstorable(rank: int, world: int, url: str) -> tuple[list[Error], int | None, list[float]]:
    with ckpt.Checkpointer(url, commit_timeout_s=20) as checkpointer:
        said = [told(lambda: checkpointer.save(1, filled(1.0)).wait().step)]
        bad = {"lock": object()} if rank == 1 else {}
        said.append(told(lambda: checkpointer.save(2, {**filled(2.0), **bad}, blocking=True)))
        state = filled(0.0)
        step = checkpointer.restore(state)
        return [*said, told(lambda: checkpointer.save(3, filled(3.0)).wait().step)], step, state["w"].tolist()


def test_a_state_that_cannot_be_stored_on_one_rank(pool: Pool, tmp_path: Path) -> None:
    for rank, (said, step, values) in enumerate(pool.results(save_unstorable, 3, str(tmp_path))):
        assert (said[0], said[2]) == (("", "1"), ("", "3"))
        assert said[1][0] == "Incompatible"
        assert "lock" in said[1][1]
        assert ("rank 1" in said[1][1]) == (rank != 1)
        assert (step, values) == (1, [1.0] * 5)


def save_where_one_fails(rank: int, world: int, url: str) -> tuple[list[Error], int | None, list[list[float]]]:
    """The single row lies on rank 0 alone, so that only its file meets the limit that the keeper gets for a while."""
    mesh = init_device_mesh("cpu", (world,))

    def row(value: float) -> dict[str, Any]:
        return {"row": distribute_tensor(torch.full((1, 400_000), value), mesh, [Shard(0)])}

    def limited(nbytes: int) -> None:
        dist.barrier()
        if rank == 0:
            (keeper,) = keepers(os.environ["CKPT_RAM_DIR"])
            resource.prlimit(keeper, resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))
        dist.barrier()

    with ckpt.Checkpointer(url, commit_timeout_s=20) as checkpointer:
        said = [told(lambda: checkpointer.save(1, row(1.0)).wait().step)]
        limited(1 << 20)
        said.append(told(lambda: checkpointer.save(2, row(2.0), blocking=True)))
        limited(resource.RLIM_INFINITY)
        found, later = row(0.0), row(0.0)
        step = checkpointer.restore(found)
        said.append(told(lambda: checkpointer.save(2, row(3.0)).wait().step))
        checkpointer.restore(later)
    return said, step, [one["row"].full_tensor().unique().tolist() for one in (found, later)]


def test_a_write_that_fails_on_one_rank(pool: Pool, tmp_path: Path) -> None:
    forget()  # one keeper, of this run
    for said, step, values in pool.results(save_where_one_fails, 3, str(tmp_path)):
        assert (said[0], said[2]) == (("", "1"), ("", "2"))
        assert said[1][0] == "StorageError"
        assert "File too large" in said[1][1]
        assert (step, values) == (1, [[1.0], [3.0]])
    assert len(list(tmp_path.glob("steps/*"))) == 2  # what the failed attempt wrote is gone


def save_fenced(rank: int, world: int, url: str) -> Error:
    """Between two saves another job takes the run over."""
    with ckpt.Checkpointer(url, run_id="old", commit_timeout_s=20) as checkpointer:
        checkpointer.save(1, filled(1.0), blocking=True)
        if rank == 0:
            with mock.patch("ckpt.checkpointer.connect", return_value=ckpt.ranks.Alone()):
                newer = ckpt.Checkpointer(url, run_id="new", takeover=True)
                newer.save(5, {"n": 5}, blocking=True)
        dist.barrier()
        return told(lambda: checkpointer.save(2, filled(2.0), blocking=True))


def test_a_run_that_was_taken_over_fences_every_rank(pool: Pool, tmp_path: Path) -> None:
    assert [kind for kind, _ in pool.results(save_fenced, 3, str(tmp_path))] == ["Fenced"] * 3
    assert ckpt.load(tmp_path) == {"n": 5}


def restore_other_keys(rank: int, world: int, url: str, how: str) -> tuple[Error, list[float]]:
    target: dict[str, Any] = {"a": torch.zeros(3)}
    if rank == 1 and how == "missing":
        target["c"] = torch.zeros(3)
    if rank == 1 and how == "shape":
        target["a"] = torch.zeros(4)
    if how != "unexpected":
        target["b"] = torch.zeros(3)
    return told(lambda: ckpt.restore(url, target, timeout_s=20)), target["a"].unique().tolist()


@pytest.mark.parametrize(("how", "named"), [("missing", "c"), ("unexpected", "b"), ("shape", "a: shape")])
def test_keys_that_do_not_fit_on_one_rank(pool: Pool, tmp_path: Path, how: str, named: str) -> None:
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": torch.ones(3), "b": torch.ones(3)}, blocking=True)
    for (kind, message), values in pool.results(restore_other_keys, 3, str(tmp_path), how):
        assert kind == "Incompatible"
        assert named in message
        assert values == [0.0]


# Damage that only one rank reads

ROWS = 3 * 65536


def save_rows(rank: int, world: int, url: str) -> None:
    mesh = init_device_mesh("cpu", (world,))
    with ckpt.Checkpointer(url) as checkpointer:
        for step in (1, 2):
            rows = distribute_tensor(torch.full((ROWS,), float(step)), mesh, [Shard(0)])
            checkpointer.save(step, {"rows": rows}, blocking=True)


def restore_rows(rank: int, world: int, url: str, fallback: bool) -> tuple[Error, list[float], int | None]:
    rows = distribute_tensor(torch.zeros(ROWS), init_device_mesh("cpu", (world,)), [Shard(0)])
    with Warnings(), ckpt.Checkpointer(url, commit_timeout_s=20) as checkpointer:
        said = told(lambda: checkpointer.restore({"rows": rows}, fallback=fallback))
        return said, rows.to_local().unique().tolist(), checkpointer.latest_step()


def test_damage_that_one_rank_reads(pool: Pool, tmp_path: Path) -> None:
    url = str(tmp_path)
    pool.results(save_rows, 3, url)
    forget()
    (data,) = tmp_path.glob("steps/*0000002.*/r00002.safetensors")
    damaged = bytearray(data.read_bytes())
    damaged[-5] ^= 1
    data.write_bytes(damaged)
    for (kind, message), _, latest in pool.results(restore_rows, 3, url, False):
        assert kind == "Corrupt"
        assert "r00002.safetensors" in message
        assert "must not be used" in message
        assert latest == 2
    assert pool.results(restore_rows, 3, url, True) == [(("", "1"), [1.0], 1)] * 3


# The loop


def loop(rank: int, world: int, url: str, every: ckpt.Every, stop_at: int | None, pause_s: float) -> Any:
    """20 steps; rank 2 gets SIGTERM in step `stop_at`. The steps that ran, those saved, and whether it stopped."""
    state = {"w": torch.zeros(4)}
    ran = []
    with Warnings(), ckpt.Checkpointer(url, every=every, commit_timeout_s=20) as checkpointer:
        for step in checkpointer.steps(20, state):
            ran.append(step)
            state["w"] += 1
            if step == stop_at and rank == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause_s * (1 + rank))
        return ran, checkpointer.all_steps(), checkpointer.stopped, state["w"].tolist()


def test_sigterm_to_one_rank_stops_all_at_one_saved_step(pool: Pool, tmp_path: Path) -> None:
    outcomes = pool.results(loop, 3, str(tmp_path), ckpt.Every(steps=100), 7, 0.01)
    ran, saved, stopped, _ = outcomes[0]
    assert outcomes == [outcomes[0]] * 3
    assert stopped
    assert len(ran) in (8, 9, 10)
    assert saved == [len(ran)]
    assert ckpt.load(tmp_path)["w"].tolist() == [float(len(ran))] * 4
    again = pool.results(loop, 3, str(tmp_path), ckpt.Every(steps=100), None, 0)
    assert again == [(list(range(len(ran), 20)), [len(ran), 20], False, [20.0] * 4)] * 3


def test_due_by_time_is_one_decision(pool: Pool, tmp_path: Path) -> None:
    """The ranks' clocks disagree about when 50 ms have passed; rank 0's counts."""
    outcomes = pool.results(loop, 3, str(tmp_path), ckpt.Every(seconds=0.05), None, 0.01)
    assert outcomes == [outcomes[0]] * 3
    saved = outcomes[0][1]
    assert len(saved) >= 3
    assert saved[-1] == 20


def test_due_by_steps(pool: Pool, tmp_path: Path) -> None:
    outcomes = pool.results(loop, 2, str(tmp_path), ckpt.Every(steps=6), None, 0)
    assert [saved for _, saved, _, _ in outcomes] == [[6, 12, 18, 20]] * 2


def asked_by_hand(rank: int, world: int, url: str) -> list[bool]:
    with ckpt.Checkpointer(url, every=ckpt.Every(seconds=0.05)) as checkpointer:
        now = checkpointer.due(1)
        time.sleep(0.06)
        return [now, checkpointer.due(2), checkpointer.stop_requested(3)]


def test_due_and_stop_requested_by_hand(pool: Pool, tmp_path: Path) -> None:
    first, *others = pool.results(asked_by_hand, 3, str(tmp_path))
    assert first[1:] == [True, False]
    assert others == [first] * 2


# Who writes what


def save_large(rank: int, world: int, url: str, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5000, 64), nn.Linear(64, 300), nn.LayerNorm(300), nn.Linear(300, 700))
    if kind == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    if kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("r", "s")))
    optim = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.step()
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(1, {"model": model, "optim": optim}, blocking=True)
    dist.barrier()


@pytest.mark.parametrize(("kind", "world"), [("ddp", 2), ("ddp", 3), ("ddp", 4), ("fsdp2", 3), ("hsdp", 4)])
def test_each_rank_writes_its_share_once(pool: Pool, tmp_path: Path, kind: str, world: int) -> None:
    pool.results(save_large, world, str(tmp_path), kind)
    sizes = [path.stat().st_size for path in tmp_path.glob("steps/*/*.safetensors")]
    unique = sum(value.nbytes for value in ckpt.load(tmp_path).values() if isinstance(value, torch.Tensor))
    assert len(sizes) == world
    assert max(sizes) <= 1.1 * sum(sizes) / world
    assert unique <= sum(sizes) <= 1.05 * unique + 65536 * world


# Replicas that were equal once, and calls that are not alike


def save_drifting(rank: int, world: int, url: str) -> list[Error]:
    big = nn.Parameter(torch.zeros(200_000))
    state = {"big": big, "small": nn.Parameter(torch.zeros(3)), "plain": torch.zeros(200_000)}
    said = []
    with ckpt.Checkpointer(url) as checkpointer:
        for step, (name, at) in enumerate([("big", slice(None)), ("small", 1), ("plain", 77_777)], start=1):
            said.append(told(lambda step=step: checkpointer.save(10 * step, state, blocking=True)))  # type: ignore[misc]
            with torch.no_grad():
                state[name][at] += rank
                said.append(told(lambda step=step: checkpointer.save(10 * step + 1, state, blocking=True)))  # type: ignore[misc]
                state[name][at] -= rank
    return said


def test_replicas_that_drift_apart_are_refused(pool: Pool, tmp_path: Path) -> None:
    for said in pool.results(save_drifting, 2, str(tmp_path)):
        assert [kind for kind, _ in said] == ["", "Incompatible"] * 3
        for (_, message), name in zip(said[1::2], ("big", "small", "plain"), strict=True):
            assert f"ranks 0 and 1 hold different values under the same key: {name}." in message


def call_unalike(rank: int, world: int, url: str) -> list[Error]:
    state = {"w": torch.zeros(3)}
    with ckpt.Checkpointer(url, every=ckpt.Every(steps=2 + rank)) as checkpointer:
        checkpointer.save(1, state, blocking=True)
        return [
            told(lambda: next(checkpointer.steps(9, state))),
            told(lambda: checkpointer.restore(state, only=["w"] if rank else None)),
            told(lambda: checkpointer.save(True if rank else 2, state, blocking=True)),
            told(lambda: checkpointer.restore(state)),
        ]


def test_calls_that_differ_from_rank_to_rank_are_refused_on_all(pool: Pool, tmp_path: Path) -> None:
    for said in pool.results(call_unalike, 2, str(tmp_path), deadline_s=60):
        assert [kind for kind, _ in said] == ["Incompatible", "Incompatible", "Incompatible", ""]


def fall_back_with_two_causes(rank: int, world: int, url: str) -> Error:
    state = {"w": torch.zeros(3), "v": torch.zeros(3)}
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(1, state, blocking=True)
        checkpointer.save(2, state, blocking=True)
        failing = mock.patch(
            "ckpt.restorer.read_data", side_effect=[ckpt.Corrupt("c") if rank else OSError("io"), None]
        )
        with failing, mock.patch("torch.autograd.graph.increment_version"):
            return told(lambda: checkpointer.restore(state, fallback=True))


def test_ranks_that_fail_for_two_reasons_raise_one_kind(pool: Pool, tmp_path: Path) -> None:
    kinds = [kind for kind, _ in pool.results(fall_back_with_two_causes, 2, str(tmp_path), deadline_s=60)]
    assert kinds == ["OSError", "CkptError"]


class Sampler:
    """Iterable, with a place in the data."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __iter__(self) -> Any:
        return iter(range(self.at, 9))

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def save_sampler(rank: int, world: int, url: str, alike: bool) -> None:
    with ckpt.Checkpointer(url) as checkpointer:
        checkpointer.save(1, {"sampler": Sampler(5 if alike else rank)}, blocking=True)


def restore_sampler(rank: int, world: int, url: str) -> tuple[Error, int]:
    sampler = Sampler(0)
    return told(lambda: ckpt.restore(url, {"sampler": sampler})), sampler.at


@pytest.mark.parametrize("alike", [True, False])
def test_a_sampler_moves_to_another_world_if_it_was_alike_on_all_ranks(pool: Pool, tmp_path: Path, alike: bool) -> None:
    pool.results(save_sampler, 3, str(tmp_path), alike)
    for error, at in pool.results(restore_sampler, 2, str(tmp_path)):
        assert (error[0], at) == (("", 5) if alike else ("Incompatible", 0))
        assert alike or "ckpt.PerRank(obj, on_resize=" in error[1]
