"""The command `elastic`: the launcher's exit codes, and what status tells."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import servers
from keepers import until
from test_objects import bucket

from ckpt.errors import NotFound
from ckpt.log import View, decide_start
from ckpt.run import RunDirectory
from elastic.cli import torchrun_arguments
from elastic.membership import Member, of_start, to_record
from elastic.roster import Pulse
from elastic.status import describe, status

ROOT = Path(__file__).parent.parent
MEMBERS = tuple(Member(name, f"host-{name}", ("10.0.0.1",), 7) for name in "ab")


def elastic(folder: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        [sys.executable, "-c", "from elastic.cli import main; main()", *arguments],
        env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def end_of(process: subprocess.Popen[str], deadline_s: float = 180) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"it has not ended within {deadline_s:g} s: {process.communicate()[0]}") from None
    return process.returncode, said


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def test_a_job_ends_with_0_and_its_workers_know_their_generation(tmp_path: Path) -> None:
    text = "import elastic; now = elastic.current(); print('at', now.generation, now.group_rank, now.group_world)"
    code, said = end_of(elastic(tmp_path, "run", "run", "--", script(tmp_path, text), ELASTIC_JOIN_WINDOW_S="0"))
    assert code == 0, said
    assert "at 1 0 1" in said
    found = status(str(tmp_path / "run"), watch_s=0)
    assert (found["generation"], found["state"], found["steps"]) == (1, "done", [])


def test_workers_that_fail_again_and_again_end_the_job(tmp_path: Path) -> None:
    text = """
from torch.distributed.elastic.multiprocessing.errors import record

@record
def main():
    raise ValueError("boom")

main()
"""
    hooks = tmp_path / "hooks.py"
    hooks.write_text(
        "class Told:\n"
        "    def on_worker_failure(self, failure):\n"
        "        open('failed', 'a').write(open(failure.error_file).read())\n"
    )
    more = {"ELASTIC_JOIN_WINDOW_S": "0", "ELASTIC_FRUITLESS_LIMIT": "2", "ELASTIC_HOOKS": "hooks:Told"}
    more["PYTHONPATH"] = f"{ROOT}:{tmp_path}"
    code, said = end_of(elastic(tmp_path, "run", "run", "--", script(tmp_path, text), **more))
    assert code == 76, said
    assert "ValueError: boom" in (tmp_path / "failed").read_text(), said
    assert "failed 2 times in a row without a new step" in said
    assert RunDirectory.open(tmp_path / "run").log.read().generation == 2


def test_workers_whose_state_does_not_fit_end_the_job_at_once(tmp_path: Path) -> None:
    """What another start does not change is started once more, in case it was one node's, and not ten times."""
    text = "import ckpt, sys; ckpt.Checkpointer('other').save(1, {'what': lambda: 0}, blocking=True)"
    code, said = end_of(elastic(tmp_path, "run", "run", "--", script(tmp_path, text), ELASTIC_JOIN_WINDOW_S="0"))
    assert code == 76, said
    # on a busy machine torchrun may collect a worker before its exit code is seen: then it is not known to be hopeless
    assert re.search("failed [23] times in a row without a new step", said), said
    assert RunDirectory.open(tmp_path / "run").log.read().generation <= 3


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, said = end_of(elastic(tmp_path, "run", "run", "--", "x.py", ELASTIC_PORT=port))
    assert code == 13, said
    assert f":{port}: Address already in use; set ELASTIC_PORT" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_agent_and_its_workers(tmp_path: Path, number: signal.Signals, expected: int) -> None:
    text = (
        "import os, signal; open('pid.part', 'w').write(str(os.getpid())); os.rename('pid.part', 'pid'); signal.pause()"
    )
    process = elastic(tmp_path, "run", "run", "--", script(tmp_path, text), ELASTIC_JOIN_WINDOW_S="0")
    try:
        until("the worker runs", (tmp_path / "pid").exists)
        process.send_signal(number)
        code, said = end_of(process)
        assert code == expected, said
        assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()
    finally:
        process.kill()


def test_workers_and_what_they_started_die_with_their_agent_but_a_keeper_does_not(tmp_path: Path) -> None:
    text = """
import os, signal, subprocess, sys
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
others = [subprocess.Popen([*sleep, *more], start_new_session=True) for more in ([], ["ckpt.keeper"])]
open("pids.part", "w").write(" ".join(map(str, [os.getpid(), *(other.pid for other in others)])))
os.rename("pids.part", "pids")
signal.pause()
"""
    process = elastic(tmp_path, "run", "run", "--", script(tmp_path, text), ELASTIC_JOIN_WINDOW_S="0")
    pids: list[int] = []
    try:
        until("the worker runs", (tmp_path / "pids").exists)
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        process.kill()
        until("worker and child are dead", lambda: not any(alive(pid) for pid in pids[:2]))
        assert alive(pids[2]), "the keeper has to store what the worker left"
    finally:
        process.kill()
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_job_that_cannot_be_is_refused_before_it_starts(tmp_path: Path) -> None:
    code, said = end_of(elastic(tmp_path, "run", "--nodes", "5:7", "run", "--", "x.py", ELASTIC_UNIT="4"))
    assert code == 13, said
    assert "multiple of 4" in said


def test_a_job_that_is_submitted_twice_or_is_another_one_does_not_merge(tmp_path: Path) -> None:
    text = "import os, time, pathlib\nwhile not pathlib.Path('enough').exists(): time.sleep(0.05)"
    mine = script(tmp_path, text)
    (other := tmp_path / "other.py").write_text(text)

    def submit(run_id: str, command: str) -> subprocess.Popen[str]:
        arguments = ("run", "--nodes", "1:4", "--run-id", run_id, "run", "--", command)
        return elastic(tmp_path, *arguments, ELASTIC_JOIN_WINDOW_S="0")

    first = submit("mine", mine)

    def began() -> bool:
        with contextlib.suppress(NotFound):
            return bool(status(str(tmp_path / "run"), watch_s=0)["generation"])
        return False

    try:
        until("the first one works", began)
        for run_id, command, differs in (
            ("other", mine, "'other' instead of 'mine'"),
            ("mine", str(other), "another script, or other arguments"),
        ):
            code, said = end_of(submit(run_id, command))
            assert code == 11, said
            assert "belongs to another job" in said
            assert differs in said
        assert status(str(tmp_path / "run"), watch_s=0)["generation"] == 1, "the first one was not disturbed"
    finally:
        (tmp_path / "enough").touch()
    code, said = end_of(first)
    assert code == 0, said


def test_a_store_on_which_two_could_lead_is_refused_as_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with servers.rclone() as endpoint:
        url = f"{bucket(monkeypatch, endpoint)}/run"
        code, said = end_of(elastic(tmp_path, "run", url, "--", script(tmp_path, "")))
    assert code == 13, said
    assert "two leaders could not be kept" in said


def test_what_stands_after_the_url_goes_to_torchrun() -> None:
    found = torchrun_arguments("/run", "2:8", "4", "job", ["--", "-m", "pkg.train", "--lr", "1"])
    assert found[-6:] == ["--nproc-per-node", "4", "-m", "pkg.train", "--lr", "1"]
    assert found[found.index("--nnodes") + 1] == "2:8"
    assert found[found.index("--max-restarts") + 1] == "1000000"


# Status


def view_of(reason: str) -> View:
    members = to_record(MEMBERS, "a", 9, "s1")
    return View().after(decide_start(View(), nonce="s1", run_id=None, reason=reason, members=members, unix_s=1.0))


@pytest.mark.parametrize(
    ("before", "after", "state"),
    [
        (Pulse("a", 1, 3), Pulse("a", 1, 5, waiting=("host-c",), avoided=("host-d",), slow=("x",)), "led"),
        (Pulse("a", 1, 3), Pulse("a", 1, 3), "no leader"),
        (None, None, "no leader"),
        (Pulse("x", 1, 3), Pulse("x", 1, 4), "no leader"),
        (Pulse("a", 1, 3), Pulse("a", 1, 4, over=True), "over"),
        (Pulse("a", 1, 3), Pulse("a", 1, 4, over=True, done=True), "done"),
    ],
)
def test_whether_there_is_a_leader_is_seen_by_its_counter(before: Any, after: Any, state: str) -> None:
    view = view_of("why")
    found = describe("/run", view, of_start(view.holder), before, after, ["host-e"])
    assert found["state"] == state
    assert [(m["rank"], m["name"], m["leads"]) for m in found["members"]] == [(0, "host-a", True), (1, "host-b", False)]
    if state == "led":
        assert (found["spares"], found["quarantined"], found["slow"]) == (["host-c"], ["host-d"], ["x"])
    one = {"generation": 1, "unix_s": 1.0, "nodes": 2, "reason": "why", "commits": 0}
    assert found["generations"] == [one]
    json.dumps(found)


def test_status_of_nothing_exits_10_and_of_a_run_is_printed(tmp_path: Path) -> None:
    assert end_of(elastic(tmp_path, "status", "nowhere"))[0] == 10
    RunDirectory.open(tmp_path / "run", create=True)
    code, said = end_of(elastic(tmp_path, "status", "run"))
    assert (code, said.splitlines()[0]) == (0, "generation 0, not elastic: nobody has begun")
