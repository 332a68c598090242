"""What did not change is stored once: by whom it is referred to, how long it stays, and that it is read back right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Pool
from keepers import forget
from states import bits

import ckpt
from ckpt.check import check_step
from ckpt.copying import copy_steps
from ckpt.errors import Corrupt, Incompatible
from ckpt.holder import Holder
from ckpt.keeper.orders import Persist
from ckpt.keeper.stock import Stock
from ckpt.manifest import BLOCK_BYTES, Chunk, Part
from ckpt.records import Commit
from ckpt.restorer import StepReader
from ckpt.run import RunDirectory

FROZEN, LIVE = 3_000_000, 20_000  # elements


def state(step: int, *, frozen: int = FROZEN, live: int = LIVE) -> dict[str, Any]:
    """A large part that never changes, some small tensors of either kind, and a part of its own for each step."""
    base, now = torch.Generator().manual_seed(0), torch.Generator().manual_seed(step)
    return {
        "base": torch.randn(frozen, generator=base),
        "buffers": [torch.randn(5, i + 1, generator=base) for i in range(8)],
        "adapter": torch.randn(live, generator=now),
        "scales": [torch.randn(3, i + 1, generator=now) for i in range(8)],
        "n": step,
    }


def save_all(url: Path, steps: Iterator[int] | range, keep: ckpt.Keep | None = None, **sizes: int) -> None:
    with ckpt.Checkpointer(url, keep=keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, state(step, **sizes), blocking=True)
    forget()


def standing(url: Path) -> list[Commit]:
    return RunDirectory.open(url).log.read().standing()


def names(commits: list[Commit]) -> list[int]:
    return [commit.step for commit in commits]


def is_right(url: Path, step: int, **sizes: int) -> None:
    run = RunDirectory.open(url)
    commit = next(commit for commit in run.log.read().standing() if commit.step == step)
    assert check_step(run, commit).findings == ()
    found, target = ckpt.load(url, step=step), state(999, **sizes)
    assert torch.equal(found["base"], state(step, **sizes)["base"])
    assert ckpt.restore(url, target, step=step) == step
    assert bits(target) == bits(state(step, **sizes))


def test_a_frozen_part_is_stored_once_and_every_step_is_whole(tmp_path: Path) -> None:
    save_all(tmp_path, range(1, 8))
    commits = standing(tmp_path)
    whole = commits[0].nbytes
    assert [commit.sources for commit in commits[:2]] == [(), ()], "the second save cannot know yet that it pays"
    for commit in commits[2:]:
        assert commit.sources == (commits[1].attempt,)
        assert commit.nbytes < 0.03 * whole
    for step in range(1, 8):
        is_right(tmp_path, step)


def test_what_is_referred_to_stays_and_leaves_with_the_last_that_needs_it(tmp_path: Path) -> None:
    save_all(tmp_path, range(1, 9), ckpt.Keep(last=2))
    assert names(standing(tmp_path)) == [2, 7, 8], "step 2 holds what did not change since"
    is_right(tmp_path, 2)
    changed = ckpt.Keep(last=2)
    for steps, left in ((range(9, 12), [2, 8, 10, 11]), (range(12, 14), [11, 12, 13])):
        with ckpt.Checkpointer(tmp_path, keep=changed) as checkpointer:
            assert checkpointer.restore(state(999)) == steps[0] - 1, "a step that the run went on from stays"
            for step in steps:
                other = state(step)
                other["base"] += step  # now everything changes
                checkpointer.save(step, other, blocking=True)
        forget()
        assert names(standing(tmp_path)) == left
    assert standing(tmp_path)[-1].sources == ()


def test_what_is_referred_to_stays_while_saves_overtake_each_other(tmp_path: Path) -> None:
    """The next save chooses what it refers to before the last is committed, which then would be deleted."""
    sizes = {"frozen": 700_000, "live": 300_000}
    with ckpt.Checkpointer(tmp_path, keep=ckpt.Keep(last=1)) as checkpointer:
        for step in range(1, 25):
            checkpointer.save(step, state(step, **sizes))
    forget()
    assert standing(tmp_path)[-1].step == 24
    for commit in standing(tmp_path):
        is_right(tmp_path, commit.step, **sizes)


def test_a_step_that_others_need_cannot_be_deleted(tmp_path: Path) -> None:
    save_all(tmp_path, range(1, 5))
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        target = state(999)
        checkpointer.restore(target)
        with pytest.raises(Incompatible, match=r"tensors of step \d lie in it"):
            checkpointer.delete(2)
    forget()
    is_right(tmp_path, 4)


def test_little_of_a_file_is_not_worth_to_keep_it(tmp_path: Path) -> None:
    """A fifth of the state changes only now and then: referred to while its file stays anyway, stored again after."""
    sizes = {"frozen": 200_000, "live": 800_000}
    save_all(tmp_path, range(1, 9), ckpt.Keep(last=3), **sizes)
    commits = standing(tmp_path)
    assert names(commits)[-3:] == [6, 7, 8]
    assert len(commits) <= 4
    assert any(commit.sources for commit in commits)
    for commit in commits:
        is_right(tmp_path, commit.step, **sizes)


def test_a_file_of_which_little_is_live_is_referred_to_only_if_it_stays_anyway() -> None:
    def part(attempt: str, **digests: bytes) -> Part:
        chunks = [
            Chunk(key, (0,), (1024,), "F32", "", 4096 * (i + 1), 4096, "raw", digest * 16)
            for i, (key, digest) in enumerate(sorted(digests.items()))
        ]
        return Part(0, attempt, 4096 * (len(chunks) + 1), tuple(chunks), {}, {})

    old, new = "000000001.a", "000000002.b"
    before, stock = part(old, a=b"1", b=b"2", c=b"3", d=b"4"), Stock()
    stock.add(before)
    little, half = part(new, a=b"1", b=b"7", c=b"8", d=b"9"), part(new, a=b"1", b=b"2", c=b"3", d=b"9")
    assert stock.in_store(Persist(new, old), little.chunks) == {}
    assert list(stock.in_store(Persist(new, old, frozenset({old})), little.chunks)) == [0]
    found = stock.in_store(Persist(new, old), half.chunks)
    assert {i: (chunk.file, chunk.at) for i, chunk in found.items()} == {
        i: (f"{old}/r00000.safetensors", 4096 * (i + 1)) for i in range(3)
    }
    assert stock.in_store(Persist(new, "000000001.c", frozenset({old})), half.chunks) == {}, "a base that is not known"


def test_without_a_rule_everything_stays_and_may_be_referred_to(tmp_path: Path) -> None:
    sizes = {"frozen": 200_000, "live": 800_000}
    save_all(tmp_path, range(1, 6), **sizes)
    assert all(commit.sources for commit in standing(tmp_path)[2:])
    is_right(tmp_path, 5, **sizes)


def test_going_back_refers_to_the_lineage_only(tmp_path: Path) -> None:
    save_all(tmp_path, range(1, 6))
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        target = state(999)
        assert checkpointer.restore(target, step=3) == 3
        for step in (4, 5, 6):
            checkpointer.save(step, state(step), blocking=True)
    forget()
    run = RunDirectory.open(tmp_path)
    view = run.log.read()
    lineage = {commit.attempt for commit in view.lineage()}
    assert all(set(commit.sources) <= lineage for commit in view.lineage())
    is_right(tmp_path, 6)


def test_a_copy_of_a_step_is_whole_by_itself(tmp_path: Path) -> None:
    save_all(tmp_path / "from", range(1, 5))
    source = RunDirectory.open(tmp_path / "from")
    last = source.log.read().standing()[-1]
    assert last.sources
    made = copy_steps(
        source, [last], Holder(RunDirectory.open(tmp_path / "to", create=True), run_id=None, takeover=False)
    )
    assert [(commit.sources, commit.content_digest) for commit in made] == [((), last.content_digest)]
    is_right(tmp_path / "to", 4)


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_damage_to_a_source_is_found_in_each_step_that_needs_it(tmp_path: Path, how: str) -> None:
    save_all(tmp_path, range(1, 5))
    run = RunDirectory.open(tmp_path)
    last = run.log.read().standing()[-1]
    path = tmp_path / "steps" / last.sources[0] / "r00000.safetensors"
    if how == "flip":
        chunk = next(chunk for chunk in StepReader(run, last).part(0).chunks if chunk.key == "base")
        with path.open("r+b") as file:
            file.seek(chunk.at + BLOCK_BYTES + 7)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 4]))
    elif how == "cut":
        with path.open("r+b") as file:
            file.truncate(FROZEN)
    else:
        path.unlink()
    findings = check_step(run, last).findings
    assert {finding.file for finding in findings} == {f"steps/{last.sources[0]}/r00000.safetensors"}
    with pytest.raises(Corrupt, match=last.sources[0]):
        ckpt.restore(tmp_path, state(999))
    target = state(999)
    assert ckpt.restore(tmp_path, target, fallback=True) == 1
    assert bits(target) == bits(state(1))


def _sharded(rank: int, world: int, url: str, steps: tuple[int, ...]) -> int | None:
    rows = torch.arange(120_000, dtype=torch.float32).reshape(1200, 100)
    size = 1200 // world
    mine = rows[rank * size : (rank + 1) * size].clone()
    live = torch.full((300,), 0.0)
    shards = {"base": ckpt.Shard(mine, (1200, 100), (rank * size, 0)), "live": live, "n": 0}
    with ckpt.Checkpointer(url) as checkpointer:
        start = checkpointer.restore(shards)
        assert torch.equal(mine, rows[rank * size : (rank + 1) * size])
        assert start is None or float(live[0]) == start
        for step in steps:
            live.fill_(step)
            shards["n"] = step
            checkpointer.save(step, shards, blocking=True)
    return start


def test_at_another_world_size(tmp_path: Path) -> None:
    pool = Pool(3)
    try:
        assert pool.results(_sharded, 2, str(tmp_path), (1, 2, 3, 4)) == [None, None]
        assert pool.results(_sharded, 3, str(tmp_path), (5, 6, 7)) == [4, 4, 4]
        assert pool.results(_sharded, 2, str(tmp_path), (8,)) == [7, 7]
    finally:
        pool.close()
    commits = standing(tmp_path)
    whole = commits[0].nbytes
    before = {commit.attempt: commit.step for commit in commits}
    for step, first in ((4, 1), (7, 5)):  # a rank that is copied before it is stored may refer to the first already
        sources = {before[source] for source in commits[step - 1].sources}
        assert sources
        assert sources <= set(range(first, step)), "of the same world size"
        assert commits[step - 1].nbytes < 0.1 * whole
    run = RunDirectory.open(tmp_path)
    assert all(check_step(run, commit).findings == () for commit in commits)
