"""How an agent behaves, as its environment says (ELASTIC_*)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ckpt.errors import Incompatible
from elastic.decide import Limits, Timing


@dataclass(frozen=True)
class Options:
    """Everything that an agent is told: limits, timing, and where it can be reached."""

    limits: Limits
    timing: Timing = field(default_factory=Timing)
    address: str = ""
    port: int = 0
    store_port: int = 0
    settle_s: float = 15.0
    notice_file: str = ""
    notice_url: str = ""
    notice_header: str = ""
    hooks: str = ""
    hook_limit_s: float = 60.0


def from_environment(minimum: int, maximum: int, environment: Mapping[str, str] = os.environ) -> Options:
    """The options of an agent whose --nnodes is minimum:maximum. Raises Incompatible for what cannot be used.

    ELASTIC_NODE_TIMEOUT_S        silence after which a node is lost, and a leader's counter stands still (10)
    ELASTIC_JOIN_WINDOW_S         a first start, and a larger membership, wait so long after the last joiner (3)
    ELASTIC_MIN_INTERVAL_S        a generation lasts so long before joiners end it (30)
    ELASTIC_GROW_WAIT_S           joiners end it right after a commit, or after so long without one (300)
    ELASTIC_MIN_WAIT_S            with fewer nodes than MIN the job ends after so long, with exit code 75 (1800)
    ELASTIC_STOP_LIMIT_S          a node that has not stopped its workers by then is left behind (60)
    ELASTIC_PAUSE_LIMIT_S         workers that were asked to stop for a planned change are killed after so long (300)
    ELASTIC_HANG_LIMIT_S          a worker in its loop that makes no step for so long hangs (10 times the longest step
                                  that was seen, at least 300)
    ELASTIC_NOTICE_FILE           once there is a file of this name, this node leaves as planned
    ELASTIC_NOTICE_URL            once it answers with a text that is not FALSE, this node leaves as planned
    ELASTIC_NOTICE_HEADER         what it is asked with, <name>: <value>
    ELASTIC_SETTLE_S              how long the keeper may take to store what the workers left, before a restart (15)
    ELASTIC_QUARANTINE_FAILURES   a node that is the first to fail so often is not used if others suffice (2; 0: never)
    ELASTIC_QUARANTINE_WINDOW_S   failures longer ago than this are forgotten (600)
    ELASTIC_FRUITLESS_LIMIT       so many failures in a row, each within 10 minutes and without a commit in between, end
                                  the job with exit code 76 (10; 2 where workers end with 13, as ckpt.Incompatible does;
                                  0: never)
    ELASTIC_UNIT                  the number of nodes is a multiple of this (1)
    ELASTIC_ADDRESS, ELASTIC_PORT, ELASTIC_STORE_PORT
                                  where agents reach this one, and workers the store of a generation (found; free ones)
    ELASTIC_KEEP_LOGS             with a log directory: of how many generations outputs are kept (10)
    ELASTIC_HOOKS                 module:object with hooks, several with commas
    ELASTIC_HOOK_LIMIT_S          a hook that takes longer is left to itself (60)
    """
    take = _Taker(environment)
    kept_logs(environment)  # refused now, not at the first start of workers
    try:
        return Options(
            limits=Limits(minimum, maximum, take.count("UNIT", 1)),
            timing=Timing(
                node_timeout_s=take.seconds("NODE_TIMEOUT_S", Timing.node_timeout_s),
                join_window_s=take.seconds("JOIN_WINDOW_S", Timing.join_window_s),
                min_interval_s=take.seconds("MIN_INTERVAL_S", Timing.min_interval_s),
                grow_wait_s=take.seconds("GROW_WAIT_S", Timing.grow_wait_s),
                min_wait_s=take.seconds("MIN_WAIT_S", Timing.min_wait_s),
                stop_limit_s=take.seconds("STOP_LIMIT_S", Timing.stop_limit_s),
                hang_limit_s=take.seconds("HANG_LIMIT_S", Timing.hang_limit_s),
                pause_limit_s=take.seconds("PAUSE_LIMIT_S", Timing.pause_limit_s),
                quarantine_failures=take.count("QUARANTINE_FAILURES", Timing.quarantine_failures),
                fruitless_limit=take.count("FRUITLESS_LIMIT", Timing.fruitless_limit),
                quarantine_window_s=take.seconds("QUARANTINE_WINDOW_S", Timing.quarantine_window_s),
            ),
            address=take.text("ADDRESS"),
            port=take.count("PORT", 0),
            store_port=take.count("STORE_PORT", 0),
            settle_s=take.seconds("SETTLE_S", Options.settle_s),
            notice_file=take.text("NOTICE_FILE"),
            notice_url=take.text("NOTICE_URL"),
            notice_header=take.text("NOTICE_HEADER"),
            hooks=take.text("HOOKS"),
            hook_limit_s=take.seconds("HOOK_LIMIT_S", Options.hook_limit_s),
        )
    except ValueError as error:
        raise Incompatible(
            f"elastic cannot start: {error}. Correct --nnodes or the variable, and start again"
        ) from error


def kept_logs(environment: Mapping[str, str] = os.environ) -> int:
    """Of how many generations what the workers wrote is kept: ELASTIC_KEEP_LOGS (10), 1 at least."""
    try:
        return max(1, _Taker(environment).count("KEEP_LOGS", 10))
    except ValueError as error:
        raise Incompatible(f"elastic cannot keep logs: {error}. Correct the variable, and start again") from error


class _Taker:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def text(self, name: str) -> str:
        return self._environment.get(f"ELASTIC_{name}", "")

    def count(self, name: str, default: int) -> int:
        text = self.text(name)
        if text and not text.isdecimal():
            raise ValueError(f"ELASTIC_{name} is a number of 0 or more, not {text!r:.100}")
        return int(text) if text else default

    def seconds(self, name: str, default: float) -> float:
        text = self.text(name)
        try:
            found = float(text) if text else default
        except ValueError:
            found = -1.0
        if not 0 <= found < 1e9:
            raise ValueError(f"ELASTIC_{name} is a number of seconds, not {text!r:.100}")
        return found
