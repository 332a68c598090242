"""It is found when the library is broken: each mutation makes an oracle of a run red, or a proof fail."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mutations import MUTATIONS, VARIABLE

from elastic.chaos.command import shipped
from elastic.chaos.conduct import conduct
from elastic.chaos.ground import abilities
from elastic.chaos.judge import (
    each_sample_exactly_once,
    judge,
    no_committed_step_was_lost,
    no_damaged_step_stands,
    nothing_is_left,
    the_job_ended_right,
    what_was_restored_was_saved,
)

TESTS = Path(__file__).parent
SLOW = {"no fsync of directories": pytest.mark.prove}
CASES = {
    "restores the step before": ("worker-kill", no_committed_step_was_lost),
    "reads nothing": ("worker-kill", what_was_restored_was_saved),
    "verifies nothing": ("bit-rot", what_was_restored_was_saved),
    "loses writes": ("worker-kill", no_damaged_step_stands),
    "no fence": ("worker-kill", what_was_restored_was_saved),
    "saves the first state again": ("worker-kill", what_was_restored_was_saved),
    "skips a batch": ("worker-kill", each_sample_exactly_once),
    "keeps the keeper": ("worker-kill", nothing_is_left),
    "hides the failure": ("software-crash", the_job_ended_right),
}


PROOFS = {
    "two writers of one slot": "test_store.py -k exclusive",
    "no fsync of directories": "test_crash_states.py -k every_image",
    "no generation fence": "test_lineage.py -k fences",
    "deletes what is kept": "test_retention.py -k pins",
}


def test_every_mutation_has_a_case() -> None:
    assert CASES.keys() | PROOFS.keys() == MUTATIONS.keys()
    assert not CASES.keys() & PROOFS.keys()


@pytest.mark.parametrize("mutation", [pytest.param(one, marks=SLOW.get(one, ())) for one in PROOFS])
def test_a_broken_library_fails_its_proof(mutation: str) -> None:
    file, *chosen = PROOFS[mutation].split()
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "mutations", str(TESTS / file), *chosen]
    path = f"{TESTS / 'chaos_site'}{os.pathsep}{TESTS}"  # for keepers; pytest itself has the plugin
    environment = {**os.environ, "PYTHONPATH": path, VARIABLE: mutation}
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=600)
    print(done.stdout[-3000:], done.stderr[-1000:])
    assert done.returncode == 1, "they pass though the library is broken"
    assert "failed" in done.stdout


@pytest.mark.prove
@pytest.mark.parametrize("mutation", CASES)
def test_a_broken_library_is_found(tmp_path: Path, mutation: str) -> None:
    name, oracle = CASES[mutation]
    scenario = shipped()[name].with_nodes(2)
    broken = {VARIABLE: mutation, "PYTHONPATH": f"{TESTS / 'chaos_site'}{os.pathsep}{TESTS}"}
    scenario = replace(scenario, environment={**scenario.environment, **broken}, limit_s=600)
    command = [str(TESTS / "chaos_script.py"), "16"]
    evidence = conduct(scenario, command, tmp_path / "run", seed=0, can=abilities(), tell=print)
    for judgement in judge(evidence):
        print(judgement)
    assert oracle(evidence).verdict == "red"
