"""`ckpt bench`: the arithmetic by hand, and the measuring against real stores. How fast anything is decides no test."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import ckpt
from ckpt.bench import MOVES, Rates, amount, cost_of, measure
from ckpt.cli import cli
from ckpt.errors import Corrupt, StorageError
from ckpt.interval import daly_s
from ckpt.manifest import digest
from ckpt.plan import RUN_BYTES
from ckpt.store import DataWriter
from ckpt.stores.posix import PosixStore

GB = 10**9
RATES = Rates(
    first_copy_bytes_per_s=1 * GB,
    copy_bytes_per_s=4 * GB,
    digest_bytes_per_s=8 * GB,
    write_bytes_per_s=2 * GB,
    read_bytes_per_s=5 * GB,
    record_s=0.1,
)


def bench(*arguments: str | Path) -> dict[str, Any]:
    done = CliRunner().invoke(cli, ["bench", *map(str, arguments), "--mb", "4", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_a_save_costs_follows_from_the_rates() -> None:
    cost = cost_of(RATES, 20 * GB, mtbf_s=10_000)
    assert (cost.first_copied_s, cost.copied_s, cost.restored_s) == (20, 5, 4)
    assert cost.durable_s == pytest.approx(20 / 2 + 3 * 0.1)
    assert cost.interval_s == pytest.approx(daly_s(5, 10_000))
    assert 0.03 < cost.lost < 0.04  # 5 s each 317 s, half of which is lost each 10,000 s, and 10.3 s more


def test_a_slow_store_holds_the_interval_back() -> None:
    cost = cost_of(RATES, 20_000 * GB, mtbf_s=1000)
    assert cost.interval_s == pytest.approx(cost.durable_s)
    assert cost.lost == 1


def test_a_directory_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    ram = os.environ["CKPT_RAM_DIR"]
    before = set(os.listdir(ram))  # what keepers of other tests have there
    found = bench(tmp_path / "run", "--state-gb", "2", "--mtbf", "3")
    assert found["url"] == str(tmp_path / "run")
    assert found["moved_bytes"] == RUN_BYTES
    assert all(rate > 0 for rate in found["rates"].values())
    cost = found["cost"]
    assert (cost["state_bytes"], cost["mtbf_s"]) == (2 * GB, 3 * 3600)
    assert cost["copied_s"] == pytest.approx(2 * GB / found["rates"]["copy_bytes_per_s"])
    assert list((tmp_path / "run").iterdir()) == []
    assert set(os.listdir(ram)) <= before


def test_without_a_size_the_newest_step_of_the_run_counts(tmp_path: Path) -> None:
    assert bench(tmp_path)["cost"] is None
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        for step, size in (1, 70_000), (2, 300_000):
            checkpointer.save(step, {"x": torch.zeros(size)}, blocking=True)
    before = sorted(tmp_path.rglob("*"))
    assert 1_200_000 < bench(tmp_path)["cost"]["state_bytes"] < 1_300_000
    assert sorted(tmp_path.rglob("*")) == before


def test_for_a_person_it_says_how_often_to_save(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["bench", str(tmp_path), "--mb", "4"], catch_exceptions=False)
    assert "has no step yet: --state-gb N says" in done.stdout
    done = CliRunner().invoke(cli, ["bench", str(tmp_path), "--mb", "4", "--state-gb", "1"], catch_exceptions=False)
    assert "With a failure every 24 h: save every " in done.stdout
    assert "ckpt.Every.auto(mtbf_s=86400)" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_all_that_is_moved_is_told(tmp_path: Path) -> None:
    told: list[int] = []
    measure(PosixStore(str(tmp_path)), 3 * RUN_BYTES, digest, told.append)
    assert sum(told) == MOVES * 3 * RUN_BYTES
    assert amount(1) == RUN_BYTES
    assert amount(RUN_BYTES + 1) == 2 * RUN_BYTES


class _Flips(PosixStore):
    """A store that changes a byte of what it is given."""

    def write_data(self, path: str, nbytes: int) -> DataWriter:
        writer = super().write_data(path, nbytes)
        write = writer.write

        def flipped(at: int, memory: memoryview) -> None:
            memory[5] ^= 1
            write(at, memory)

        writer.write = flipped  # type: ignore[method-assign]
        return writer


def test_a_store_that_changes_bytes_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="other bytes came back"):
        measure(_Flips(str(tmp_path)), RUN_BYTES, digest, lambda nbytes: None)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written to"):
        measure(PosixStore(str(tmp_path / "file")), RUN_BYTES, digest, lambda nbytes: None)


def test_no_room_for_a_ram_tier_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_RAM_DIR", str(tmp_path / "new"))
    assert amount(1) == RUN_BYTES
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CKPT_RAM_DIR", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="CKPT_RAM_DIR"):
        amount(1)
