"""What the tests' agents run: trains until told to stop, saves every step, and says what it does in a file of its own.

    elastic_worker.py RUN EVENTS [steps]

Every element of the state is a function of the step, so that a state restored wrong or mixed is seen; and it says
which samples each step was made of, before it saves it, so that `agents.Cluster` can keep the books. It ends once
EVENTS/finish exists (read by rank 0, told to all), with the exit code that stands there. With TEST_DIES in the
environment, rank 1 of the first generation kills itself at that point of a save (`points`).

With `steps` it trains in `checkpointer.steps`, saves every tenth step, and once EVENTS/leave-NODE exists the worker of
that node has its node leave, within as many seconds as stand there; with EVENTS/hang-NODE it hangs. With TEST_HANGS,
rank 1 hangs, once, after step 15. TEST_SLOW are seconds that each step takes longer on this node.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from points import arm_worker

import ckpt
import elastic

SAMPLES, GLOBAL_BATCH = 22, 4  # the last batch of a pass has 2 samples: of 3 ranks, one has none
STEP_S = 0.05  # so that a test's machine has time for other things; nothing waits for it


def expected(step: int) -> torch.Tensor:
    return torch.arange(1000, dtype=torch.float64) * step + step


def take(data: elastic.Batches, step: int, say: Callable[..., None]) -> None:
    """Say what completes `step`: before it can be saved."""
    for batch in data.step():
        assert not batch.indices or batch.data.tolist() == list(batch.indices)
        say("data", step=step, indices=batch.indices)


def in_steps(checkpointer: ckpt.Checkpointer, data: elastic.Batches, events: Path, say: Callable[..., None]) -> int:
    """Train until told to stop; the last step."""
    state, node = {"w": expected(0), "step": 0, "data": data}, os.environ["TEST_NODE"]
    first, left = True, False
    for index in checkpointer.steps(1_000_000, state):
        if first:
            right = bool(torch.equal(state["w"], expected(index))) and state["step"] == data.done == index
            say("restored", step=index, right=right)
        first = False
        if told_to_finish(events):
            return index
        if (events / f"leave-{node}").exists() and not left:
            left = True
            elastic.leave("a test wants it", float((events / f"leave-{node}").read_text() or 60))
        if (events / f"hang-{node}").exists():
            threading.Event().wait()
        take(data, index + 1, say)
        state["w"], state["step"] = expected(index + 1), index + 1
        say("step", step=index + 1)
        time.sleep(STEP_S + float(os.environ.get("TEST_SLOW", "0")))
        if os.environ.get("TEST_HANGS") and dist.get_rank() == 1 and index >= 15:
            hang_once(events / "hung")
    return 1_000_000


def hang_once(marker: Path) -> None:
    if not marker.exists():
        marker.touch()
        threading.Event().wait()


def told_to_finish(events: Path) -> bool:
    word = torch.tensor([int((events / "finish").exists()) if dist.get_rank() == 0 else 0])
    dist.broadcast(word, 0)
    return bool(word)


def main(url: str, events: Path, loop: str = "") -> int:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    with open(events / f"{os.getpid()}.jsonl", "a", buffering=1) as out:

        def say(what: str, **more: Any) -> None:
            current = elastic.current()
            assert current is not None
            more |= {"at": time.time(), "generation": current.generation, "node": os.environ["TEST_NODE"]}
            out.write(json.dumps({"what": what, "rank": rank, "world": world, "pid": os.getpid(), **more}) + "\n")

        if os.environ.get("TEST_DIES") and rank == 1 and os.environ["ELASTIC_GENERATION"] == "1":
            name, when, nth = os.environ["TEST_DIES"].split()
            arm_worker((name, when, int(nth)))
        data = elastic.batches(
            range(SAMPLES),  # type: ignore[arg-type]
            global_batch=GLOBAL_BATCH,
            num_workers=int(os.environ.get("TEST_LOADERS", "0")),
        )
        state = {"w": expected(0), "step": 0, "data": data}
        every = ckpt.Every(steps=10)  # heeded by `steps` alone
        with ckpt.Checkpointer(url, every=every, commit_timeout_s=60) as checkpointer:
            if loop == "steps":
                say("end", step=in_steps(checkpointer, data, events, say))
                return 0
            step = checkpointer.restore(state) or 0
            right = bool(torch.equal(state["w"], expected(step))) and state["step"] == data.done == step
            say("restored", step=step, right=right)
            while True:
                if told_to_finish(events):
                    break
                step += 1
                take(data, step, say)
                state["w"], state["step"] = expected(step), step
                checkpointer.save(step, state)
                say("step", step=step)
                time.sleep(STEP_S)
        say("end", step=step)
    dist.destroy_process_group()
    return int((events / "finish").read_text() or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
