"""Standbys become workers that nobody can tell from others, except by what they need not import; or are not used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from keepers import until
from test_elastic_cli import ROOT, elastic, end_of

from elastic import standby
from elastic.guard import processes_of
from elastic.warm import Standbys
from elastic.workers import error_file_of

SCRIPT = """
import json, os, signal, sys
if "--says" in sys.argv:
    leads, rank, imported = os.getpid() == os.getsid(0), os.environ["RANK"], "colorsys" in sys.modules
    interrupted = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print(json.dumps([__name__, sys.argv, sys.path[:1], leads, rank, imported, interrupted, os.getpriority(0, 0)]))
    print("late", file=sys.stderr, flush=True)
    sys.exit(7)
signal.pause()
"""


def standbys_of(parent: int) -> list[int]:
    """Those that are ready."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                name, _, rest = (entry / "stat").read_text().partition(" (")[2].rpartition(") ")
            except OSError:
                continue
            if name == standby.NAME and rest[0] != "Z" and int(rest.split()[1]) == parent:
                found.append(int(entry.name))
    return found


class Tracked(Standbys):
    """Of which no worker is left, whatever a test makes of it."""

    def __init__(self, modules: Sequence[str]) -> None:
        super().__init__(modules)
        self.workers: list[subprocess.Popen[Any]] = []

    def start(self, *given: Any) -> subprocess.Popen[Any] | None:
        if (worker := super().start(*given)) is not None:
            self.workers.append(worker)
        return worker


@pytest.fixture
def made() -> Iterator[Standbys]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    found = Tracked(["colorsys"])
    yield found
    found.close()
    for worker in found.workers:
        worker.kill()
        worker.wait()
    signal.signal(signal.SIGINT, before)
    assert standbys_of(os.getpid()) == []


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "RANK": "3", **more}


def command(folder: Path, *arguments: str) -> list[str]:
    path = folder / "worker.py"
    path.write_text(SCRIPT)
    return [sys.executable, "-u", str(path), *arguments]


def ready(made: Standbys, command: Sequence[str], given: dict[str, str]) -> int:
    made.prepare(0, command, given)
    until("the standby is ready", lambda: standbys_of(os.getpid()))
    return standbys_of(os.getpid())[0]


@pytest.mark.parametrize("as_module", [False, True])
def test_a_standby_is_the_worker_with_its_environment_output_session_and_exit_code(
    made: Standbys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_module: bool
) -> None:
    given = command(tmp_path, "--says", "é")
    if as_module:
        monkeypatch.chdir(tmp_path)
        given[2:3] = ["-m", "worker"]
    pid = ready(made, given, environment())
    with open(tmp_path / "out", "w+") as out, open(tmp_path / "err", "w+") as err:
        more = environment(RANK="5", TORCHELASTIC_ERROR_FILE="/where/it/writes")
        process = made.start(0, given, more, (out.fileno(), err.fileno()))
        assert process is not None
        assert process.pid == pid
        assert error_file_of(pid) == "/where/it/writes"
        assert process.wait(60) == 7
        main, argv, path, leads, rank, imported, interrupted, priority = json.loads((tmp_path / "out").read_text())
        assert (main, argv, path) == ("__main__", [str(tmp_path / "worker.py"), "--says", "é"], [str(tmp_path)])
        assert (leads, rank, imported, interrupted) == (True, "5", True, True)
        assert priority == os.getpriority(os.PRIO_PROCESS, 0)
        assert (tmp_path / "err").read_text() == "late\n"


def test_one_that_does_not_fit_is_not_used(made: Standbys, tmp_path: Path) -> None:
    given = command(tmp_path)
    pid = ready(made, given, environment())
    assert made.start(0, given, environment(OMP_NUM_THREADS="77"), (1, 2)) is None, "an import may have read it"
    assert made.start(0, [*given, "--other"], environment(), (1, 2)) is None
    assert made.start(1, given, environment(), (1, 2)) is None
    made.prepare(0, given, environment(RANK="9"))
    assert standbys_of(os.getpid()) == [pid], "it still fits: the rank is no matter of imports"
    process = made.start(0, given, environment(RANK="9"), (1, 2))
    assert process is not None
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL


def test_one_that_is_lost_or_stuck_or_cannot_import_costs_nothing_but_its_imports(
    made: Standbys, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = command(tmp_path)
    os.kill(ready(made, given, environment()), signal.SIGKILL)
    until("it is gone", lambda: not standbys_of(os.getpid()))
    assert made.start(0, given, environment(), (1, 2)) is None

    pid = ready(made, given, environment())
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr("elastic.warm.TAKE_LIMIT_S", 0.05)
    assert made.start(0, given, environment(), (1, 2)) is None
    assert not Path(f"/proc/{pid}").exists()

    other = Standbys(["no_such_module"])
    other.prepare(0, given, environment())
    until("it says so", lambda: "no_such_module cannot be imported ahead" in capfd.readouterr().err)
    assert other.start(0, given, environment(), (1, 2)) is None
    other.prepare(0, ["./binary"], environment())
    assert other.start(0, ["./binary"], environment(), (1, 2)) is None
    other.close()


JOB = """
import os, signal, sys

def ready():
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            called, _, rest = open(f"/proc/{name}/stat").read().partition(" (")[2].rpartition(") ")
        except OSError:
            continue
        if called == "elastic-standby" and rest[0] != "Z" and int(rest.split()[1]) == os.getppid():
            found.append(int(name))
    return found

generation = int(os.environ["ELASTIC_GENERATION"])
print("out of", generation, flush=True)
with open("said", "a") as file:
    print(generation, os.getpid(), os.getppid(), "ahead" in sys.modules, file=file)
while not ready():
    pass
if generation < 3:
    sys.exit(5)
if generation == 3:
    os.kill(ready()[0], signal.SIGKILL)
    while ready():
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_job_restarts_its_workers_warm_and_without_a_standby_cold_and_keeps_what_they_print(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "ahead.py").touch()
    more = {"ELASTIC_JOIN_WINDOW_S": "0", "ELASTIC_FRUITLESS_LIMIT": "0", "ELASTIC_KEEP_LOGS": "3"}
    more["PYTHONPATH"] = f"{ROOT}:{tmp_path}"
    process = elastic(tmp_path, "run", "--preload", "ahead", "--log-dir", "logs", "run", "--", "job.py", **more)
    code, said = end_of(process)
    assert code == 0, said
    found = [line.split() for line in (tmp_path / "said").read_text().splitlines()]
    assert [one[0] for one in found] == ["1", "2", "3", "4"]
    assert [one[3] for one in found] == ["False", "True", "True", "False"]
    assert {int(one[2]) for one in found} == {process.pid}
    assert standbys_of(process.pid) == []
    kept = sorted((tmp_path / "logs").glob("generation-*/*/attempt_*/0/stdout.log"))
    assert [path.parents[3].name for path in kept] == [f"generation-{number:010d}" for number in (2, 3, 4)]
    assert [path.read_text() for path in kept] == ["out of 2\n", "out of 3\n", "out of 4\n"]
    assert all(f"out of {number}\n" in said for number in (1, 2, 3, 4))


def test_standbys_and_those_that_were_die_with_their_agent(made: Standbys, tmp_path: Path) -> None:
    given = command(tmp_path)
    pid = ready(made, given, environment(ELASTIC_AGENT="test-warm"))
    assert processes_of("test-warm") == [pid]
    process = made.start(0, given, environment(ELASTIC_AGENT="test-warm"), (1, 2))
    assert process is not None
    assert processes_of("test-warm") == [pid], "the guard finds it"
    process.kill()
    process.wait(60)

    agent = f"""
import os, time
from elastic.warm import Standbys
from test_warm import standbys_of
made = Standbys(["colorsys"])
made.prepare(0, {given!r}, dict(os.environ))
while not standbys_of(os.getpid()):
    time.sleep(0.01)
print(standbys_of(os.getpid())[0])
os._exit(0)
"""
    path = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-c", agent], env=environment(PYTHONPATH=path), capture_output=True, text=True, timeout=120
    )
    pid = int(done.stdout)
    until("the standby is gone", lambda: not Path(f"/proc/{pid}").exists())
