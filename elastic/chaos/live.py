"""Faults of the live state in a worker's memory, and of its clock."""

from __future__ import annotations

import struct
from abc import abstractmethod

from elastic.chaos.cgroups import GroundError
from elastic.chaos.evidence import Mark
from elastic.chaos.fault import Fault

NAN = {"float32": struct.pack("<f", float("nan")), "float64": struct.pack("<d", float("nan")), "bfloat16": b"\xc0\x7f",
       "float16": b"\x00\x7e"}  # fmt: skip
HOURS = 5.0


class LiveDamage(Fault):
    """What is done to one tensor of the state in a worker's memory, from outside, while it is held after a step."""

    restarts = False

    async def inject(self) -> str:
        listener = self.ground.listener
        hold = listener.hold(lambda mark: mark.name == "step" and mark.node == self.node.name)
        held = await hold.caught
        try:
            return self._do(held)
        except OSError as error:
            raise GroundError(f"the memory of worker {held.pid} cannot be written: {error}") from error
        finally:
            hold.released.set()

    def _do(self, held: Mark) -> str:
        told = [mark for mark in self.ground.listener.marks if mark.pid == held.pid and mark.facts.get("memory")]
        if not told:
            raise GroundError(f"worker {held.pid} has saved or restored nothing in CPU memory yet")
        tensors = sorted(one for one in told[-1].facts["memory"] if one[3] in NAN)
        if not tensors:
            raise GroundError(f"worker {held.pid} has no tensor of floating point numbers in CPU memory")
        key, address, nbytes, dtype = self.ground.random.choice(tensors)
        at = address + self.ground.random.randrange(nbytes // len(NAN[dtype])) * len(NAN[dtype])
        with open(f"/proc/{held.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(at)
            element = memory.read(len(NAN[dtype]))
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
        return bytes([element[0] ^ 1]) + element[1:]


class LiveNaN(LiveDamage):
    """An element of the live state of one rank becomes NaN, and the next steps spread it. No share was published."""

    kind, stands_for, restarts, what = "live-nan", "a number that is none any more", True, "an element became NaN"
    promise = "detected where ranks hold replicas, as for live-bit-flip; elsewhere only the metrics say so"

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
