"""A container of Azure's blobs. Like any other fsspec file system, but that large blobs go up in blocks, side by side.

A block that fails is sent again alone, and Azure checks what arrives. Blocks that are never committed are nobody's:
Azure forgets them after a week.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from typing import Any, Final

from azure.storage.blob import BlobBlock
from fsspec.asyn import sync

from ckpt.stores.anyfs import PART_BYTES, FsspecBucket
from ckpt.stores.bucket import Upload, parts_of

BLOCKS_LIMIT: Final = 50_000


class AzureBucket(FsspecBucket):
    """The container `name`."""

    def create(self, key: str, data: bytes) -> None:
        # If the client asked again, the second answer would be about its own first request.
        self.with_blob(
            "create",
            key,
            lambda client: client.upload_blob(data, overwrite=False, validate_content=True, retry_total=0),
            exclusive=True,
        )

    def upload(self, key: str, nbytes: int) -> tuple[Upload, int]:
        return _Blocks(self, key), parts_of(nbytes, PART_BYTES, BLOCKS_LIMIT)

    def with_blob(
        self, operation: str, key: str, act: Callable[[Any], Awaitable[Any]], exclusive: bool = False
    ) -> None:
        """Have the client of one blob do something. Raises the errors of every bucket."""

        async def on_loop(path: str) -> None:
            container, blob, _ = self._fs.split_path(path)
            async with self._fs.service_client.get_blob_client(container, blob) as client:
                await act(client)

        self._run(operation, key, lambda path: sync(self._fs.loop, on_loop, path, **self._bounded), exclusive)


class _Blocks:
    """An upload: the blocks that were sent."""

    def __init__(self, bucket: AzureBucket, key: str) -> None:
        self._bucket, self._key = bucket, key
        self._sent: set[int] = set()

    def part(self, index: int, data: bytes | bytearray) -> None:
        sent = bytes(data)
        self._bucket.with_blob(
            f"send block {index} of",
            self._key,
            lambda client: client.stage_block(_id(index), sent, length=len(sent), validate_content=True),
        )
        self._sent.add(index)

    def complete(self) -> None:
        blocks = [BlobBlock(_id(index)) for index in sorted(self._sent)]
        self._bucket.with_blob("complete", self._key, lambda client: client.commit_block_list(blocks))

    def abort(self) -> None:
        """There is nothing to be done."""


def _id(index: int) -> str:
    """All of one length, as Azure wants it."""
    return base64.b64encode(f"{index:08d}".encode()).decode()
