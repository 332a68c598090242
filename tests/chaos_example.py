"""An example as it stands, in the place that a fault-injection run has for it.

chaos_example.py NAME STEPS
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    script = Path(__file__).parent.parent / "examples" / sys.argv[1] / "after.py"
    sys.argv = [str(script), os.environ["CKPT_URL"], *sys.argv[2:]]
    runpy.run_path(str(script), run_name="__main__")
