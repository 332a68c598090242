"""Power cuts of a mounted file system: while a job saves into it, its disk is copied at one instant; the copy is read.

    outer   XFS in an image file, for its clones: FICLONE keeps writers out and takes a file as it is at one instant
    disk    in it, the image of the file system under test, mounted; what was not written back is not in it
    cut     in it, the clone of the disk, mounted: its journal is replayed, and the run in it is read

Started by `cut_power` in a mount namespace of its own, so that every mount goes with it, and every loop device with
the mount. What this does not have: a disk that forgets what it took and was not told to flush (`crash` has).
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import ROOT
from keepers import forget, keepers, until

import ckpt
from ckpt.errors import NotFound
from ckpt.run import RunDirectory

OUTER_BYTES, DISK_BYTES = 2 << 30, 320 << 20  # files with holes; XFS wants 300 MiB
FICLONE = 0x40049409
KEPT = 3
CUTS_OF_A_RUN = 10
NO_SUCH_DISK = 75  # exit code: it cannot be tried on this machine
COMMAND_S = 60
KINDS = {  # how to make it, and how to mount a second one with the same name
    "ext4": (["mkfs.ext4", "-q", "-F"], []),
    "xfs": (["mkfs.xfs", "-q", "-f"], ["nouuid"]),
}
INSTALLED = Path(sys.prefix) / "servers" / "disks"


def cut_power(kind: str, cuts: int, seed: int, timeout_s: float) -> dict[str, Any]:
    """What was seen in `cuts` cuts; skips the test where none can be made."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists() or not shutil.which("unshare"):
        pytest.skip("needs root, loop devices and unshare for file systems of its own")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as ram:
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", sys.executable, __file__, kind, str(cuts), str(seed)],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "CKPT_RAM_DIR": f"{ram}/reader"},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            cwd=folder,
        )
    if done.returncode == NO_SUCH_DISK:
        pytest.skip(f"{kind} disks cannot be made here (`make servers` installs what it needs): {done.stderr.strip()}")
    assert done.returncode == 0, f"{kind}, seed {seed}\n{done.stdout}{done.stderr[-8000:]}"
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


# In the namespace


def run(*command: str) -> None:
    """A command of the system, which must succeed."""
    path = [str(INSTALLED / folder) for folder in ("sbin", "usr/sbin")]
    libraries = [str(each) for each in (INSTALLED / "usr/lib").glob("*-linux-gnu")]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin", *path]),
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
    }
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        raise RuntimeError(f"there is no {command[0]} here")
    done = subprocess.run([program, *command[1:]], env=environment, capture_output=True, text=True, timeout=COMMAND_S)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def mount(image: Path, at: Path, options: Sequence[str] = ()) -> None:
    at.mkdir(exist_ok=True)
    run("mount", "-o", ",".join(["loop", *options]), str(image), str(at))


def make_disk(image: Path, kind: str, nbytes: int) -> None:
    with open(image, "xb") as file:
        file.truncate(nbytes)
    run(*KINDS[kind][0], str(image))


def clone(image: Path, into: Path) -> None:
    """What `image` holds at one instant; nobody writes into it meanwhile."""
    with open(image, "rb") as source, open(into, "wb") as target:
        fcntl.ioctl(target, FICLONE, source.fileno())


def state(step: int) -> dict[str, Any]:
    return {"a": torch.full((150_000,), float(step)), "b": torch.full((300,), float(step)), "n": step}


def check_whole(found: dict[str, Any], step: int) -> None:
    assert found["n"] == step
    assert all(bool((found[name] == step).all()) for name in "ab"), f"step {step} is a mix"


class Job:
    """A process that saves in a row, and says what `wait()` acknowledged."""

    def __init__(self, ram: Path) -> None:
        ram.mkdir()
        self._ram, self._stop = ram, ram / "stop"
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import power_cuts; power_cuts.save_in_a_row()"],
            env={**os.environ, "CKPT_RAM_DIR": str(ram)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.acknowledged = 0
        self._changed = threading.Condition()
        self._running = False
        threading.Thread(target=self._listen, daemon=True).start()

    def begin(self, path: Path) -> None:
        self.acknowledged, self._running = 0, True
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path} {self._stop}\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """Return once nothing of it runs any more."""
        self._stop.touch()
        with self._changed:
            assert self._changed.wait_for(lambda: not self._running, COMMAND_S), "the job does not end"
        until("its keeper has ended", lambda: not keepers(self._ram))
        self._stop.unlink()

    def wait_for(self, step: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.acknowledged >= step, COMMAND_S), "the job does not save"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                if line == "ended\n":
                    self._running = False
                else:
                    self.acknowledged = int(line)
                self._changed.notify_all()


def save_in_a_row() -> None:
    """The job's process: for each path on standard input, save into it until there is a file that says stop."""
    torch.set_num_threads(1)
    while line := sys.stdin.readline():
        path, stop = line.split()
        step = 0
        with ckpt.Checkpointer(path, keep=ckpt.Keep(last=KEPT)) as checkpointer:
            while not os.path.exists(stop):
                step += 1
                checkpointer.save(step, state(step)).wait()
                print(step, flush=True)
        print("ended", flush=True)


def check_run(path: Path, least: int, most: int) -> int:
    """Every step that stands is whole, none that was acknowledged is missing; the newest."""
    try:
        steps = [commit.step for commit in RunDirectory.open(path).log.read().standing()]
    except NotFound:
        steps = []
    newest = steps[-1] if steps else 0
    assert least <= newest <= most, f"{least} was acknowledged before the cut, {most} begun; there is {newest}"
    assert set(steps) >= set(range(max(newest - KEPT, 0) + 1, newest + 1)), f"of the last {KEPT}, only {steps} stand"
    for step in steps:
        check_whole(ckpt.load(path, step=step), step)
    return newest


def go_on(path: Path, newest: int) -> None:
    """A new job restores what is there, and saves."""
    target = state(0)
    with ckpt.Checkpointer(path) as checkpointer:
        restored = checkpointer.restore(target) or 0
        assert restored in (newest, newest + 1), f"{newest} was committed, {restored} restored"  # or adopted
        check_whole(target, restored)
        checkpointer.save(restored + 1, state(restored + 1), blocking=True)
    check_whole(ckpt.load(path), restored + 1)
    forget()


def cuts_of(job: Job, folder: Path, kind: str, draw: random.Random) -> Iterator[int]:
    """Cut the power at random instants of runs that begin one after the other; the newest step found each time."""
    disk, cut = folder / "outer" / "disk.img", folder / "outer" / "cut.img"
    for number in range(sys.maxsize):
        path = folder / "disk" / f"run{number}"
        job.begin(path)
        for nth in range(CUTS_OF_A_RUN):
            if nth:
                job.wait_for(job.acknowledged + draw.randint(1, 3))
            time.sleep(draw.uniform(0, 0.3))  # the instant is the test's subject
            least = job.acknowledged
            clone(disk, cut)
            most = job.acknowledged + 1
            mount(cut, folder / "cut", KINDS[kind][1])
            newest = check_run(folder / "cut" / path.name, least, most)
            if nth % 5 == 0:
                go_on(folder / "cut" / path.name, newest)
            run("umount", str(folder / "cut"))
            yield newest
        job.end()
        shutil.rmtree(path)


def main(kind: str, cuts: int, seed: int) -> int:
    folder = Path.cwd()
    try:
        make_disk(folder / "outer.img", "xfs", OUTER_BYTES)
        mount(folder / "outer.img", folder / "outer")
        make_disk(folder / "outer" / "disk.img", kind, DISK_BYTES)
        mount(folder / "outer" / "disk.img", folder / "disk")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return NO_SUCH_DISK
    ram = Path(os.environ["CKPT_RAM_DIR"])  # of the readers, who shall find nothing there
    ram.mkdir()
    job = Job(ram.parent / "job")
    try:
        found = cuts_of(job, folder, kind, random.Random(seed))
        print(json.dumps({"newest": [next(found) for _ in range(cuts)]}))
    finally:
        job.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
