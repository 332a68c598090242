"""What `fuzzing` does, led by the branches that an input reaches: python tests/fuzzing_guided.py TARGET RUNS FOLDER.

An input that ends it is left in FOLDER.
"""

from __future__ import annotations

import itertools
import json
import sys

import atheris

with atheris.instrument_imports(include=["ckpt"]):
    import fuzzing


def main(target: str, runs: int, folder: str) -> None:
    outcomes, tried = {"refused": 0, "valid": 0}, itertools.count(1)
    give = fuzzing.property_of(getattr(fuzzing, target), 1, outcomes).hypothesis.fuzz_one_input  # type: ignore[attr-defined]

    def one(data: bytes) -> None:
        give(data)
        if next(tried) == runs:  # this process ends without a word to Python
            print(json.dumps(outcomes), flush=True)

    settings = [f"-runs={runs}", "-max_len=1024", "-len_control=0", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *settings], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
