"""Each framework: its example changes at most five lines, trains, dies by SIGKILL, and goes on to the same losses."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest
from programs import EXAMPLES, killed_and_resumed

FRAMEWORKS = sorted(path.parent.name for path in EXAMPLES.glob("*/before.py"))


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_example_changes_at_most_five_lines(name: str) -> None:
    texts = ((EXAMPLES / name / file).read_text() for file in ("before.py", "after.py"))
    before, after = ([line.replace("before.py", "after.py") for line in t.splitlines() if line] for t in texts)
    spans = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    changed = [max(b - a, d - c) for kind, a, b, c, d in spans if kind != "equal"]
    assert 0 < sum(changed) <= 5


def test_a_plain_loop(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "plain")


def test_a_plain_loop_on_two_ranks(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "plain", ranks=2)


def test_accelerate(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "accelerate")  # 25 updates in an epoch of 49 batches


def test_accelerate_on_two_ranks(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "accelerate", ranks=2, steps=195)  # 13 updates in an epoch of 25 batches


def test_the_trainer(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "transformers")  # 49 steps of two batches in an epoch


def test_the_trainer_on_two_ranks(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "transformers", ranks=2)  # 25 steps in an epoch of 49 batches
