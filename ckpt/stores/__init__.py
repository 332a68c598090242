"""The places where a run's directory can lie, and what opens each of them by its URL.

posix    a directory: local disk, tmpfs, NFS, Lustre
objects  a prefix of a bucket, on top of
    bucket   plain requests, tried again where that is safe
    s3       S3 and what speaks like it
    anyfs    any other fsspec file system
    azure    Azure's blobs, on top of that
    gcs      Google's, on top of that
"""

from __future__ import annotations

import os
import re
from typing import Final
from urllib.parse import unquote

from ckpt.errors import StorageError
from ckpt.store import Store
from ckpt.stores.posix import PosixStore

_ONE_SLASH = re.compile(r"(s3|s3a|gs|gcs|az|abfs|abfss):/(?!/)")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)/*(.*)", re.DOTALL)
EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store at a path (made absolute), a file:// URL, or the URL of an fsspec file system of objects.

    Raises StorageError for what is none of them, or needs a package that is not installed. Touches nothing.
    """
    text = os.fsdecode(url)
    parsed = _URL.fullmatch(text)
    if (lost := _ONE_SLASH.match(text)) is not None:
        raise StorageError(f"cannot open {text!r}: did you mean {lost[1]}://{text[lost.end() :]}?")
    if parsed is None and text and "://" not in text:
        return PosixStore(os.path.abspath(text))
    if text.startswith("file:///"):
        return PosixStore(unquote(text.removeprefix("file://")))
    if parsed is None or parsed[1] in ("file", "local", "memory") or not parsed[2]:
        raise StorageError(
            f"cannot open {text!r}: expected a path, file:///absolute/path, or the URL of a place that all processes "
            "see, like s3://bucket/path"
        )
    return _open_bucket(text, parsed[1].lower(), parsed[2], parsed[3].strip("/"))


def _open_bucket(url: str, protocol: str, name: str, prefix: str) -> Store:
    if any(component in ("", ".", "..") for component in prefix.split("/")) and prefix:
        raise StorageError(f"cannot open {url!r}: a path in a bucket has no empty component, no . and no ..")
    from ckpt.stores.bucket import Bucket, Retried
    from ckpt.stores.objects import ObjectStore

    bucket: Bucket
    try:
        if protocol in ("s3", "s3a"):
            from ckpt.stores.s3 import S3Bucket

            bucket = S3Bucket(name)
        elif EXTRAS.get(protocol) == "azure":
            from ckpt.stores.azure import AzureBucket

            bucket = AzureBucket(protocol, name)
        elif EXTRAS.get(protocol) == "gcs":
            from ckpt.stores.gcs import GcsBucket

            bucket = GcsBucket(protocol, name)
        else:
            from ckpt.stores.anyfs import FsspecBucket

            bucket = FsspecBucket(protocol, name)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        what = f"pip install 'holdfast[{extra}]'" if extra else f"install the fsspec package for {protocol}://"
        raise StorageError(f"cannot open {url!r}: {error}. To use it: {what}") from error
    except ValueError as error:
        raise StorageError(f"cannot open {url!r}: {error}. Use a path, or a URL like s3://bucket/path") from error
    return ObjectStore(Retried(bucket), prefix)
