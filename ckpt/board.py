"""A page of memory between a launcher and the workers of its node: "stop here" one way, how far each is the other way.

A worker also opens a way to its stacks: on STACKS_SIGNAL the interpreter writes those of all its threads into a memory
file, whatever the worker hangs in.

    CKPT_BOARD    where the workers find it; without it a worker has no place, and nothing of this is done

The launcher makes the board anew for each set of workers; LOCAL_RANK says whose place is whose. It is a memory file
without a name, so nothing is left of it, whoever dies. A field is 8 bytes, aligned, and has one writer: it is read
whole or not yet. A worker looks and writes without a system call, in a microsecond. No torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import mmap
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from ckpt.owntime import Watch

log = logging.getLogger("ckpt")

VARIABLE = "CKPT_BOARD"
PLACES = 256  # workers of a node; one beyond has no place
PLACE_BYTES, TEXT_BYTES = 256, 128
WORDS = PLACE_BYTES // 8
MAGIC = 0x31445241_4F425F48
ASKED = 1  # word of the head
PID, STATE, STEP, MOVED_NS, LIMIT_MS, LEAVE_BYTES, LEAVE_MS, RANK, WATCHED, MOVES, LONGEST_NS, STACKS = range(12)
OWN_NS, SEEN_NS, BLOCKED_NS, SAVED = 12, 13, 14, 15
HEEDS, PAUSED = 1, 2
STACKS_SIGNAL = signal.SIGRTMIN + 7


@dataclass(frozen=True)
class Worker:
    """What a worker says of itself.

    `heeds`: it stops where it is asked to. `paused`: it has, and everything is durable. `watched`: it is in a loop of
    steps, of which it has made `moves`, the longest in `longest_s`; `moved_s`: seconds since the last. `limit_s`: how
    long what it does now may take, where it said so, else 0. `own_s`: how long of `seen_s`, in its loop
    and outside of phases, it did not wait for other ranks; `saved`: the newest step that it had saved, durable or not;
    `blocked_s`: how long `save` has held it up. `leaves`: why its node shall leave, and within how many seconds.
    `stacks`: where they are written on STACKS_SIGNAL.
    """

    local_rank: int
    rank: int
    pid: int
    heeds: bool
    paused: bool
    step: int
    watched: bool
    moves: int
    moved_s: float
    longest_s: float
    limit_s: float
    own_s: float
    seen_s: float
    saved: int
    blocked_s: float
    stacks: str
    leaves: tuple[str, float] | None


class Board:
    """The launcher's end."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("ckpt-board", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, (PLACES + 1) * PLACE_BYTES)
        self._memory = mmap.mmap(self._fd, (PLACES + 1) * PLACE_BYTES)
        self._words = memoryview(self._memory).cast("Q")
        self._words[0] = MAGIC
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def ask(self) -> None:
        """Have all workers stop after a step on which they agree. Idempotent."""
        self._words[ASKED] = 1

    def workers(self) -> list[Worker]:
        """Those that took their places."""
        return [self._worker(rank) for rank in range(PLACES) if self._words[(rank + 1) * WORDS + PID]]

    def _worker(self, rank: int) -> Worker:
        at = (rank + 1) * WORDS
        words = self._words[at : at + WORDS]
        leaves = None
        if size := words[LEAVE_BYTES]:
            end = (rank + 2) * PLACE_BYTES
            text = self._memory[end - TEXT_BYTES : end - TEXT_BYTES + min(size, TEXT_BYTES)].decode(errors="replace")
            leaves = (text, words[LEAVE_MS] / 1000)
        moved_s = (time.monotonic_ns() - words[MOVED_NS]) / 1e9
        return Worker(
            local_rank=rank,
            rank=words[RANK],
            pid=words[PID],
            heeds=words[STATE] >= HEEDS,
            paused=words[STATE] >= PAUSED,
            step=words[STEP],
            watched=bool(words[WATCHED]),
            moves=words[MOVES],
            moved_s=moved_s,
            longest_s=words[LONGEST_NS] / 1e9,
            limit_s=words[LIMIT_MS] / 1000,
            own_s=words[OWN_NS] / 1e9,
            seen_s=words[SEEN_NS] / 1e9,
            saved=words[SAVED],
            blocked_s=words[BLOCKED_NS] / 1e9,
            stacks=f"/proc/{words[PID]}/fd/{words[STACKS] - 1}" if words[STACKS] else "",
            leaves=leaves,
        )

    def close(self) -> None:
        """Workers that have it keep it. Idempotent."""
        if self._fd >= 0:
            self._words.release()
            self._memory.close()
            os.close(self._fd)
            self._fd = -1


class Place:
    """A worker's end."""

    def __init__(self, memory: mmap.mmap, local_rank: int, rank: int) -> None:
        self._memory, self._all = memory, memoryview(memory).cast("Q")
        at = (local_rank + 1) * WORDS
        self._end = (local_rank + 2) * PLACE_BYTES
        self._mine = self._all[at : at + WORDS]
        self._mine[RANK] = rank
        self._mine[PID] = os.getpid()

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Self | None:
        """The place of this process; None where no launcher gave it one."""
        path, rank = environment.get(VARIABLE), environment.get("LOCAL_RANK", "")
        if not path or not rank.isdecimal() or int(rank) >= PLACES:
            return None
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            log.warning("%s cannot be opened (%s): this worker is not asked before the membership changes", path, error)
            return None
        with contextlib.closing(os.fdopen(fd, "r+b", buffering=0)) as file:
            size = (PLACES + 1) * PLACE_BYTES
            if os.fstat(file.fileno()).st_size != size:
                return None
            memory = mmap.mmap(file.fileno(), size)
        if int.from_bytes(memory[:8], "little") != MAGIC:
            return None
        return cls(memory, int(rank), int(environment.get("RANK", rank)))

    @property
    def asked(self) -> bool:
        """Whether all workers are to stop, because the membership changes."""
        return bool(self._all[ASKED])

    def heed(self) -> None:
        """From now on this worker looks at `asked` in every step."""
        self._mine[STATE] = max(self._mine[STATE], HEEDS)

    def moved(self, step: int) -> None:
        """`step` steps are completed."""
        mine, now = self._mine, time.monotonic_ns()
        if mine[WATCHED]:
            mine[LONGEST_NS] = max(mine[LONGEST_NS], now - mine[MOVED_NS])
            mine[MOVES] += 1
        mine[STEP] = step
        mine[MOVED_NS] = now

    def saved(self, step: int, seconds: float) -> None:
        """A save of `step` has held this worker up for so long."""
        self._mine[STEP] = max(self._mine[STEP], step)
        self._mine[SAVED] = step
        self._mine[BLOCKED_NS] += int(seconds * 1e9)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """In here, one step follows the other: where none does for too long, this worker hangs."""
        if not self._mine[STACKS]:
            fd = os.memfd_create("ckpt-stacks", os.MFD_CLOEXEC)
            faulthandler.register(STACKS_SIGNAL, file=fd, all_threads=True)
            self._mine[STACKS] = fd + 1
        self._mine[MOVED_NS] = time.monotonic_ns()
        self._mine[WATCHED] = 1
        watch = Watch(self._count)
        try:
            yield
        finally:
            watch.close()
            self._mine[WATCHED] = 0

    def _count(self, ns: int, own: bool) -> None:
        if not self._mine[LIMIT_MS]:
            self._mine[OWN_NS] += own * ns
            self._mine[SEEN_NS] += ns

    @contextlib.contextmanager
    def phase(self, limit_s: float) -> Iterator[None]:
        """What is done in here may take `limit_s`, whatever a step takes; then the step begins anew."""
        before = self._mine[LIMIT_MS]
        self._mine[LIMIT_MS] = max(1, int(limit_s * 1000))
        self._mine[MOVED_NS] = time.monotonic_ns()
        try:
            yield
        finally:
            self._mine[LIMIT_MS] = before
            self._mine[MOVED_NS] = time.monotonic_ns()

    def pause(self) -> None:
        """All has stopped and is durable; this process may be killed."""
        self._mine[STATE] = PAUSED

    def leave(self, reason: str, deadline_s: float) -> None:
        """Have the launcher take this node out of the job, as planned."""
        text = reason.encode()[:TEXT_BYTES] or b"asked to"
        start = self._end - TEXT_BYTES
        self._memory[start : start + len(text)] = text
        self._mine[LEAVE_MS] = int(deadline_s * 1000)
        self._mine[LEAVE_BYTES] = len(text)  # last: from here on it counts
