"""In processes that are given it on PYTHONPATH: the clock on the wall is wrong by TEST_CLOCK_OFF_S seconds."""

import os
import time

_right, _off_s = time.time, float(os.environ.get("TEST_CLOCK_OFF_S", "0"))
time.time = lambda: _right() + _off_s
