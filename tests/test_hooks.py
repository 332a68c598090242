"""Hooks are found, called, and contained: one that raises or hangs delays nobody and is named."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from ckpt.errors import Incompatible
from elastic import hooks
from elastic.hooks import Event, Excluded, Failure, Hooks, load

EVENT = Event(3, ("one", "two"), 1, "test", joined=("two",))


class Heard:
    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.enough = threading.Event()

    def on_membership(self, event: Event) -> None:
        self.events.append(("membership", event.generation, event.rank, event.world, event.joined))

    def on_worker_failure(self, failure: Failure) -> None:
        self.events.append(("failure", failure.exit_code, failure.signal))

    def on_leave(self, reason: str) -> None:
        self.events.append(("leave", reason))
        self.enough.set()


class Faulty:
    def __init__(self) -> None:
        self.release = threading.Event()

    def on_membership(self, event: Event) -> None:
        raise SystemExit(7)

    def on_worker_failure(self, failure: Failure) -> None:
        self.release.wait(30)


def test_all_are_called_in_order_though_one_raises_and_one_hangs(caplog: pytest.LogCaptureFixture) -> None:
    heard, faulty = Heard(), Faulty()
    found = Hooks((("hooks faulty", faulty), ("hooks heard", heard)), limit_s=0.05)
    with caplog.at_level(logging.ERROR):
        found.tell("on_membership", EVENT)
        found.tell("on_worker_failure", Failure(1, None, 9))
        found.tell("on_leave", "done")
        assert heard.enough.wait(30)
        found.finish(30)
    assert heard.events == [("membership", 3, 1, 2, ("two",)), ("failure", None, 9), ("leave", "done")]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "hooks faulty: on_membership raised SystemExit: 7",
        "hooks faulty: on_worker_failure did not return within 0.05 s",
    ]
    faulty.release.set()


class Broken:
    def pre_join(self) -> None:
        raise RuntimeError("device 3 is broken")


class Slow:
    release = threading.Event()

    def pre_join(self) -> None:
        self.release.wait(30)


def test_a_node_is_kept_out_by_a_hook_that_raises_or_hangs() -> None:
    with pytest.raises(
        Excluded, match=r"hooks b: pre_join raised RuntimeError: device 3 is broken; this node does not"
    ):
        Hooks((("hooks b", Broken()),)).pre_join()
    with pytest.raises(Excluded, match=r"hooks s: pre_join did not return within 0.05 s"):
        Hooks((("hooks s", Slow()),), limit_s=0.05).pre_join()
    Slow.release.set()
    Hooks((("hooks h", Heard()),)).pre_join()


def test_hooks_come_from_the_environment_and_from_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_hooks.py").write_text(
        "class A:\n    made = True\n\nclass N:\n    class B: pass\n\nthing = object()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hooks, "_added", [heard := Heard()])
    found = load("my_hooks:A, my_hooks:N.B,my_hooks:thing", 1.0)
    assert [name for name, _ in found.named] == [
        "hooks Heard", "hooks my_hooks:A", "hooks my_hooks:N.B", "hooks my_hooks:thing"
    ]  # fmt: skip
    assert found.named[0][1] is heard
    assert isinstance(found.named[1][1], sys.modules["my_hooks"].A)


@pytest.mark.parametrize(
    "text", ["no_such_module:x", "elastic.hooks:nothing", "elastic.hooks:Event.x", "elastic.hooks:Event"]
)
def test_hooks_that_are_not_there_are_an_error(text: str) -> None:
    with pytest.raises(Incompatible, match=r"cannot be loaded.*module:object"):
        load(text, 1.0)
