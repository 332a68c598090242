"""Notices that this machine will end soon: a file that appears, or a URL that a cloud's machines can ask.

A URL's notice is any answer with a text other than FALSE. Clouds ask for a header (ELASTIC_NOTICE_HEADER), or a token:

    AWS    http://169.254.169.254/latest/meta-data/spot/instance-action            the token is fetched here
    GCE    http://metadata.google.internal/computeMetadata/v1/instance/preempted   header Metadata-Flavor: Google
"""

from __future__ import annotations

import logging
import os
import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from ckpt.errors import Incompatible

log = logging.getLogger("elastic")

ASK_EVERY_S = 2.0
ASK_LIMIT_S = 2.0
TEXT_LIMIT_BYTES = 4096
AWS_TOKEN_PATH, AWS_PREFIX = "/latest/api/token", "/latest/"


class Notices:
    """What was said so far; the URL is asked on a thread of its own. Raises Incompatible for what is no http URL."""

    def __init__(self, file: str, url: str, header: str) -> None:
        self._file, self._url, self._header = file, url, header
        self._said = ""
        self._warned = False
        self._closed = threading.Event()
        if not url:
            return
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise Incompatible(f"ELASTIC_NOTICE_URL is an http or https URL, not {url!r:.200}")
        if header and ":" not in header:
            raise Incompatible(f"ELASTIC_NOTICE_HEADER is <name>: <value>, not {header!r:.200}")
        threading.Thread(target=self._run, name="elastic-notices", daemon=True).start()

    def reason(self) -> str:
        """Why this node shall leave; empty as long as it need not. Does not block."""
        if self._file and os.path.exists(self._file):
            return f"{self._file} is there"
        return self._said

    def close(self) -> None:
        """Ask no more. Idempotent."""
        self._closed.set()

    def _run(self) -> None:
        while not self._said and not self._closed.is_set():
            if text := self._ask():
                self._said = f"{self._url} says {text[:100]!r}"
            self._closed.wait(ASK_EVERY_S)

    def _ask(self) -> str:
        """The notice; empty if there is none."""
        try:
            text = _fetch(self._url, self._headers()).strip()
        except urllib.error.HTTPError:  # 404 is AWS's "no notice"
            return ""
        except (OSError, ValueError) as error:
            if not self._warned:
                self._warned = True
                log.warning("%s cannot be asked for notices: %s", self._url, error)
            return ""
        return "" if text.upper() == "FALSE" else text

    def _headers(self) -> dict[str, str]:
        if self._header:
            name, _, value = self._header.partition(":")
            return {name.strip(): value.strip()}
        parts = urlsplit(self._url)
        if not parts.path.startswith(AWS_PREFIX):
            return {}
        token = f"{parts.scheme}://{parts.netloc}{AWS_TOKEN_PATH}"
        return {"X-aws-ec2-metadata-token": _fetch(token, {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")}


def _fetch(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a machine's own addresses
    with opener.open(request, timeout=ASK_LIMIT_S) as answer:
        found: bytes = answer.read(TEXT_LIMIT_BYTES)
    return found.decode(errors="replace")
