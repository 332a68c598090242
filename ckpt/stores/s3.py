"""S3 and what speaks like it, through s3fs: its credentials, endpoints and settings are those of botocore and fsspec.

s3fs and botocore try again by themselves, blindly; that is switched off here, as `Retried` knows what may be repeated.
Every part and object carries the checksum that botocore adds by default (AWS_REQUEST_CHECKSUM_CALCULATION).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import fsspec
from fsspec.asyn import sync

from ckpt.errors import NotFound, StorageError
from ckpt.store import AlreadyExists, OutcomeUnknown
from ckpt.stores.bucket import REQUEST_S, Busy, Found, Listing, Upload, parts_of

PART_BYTES: Final = 16 << 20
PARTS_LIMIT: Final = 10_000
DELETED_AT_ONCE: Final = 1000
CONNECT_S: Final = 10
SILENT_S: Final = 30

_BUSY_STATUS = frozenset({408, 409, 429, 500, 502, 503, 504})
_BUSY_CODES = frozenset({"RequestTimeout", "SlowDown", "BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"})
_CONNECTION = frozenset(
    # of the standard library, fsspec, botocore (HTTPClientError and below) and aiohttp
    {"OSError", "TimeoutError", "FSTimeoutError", "HTTPClientError", "ClientError", "ResponseStreamingError",
     "IncompleteReadError", "ResponseParserError", "IncompleteRead"}
)  # fmt: skip
_HINTS = {
    401: "check the credentials",
    403: "check the credentials, the bucket's policy and this machine's clock",
    404: "is the name of the bucket right?",
    301: "the bucket lies in another region: set AWS_DEFAULT_REGION or the endpoint",
}

log = logging.getLogger("ckpt")

T = TypeVar("T")


class S3Bucket:
    """One bucket. Connects at the first request."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._fs: Any = fsspec.filesystem(
            "s3",
            skip_instance_cache=True,  # the settings below are for this library alone
            use_listings_cache=False,
            config_kwargs={
                "connect_timeout": CONNECT_S,
                "read_timeout": SILENT_S,
                "retries": {"total_max_attempts": 1},
                "max_pool_connections": 64,
                "response_checksum_validation": "when_required",  # every block is verified anyway
            },
        )
        self._fs.retries = 1

    @property
    def url(self) -> str:
        return f"s3://{self._name}"

    def create(self, key: str, data: bytes) -> None:
        self._call("create", key, "put_object", Key=key, Body=data, IfNoneMatch="*", exclusive=True)

    def put(self, key: str, data: bytes) -> None:
        self._call("put", key, "put_object", Key=key, Body=data)

    def get(self, key: str, start: int, stop: int | None) -> bytes:
        asked = f"bytes={start}-" if stop is None else f"bytes={start}-{stop - 1}"

        async def act() -> bytes:
            answer = await self._fs._call_s3("get_object", Bucket=self._name, Key=key, Range=asked)
            async with answer["Body"] as body:
                if stop is not None and answer["ContentLength"] > stop - start:
                    raise StorageError(f"get {self.url}/{key}: the server sends more than {asked}, which was asked for")
                return bytes(await body.read())

        try:
            return self._run("get", key, act)
        except _OutOfRange:
            return b""

    def size(self, key: str) -> int:
        return int(self._call("look up", key, "head_object", Key=key)["ContentLength"])

    def list(self, prefix: str, *, deep: bool) -> Listing:
        found: Listing = []
        more: dict[str, Any] = {}
        while True:
            delimiter: dict[str, Any] = {} if deep else {"Delimiter": "/"}
            page = self._call("list", prefix, "list_objects_v2", Prefix=prefix, **delimiter, **more)
            for each in page.get("Contents", ()):
                found.append(Found(each["Key"], each["Size"], each["LastModified"].timestamp()))
            found += [Found(each["Prefix"], is_prefix=True) for each in page.get("CommonPrefixes", ())]
            if not page.get("IsTruncated"):
                return sorted(found, key=lambda each: each.key)
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, keys: Sequence[str]) -> None:
        for first in range(0, len(keys), DELETED_AT_ONCE):
            group = keys[first : first + DELETED_AT_ONCE]
            objects = {"Objects": [{"Key": key} for key in group], "Quiet": True}
            answer = self._call("delete", group[0], "delete_objects", Delete=objects)
            if errors := [error for error in answer.get("Errors", ()) if error.get("Code") != "NoSuchKey"]:
                kind = Busy if errors[0].get("Code") in ("InternalError", "SlowDown") else StorageError
                raise kind(f"delete {self.url}/{errors[0].get('Key')}: {errors[0].get('Code')}")

    def upload(self, key: str, nbytes: int) -> tuple[Upload, int]:
        answer = self._call("begin upload of", key, "create_multipart_upload", Key=key)
        return _Parts(self, key, answer["UploadId"]), parts_of(nbytes, PART_BYTES, PARTS_LIMIT)

    def abort_uploads(self, prefix: str) -> None:
        more: dict[str, Any] = {}
        while True:
            try:
                answer = self._call("list uploads below", prefix, "list_multipart_uploads", Prefix=prefix, **more)
            except Busy:
                raise
            except (NotFound, StorageError) as error:  # a server that knows no such list, or a user who may not see it
                log.info("unfinished uploads, if there are any, are left to the bucket's own rules: %s", error)
                return
            for each in answer.get("Uploads", ()):
                if each["Key"].startswith(prefix):  # some servers do not heed the prefix
                    _Parts(self, each["Key"], each["UploadId"]).abort()
            after = {name: answer.get(f"Next{name}") for name in ("KeyMarker", "UploadIdMarker")}
            if not answer.get("IsTruncated") or not all(after.values()) or after == more:
                return
            more = after

    def _call(self, operation: str, key: str, method: str, *, exclusive: bool = False, **arguments: Any) -> Any:
        def act() -> Any:
            return self._fs._call_s3(method, Bucket=self._name, **arguments)

        return self._run(operation, key, act, exclusive)

    def _run(self, operation: str, key: str, act: Callable[[], Awaitable[T]], exclusive: bool = False) -> T:
        try:
            return sync(self._fs.loop, act, timeout=REQUEST_S)  # type: ignore[no-any-return]
        except StorageError:
            raise
        except Exception as error:
            raise _sorted(f"{operation} {self.url}/{key}", error, exclusive) from error


class _OutOfRange(Exception):
    """The object ends before the range begins."""


class _Parts:
    """An upload in parts, as the server knows it."""

    def __init__(self, bucket: S3Bucket, key: str, upload: str) -> None:
        self._bucket, self._key, self._upload = bucket, key, upload
        self._tags: dict[int, dict[str, Any]] = {}

    def part(self, index: int, data: bytes | bytearray) -> None:
        answer = self._bucket._call(
            f"send part {index} of", self._key, "upload_part",
            Key=self._key, UploadId=self._upload, PartNumber=index + 1, Body=data,
        )  # fmt: skip
        kept = {name: value for name, value in answer.items() if name == "ETag" or name.startswith("Checksum")}
        kept.pop("ChecksumType", None)
        self._tags[index] = {"PartNumber": index + 1, **kept}

    def complete(self) -> None:
        if not self._tags:  # S3 knows no upload without a part
            self.abort()
            self._bucket.put(self._key, b"")
            return
        parts = {"Parts": [self._tags[index] for index in sorted(self._tags)]}
        self._bucket._call(
            "complete", self._key, "complete_multipart_upload",
            Key=self._key, UploadId=self._upload, MultipartUpload=parts,
        )  # fmt: skip

    def abort(self) -> None:
        try:
            self._bucket._call("abort the upload of", self._key, "abort_multipart_upload",
                               Key=self._key, UploadId=self._upload)  # fmt: skip
        except NotFound:
            return


def _sorted(what: str, error: Exception, exclusive: bool) -> Exception:
    """The error of ours for what s3fs raised; see `bucket` for the kinds."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    if not isinstance(response, dict):
        return _without_answer(what, error, exclusive)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = str(response.get("Error", {}).get("Code", status))
    message = f"{what}: {code}, {response.get('Error', {}).get('Message', '')} (HTTP status {status})"
    if exclusive and status == 412:
        return AlreadyExists(f"{what}: it already exists. Nothing was changed")
    if status in _BUSY_STATUS or code in _BUSY_CODES:
        return OutcomeUnknown(message) if exclusive else Busy(message)
    if status == 416:
        return _OutOfRange()
    if status == 404 and code != "NoSuchBucket":
        return NotFound(f"{what}: there is no such object")
    return StorageError(message + (f"; {_HINTS[status]}" if status in _HINTS else ""))


def _without_answer(what: str, error: Exception, exclusive: bool) -> StorageError:
    message = f"{what}: {type(error).__name__}: {error}".rstrip(": ")
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _CONNECTION:
        return OutcomeUnknown(message) if exclusive else Busy(message)
    hint = "; set the credentials as for any AWS client (environment, profile, role)" if "Credential" in message else ""
    return StorageError(message + hint)
