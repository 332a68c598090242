"""The oracles find it when the library is broken: each mutation makes one of them red."""

from __future__ import annotations

import os
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


def test_every_mutation_has_a_case() -> None:
    assert CASES.keys() == MUTATIONS.keys()


@pytest.mark.prove
@pytest.mark.parametrize("mutation", MUTATIONS)
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
