"""On the path of keepers that a test wants to die at a certain point (`points`), whose work it records (`crash`),
whose files fail (`io_faults`), or which is broken on purpose (`mutations`)."""

import os
import sys

if "ckpt.keeper" in sys.orig_argv:
    import io_faults
    import mutations
    import points

    from ckpt.testing import crash

    mutations.arm()
    if points.VARIABLE in os.environ:
        points.arm_keeper()
    if crash.VARIABLE in os.environ:
        crash.record_keeper()
    if io_faults.VARIABLE in os.environ:
        io_faults.arm_keeper()
