"""Reading runs no pickle, and any safetensors reader can open the data files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from states import Box, bits, model, train
from torch import nn

import ckpt
from ckpt.plan import SAFETENSORS_DTYPE
from ckpt.sharding import ITEMSIZE


class Loader(Box):
    def __iter__(self) -> Any:
        return iter(())


class Odd(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"scale": torch.ones(3), ("a", 1): {2}}

    def set_extra_state(self, state: Any) -> None:
        assert state[("a", 1)] == {2}


def everything() -> dict[str, Any]:
    """One of each kind of member, trained a little."""
    net = nn.Sequential(*model(0), Odd(3, 3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    lbfgs = torch.optim.LBFGS(model(1).parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    train(net, optimizer, 2, after=scheduler.step)
    tied = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    tied[1].weight = tied[0].weight
    return {
        "model": net,
        "optim": optimizer,
        "lbfgs": lbfgs,
        "sched": scheduler,
        "plateau": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        "scaler": torch.amp.GradScaler("cpu"),
        "ema": Box(
            {"shadow": {name: p.detach().clone() for name, p in net.named_parameters()}, "big": torch.ones(2000)}
        ),
        "loader": Loader({"at": 3}),
        "rng": ckpt.Rng(),
        "mine": ckpt.PerRank((1, 2)),
        "shard": ckpt.Shard(torch.ones(2, 2), (2, 2), (0, 0)),
        "tied": tied,
        "values": [
            Counter("ab"),
            OrderedDict(a=1),
            {1: (2, {3})},
            np.arange(3),
            np.float32(1),
            torch.float16,
            2**90,
            1j,
        ],
        "dtypes": {name: torch.zeros(3, dtype=getattr(torch, name)) for name in ITEMSIZE},
    }


READ = """
import os, sys
sys.path.insert(0, {tests!r})
import numpy, torch
import ckpt, ckpt.cli
from test_no_pickle import everything
state = everything()
armed, seen = False, []
names = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")

def hook(event, arguments):
    if armed and (event == "pickle.find_class" or event == "import" and arguments[0].partition(".")[0] in names):
        seen.append((event, str(arguments)[:200]))

def unpickle(*_, **__):
    seen.append("a call of pickle")
    raise AssertionError("pickle was called")

import pickle
pickle.load = pickle.loads = pickle.Unpickler = pickle._Unpickler = unpickle
torch.load = torch.serialization.load = unpickle
sys.addaudithook(hook)
armed = True
{act}
armed = False
print("seen:", seen)
"""

ACTS = {
    "restore": "ckpt.restore({url!r}, state)",
    "resume": "ckpt.Checkpointer({url!r}).restore(state)",
    "load": "ckpt.load({url!r})",
    "ls": "ckpt.cli.cli(['ls', {url!r}], standalone_mode=False)",
    "show": "ckpt.cli.cli(['show', {url!r}], standalone_mode=False)",
    "check": "ckpt.cli.cli(['check', {url!r}], standalone_mode=False)",
}


def _run(url: str, act: str) -> str:
    script = READ.format(tests=str(Path(__file__).parent), act=act.format(url=url))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("seen:")[2].strip()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    with ckpt.Checkpointer(path) as checkpointer:
        checkpointer.save(1, everything(), blocking=True)
    return path


def test_no_pickle_on_any_read_path(run: Path) -> None:
    assert _run(str(run), "\n".join(ACTS.values())) == "[]"


def test_the_hook_sees_pickle(run: Path) -> None:
    """Otherwise the test above would prove nothing."""
    act = "import _pickle; _pickle.loads(b'cos\\ngetcwd\\n.')"
    assert "pickle.find_class" in _run(str(run), act)


def test_safetensors_opens_every_data_file(run: Path) -> None:
    whole, found = ckpt.load(run), {}
    for file in run.glob("steps/*/*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if not name.startswith(".pad/"):
                    key, _, offsets = name.rpartition("@")
                    assert set(offsets) <= set("0,")  # one rank wrote all, so each tensor is one chunk
                    found[key] = opened.get_tensor(name)
    untyped = {key for key in found if key.startswith("dtypes/") and key.split("/")[1] not in SAFETENSORS_DTYPE}
    assert untyped == {"dtypes/complex32", "dtypes/complex128"}
    for key in untyped:
        found[key] = found[key].view(whole[key].dtype).view(whole[key].shape)
    tensors = {key: value for key, value in whole.items() if isinstance(value, torch.Tensor) and key in found}
    assert set(found) == set(tensors)
    assert bits(dict(sorted(found.items()))) == bits(tensors)
    assert len(found) > 40
