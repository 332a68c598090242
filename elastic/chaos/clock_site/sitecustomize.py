"""In processes that are given this folder on PYTHONPATH: the wall clock is off by the seconds that the file
HOLDFAST_CHAOS_CLOCK holds at that moment. Monotonic clocks are right, as on a host whose clock is set.

Python's `time.time` alone: a library that wraps the C functions breaks the sleeps of Python 3.11.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import time

_right, _right_ns = time.time, time.time_ns


def _off_s() -> float:
    try:
        with open(os.environ["HOLDFAST_CHAOS_CLOCK"]) as file:
            return float(file.read() or 0)
    except (OSError, KeyError, ValueError):
        return 0.0


time.time = lambda: _right() + _off_s()
time.time_ns = lambda: _right_ns() + int(_off_s() * 1e9)

# The module of this name that would have been imported without this one.
_others = [path for path in sys.path if os.path.realpath(path) != os.path.dirname(os.path.realpath(__file__))]
if (_spec := importlib.machinery.PathFinder.find_spec("sitecustomize", _others)) is not None and _spec.loader:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
