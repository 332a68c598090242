"""One rank of a benchmark world: keeps a training state and carries out the operations it is told.

Owns what is timed and what is checked. The timed region is barrier, operation, barrier; the caller takes the largest
figure of all ranks. Every load is checked, bit for bit, after its timed region.
"""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpt2
import torch
import torch.distributed as dist
from contenders import READ_BLOCK_BYTES, Contender
from roster import ASYNC_CONTENDERS, CONTENDERS

Reply = dict[str, Any]


@dataclass
class Worker:
    """The state and the contenders of one rank; each public method is one operation, collective over the world."""

    config: gpt2.Config
    layout: gpt2.Layout
    seed: int

    def __post_init__(self) -> None:
        self._contenders: dict[str, Contender] = {}
        self._state = self._build(self.config)

    def available(self, names: list[str]) -> Reply:
        """Import the contenders; the reply says of each one that cannot take part why."""
        reasons = {}
        for name in names:
            try:
                self._contenders[name] = CONTENDERS[name]()
            except ImportError as error:
                reasons[name] = str(error)
        return {"unavailable": reasons}

    def warm_up(self, path: str) -> Reply:
        """Let every contender save and load a small state once, so that imports and first calls are not timed."""
        state, self._state = self._state, self._build(gpt2.GPT2_TINY)
        try:
            for name in self._contenders:
                target = f"{path}/{name}"
                self.save(name, target)
                self.load(name, target)
        finally:
            self._state = state
        return {}

    def save(self, contender: str, path: str, later: bool = False) -> Reply:
        """Save to `path`; nothing that was written before is still on its way to the disk.

        `later`: below `path`, after another save there, of which every element has changed since.
        """
        chosen = self._contenders[contender]
        target = Path(path)
        chosen.prepare_save(target, self._state)
        if later:
            target.mkdir(exist_ok=True)
            dist.barrier()
            chosen.save(target / "first", self._state)
            with torch.no_grad():
                for tensor in self._state.tensors():
                    tensor.local.add_(1)
            target /= "second"
        if self._state.rank == 0:
            os.sync()
        reply = _measure(lambda: chosen.save(target, self._state))
        chosen.finish_save()
        if later:
            gpt2.fill(self._state)
        return reply

    def load(self, contender: str, path: str, cold: bool = False) -> Reply:
        """Load from `path`, its files in the page cache or not, into wiped tensors; then check every element."""
        chosen = self._contenders[contender]
        target = Path(path)
        gpt2.wipe(self._state)
        chosen.prepare_load(target, self._state)
        if cold:
            _drop(target)
            reply = _measure(lambda: chosen.load_cold(target, self._state))
        else:
            _read_through(target, self._state.rank, self._state.world)
            reply = _measure(lambda: chosen.load(target, self._state))
        chosen.finish_load(self._state)
        gpt2.verify(self._state)
        return reply

    def copy(self, contender: str, path: str) -> Reply:
        """Copy the local tensors into memory that has been touched (the limit only)."""
        chosen = self._contenders[contender]
        chosen.prepare_save(Path(path), self._state)
        reply = _measure(lambda: chosen.copy(self._state))  # type: ignore[attr-defined]
        chosen.finish_save()
        return reply

    def fresh_copy(self) -> Reply:
        """Copy the local tensors into memory that nobody has touched."""
        sources = [tensor.local for tensor in self._state.tensors()]
        return _measure(lambda: [torch.empty_like(source).copy_(source) for source in sources] and None)

    def open_async(self, contender: str, path: str) -> Reply:
        """Make ready to save asynchronously below `path`."""
        self._async = ASYNC_CONTENDERS[contender](Path(path))
        self._async.prepare(self._state)
        return {}

    def async_save(self) -> Reply:
        """One save with nothing else running: seconds until it returns, and until it is durable."""
        if self._state.rank == 0:
            os.sync()
        dist.barrier()
        begin = time.perf_counter()
        wait = self._async.begin(self._state)
        blocked = time.perf_counter() - begin
        wait()
        dist.barrier()
        durable = time.perf_counter() - begin
        self._step(0.0)
        return {"blocked": blocked, "durable": durable}

    def train(self, steps: int, step_s: float, saves: list[int]) -> Reply:
        """Train for a number of steps that compute for `step_s` each on an idle machine, saving after some.

        Seconds until the last step has ended; saves may still be on their way then, and are waited for afterwards.
        """
        waits = []
        dist.barrier()
        begin = time.perf_counter()
        for step in range(steps):
            self._step(step_s)
            if step in saves:
                waits.append(self._async.begin(self._state))
        self._step(0.0)
        dist.barrier()
        seconds = time.perf_counter() - begin
        for wait in waits[-1:]:
            wait()
        return {"seconds": seconds}

    def restore_again(self, path: str) -> Reply:
        """A job that goes on: seconds of `restore` into wiped tensors, which are checked; then it ends in peace."""
        import ckpt

        gpt2.wipe(self._state)
        with ckpt.Checkpointer(path) as checkpointer:
            _read_through(Path(path), self._state.rank, self._state.world)
            state = {"model": self._state.model, "optim": self._state.optim}
            reply = _measure(lambda: checkpointer.restore(state, required=True) and None)
            gpt2.verify(self._state)
        return reply

    def close_async(self) -> Reply:
        self._async.close()
        del self._async
        return {}

    def _step(self, seconds: float) -> None:
        """Compute what takes `seconds` on an idle core; then the optimizer's step, with hooks but without gradients."""
        if not hasattr(self, "_square"):
            self._square = torch.ones(512, 512)
            self._product_s = min(self._time_product() for _ in range(200))  # the others include somebody else's work
        for _ in range(round(seconds / self._product_s)):
            self._square @ self._square
        with self._async.guard():
            self._state.optim.step()

    def _time_product(self) -> float:
        begin = time.perf_counter()
        for _ in range(10):
            self._square @ self._square
        return (time.perf_counter() - begin) / 10

    def state_bytes(self) -> Reply:
        """How many bytes of tensors this rank holds."""
        return {"bytes": self._state.local_bytes}

    def _build(self, config: gpt2.Config) -> gpt2.TrainingState:
        rank, world = dist.get_rank(), dist.get_world_size()
        state = gpt2.build(config, self.layout, seed=self.seed, rank=rank, world=world)
        gpt2.fill(state)
        return state


def start(config: dict[str, int], layout: gpt2.Layout, seed: int) -> Worker:
    """Join the world that the environment describes and build its state."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return Worker(gpt2.Config(**config), layout, seed)


def stop() -> None:
    """Leave the world."""
    dist.destroy_process_group()


def _measure(operation: Callable[[], None]) -> Reply:
    gc.collect()
    memory = _PeakMemory()
    dist.barrier()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    operation()
    dist.barrier()
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - begin_cpu,
        "extra_memory_bytes": memory.growth_bytes(),
    }


class _PeakMemory:
    """Growth of this process's resident set from now to its peak, mapped files included."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present size
        self._before_bytes = self._status_bytes("VmRSS")

    def growth_bytes(self) -> int:
        return max(0, self._status_bytes("VmHWM") - self._before_bytes)

    @staticmethod
    def _status_bytes(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024


def _drop(path: Path) -> None:
    """Have the files under `path` leave the page cache; all of them are on the disk."""
    dist.barrier()
    for file in [file for file in path.rglob("*") if file.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    dist.barrier()


def _read_through(path: Path, rank: int, world: int) -> None:
    """Read every file under `path` once, the files shared out among the ranks."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    buffer = bytearray(READ_BLOCK_BYTES)
    for file in files[rank::world]:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    dist.barrier()
