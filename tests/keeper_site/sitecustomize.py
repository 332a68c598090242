"""On the path of keepers that a test wants to die at a certain point (`points`), whose work it records (`crash`),
or whose files fail (`io_faults`)."""

import os
import sys

if "ckpt.keeper" in sys.orig_argv:
    import crash
    import io_faults
    import points

    if points.VARIABLE in os.environ:
        points.arm_keeper()
    if crash.VARIABLE in os.environ:
        crash.record_keeper()
    if io_faults.VARIABLE in os.environ:
        io_faults.arm_keeper()
