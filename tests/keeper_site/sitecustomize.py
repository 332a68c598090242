"""On the path of keepers that a test wants to die at a certain point; see `points`."""

import sys

if "ckpt.keeper" in sys.orig_argv:
    import points

    points.arm_keeper()
