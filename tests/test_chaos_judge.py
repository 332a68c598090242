"""The oracles, the split of time, scenarios and the echo of a state: what is judged green, red, and not at all."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ckpt import Shard
from ckpt.adapt import collect_state
from ckpt.echo import echo_of
from ckpt.errors import Incompatible
from elastic.chaos.command import needs, shipped
from elastic.chaos.faults import FAULTS
from elastic.chaos.judge import (
    damage_of_the_live_state_was_noticed,
    each_metric_is_a_number,
    each_sample_exactly_once,
    judge,
    losses_are_the_undisturbed_ones,
    no_committed_step_was_lost,
    no_damaged_step_stands,
    nothing_is_left,
    recovered_in_time,
    saves_go_on_after_faults_of_the_store,
    saves_lost_as_promised,
    the_faults_happened,
    the_job_ended_right,
    what_was_restored_was_saved,
)
from elastic.chaos.scenario import Promise, Scenario, draw, parse
from elastic.chaos.trace import recorded, replay
from elastic.cli import cli
from elastic.evidence import Evidence, Injection, Life, Mark, passed
from elastic.goodput import Instant, spans, split
from elastic.report import document, figures, page

SCENARIO = Scenario("made", "by hand", ())


def mark(name: str, generation: int, at: float, rank: int = 0, **facts: Any) -> Mark:
    return Mark(at, name, f"n{rank + 1}", 100 * generation + rank, generation, {"rank": rank, "world": 2, **facts})


def echo(rank: int, value: int = 7) -> list[tuple[str, list[int], list[int], int]]:
    """Of a tensor that two ranks share: rank 0 has the first row, rank 1 the second."""
    return [("w", [rank, 0], [1, 4], value + rank)]


def good() -> Evidence:
    """A worker died in generation 1 after step 3; step 2 was committed, and restored whole in generation 2."""
    found = Evidence(asdict(SCENARIO), ["train.py"], 0, "namespaces", looked_for=["processes"], seconds=20.0)
    for rank in (0, 1):
        found.marks += [
            mark("step", 1, 5.0, rank, step=2, metrics={"loss": 2.0}),
            mark("save", 1, 5.1, rank, step=2, echo=echo(rank)),
            mark("copy", 1, 5.2, rank, step=2, attempt="000000002.a"),
            mark("commit", 1, 5.5, rank, step=2, attempt="000000002.a"),
            mark("step", 1, 6.0, rank, step=3, metrics={"loss": 1.5}),
            mark("restore", 2, 9.0, rank, step=2, attempt="000000002.a", echo=echo(rank)),
            mark("step", 2, 10.0, rank, step=3, metrics={"loss": 1.5}),
        ]
    found.marks.sort(key=lambda one: one.at)
    found.faults = [Injection("worker-kill", ["n1"], 6.5, "SIGKILL", 1, 3, restarts=True, recovered_at=10.0)]
    found.lives = [Life("n1", 0.0, 20.0, 0), Life("n2", 0.0, 20.0, 0)]
    found.checked_steps = [2]
    return found


def changed(evidence: Evidence, name: str, generation: int, rank: int, **facts: Any) -> Evidence:
    """With other facts of one mark."""
    found = replace(evidence, marks=list(evidence.marks))
    for i, one in enumerate(found.marks):
        if (one.name, one.generation, one.rank) == (name, generation, rank):
            found.marks[i] = replace(one, facts={**one.facts, **facts})
    return found


def test_a_good_run_is_green_and_says_what_it_cannot_judge() -> None:
    found = {one.oracle: one for one in judge(good())}
    assert passed(found.values())
    assert [one.oracle for one in found.values() if one.verdict == "not judged"] == [
        "each sample exactly once in a pass"
    ]


def test_without_evidence_nothing_is_green_but_that_nothing_is_left() -> None:
    bare = Evidence(asdict(SCENARIO), ["train.py"], 0, "processes")
    assert {one.verdict for one in judge(bare)} == {"not judged"}
    assert not passed(judge(bare))


def test_a_restored_state_that_differs_in_one_box_is_red() -> None:
    assert what_was_restored_was_saved(changed(good(), "restore", 2, 1, echo=echo(1, value=8))).verdict == "red"
    assert what_was_restored_was_saved(changed(good(), "save", 1, 0, echo=echo(0, value=8))).verdict == "red"


def test_a_restored_state_that_lacks_a_tensor_is_red() -> None:
    more = [*echo(0), ("b", [0], [3], 1)]
    assert what_was_restored_was_saved(changed(good(), "save", 1, 0, echo=more)).verdict == "red"


def test_a_restore_is_judged_on_another_number_of_ranks() -> None:
    whole = [("w", [0, 0], [2, 4], 7 + 8)]
    resized = good()
    resized.marks = [one for one in resized.marks if not (one.name == "restore" and one.rank == 1)]
    resized = changed(resized, "restore", 2, 0, echo=whole, world=1)
    judgement = what_was_restored_was_saved(resized)
    assert (judgement.verdict, judgement.evidence) == ("green", "1 restores of 1 saved states")


def test_a_restore_that_not_all_ranks_tell_of_is_not_judged() -> None:
    half = good()
    half.marks = [one for one in half.marks if not (one.name == "restore" and one.rank == 1)]
    assert what_was_restored_was_saved(half).verdict == "not judged"


def test_a_committed_step_that_is_not_restored_is_red() -> None:
    newer = mark("commit", 1, 6.2, step=3, attempt="000000003.b")
    assert no_committed_step_was_lost(replace(good(), marks=[*good().marks, newer])).verdict == "red"
    late = mark("commit", 1, 6.6, step=3, attempt="000000003.b")
    assert no_committed_step_was_lost(replace(good(), marks=[*good().marks, late])).verdict == "green"


def test_more_saves_lost_than_promised_is_red() -> None:
    lost = [mark("save", 1, 6.1 + i / 10, step=3 + i, echo=[]) for i in range(3)]
    assert saves_lost_as_promised(replace(good(), marks=[*good().marks, *lost[:2]])).verdict == "green"
    assert saves_lost_as_promised(replace(good(), marks=[*good().marks, *lost])).verdict == "red"


def test_a_loss_that_differs_the_second_time_is_red_and_so_is_one_of_the_undisturbed_run() -> None:
    assert losses_are_the_undisturbed_ones(changed(good(), "step", 2, 0, metrics={"loss": 1.6})).verdict == "red"
    resized = changed(good(), "step", 2, 0, metrics={"loss": 1.6}, world=1)
    assert losses_are_the_undisturbed_ones(resized).verdict == "not judged"
    resized.marks.append(mark("batch", 2, 9.0))  # the same batches on any number of ranks
    assert losses_are_the_undisturbed_ones(resized).verdict == "red"
    assert losses_are_the_undisturbed_ones(replace(good(), reference={2: {"loss": 2.1}})).verdict == "red"
    assert losses_are_the_undisturbed_ones(replace(good(), reference={2: {"loss": 2.0}})).verdict == "green"


def spoilt(value: float) -> Evidence:
    """A bit flipped after step 2; what step 3 then reported was `value`."""
    found = changed(good(), "step", 1, 0, step=3, metrics={"loss": value})
    found.marks = [
        replace(one, facts={**one.facts, "step": 2, "metrics": {"loss": 2.0}}) if one.at == 5.0 else one
        for one in found.marks
    ]
    found.marks = [
        replace(one, facts={**one.facts, "step": 3, "metrics": {"loss": value}}) if one.at == 6.0 else one
        for one in found.marks
    ]
    found.faults = [replace(found.faults[0], kind="live-bit-flip", live=True, at=5.5)]
    found.scenario = {**found.scenario, "promise": {**found.scenario["promise"], "spoilt": True}}
    return found


def test_a_metric_that_is_no_number_is_red_unless_the_state_was_spoilt_on_purpose() -> None:
    by_accident = spoilt(float("nan"))
    by_accident.scenario = good().scenario
    assert each_metric_is_a_number(by_accident).verdict == "red"
    assert each_metric_is_a_number(spoilt(float("nan"))).verdict == "green"
    assert losses_are_the_undisturbed_ones(spoilt(1.6)).verdict != "red"


def test_damage_of_the_live_state_must_be_noticed() -> None:
    assert damage_of_the_live_state_was_noticed(spoilt(1.6)).verdict == "green"
    in_silence = spoilt(1.6)
    in_silence.marks = [one for one in in_silence.marks if one.generation == 1]
    assert damage_of_the_live_state_was_noticed(in_silence).verdict == "red"
    in_silence = spoilt(float("nan"))
    in_silence.marks = [one for one in in_silence.marks if one.generation == 1]
    assert damage_of_the_live_state_was_noticed(in_silence).verdict == "green"
    masked = spoilt(1.6)
    masked.faults.append(replace(masked.faults[0], kind="worker-kill", live=False))
    assert damage_of_the_live_state_was_noticed(masked).verdict == "not judged"


def test_saves_must_go_on_after_a_fault_of_the_store_and_something_must_have_met_it() -> None:
    def of_store(**more: Any) -> Evidence:
        found = good()
        found.faults = [replace(found.faults[0], kind="store-errors", at=4.0, storage=True, **more)]
        return found

    assert saves_go_on_after_faults_of_the_store(of_store(healed_at=5.0)).verdict == "green"
    stuck = of_store(healed_at=5.0)
    stuck.marks = [one for one in stuck.marks if one.name != "commit"]
    assert saves_go_on_after_faults_of_the_store(stuck).verdict == "red"
    assert saves_go_on_after_faults_of_the_store(of_store(healed_at=30.0)).verdict == "not judged"
    assert the_faults_happened(of_store(met=0)).verdict == "red"
    assert the_faults_happened(of_store(met=3)).verdict == "green"


def test_slow_or_no_recovery_is_red() -> None:
    never = replace(good(), faults=[replace(good().faults[0], recovered_at=None)])
    assert recovered_in_time(never).verdict == "red"
    slow = replace(good(), faults=[replace(good().faults[0], recovered_at=6.5 + Promise.recovery_s + 1)])
    assert recovered_in_time(slow).verdict == "red"


def test_a_wrong_end_is_red() -> None:
    assert the_job_ended_right(replace(good(), lives=[Life("n1", 0.0, 9.0, 1)])).verdict == "red"
    assert the_job_ended_right(replace(good(), timed_out=True)).verdict == "red"
    taken = replace(good(), lives=[*good().lives, Life("n3", 0.0, 9.0, -9, taken="lost")])
    assert the_job_ended_right(taken).verdict == "green"


def test_what_is_left_damaged_or_missed_is_red() -> None:
    assert nothing_is_left(replace(good(), left=["process 7"])).verdict == "red"
    assert no_damaged_step_stands(replace(good(), damage=["r00000.safetensors: block 3"])).verdict == "red"
    assert the_faults_happened(replace(good(), missed=["node-loss"])).verdict == "red"


def test_damage_that_was_done_must_be_found() -> None:
    told = {**asdict(SCENARIO), "promise": asdict(Promise(damage=True))}
    assert no_damaged_step_stands(replace(good(), scenario=told)).verdict == "red"
    assert no_damaged_step_stands(replace(good(), scenario=told, damage=["a block"])).verdict == "green"


def test_a_sample_that_comes_twice_or_not_at_all_is_red() -> None:
    def steps(generation: int, at: float, first: int, *each: tuple[int, list[int]]) -> list[Mark]:
        made = []
        for n, (number, indices) in enumerate(each):
            made.append(mark("batch", generation, at + n, number=number, samples=4, indices=indices))
            made.append(mark("step", generation, at + n + 0.5, step=first + n))
        return made

    def verdict(*marks: list[Mark]) -> str:
        return each_sample_exactly_once(replace(good(), marks=[one for some in marks for one in some])).verdict

    first = steps(1, 1.0, 1, (0, [0, 1]), (1, [2, 3]), (2, [3, 0]))
    assert verdict(first) == "green"
    assert verdict(steps(1, 1.0, 1, (0, [0, 1]), (1, [1, 3]))) == "red"
    assert verdict(first, steps(2, 9.0, 3, (2, [1, 0]), (3, [2, 3]))) == "green", (
        "of a step, the newest generation counts"
    )
    assert verdict(first, steps(2, 9.0, 3, (3, [1, 2]))) == "red", "batch 2 of the step that was lost is left out"
    assert verdict([mark("batch", 1, 1.0, number=0, samples=4, indices=[1])]) == "not judged"


def test_time_is_split_without_a_gap() -> None:
    instants = [
        Instant(2.0, "restoring"), Instant(3.0, "restored"), Instant(4.0, "step", 1), Instant(4.5, "saved", 1, 0.25),
        Instant(5.0, "step", 2), Instant(6.0, "decide"), Instant(7.0, "restoring"), Instant(7.5, "restored"),
        Instant(8.5, "step", 2), Instant(9.5, "step", 3),
    ]  # fmt: skip
    found = spans(instants, 10.0)
    assert [a.stop for a in found[:-1]] == [b.start for b in found[1:]]
    assert split(found) == {
        "productive": 1.0 + 0.75 + 1.0, "recompute": 1.0, "saving": 0.25, "detection": 1.0, "rendezvous": 3.0,
        "restore": 1.5, "ending": 0.5,
    }  # fmt: skip


def test_the_report_says_what_was_judged_and_needs_nothing_else() -> None:
    bad = replace(good(), left=["<b>a process</b>"])
    text = page(bad, judge(bad), "")
    assert "failed" in text
    assert "&lt;b&gt;a process" in text
    assert "http" not in text, "nothing is fetched"
    assert document(bad, judge(bad))["passed"] is False
    assert figures(good())["steps_computed_again"] == 1


def test_every_shipped_scenario_names_faults_that_exist() -> None:
    for scenario in shipped().values():
        assert {fault.kind for fault in scenario.faults} <= FAULTS.keys()
        assert scenario.faults
        assert needs(scenario) <= {"boxes", "disk", "tc", "freezer", "memory", "cpu", "s3", "strace"}


def test_the_scenario_of_the_page_is_one() -> None:
    text = (Path(__file__).parent.parent / "docs" / "chaos.md").read_text()
    scenario = parse(text.split("```toml\n")[1].split("```")[0], "page")
    assert [fault.kind for fault in scenario.faults] == ["worker-kill", "node-loss"]
    assert scenario.promise == Promise(), "the page says that it shows the defaults"


def test_a_scenario_with_a_mistake_is_refused_by_name() -> None:
    for text in ("nodes = ", "nods = 3", "[[fault]]\nkind = 'x'\nat.stp = 3", "nodes = 1\nminimum = 2", "store = 's4'"):
        with pytest.raises(Incompatible, match="scenario mine"):
            parse(f"title = 'a title'\n{text}", "mine")


def test_the_same_seed_draws_the_same_faults_in_their_shares() -> None:
    shares = {"worker-kill": 30.0, "node-loss": 10.0}
    one, again, other = (draw("r", 60, shares, {"node-loss": 3.0}, Random(seed).random) for seed in (1, 1, 2))
    assert one == again != other
    kinds = [fault.kind for fault in one.faults]
    assert 0.6 < kinds.count("worker-kill") / len(kinds) < 0.9
    assert {fault.heal_s for fault in one.faults if fault.kind == "node-loss"} == {3.0}


def test_a_recorded_trace_becomes_minutes() -> None:
    def event(node: str, at: float, what: str, cause: str, described: str = "-") -> dict[str, Any]:
        kind = {"Level": "Hardware Failure", "Class": cause, "Desc": described}
        return {"node_id": node, "event_time": at, "event_type": f"fault_{what}", "fault_type": kind}

    faults = recorded(
        [
            event("a", 1.0, "start", "GPU"), event("b", 2.0, "start", "Parameter Plane Cable"),
            event("b", 2.125, "end", "Parameter Plane Cable"), event("c", 3.0, "start", "Fan"),
            event("a", 3.5, "end", "GPU"),
            event("b", 4.0, "start", "NIC", "NIC Link Speed low"), event("b", 9.0, "end", "NIC"),
        ]
    )  # fmt: skip
    assert [(one.node, one.start, one.stop) for one in faults] == [
        ("a", 1.0, 3.5), ("b", 2.0, 2.125), ("c", 3.0, None), ("b", 4.0, 9.0)
    ]  # fmt: skip
    scenario = replay("r", faults, 1.0, {"worker-kill", "link-cut", "maintenance"}, lambda: 0.0)
    assert [(one.kind, one.trigger.seconds, one.heal_s) for one in scenario.faults] == [
        ("worker-kill", 0.0, None), ("link-cut", 20.0, 2.5), ("maintenance", 40.0, 12.0), ("node-loss", 60.0, 12.0)
    ]  # fmt: skip
    with pytest.raises(Incompatible, match="not a fault trace"):
        recorded([{"node_id": "a"}])


def test_many_runs_add_up_and_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    for seed, run in enumerate((good(), replace(good(), seed=1, left=["process 7"]))):
        (folder := tmp_path / f"seed-{seed}").mkdir()
        (folder / "report.json").write_text(json.dumps(document(run, judge(run))))
    words = ["chaos", "random", "--seeds", "2", "--folder", str(tmp_path), "--json", "--", "never_run.py"]
    said = CliRunner().invoke(cli, words)
    found = json.loads(said.stdout)
    assert said.exit_code == 1
    assert (found["runs"], found["passed"], found["failed_seeds"]) == (2, 1, [1])
    assert (found["faults"], found["worst_recovery_s"]) == ({"worker-kill": 2}, 3.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128, torch.bool, torch.int64])
def test_the_sums_of_pieces_are_that_of_the_whole(dtype: torch.dtype) -> None:
    tensor = (torch.arange(24).reshape(6, 4) * 3 % 7).to(dtype)

    def total(pieces: list[Any]) -> int:
        echoes = [entry for piece in pieces for entry in echo_of(collect_state({"w": piece}, 0, 1), 0)]
        return sum(value for _, _, _, value in echoes) % 2**64

    halves = [Shard(tensor[:2].clone(), (6, 4), (0, 0)), Shard(tensor[2:].clone(), (6, 4), (2, 0))]
    assert total([tensor]) == total(halves)
    moved = tensor.clone()
    moved[0], moved[1] = tensor[1].clone(), tensor[0].clone()
    assert total([moved]) != total([tensor]), "an element at another place is another state"
