"""A bucket of Google Cloud Storage. Like any other fsspec file system, but that large objects go up in pieces, side by
side, which the store then composes.

A piece is an object beside the one that it becomes part of, under a name of its own, so that each request can be made
again. Its MD5 is compared with that of what was sent. Pieces are deleted once the object is there; those of an upload
that nobody finished, together with the attempt to which they belong.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Any, Final

from ckpt.errors import StorageError
from ckpt.stores.anyfs import PART_BYTES, FsspecBucket
from ckpt.stores.bucket import Upload, parts_of

COMPOSED: Final = 32  # objects that one request makes into one, at most
PIECES_LIMIT: Final = COMPOSED**3
_PIECE: Final = re.compile(r".+\.piece-[0-9a-f]{16}-\d+-\d{5}")


class GcsBucket(FsspecBucket):
    """The bucket `name`."""

    def __init__(self, protocol: str, name: str) -> None:
        super().__init__(protocol, name)
        self._creating = _asked_once()

    def create(self, key: str, data: bytes) -> None:
        # If the client asked again, the second answer would be about its own first request.
        options = {"mode": "create", "consistency": "md5", **self._bounded}
        self._run("create", key, lambda path: self._creating.pipe_file(path, data, **options), exclusive=True)

    def put(self, key: str, data: bytes) -> None:
        self._run("put", key, lambda path: self._fs.pipe_file(path, data, consistency="md5", **self._bounded))

    def compose(self, key: str, pieces: Sequence[str]) -> None:
        """Make the object `key` of others, in their order; idempotent as long as those stay."""
        paths = [f"{self._name}/{piece}" for piece in pieces]
        self._run("compose", key, lambda path: self._fs.merge(path, paths, **self._bounded))

    def upload(self, key: str, nbytes: int) -> tuple[Upload, int]:
        return _Pieces(self, key), parts_of(nbytes, PART_BYTES, PIECES_LIMIT)

    def abort_uploads(self, prefix: str) -> None:
        found = [each.key for each in self.list(prefix, deep=True)]
        self.delete([key for key in found if _PIECE.fullmatch(key)])


def _asked_once() -> Any:
    """The client without its own retries, which it offers no switch for."""
    from gcsfs import GCSFileSystem

    class AskedOnce(GCSFileSystem):  # type: ignore[misc]
        _request = GCSFileSystem._request.__wrapped__

    return AskedOnce(use_listings_cache=False)


class _Pieces:
    """An upload: the pieces that were sent, and those that were made of pieces."""

    def __init__(self, bucket: GcsBucket, key: str) -> None:
        self._bucket, self._key, self._nonce = bucket, key, secrets.token_hex(8)
        self._sent: set[int] = set()
        self._composed: list[str] = []

    def part(self, index: int, data: bytes | bytearray) -> None:
        self._bucket.put(self._piece(0, index), bytes(data))
        self._sent.add(index)

    def complete(self) -> None:
        self._composed = []
        pieces = [self._piece(0, index) for index in sorted(self._sent)]
        level = 0
        while len(pieces) > COMPOSED:
            level += 1
            groups = [pieces[first : first + COMPOSED] for first in range(0, len(pieces), COMPOSED)]
            pieces = [self._piece(level, index) for index in range(len(groups))]
            self._composed += pieces
            for piece, group in zip(pieces, groups, strict=True):
                self._bucket.compose(piece, group)
        self._bucket.compose(self._key, pieces)
        try:
            self.abort()
        except StorageError:
            return  # they go with the attempt

    def abort(self) -> None:
        self._bucket.delete([*self._composed, *(self._piece(0, index) for index in self._sent)])

    def _piece(self, level: int, index: int) -> str:
        return f"{self._key}.piece-{self._nonce}-{level}-{index:05d}"
