"""What signing costs: a blocking save and a restore of the same state, with CKPT_SIGNING_KEY and without.

    python benchmarks/signing.py [--gib 1] [--rounds 3] [--directory DIR]

Prints seconds, the median of the rounds after one that is not counted; everything is fsynced and read back warm.
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import tempfile
import time
from pathlib import Path

import torch

import ckpt


def measure(path: Path, state: dict[str, torch.Tensor], key: str, rounds: int) -> tuple[list[float], list[float]]:
    os.environ["CKPT_SIGNING_KEY"] = key
    saves, loads = [], []
    with ckpt.Checkpointer(path, keep=ckpt.Keep(last=1)) as checkpointer:
        for step in range(1, rounds + 2):
            began = time.monotonic()
            checkpointer.save(step, state, blocking=True)
            saves.append(time.monotonic() - began)
            began = time.monotonic()
            ckpt.restore(path, state)
            loads.append(time.monotonic() - began)
    return saves[1:], loads[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    size = int(options.gib * (1 << 30) / 4 / 16)
    state = {f"t{i}": torch.randn(size) for i in range(16)}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for name, key in (("unsigned", ""), ("signed", secrets.token_hex(32))):
            saves, loads = measure(Path(directory) / name, state, key, options.rounds)
            print(
                f"{name:9} save {statistics.median(saves):.2f} s, restore {statistics.median(loads):.2f} s", flush=True
            )


if __name__ == "__main__":
    main()
