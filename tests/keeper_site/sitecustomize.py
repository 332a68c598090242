"""On the path of keepers that a test wants to die at a certain point (`points`), or whose work it records (`crash`)."""

import os
import sys

if "ckpt.keeper" in sys.orig_argv:
    import crash
    import points

    if points.VARIABLE in os.environ:
        points.arm_keeper()
    if crash.VARIABLE in os.environ:
        crash.record_keeper()
