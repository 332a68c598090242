"""Where a benchmark runs: a folder on a real disk, and the machine in words that name nobody."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def default_folder() -> Path:
    """Beside the working tree, which is on a real disk more often than /tmp is; else in its ignored build folder."""
    if os.access(REPOSITORY.parent, os.W_OK):
        return REPOSITORY.parent
    (REPOSITORY / "build").mkdir(exist_ok=True)
    return REPOSITORY / "build"


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    holding = [(point, kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]))[1]


def describe(folder: Path) -> str:
    """The machine in words, without its name."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kernel = re.match(r"[\d.]*\d", platform.release())
    return (
        f"{len(os.sched_getaffinity(0))} cores, {memory_gib:.0f} GiB, Linux {kernel[0] if kernel else '?'}, "
        f"{file_system(folder)}, Python {platform.python_version()}, torch {importlib.metadata.version('torch')}"
    )


def busy() -> str | None:
    """A sentence about the other work on this machine in the last minute, if there was enough to disturb."""
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    if load < 0.25 * cores:
        return None
    return f"Other work disturbed these figures: the load average was {load:.1f} on {cores} cores before the start."
