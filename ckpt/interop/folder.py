"""The folders that `Accelerator.save_state` and the Trainer of transformers write: weights, and a training beside them.

Models come as `model`, `model_1`, ..., and optimizers, schedulers and gradient scalers by the names of their files.
What is each rank's own (random generators, samplers) and what only runs as a pickle stays behind, and that is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ckpt.errors import Corrupt
from ckpt.interop.files import Files
from ckpt.interop.hf import INDEX_NAME, SINGLE_NAME, read_hf, read_safetensors, read_shards

_WEIGHTS: Final = re.compile(r"(?:pytorch_)?(model(?:_\d+)?)\.(safetensors|bin)")
_OBJECT: Final = re.compile(r"((?:optimizer|scheduler|scaler)(?:_\d+)?)\.(?:bin|pt)")
_LEFT: Final = re.compile(
    r"random_states_\d+\.pkl|rng_state(_\d+)?\.pth|(dl_state_dict|sampler|custom_checkpoint|training_args)[\w.]*"
)
_PICKLED_INDEX: Final = "pytorch_model.bin.index.json"
_COUNTS: Final = "trainer_state.json"
_COUNTS_LIMIT_BYTES: Final = 64 << 20


def is_training(directory: Path) -> bool:
    """Whether an optimizer or the like lies there, or no weights but those that `torch.save` wrote.

    What a hub offers for download often has its weights in both formats, and is no training.
    """
    names = [path.name for path in directory.iterdir()]
    weights = {found[2] for name in names if (found := _WEIGHTS.fullmatch(name))}
    weights |= {kind for index, kind in ((INDEX_NAME, "safetensors"), (_PICKLED_INDEX, "bin")) if index in names}
    return any(map(_OBJECT.fullmatch, names)) or weights == {"bin"}


def read_training(directory: Path, files: Files, read: Callable[[Path], Any]) -> tuple[dict[str, Any], list[str], bool]:
    """The tree in a folder, what was left out, and whether its models list their parameters in their own order.

    Neither safetensors files nor several shards do; safetensors files count where weights are there in both formats.
    `read` gives the tree in a file of torch.save. Raises as the readers of the files do.
    """
    tree: dict[str, Any] = {}
    left: list[str] = []
    ordered = True
    for path in sorted(directory.iterdir()):
        if weights := _WEIGHTS.fullmatch(path.name):
            if weights[2] == "safetensors":
                tree[weights[1]], ordered = read_safetensors(path, files), False
            elif not (path.parent / f"{weights[1]}.safetensors").exists():
                tree[weights[1]] = read(path)
        elif found := _OBJECT.fullmatch(path.name):
            tree[found[1]] = read(path)
        elif _LEFT.fullmatch(path.name):
            left.append(path.name)
    if (directory / INDEX_NAME).is_file() and not (directory / SINGLE_NAME).exists():
        tree["model"], ordered = read_hf(directory, files), False
    if (directory / _PICKLED_INDEX).is_file() and "model" not in tree:
        tree["model"], ordered = read_shards(directory / _PICKLED_INDEX, read), False
    if (directory / _COUNTS).is_file():
        tree[_COUNTS.removesuffix(".json")] = _counts(directory / _COUNTS)
    return tree, [f"left out, for it is each rank's own or a program's: {', '.join(left)}"] if left else [], ordered


def _counts(path: Path) -> Any:
    try:
        if path.stat().st_size > _COUNTS_LIMIT_BYTES:
            raise Corrupt(f"{path}: over {_COUNTS_LIMIT_BYTES} bytes, which is the most that is read")
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path}: cannot be read: {error}") from error
