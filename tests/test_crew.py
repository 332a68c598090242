"""Workers are watched by their board: how long is too long, and where they are when they hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from keepers import until

import ckpt
from ckpt.board import Place
from elastic.crew import Crew
from elastic.decide import hang_limit_s
from elastic.stacks import locate

ROOT = str(Path(ckpt.__file__).parents[1])
HANGS = """
import threading
from ckpt.board import Place

def deep():
    threading.Event().wait()

place = Place.of()
with place.watched():
    place.moved(41)
    place.moved(42)
    deep()
"""


@pytest.mark.parametrize(
    ("stated", "said", "moves", "longest", "limit"),
    [
        (0, 0, 9, 1.0, None),  # too little is known
        (0, 0, 10, 1.0, 300),
        (0, 0, 10, 60.0, 600),
        (20, 0, 0, 60.0, 20),
        (20, 900, 10, 1.0, 900),
        (0, 30, 10, 60.0, 30),
    ],
)
def test_what_is_said_counts_most_then_what_is_stated_then_what_was_seen(
    stated: float, said: float, moves: int, longest: float, limit: float | None
) -> None:
    assert hang_limit_s(stated, said, moves, longest) == limit


def test_a_worker_that_makes_no_step_is_named_with_its_stack() -> None:
    crew = Crew(stated_hang_limit_s=0.001)
    more = {
        "CKPT_BOARD": crew.begin(),
        "LOCAL_RANK": "0",
        "RANK": "5",
        "PYTHONPATH": str(Path(ckpt.__file__).parents[1]),
    }
    process = subprocess.Popen([sys.executable, "-c", HANGS], env={**os.environ, **more})
    try:
        until("it has made two steps", lambda: crew.step() == 42)
        until("it hangs", lambda: crew.look(1).hangs.startswith("rank 5 has made no step for 0 s, since step 42"))
        assert crew.look(1).hangs == "", "said once"
        (stack,) = crew.trace()
        assert (stack.rank, stack.waits) == (5, False)
        assert stack.where.startswith("deep (<string>:")
        assert len(crew.trace()) == 1, "again"
        assert process.poll() is None, "the signal does not end it"
    finally:
        process.kill()
        process.wait()
    assert crew.trace() == ()


def test_outside_of_the_loop_nothing_hangs_and_a_phase_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew(stated_hang_limit_s=0.001)
    place = Place.of({"CKPT_BOARD": crew.begin(), "LOCAL_RANK": "0"})
    assert place is not None
    place.moved(1)
    until("a while has passed", lambda: crew.workers()[0].moved_s > 0.01)
    assert not crew.look(1).hangs
    with place.watched(), place.phase(1000):
        until("a while has passed", lambda: crew.workers()[0].moved_s > 0.01)
        assert not crew.look(1).hangs
    with place.watched():
        until("it hangs", lambda: crew.look(1).hangs)


WAITS = """Thread 0x00007f01 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 1 in wait

Current thread 0x00007f02 (most recent call first):
  File "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 3151 in broadcast
  File "/home/me/train.py", line 7 in main
"""
BACKWARD = """Current thread 0x00007f02 (most recent call first):
  File "/venv/lib/python3.11/site-packages/torch/autograd/graph.py", line 824 in _engine_run_backward
  File "/home/me/train.py", line 7 in main
"""
READS = """Current thread 0x00007f02 (most recent call first):
  File "/home/me/loader.py", line 3 in read
  File "/home/me/train.py", line 7 in main

Thread 0x00007f01 (most recent call first):
  File "/home/me/train.py", line 9 in main
"""


@pytest.mark.parametrize(
    ("text", "where", "waits"),
    [
        (WAITS, "main (train.py:7)", True),
        (BACKWARD, "main (train.py:7)", True),
        (READS, "main (train.py:9)", False),
        ("", "? (?:?)", False),
    ],
)
def test_a_rank_that_waits_for_others_is_told_from_one_that_does_not(text: str, where: str, waits: bool) -> None:
    found = locate(1, text)
    assert (found.where, found.waits) == (where, waits)


def test_what_was_saved_last_is_known() -> None:
    crew = Crew(stated_hang_limit_s=0)
    assert crew.saved() == 0
    place = Place.of({"CKPT_BOARD": crew.begin(), "LOCAL_RANK": "1"})
    assert place is not None
    place.saved(40, 0.1)
    place.moved(45)
    place.saved(30, 0.1)  # after going back
    assert (crew.saved(), crew.step()) == (30, 45)
