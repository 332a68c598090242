"""All the ways in which a node is told that it has to leave, with real agents; and a rank that others wait for."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from agents import Cluster
from keepers import until
from test_elastic_cli import elastic, end_of
from test_planned import as_host, check_steps, goes_on

from ckpt.errors import Incompatible
from ckpt.run import RunDirectory
from elastic.notices import Notices
from elastic.status import status


class Metadata(BaseHTTPRequestHandler):
    """A cloud's: 404 until there is a notice; tokens as AWS has them."""

    notice: str | None = None
    asked: list[tuple[str, str, str | None]]

    def do_PUT(self) -> None:
        self._answer(200, "a token")

    def do_GET(self) -> None:
        kind = type(self)
        header = self.headers.get("X-aws-ec2-metadata-token") or self.headers.get("Metadata-Flavor")
        kind.asked.append((self.command, self.path, header))
        self._answer(200 if kind.notice is not None else 404, kind.notice or "")

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def metadata() -> Iterator[tuple[str, type[Metadata]]]:
    kind = type("Told", (Metadata,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", kind
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("path", "header", "before", "sent"),
    [
        ("/latest/meta-data/spot/instance-action", "", None, "a token"),
        ("/computeMetadata/v1/instance/preempted", "Metadata-Flavor: Google", "FALSE", "Google"),
    ],
)
def test_a_notice_by_url_is_heard_once_it_is_one(
    monkeypatch: pytest.MonkeyPatch, path: str, header: str, before: str | None, sent: str
) -> None:
    monkeypatch.setattr("elastic.notices.ASK_EVERY_S", 0.01)
    with metadata() as (url, kind):
        kind.notice = before
        notices = Notices("", url + path, header)
        until("it was asked several times", lambda: len(kind.asked) > 3)
        assert notices.reason() == ""
        assert set(kind.asked) == {("GET", path, sent)}
        kind.notice = "TRUE"
        until("the notice is heard", notices.reason)
        assert notices.reason() == f"{url}{path} says 'TRUE'"
        notices.close()


def test_what_cannot_be_asked_is_no_notice_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("elastic.notices.ASK_EVERY_S", 0.01)
    notices = Notices(str(tmp_path / "file"), "http://127.0.0.1:1/x", "")
    until("it says so, once", lambda: caplog.text.count("cannot be asked for notices") == 1)
    assert notices.reason() == ""
    (tmp_path / "file").touch()
    assert notices.reason() == f"{tmp_path / 'file'} is there"
    notices.close()
    for url, header in (("ftp://x/y", ""), ("/a/file", ""), ("http://host/", "no header")):
        with pytest.raises(Incompatible, match="ELASTIC_NOTICE"):
            Notices("", url, header)


def add(cluster: Cluster, name: str, **more: str) -> None:
    at_once = {"ELASTIC_JOIN_WINDOW_S": "0", "ELASTIC_MIN_INTERVAL_S": "0"}
    cluster.add(name, "1:2", before=as_host(f"host-{name}"), loop=["steps"], **at_once, **more)


def status_of(folder: Path) -> dict[str, Any]:
    return status(str(folder / "run"), watch_s=0)


def test_a_signal_makes_a_node_leave_with_its_last_step_saved(tmp_path: Path) -> None:
    """The short version of the next one."""
    with Cluster(tmp_path) as cluster:
        add(cluster, "a")
        cluster.until("it trains", lambda: cluster.last_step() > 3)
        cluster.agents["a"].process.send_signal(signal.SIGUSR1)
        assert cluster.agents["a"].wait() == 143
        head = RunDirectory.open(cluster.run).log.read().head
        assert head is not None
        assert head.step == cluster.last_step()


@pytest.mark.prove
def test_a_signal_a_cordon_a_file_and_a_deadline_make_a_node_leave(tmp_path: Path) -> None:
    notice = tmp_path / "notice"
    with Cluster(tmp_path) as cluster:
        add(cluster, "a")
        cluster.until("one trains", lambda: cluster.last_step() > 3)
        add(cluster, "b", TEST_SLOW="0.2")
        generation = cluster.trains({"a", "b"})
        slow = r"rank 1 on host-b is \d+\.\d x the median of its own time"
        cluster.until("the straggler is named", lambda: cluster.log_has("a", slow))
        cluster.until("status says so", lambda: status_of(tmp_path)["slow"])
        assert [text.partition(" is ")[0] for text in status_of(tmp_path)["slow"]] == ["rank 1 on host-b"]

        cluster.agents["b"].process.send_signal(signal.SIGUSR1)
        generation = goes_on(cluster, {"a"}, generation)
        assert cluster.agents["b"].wait() == 143
        assert cluster.log_has("a", "host-b leaves: this agent got SIGUSR1")

        assert end_of(elastic(tmp_path, "cordon", "host-b", "run"))[0] == 0
        add(cluster, "b", ELASTIC_NOTICE_FILE=str(notice))
        cluster.until("it is there", lambda: status_of(tmp_path)["spares"] == ["host-b"])
        assert status_of(tmp_path)["generation"] == generation, "it waits"
        assert end_of(elastic(tmp_path, "cordon", "--undo", "host-b", "run"))[0] == 0
        generation = goes_on(cluster, {"a", "b"}, generation)
        assert end_of(elastic(tmp_path, "cordon", "--undo", "host-b", "run"))[0] == 10, "it is none any more"

        notice.touch()
        generation = goes_on(cluster, {"a"}, generation)
        assert cluster.agents["b"].wait() == 143
        check_steps(cluster)

        add(cluster, "c")
        generation = goes_on(cluster, {"a", "c"}, generation)
        (cluster.events / "leave-c.part").write_text("0.5")
        (cluster.events / "hang-c").touch()
        (cluster.events / "leave-c.part").rename(cluster.events / "leave-c")
        cluster.trains({"a"}, after=generation)
        assert cluster.agents["c"].wait() == 143
        assert cluster.log_has("c", "a test wants it; its time is up")
        cluster.finish()
        assert cluster.agents["a"].wait() == 0
