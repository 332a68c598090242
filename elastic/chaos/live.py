"""Faults of the live state in a worker's memory, and of its clock."""

from __future__ import annotations

import asyncio
import struct
from abc import abstractmethod
from typing import Any

from elastic.chaos.cgroups import GroundError
from elastic.chaos.fault import Fault
from elastic.evidence import Mark

NAN = {"float32": struct.pack("<f", float("nan")), "float64": struct.pack("<d", float("nan")), "bfloat16": b"\xc0\x7f",
       "float16": b"\x00\x7e"}  # fmt: skip
HOURS = 5.0
READY_LIMIT_S = 60.0
TRIES = 64


class LiveDamage(Fault):
    """What is done to one tensor of the state in a worker's memory, from outside, while it is held after a step."""

    restarts, live = False, True

    async def inject(self) -> str:
        hold = self.ground.listener.hold(self._is_ready)
        try:
            async with asyncio.timeout(READY_LIMIT_S):
                held = await hold.caught
            return self._do(held)
        except TimeoutError as error:
            raise GroundError(f"no worker of {self.node.name} made a step after a save in CPU memory") from error
        except OSError as error:
            raise GroundError(f"the memory of a worker of {self.node.name} cannot be written: {error}") from error
        finally:
            hold.wanted = lambda mark: False
            hold.released.set()

    def _is_ready(self, mark: Mark) -> bool:
        return mark.name == "step" and mark.node == self.node.name and bool(self._tensors(mark.pid))

    def _tensors(self, pid: int) -> list[list[Any]]:
        """Those that lay in the same place whenever the worker told of them: what is made anew for a save does not."""
        told = [
            mark.facts["memory"] for mark in self.ground.listener.marks if mark.pid == pid and mark.facts.get("memory")
        ]
        return sorted(one for one in (told or [[]])[-1] if one[3] in NAN and all(one in before for before in told[-2:]))

    def _do(self, held: Mark) -> str:
        key, address, nbytes, dtype = self.ground.random.choice(self._tensors(held.pid))
        size = len(NAN[dtype])
        with open(f"/proc/{held.pid}/mem", "r+b", buffering=0) as memory:
            for _ in range(TRIES):  # of zeros a bit may make a number that is rounded away
                at = address + self.ground.random.randrange(nbytes // size) * size
                memory.seek(at)
                if any(element := memory.read(size)):
                    break
            memory.seek(at)
            memory.write(self.changed(element, dtype))
        return f"{self.what} in {key} of worker {held.pid} on {self.node.name}, after step {held.step}"

    what: str

    @abstractmethod
    def changed(self, element: bytes, dtype: str) -> bytes:
        """The bytes of the element afterwards."""


class LiveBitFlip(LiveDamage):
    """A bit of the live state of one rank flips, and the rank trains on: silent corruption was 1.4 % of all causes.

    Its replicas on other ranks differ then, which the next save finds (of tensors above 256 KiB it compares samples).
    """

    kind, stands_for, restarts, what = "live-bit-flip", "silent corruption of the live state", True, "a bit flipped"
    promise = "detected where ranks hold replicas: the next save is refused, and all go on from the step before"

    def changed(self, element: bytes, dtype: str) -> bytes:
        flipped = bytearray(element)
        flipped[-2] ^= 0x40  # high in the fraction of a float32 or bfloat16: it is not rounded away
        return bytes(flipped)


class LiveNaN(LiveDamage):
    """An element of the live state of one rank becomes NaN, and the next steps spread it. No share was published.

    The next save is refused if it finds it in one replica alone; a step later all may have it alike.
    """

    kind, stands_for, what = "live-nan", "a number that is none any more", "an element became NaN"
    promise = "detected only: the next save is refused, or the metrics say so"

    def changed(self, element: bytes, dtype: str) -> bytes:
        return NAN[dtype]


class ClockJump(Fault):
    """The wall clock of a node jumps by `amount` hours (5), forwards or backwards. No share was published."""

    kind, stands_for = "clock-jump", "a host whose clock is set"
    promise = "survived, without a new generation: no decision depends on a wall clock"
    restarts = False

    async def inject(self) -> str:
        hours = HOURS if self.amount is None else self.amount
        self.node.clock.write_text(str(hours * 3600))
        return f"the clock of {self.node.name} jumped by {hours:g} h"

    async def heal(self) -> None:
        self.node.clock.write_text("0")
