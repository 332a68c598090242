"""What workers write, kept by generation: where torchrun puts their outputs with `--logs-specs elastic`.

    <log dir>/generation-0000000007/<node>/attempt_<n>/<local rank>/stdout.log, stderr.log, error.json

<node> is the agent's name, so all nodes may share the directory. torchrun alone would delete an attempt's files at the
next change of the membership. Of older generations than the last ELASTIC_KEEP_LOGS (10) everything is removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest

from elastic import guard
from elastic.options import kept_logs

_FOLDER = re.compile(r"generation-(\d{10})")


class GenerationLogs(DefaultLogsSpecs):
    """torchrun's own, in a folder for each generation."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        generation = os.environ.get("ELASTIC_GENERATION", "")
        if generation.isdecimal() and self.root_log_dir != os.devnull:
            root = Path(self.root_log_dir)
            remove_old(root, int(generation) - kept_logs())
            folder = root / f"generation-{int(generation):010d}" / os.environ.get(guard.VARIABLE, "node")
            folder.mkdir(parents=True, exist_ok=True)
            self._run_log_dir = str(folder)  # type: ignore[assignment]  # torch declares what it begins with
        return super().reify(envs)


def remove_old(root: Path, newest: int) -> None:
    """Remove what generations up to `newest` have left; another node may be doing the same. Does not raise."""
    with contextlib.suppress(OSError):
        for path in root.iterdir():
            if (found := _FOLDER.fullmatch(path.name)) and int(found[1]) <= newest:
                shutil.rmtree(path, ignore_errors=True)
