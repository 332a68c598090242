"""Connections between agents, on one asyncio loop: who listens, who asks whom, and messages that never block."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from ckpt.errors import CkptError
from ckpt.wire import Channel, Outbox, dial_tcp
from elastic.membership import Member
from elastic.messages import Down, Hello, Refused, Welcome

log = logging.getLogger("elastic")


class Link(Outbox):
    """One connection, both ways. What cannot be delivered is lost with it."""

    def __init__(self, channel: Channel, address: str = "") -> None:
        super().__init__(channel)
        self._receive, self.address = channel.receive, address
        self.reader: asyncio.Task[None] | None = None

    async def receive(self) -> Any:
        """The next message; None when the other end is gone."""
        return await self._receive()


async def ask(target: Member, token: bytes, hello: Hello, limit_s: float) -> tuple[Link, Welcome | Refused] | None:
    """A link to `target` and its answer, by the first of its addresses that answers; None if none does in time."""
    for address in target.addresses:
        link: Link | None = None
        try:
            async with asyncio.timeout(limit_s):
                link = Link(await dial_tcp(address, target.port, token, Down), address)
                link.tell(hello)
                answer = await link.receive()
                if isinstance(answer, Welcome | Refused):
                    return link, answer
                link.close()
        except (CkptError, OSError, TimeoutError):
            if link is not None:
                link.close()
    return None


async def read_all(link: Link, heard: Callable[[Any], None]) -> None:
    """Give every message to `heard` until the other end is gone, or says what it may not."""
    try:
        while (message := await link.receive()) is not None:
            heard(message)
    except (CkptError, OSError) as error:
        log.warning("a connection was closed: %s", error)
    finally:
        link.close()
