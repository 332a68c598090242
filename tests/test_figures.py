"""What a save cost: its log line, its fields, and the same read back from Prometheus and TensorBoard."""

from __future__ import annotations

import gc
import json
import logging
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from ckpt.figures import Figures, Prometheus, Reporters, SaveFailure, SaveFigures, TensorBoard, log_line

SAVED = SaveFigures(
    step=1200,
    nbytes=1_490_000_000,
    blocked_s=0.012,
    copied_s=0.31,
    durable_s=0.93,
    written_bytes_per_s=1.73e9,
    limit_bytes_per_s=1.9e9,
)
FAILED = SaveFailure(1300, "StorageError", "disk full")


# Words


def test_the_line_of_a_save() -> None:
    assert SAVED.line() == (
        "saved step 1200: 1.49 GB, blocked 0.012 s, copied 0.31 s, durable 0.93 s, 1.73 GB/s (91 % of the disk's best)"
    )
    more = replace(SAVED, limit_bytes_per_s=None, skipped=2, in_flight=1)
    assert more.line().endswith("durable 0.93 s, 1.73 GB/s, 2 skipped before it, 1 in flight")
    assert more.share_of_limit is None
    assert FAILED.line() == "save of step 1300 failed: StorageError: disk full"


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (123_456, "123 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (20 * 10**9, "20.0 GB"),
        (3 * 10**12, "3.00 TB"),
        (7 * 10**15, "7.00 PB"),
        (4200 * 10**15, "4200 PB"),
    ],
)
def test_bytes_are_said_in_three_digits(nbytes: int, said: str) -> None:
    assert replace(SAVED, nbytes=nbytes).line().split(": ")[1].split(",")[0] == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "0.000"),
        (0.0994, "0.099"),
        (0.0996, "0.10"),
        (9.94, "9.94"),
        (9.96, "10.0"),
        (99.6, "100"),
        (5000, "5000"),
    ],
)
def test_seconds_are_said_to_what_matters(seconds: float, said: str) -> None:
    assert f"durable {said} s," in replace(SAVED, durable_s=seconds).line()


def test_the_fields_are_json_and_always_the_same() -> None:
    fields = SAVED.fields()
    assert list(fields) == [
        "event",
        "step",
        "nbytes",
        "blocked_s",
        "copied_s",
        "durable_s",
        "written_bytes_per_s",
        "limit_bytes_per_s",
        "skipped",
        "in_flight",
        "share_of_limit",
    ]
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert (fields["event"], fields["nbytes"], fields["share_of_limit"]) == ("saved", 1_490_000_000, 1.73 / 1.9)
    unknown = replace(SAVED, limit_bytes_per_s=None, written_bytes_per_s=float("inf")).fields()
    assert list(unknown) == list(fields)
    assert (unknown["written_bytes_per_s"], unknown["limit_bytes_per_s"], unknown["share_of_limit"]) == (None,) * 3
    assert FAILED.fields() == {
        "event": "save_failed",
        "step": 1300,
        "error_kind": "StorageError",
        "message": "disk full",
    }


def test_the_log_has_one_line_a_save(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ckpt"):
        log_line(SAVED)
        log_line(FAILED)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", SAVED.line()),
        ("ERROR", FAILED.line()),
    ]
    assert [r.__dict__["ckpt"] for r in caplog.records] == [SAVED.fields(), FAILED.fields()]


# Reporters that fail


def test_a_reporter_that_raises_hurts_nobody_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Figures] = []
    asked: list[int] = []

    def broken(figures: Figures) -> None:
        asked.append(figures.step)
        raise RuntimeError("no such host")

    def broken_too(figures: Figures) -> None:
        raise OSError("full")

    report = Reporters([broken, heard.append, broken_too])
    report(SAVED)
    report(FAILED)
    report(SAVED)
    assert heard == [SAVED, FAILED, SAVED]
    assert asked == [1200, 1300, 1200]
    warned = [r for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 2
    assert "broken" in warned[0].getMessage()
    assert "no such host" in caplog.text
    assert "full" in caplog.text


def test_a_reporter_can_not_swallow_an_interrupt() -> None:
    def interrupted(figures: Figures) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Reporters([interrupted])(SAVED)


# Prometheus


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """Every sample of the exposition text, as `name{label=value,...}`."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_prometheus_tells_what_was_reported() -> None:
    registry = CollectorRegistry()
    report = Prometheus(registry)
    assert samples(registry)["holdfast_saves_total{outcome=failed}"] == 0
    report(SAVED)
    report(replace(SAVED, step=1400, nbytes=10, durable_s=4.0, skipped=3, in_flight=2, limit_bytes_per_s=None))
    report(FAILED)
    told = samples(registry)
    expected = {
        "holdfast_saves_total{outcome=committed}": 2,
        "holdfast_saves_total{outcome=failed}": 1,
        "holdfast_saves_skipped_total": 3,
        "holdfast_saved_bytes_total": 1_490_000_010,
        "holdfast_save_blocked_seconds_count": 2,
        "holdfast_save_blocked_seconds_sum": 0.024,
        "holdfast_save_blocked_seconds_bucket{le=0.01}": 0,
        "holdfast_save_blocked_seconds_bucket{le=0.02}": 2,
        "holdfast_save_copied_seconds_sum": 0.62,
        "holdfast_save_durable_seconds_sum": 4.93,
        "holdfast_save_durable_seconds_bucket{le=1.0}": 1,
        "holdfast_save_durable_seconds_bucket{le=5.0}": 2,
        "holdfast_save_written_bytes_per_second": 1.73e9,
        "holdfast_save_limit_ratio": 1.73 / 1.9,
        "holdfast_saves_in_flight": 2,
        "holdfast_last_saved_step": 1400,
    }
    assert {name: told[name] for name in expected} == pytest.approx(expected)
    assert told["holdfast_last_save_timestamp_seconds"] > 1.7e9


def test_prometheus_labels_and_several_reporters_in_one_registry() -> None:
    registry = CollectorRegistry()
    one, two = (Prometheus(registry, {"run": run, "node": "n1"}) for run in "ab")
    one(SAVED)
    two(FAILED)
    two(SAVED)
    two(SAVED)
    told = samples(registry)
    assert told["holdfast_last_saved_step{node=n1,run=a}"] == 1200
    assert told["holdfast_saves_total{node=n1,outcome=committed,run=a}"] == 1
    assert told["holdfast_saves_total{node=n1,outcome=committed,run=b}"] == 2
    assert told["holdfast_saves_total{node=n1,outcome=failed,run=b}"] == 1
    assert told["holdfast_save_durable_seconds_count{node=n1,run=b}"] == 2
    with pytest.raises(ValueError, match="already"):
        Prometheus(registry)
    for taken in ("outcome", "le"):
        with pytest.raises(ValueError, match="own"):
            Prometheus(CollectorRegistry(), {taken: "x"})


def test_prometheus_uses_the_default_registry_and_holds_no_other() -> None:
    Prometheus()(SAVED)
    assert REGISTRY.get_sample_value("holdfast_last_saved_step") == 1200
    Prometheus()  # a second Checkpointer of the process
    registry = CollectorRegistry()
    Prometheus(registry)(SAVED)
    gone = weakref.ref(registry)
    del registry
    gc.collect()
    assert gone() is None


# TensorBoard


def scalars(path: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(path)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_what_was_reported(tmp_path: Path) -> None:
    report = TensorBoard(tmp_path / "runs")
    report(SAVED)
    report(FAILED)
    report(replace(SAVED, step=1400, limit_bytes_per_s=None, durable_s=2.0, skipped=1))
    report(replace(FAILED, step=1500))
    told = scalars(tmp_path / "runs")  # before it is closed: a crash loses nothing
    report.close()
    assert set(told) == {
        *("ckpt/nbytes", "ckpt/blocked_s", "ckpt/copied_s", "ckpt/durable_s", "ckpt/written_bytes_per_s"),
        *("ckpt/limit_bytes_per_s", "ckpt/share_of_limit", "ckpt/skipped", "ckpt/in_flight", "ckpt/failed"),
    }
    assert told["ckpt/durable_s"] == [(1200, pytest.approx(0.93)), (1400, 2.0)]
    assert told["ckpt/nbytes"] == [(1200, pytest.approx(1.49e9)), (1400, pytest.approx(1.49e9))]
    assert told["ckpt/share_of_limit"] == [(1200, pytest.approx(1.73 / 1.9))]
    assert told["ckpt/skipped"] == [(1200, 0), (1400, 1)]
    assert told["ckpt/failed"] == [(1300, 1), (1500, 2)]


def test_tensorboard_leaves_a_given_writer_open(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        report = TensorBoard(writer)
        report(SAVED)
        report.close()
        writer.add_scalar("loss", 0.5, 1201)
    told = scalars(tmp_path)
    assert (told["ckpt/blocked_s"], told["loss"]) == ([(1200, pytest.approx(0.012))], [(1201, 0.5)])


# Extras


@pytest.mark.parametrize(
    ("make", "package", "said"),
    [
        (lambda path: Prometheus(), "prometheus_client", r"Prometheus needs .*pip install 'holdfast\[prometheus\]'"),
        (lambda path: TensorBoard(path), "tensorboard", r"TensorBoard needs .*pip install 'holdfast\[tensorboard\]'"),
    ],
)
def test_a_missing_extra_is_named(
    make: Any, package: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed: its import fails
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    with pytest.raises(ImportError, match=said):
        make(tmp_path)
    assert list(tmp_path.iterdir()) == []
