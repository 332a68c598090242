"""Hooks that the tests' agents load: they write down what they are told."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

from elastic.hooks import Event, Failure


class Told:
    def on_membership(self, event: Event) -> None:
        self._write("on_membership", world=event.world, **asdict(event))

    def on_worker_failure(self, failure: Failure) -> None:
        self._write("on_worker_failure", **asdict(failure))

    def on_leave(self, reason: str) -> None:
        self._write("on_leave", reason=reason)

    def _write(self, hook: str, **more: Any) -> None:
        with open(os.environ["TEST_TOLD"], "a") as out:
            out.write(json.dumps({"hook": hook, **more}) + "\n")
