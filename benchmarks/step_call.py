"""What `checkpointer.steps` costs between two steps when nothing happens: a job under elastic, saved never.

    python benchmarks/step_call.py [--steps 2000] [--write]

Workers of one node, gloo. A step is some milliseconds of arithmetic, which keep all CPUs busy, or the same and a wait,
as for a GPU, in which they are idle. Timed is the call alone: from the end of one body of the loop to the beginning of
the next, in which the ranks agree on stopping and on saves.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
from results import write_section

CASES = ((1, 0.0), (2, 0.0), (1, 0.01), (2, 0.01))  # ranks, seconds that a step waits
FIRST = 50  # steps that do not count
LIMIT_S = 300


def train(url: str, steps: int, wait_s: float, out: Path) -> None:
    """A worker: `steps` steps; rank 0 writes how long each call between two of them took."""
    import torch
    import torch.distributed as dist

    import ckpt

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(256, 256))
    state = {"weight": weight, "optim": torch.optim.AdamW([weight])}
    took = []
    with ckpt.Checkpointer(url, every=ckpt.Every(seconds=1e9)) as checkpointer:
        loop, ended = checkpointer.steps(steps, state), None
        for _ in loop:
            if ended is not None:
                took.append(time.perf_counter() - ended)
            (weight @ weight).square().mean().backward()
            dist.all_reduce(weight.grad)
            state["optim"].step()
            state["optim"].zero_grad()
            if wait_s:
                time.sleep(wait_s)
            ended = time.perf_counter()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(took[FIRST:]))
    dist.destroy_process_group()


def measure(world: int, wait_s: float, steps: int, folder: Path) -> list[float]:
    """Seconds of each call on rank 0 of `world` workers."""
    name = f"{world}-{wait_s:g}"
    out, ram = folder / f"{name}.json", folder / f"ram-{name}"
    command = [
        sys.executable, "-m", "elastic.cli", "run", "--nodes", "1", "--workers", str(world),
        str(folder / f"run-{name}"),
        "--", __file__, "--worker", str(out), "--steps", str(steps), "--wait", str(wait_s),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CKPT_RAM_DIR": str(ram), "CKPT_KEEPER_GRACE_S": "1"}
    subprocess.run(
        command, env=environment, check=True, timeout=LIMIT_S, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    found: list[float] = json.loads(out.read_text())
    return found


def report(found: dict[tuple[int, float], list[float]], steps: int, notes: list[str]) -> str:
    rows = [
        f"| {world} | {f'then waits {1e3 * wait_s:g} ms' if wait_s else 'computes only'} "
        f"| {1e3 * statistics.median(took):.3f} | {1e3 * statistics.quantiles(took, n=100)[98]:.3f} |"
        for (world, wait_s), took in found.items()
    ]
    return f"""## The call between two steps

`python benchmarks/step_call.py --write`; {notes[0]}

To reach: 0.2 ms in the median, in `checkpointer.steps` under elastic when nothing happens. {steps} steps, gloo.
{"".join(f"{chr(10)}{note}{chr(10)}" for note in notes[1:])}
| ranks | a step | median ms | 99th percentile ms |
| ---: | --- | ---: | ---: |
{chr(10).join(rows)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--wait", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        train(os.environ["CKPT_URL"], given.steps, given.wait, given.worker)
        return
    busy = machine.busy()
    folder = Path(tempfile.mkdtemp(prefix="step-call-", dir=machine.default_folder()))
    try:
        notes = [f"{datetime.date.today()}; {machine.describe(folder)}.", *([busy] if busy else [])]
        section = report({case: measure(*case, given.steps, folder) for case in CASES}, given.steps, notes)
    finally:
        shutil.rmtree(folder)
    print(section)
    if given.write:
        write_section("step_call", section)


if __name__ == "__main__":
    main()
