"""The files for Slurm and Kubernetes: what they ask for, and what the Slurm script does, with real agents."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from agents import Cluster
from test_elastic_cli import ROOT

from ckpt.run import RunDirectory
from elastic.cli import cli

SBATCH = ROOT / "examples" / "slurm" / "train.sbatch"
MANIFEST = ROOT / "examples" / "kubernetes" / "train.yaml"
SRUN = """#!/bin/bash
# Stands in for Slurm's: the command once for each of two hosts; the highest exit code.
while [[ "$1" == --* ]]; do shift; done
for host in n1 n2; do
    CKPT_RAM_DIR="$CKPT_RAM_DIR/$host" TEST_NODE="$host" unshare --uts sh -c "hostname $host; "'exec "$@"' sh "$@" &
    pids="${pids:-} $!"
done
worst=0
for pid in $pids; do
    wait "$pid"
    code=$?
    [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
"""


def options_of(command: list[str]) -> set[str]:
    return {word for word in command[: command.index("--")] if word.startswith("--")}


def known_options() -> set[str]:
    run: Any = cli.commands["run"]
    return {name for parameter in run.params for name in parameter.opts}


def test_the_sbatch_file_is_a_script_and_asks_for_what_the_page_says() -> None:
    assert subprocess.run(["bash", "-n", str(SBATCH)], check=False, timeout=30).returncode == 0
    text = SBATCH.read_text()
    asked = re.findall(r"^#SBATCH (--\S+)$", text, re.MULTILINE)
    assert {"--no-kill", "--requeue", "--signal=B:USR1@300"} <= set(asked)
    assert "srun --no-kill --kill-on-bad-exit=0 --wait=0" in text
    command = re.search(r"elastic run (.*?) -- ", text.replace("\\\n", " "))
    assert command is not None
    assert set(re.findall(r"--[a-z-]+", command[1])) <= known_options()


def test_the_kubernetes_file_is_one_job_with_what_the_page_says() -> None:
    (job,) = yaml.safe_load_all(MANIFEST.read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    (agent,) = pod["containers"]
    command = agent["command"]
    assert command[:2] == ["elastic", "run"]
    assert options_of(command) <= known_options()
    assert all(isinstance(word, str) for word in command)
    largest = int(command[command.index("--nodes") + 1].partition(":")[2])
    assert job["spec"]["parallelism"] == job["spec"]["completions"] == largest + 1
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert "kill -USR1 1" in agent["lifecycle"]["preStop"]["exec"]["command"][-1]
    mounts = {mount["name"]: mount["mountPath"] for mount in agent["volumeMounts"]}
    (memory,) = [volume for volume in pod["volumes"] if volume.get("emptyDir", {}).get("medium") == "Memory"]
    assert mounts[memory["name"]] == "/dev/shm"
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["spec"]["podFailurePolicy"]["rules"]
             if "onExitCodes" in rule}  # fmt: skip
    assert codes == {"FailJob": [11, 13, 76], "Ignore": [75, 143]}


@pytest.mark.prove
def test_the_sbatch_script_saves_leaves_and_is_queued_again_after_its_signal_and_ends_when_the_job_is_done(
    tmp_path: Path,
) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in {
        "srun": SRUN,
        "scontrol": f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol\n',
        "elastic": f'#!/bin/bash\nexec {sys.executable} -c "from elastic.cli import main; main()" "$@"\n',
    }.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    with Cluster(tmp_path) as cluster:
        for host in ("n1", "n2"):
            (cluster.ram / host).mkdir()
        environment = {
            **os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "CKPT_RAM_DIR": str(cluster.ram), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
            "RUN": str(cluster.run), "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "MIN_NODES": "2",
            "ELASTIC_TEST": cluster.mark, "ELASTIC_NODE_TIMEOUT_S": "2", "CKPT_KEEPER_GRACE_S": "30",
        }  # fmt: skip

        def start() -> subprocess.Popen[bytes]:
            worker = [str(cluster.worker), str(cluster.run), str(cluster.events), "steps"]
            with open(tmp_path / "out", "ab") as out:
                return subprocess.Popen(["bash", str(SBATCH), *worker], env=environment, stdout=out, stderr=out)

        script = start()
        try:
            generation = cluster.trains({"n1", "n2"})
            script.send_signal(signal.SIGUSR1)
            assert script.wait(120) == 143, (tmp_path / "out").read_text()
            assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
            assert not Path(f"{cluster.run}.notice-77").exists()
            head = RunDirectory.open(cluster.run).log.read().head
            assert head is not None
            assert head.step == cluster.last_step() > 0

            script = start()
            later = cluster.trains({"n1", "n2"}, after=generation)
            assert {worker["step"] for worker in cluster.workers(later).values()} == {head.step}
            cluster.finish()
            assert script.wait(120) == 0, (tmp_path / "out").read_text()
            assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
        finally:
            script.kill()
            script.wait()
