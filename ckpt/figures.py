"""What a save cost, and where that is reported: the log, Prometheus, TensorBoard, a callable of your own.

Owns the figures, their wording and names; measuring them is the caller's, and so is on which rank they are reported
(one of them: rank 0). A reporter is a callable that takes a `SaveFigures` or a `SaveFailure`. The two that need
packages of their own import them when they are made.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

log = logging.getLogger("ckpt")


@dataclass(frozen=True, kw_only=True)
class SaveFigures:
    """One committed save, all ranks together. Durations in seconds since the save was asked for, `blocked_s` apart.

    `nbytes` is what was saved, `written_bytes_per_s` the speed at which it became durable, `limit_bytes_per_s` the
    best that the disk was seen to do (None: not known). `skipped` counts the saves that were left out since the one
    before because too many were in flight, `in_flight` those that are after this one.
    """

    step: int
    nbytes: int
    blocked_s: float
    copied_s: float
    durable_s: float
    written_bytes_per_s: float
    limit_bytes_per_s: float | None = None
    skipped: int = 0
    in_flight: int = 0

    @property
    def share_of_limit(self) -> float | None:
        """Speed of this save over the disk's best; None where that is not known."""
        return self.written_bytes_per_s / self.limit_bytes_per_s if self.limit_bytes_per_s else None

    def line(self) -> str:
        """The one log line of a save."""
        share = "" if self.share_of_limit is None else f" ({100 * self.share_of_limit:.0f} % of the disk's best)"
        return (
            f"saved step {self.step}: {_bytes(self.nbytes)}, blocked {_seconds(self.blocked_s)}, "
            f"copied {_seconds(self.copied_s)}, durable {_seconds(self.durable_s)}, "
            f"{_bytes(self.written_bytes_per_s)}/s{share}"
            f"{f', {self.skipped} skipped before it' if self.skipped else ''}"
            f"{f', {self.in_flight} in flight' if self.in_flight else ''}"
        )

    def fields(self) -> dict[str, Any]:
        """The same for structured logs: plain values, always these keys in this order, None for what is not known."""
        numbers = {**asdict(self), "share_of_limit": self.share_of_limit}
        return {"event": "saved", **{name: _json(value) for name, value in numbers.items()}}


@dataclass(frozen=True)
class SaveFailure:
    """A save that did not commit: its step, the name of the error's type, and its message."""

    step: int
    error_kind: str
    message: str

    def line(self) -> str:
        """The one log line of a failed save."""
        return f"save of step {self.step} failed: {self.error_kind}: {self.message}"

    def fields(self) -> dict[str, Any]:
        """The same for structured logs."""
        return {"event": "save_failed", **asdict(self)}


Figures = SaveFigures | SaveFailure
Reporter = Callable[[Figures], object]


def log_line(figures: Figures) -> None:
    """A reporter: one line to the logger `ckpt`; the record's attribute `ckpt` holds the fields, for JSON logs."""
    level = logging.ERROR if isinstance(figures, SaveFailure) else logging.INFO
    log.log(level, "%s", figures.line(), extra={"ckpt": figures.fields()})


class Reporters:
    """Several reporters as one that cannot hurt training: it never raises, all are called in order each time.

    The first failure of each is logged, with its traceback; later ones of the same reporter are not.
    """

    def __init__(self, reporters: Iterable[Reporter] = ()) -> None:
        self._reporters = tuple(reporters)
        self._failed: set[int] = set()

    def __call__(self, figures: Figures) -> None:
        for position, reporter in enumerate(self._reporters):
            try:
                reporter(figures)
            except Exception:
                if position not in self._failed:
                    self._failed.add(position)
                    log.warning(
                        "reporter %.200r failed at step %d; it is called again, further failures of it are not logged",
                        reporter,
                        figures.step,
                        exc_info=True,
                    )


# Prometheus


_BLOCKED_BUCKETS_S = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.3, 1, 3, 10, 30, 100)
_DURABLE_BUCKETS_S = (0.03, 0.1, 0.3, 1, 2, 5, 10, 20, 60, 180, 600, 1800)


class Prometheus:
    """A reporter: metrics `holdfast_*` in `registry` (the client's default), all with the constant `labels`.

    Several may share a registry if their labels have the same names. Serving or pushing the registry is the caller's.
    `ImportError` without prometheus-client, `ValueError` for label names that are taken or do not fit.
    """

    def __init__(self, registry: CollectorRegistry | None = None, labels: Mapping[str, str] | None = None) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise _missing("Prometheus", "prometheus-client", "prometheus") from error
        self._labels = {name: str(value) for name, value in sorted((labels or {}).items())}
        if taken := self._labels.keys() & {"outcome", "le"}:
            raise ValueError(f"label {taken.pop()!r} is the metrics' own; give yours another name")
        self._metrics = _metrics_in(registry or prometheus_client.REGISTRY, tuple(self._labels))
        for outcome in ("committed", "failed"):  # there from the start, as zero: a rate needs a value before the first
            self._metrics.saves.labels(**self._labels, outcome=outcome)

    def __call__(self, figures: Figures) -> None:
        metrics, labels = self._metrics, self._labels
        if isinstance(figures, SaveFailure):
            metrics.saves.labels(**labels, outcome="failed").inc()
            return
        metrics.saves.labels(**labels, outcome="committed").inc()
        _of(metrics.skipped, labels).inc(figures.skipped)
        _of(metrics.nbytes, labels).inc(figures.nbytes)
        _of(metrics.blocked, labels).observe(figures.blocked_s)
        _of(metrics.copied, labels).observe(figures.copied_s)
        _of(metrics.durable, labels).observe(figures.durable_s)
        _of(metrics.speed, labels).set(figures.written_bytes_per_s)
        if figures.share_of_limit is not None:
            _of(metrics.share, labels).set(figures.share_of_limit)
        _of(metrics.in_flight, labels).set(figures.in_flight)
        _of(metrics.step, labels).set(figures.step)
        _of(metrics.at, labels).set_to_current_time()


@dataclass(frozen=True)
class _Metrics:
    """The metrics of one registry."""

    saves: Counter
    skipped: Counter
    nbytes: Counter
    blocked: Histogram
    copied: Histogram
    durable: Histogram
    speed: Gauge
    share: Gauge
    in_flight: Gauge
    step: Gauge
    at: Gauge


_REGISTERED: WeakKeyDictionary[CollectorRegistry, tuple[tuple[str, ...], _Metrics]] = WeakKeyDictionary()
"""A registry takes a metric once in its life, but a process may make several Checkpointers."""


def _metrics_in(registry: CollectorRegistry, names: tuple[str, ...]) -> _Metrics:
    if registry not in _REGISTERED:
        _REGISTERED[registry] = names, _register(registry, names)
    known, metrics = _REGISTERED[registry]
    if known != names:
        raise ValueError(f"this registry has holdfast's metrics with labels {known} already, not {names}: use those")
    return metrics


def _register(registry: CollectorRegistry, names: tuple[str, ...]) -> _Metrics:
    from prometheus_client import Counter, Gauge, Histogram

    def counter(name: str, text: str, *own: str) -> Counter:
        return Counter(f"holdfast_{name}", text, [*names, *own], registry=registry)

    def gauge(name: str, text: str) -> Gauge:
        return Gauge(f"holdfast_{name}", text, names, registry=registry)

    def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"holdfast_{name}", text, names, registry=registry, buckets=buckets)

    return _Metrics(
        saves=counter("saves_total", "Saves by outcome: committed or failed.", "outcome"),
        skipped=counter("saves_skipped_total", "Saves left out because too many were in flight."),
        nbytes=counter("saved_bytes_total", "Bytes of committed saves."),
        blocked=histogram("save_blocked_seconds", "Time for which a save blocked training.", _BLOCKED_BUCKETS_S),
        copied=histogram("save_copied_seconds", "Time until the state was copied.", _BLOCKED_BUCKETS_S),
        durable=histogram("save_durable_seconds", "Time until the save was durable.", _DURABLE_BUCKETS_S),
        speed=gauge("save_written_bytes_per_second", "Speed at which the last save became durable."),
        share=gauge("save_limit_ratio", "Speed of the last save over the best that the disk was seen to do."),
        in_flight=gauge("saves_in_flight", "Saves that are not durable yet."),
        step=gauge("last_saved_step", "Step of the last committed save."),
        at=gauge("last_save_timestamp_seconds", "When the last save was reported, in Unix time."),
    )


def _of(metric: Any, labels: Mapping[str, str]) -> Any:
    """The child for these labels; a metric without label names has none and is used as it is."""
    return metric.labels(**labels) if labels else metric


# TensorBoard


class _Writer(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...

    def flush(self) -> object: ...


class TensorBoard:
    """A reporter: scalars `ckpt/*`, named as in `fields`, at the saved step, through a `SummaryWriter`.

    Given a directory instead of a writer it makes one of its own, which `close` closes; each report is flushed.
    `ImportError` without tensorboard.
    """

    def __init__(self, writer_or_log_dir: _Writer | str | os.PathLike[str]) -> None:
        self._own: Any = None
        self._failed = 0
        if isinstance(writer_or_log_dir, str | os.PathLike):
            self._own = _summary_writer(os.fspath(writer_or_log_dir))
            self._writer: _Writer = self._own
        else:
            self._writer = writer_or_log_dir

    def __call__(self, figures: Figures) -> None:
        if isinstance(figures, SaveFailure):
            self._failed += 1
            self._writer.add_scalar("ckpt/failed", self._failed, figures.step)
        else:
            for name, value in figures.fields().items():
                if name not in ("event", "step") and value is not None:
                    self._writer.add_scalar(f"ckpt/{name}", value, figures.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the writer, if it is its own."""
        if self._own is not None:
            self._own.close()


def _summary_writer(log_dir: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("TensorBoard", "tensorboard", "tensorboard") from error
    return SummaryWriter(log_dir)


def _missing(reporter: str, package: str, extra: str) -> ImportError:
    return ImportError(f"ckpt.figures.{reporter} needs {package}: pip install 'holdfast[{extra}]'", name=package)


# Units


def _bytes(count: float) -> str:
    """Three digits and a decimal unit: 1.49 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:#.3g} {unit}".replace(". ", " ")
        count /= 1000
    return f"{count:.0f} PB" if count >= 99.95 else f"{count:#.3g} PB"


def _seconds(value: float) -> str:
    """At least two digits, down to the millisecond: 0.012 s, 0.31 s, 12.4 s."""
    digits = 3 if value < 0.0995 else 2 if value < 9.95 else 1 if value < 99.5 else 0
    return f"{value:.{digits}f} s"


def _json(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return None if isinstance(value, float) and not isfinite(value) else value
