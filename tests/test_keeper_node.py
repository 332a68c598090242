"""One node's keeper, message by message: races that kills bring about once in hundreds."""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from pathlib import Path

from ckpt.keeper.coordinator import GRACE_S, LOST_S, Ledger
from ckpt.keeper.node import Node, Snapshot
from ckpt.keeper.orders import Job, Order, Ordered, Outcome, Persist, Summary, ToCoordinator, ToWorker
from ckpt.keeper.persist import Copying, Memory
from ckpt.keeper.ram import RamTier
from ckpt.run import RunDirectory

ATTEMPT = "000000001.aa"


class Silent:
    """A link and a worker to whom everything can be said."""

    rank = 0

    def __init__(self) -> None:
        self.heard: list[ToCoordinator | ToWorker] = []

    def tell(self, message: ToCoordinator | ToWorker) -> None:
        self.heard.append(message)


def snapshot(rank: int, worker: Silent) -> Snapshot:
    job = Job(ATTEMPT, 1, 1, 1, "nonce", 2, 10.0, False)
    order = Order(
        job=job, rank=rank, data_bytes=4096, slots=(), runs=((0, 4096),), values={}, rank_values={}, ring=1,
        place_bytes=4096, local_world=2, layouts=b"", coordinator=None, token=b"", summary=None,
    )  # fmt: skip
    return Snapshot(order, Memory(order, mmap.mmap(-1, 4096)), Copying(1), worker, worker, time.monotonic() + 10)


def test_an_outcome_that_is_told_again_ends_the_rank_that_came_in_between(tmp_path: Path) -> None:
    """Seed 131 of the kill proof: a new keeper hears of a failed attempt from one rank, and then from the other."""

    async def play() -> None:
        ram = RamTier(os.environ["CKPT_RAM_DIR"], "node-test")
        node = Node(RunDirectory.open(tmp_path, create=True), ram)
        first, second = Silent(), Silent()
        node.open[ATTEMPT, 0] = snapshot(0, first)
        failed = Outcome(ATTEMPT, kind="SaveFailed", message="the keeper was lost")
        node.heard(failed)
        node.open[ATTEMPT, 1] = snapshot(1, second)  # its order comes now, and the coordinator answers it
        node.heard(failed)
        await asyncio.wait_for(node.settle(), 10)
        assert not node.open
        for worker in (first, second):
            assert [message.message for message in worker.heard if isinstance(message, Outcome)] == [failed.message]

    asyncio.run(play())


def test_a_ram_directory_that_is_not_there_yet_is_made(tmp_path: Path) -> None:
    """With CKPT_RAM_DIR at such a place, the first save failed or not, as two threads raced."""
    tier = RamTier(str(tmp_path / "not" / "there"), "nonce")
    tier.make()
    assert tier.exists()


def test_a_new_start_does_not_wait_for_a_rank_whose_node_has_no_worker_left() -> None:
    """Rank 1 was killed between the word among the ranks and its order: nobody can bring its part."""

    def ledger_with(*ordered: tuple[str, str, int]) -> Ledger:
        ledger = Ledger()
        for attempt, node, rank in ordered:
            job = Job(attempt, int(attempt[:9]), int(attempt[:9]), 1, "nonce", 2, 600.0, False)
            ledger.ordered(node, Ordered(job, rank, 1, b"", None), now=0.0)
        return ledger

    first, second = ATTEMPT, "000000002.aa"
    both = ledger_with((first, "a", 0), (first, "b", 1), (second, "a", 0))
    both.settling_since = 1.0
    both.quiet("a")
    assert not both.tick(1.0, {"a", "b"}), "a worker of b may still order"
    both.quiet("b")
    assert not both.tick(1.0, {"a"}), "b is away, and may have more"
    (failed,) = both.tick(1.0, {"a", "b"})
    assert isinstance(failed, Outcome)
    assert failed.attempt == second, "what both have ordered goes on"

    unknown = ledger_with((second, "a", 0))
    unknown.settling_since = 1.0
    unknown.quiet("a")
    assert not unknown.tick(1.0, {"a", "b"}), "of b nothing is known"
    assert unknown.tick(1.1 + GRACE_S, {"a", "b"})

    node_lost = ledger_with((first, "a", 0), (first, "b", 1))
    node_lost.settling_since, node_lost.grace_s = 1.0, LOST_S
    assert not node_lost.tick(1.0, {"a"})
    assert node_lost.tick(1.1 + LOST_S, {"a"}), "b is lost, and what it had with it"
    assert node_lost.grace_s == GRACE_S, "the next one is another matter"

    again = ledger_with((first, "a", 0), (first, "b", 1), (second, "a", 0))
    again.settling_since = 1.0
    again.quiet("a")
    again.quiet("b")
    job = Job("000000003.aa", 3, 3, 1, "nonce", 2, 600.0, False)
    again.ordered("b", Ordered(job, 1, 1, b"", None), now=1.0)
    assert not again.tick(1.0, {"a", "b"}), "b has come back"


def test_nothing_is_stored_before_rank_0_has_said_what_may_be_referred_to() -> None:
    """A rank that came before rank 0 stored again what had not changed; which one did was a matter of chance."""
    job, ledger = Job(ATTEMPT, 1, 1, 1, "nonce", 2, 10.0, False), Ledger()
    assert ledger.ordered("a", Ordered(job, 1, 2, b"", None), now=0.0) == []
    assert ledger.ordered("a", Ordered(job, 0, 2, b"", Summary("", {})), now=0.0) == [Persist(ATTEMPT)]
    assert ledger.ordered("b", Ordered(job, 1, 2, b"", None), now=0.0) == [Persist(ATTEMPT)], "who asks again hears it"
