"""Signatures of a run's records, for a store that somebody else can write to. Owns the key; it is shown nowhere.

A record is signed with HMAC-SHA256 over the run's nonce, the signature before it, and its own bytes. So what stands in
a signed log was written by somebody with the key, for this run, after exactly these records.
"""

from __future__ import annotations

import hmac
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from ckpt.errors import Corrupt, Incompatible
from ckpt.records import signature_of

KEY_VARIABLE: Final = "CKPT_SIGNING_KEY"
_KEY = re.compile(r"(?:[0-9a-fA-F]{2}){32,1024}")
_FILE = "file:"


def signing_key() -> bytes | None:
    """The key that the environment names, if any: at least 64 hex digits, or `file:` and a file that holds them."""
    text = os.environ.get(KEY_VARIABLE, "")
    if not text:
        return None
    where = KEY_VARIABLE
    if text.startswith(_FILE):
        where = f"{KEY_VARIABLE}, the file {text.removeprefix(_FILE)!r},"
        try:
            text = Path(text.removeprefix(_FILE)).read_text("ascii").strip()
        except (OSError, ValueError) as error:
            raise Incompatible(f"{where} cannot be read: {type(error).__name__}. {_MAKE_ONE}") from None
    if not _KEY.fullmatch(text):
        raise Incompatible(f"{where} is not a key: it takes at least 64 hex digits. {_MAKE_ONE}")
    return bytes.fromhex(text)


_MAKE_ONE = "`openssl rand -hex 32` makes a key; CKPT_SIGNING_KEY holds it, or file:PATH of a file that does"


@dataclass(frozen=True)
class Chain:
    """The signatures of a log, as far as it was read. Immutable; without a key it neither verifies nor signs."""

    key: bytes | None = field(default=None, repr=False)
    run: str = ""
    last: bytes = b""  # the signature before the next slot

    def sign(self, body: bytes) -> bytes | None:
        """The signature of `body` as the next record, None without a key. `Incompatible` if this log needs one."""
        if self.key is not None:
            return self._signature(self.key, body)
        if self.last:
            raise Incompatible(
                f"the records of this run are signed and {KEY_VARIABLE} is not set here, so everybody who has the key "
                "would refuse what this process appends. Nothing was appended; set the key (also where the job starts "
                "its workers on other nodes) and start again"
            )
        return None

    def after(self, data: bytes) -> Chain:
        """The chain once the record `data` was read next. `Corrupt` unless somebody with the key put it there."""
        body, signature = signature_of(data)
        if self.key is None:
            return replace(self, last=signature)
        if not signature:
            raise Corrupt(
                f"it is not signed, and {KEY_VARIABLE} is set here: the run was begun without a key, or somebody "
                f"without it wrote this. {_GENUINE}. Without {KEY_VARIABLE} the run is read as it stands, on trust"
            )
        if not hmac.compare_digest(signature, self._signature(self.key, body)):
            raise Corrupt(
                "its signature is not the one of this key, this run and this place in the log: it was signed with "
                f"another key, changed, copied from elsewhere, or a record before it was taken away. {_GENUINE}"
            )
        return replace(self, last=signature)

    def _signature(self, key: bytes, body: bytes) -> bytes:
        place = b"holdfast record\0" + self.run.encode() + b"\0"
        return hmac.digest(key, place + self.last.rjust(32, b"\0") + body, "sha256")


_GENUINE = (
    "First check that CKPT_SIGNING_KEY is the key of this run. If it is, every record before this one is genuine; to "
    "go on from there, find out who wrote this one, then move it and all later ones out of log/"
)
