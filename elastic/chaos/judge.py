"""The oracles: each looks at the evidence and says green, red, or that it has none to judge by. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from elastic.evidence import Evidence, Injection, Judgement, Mark

METRIC_TOLERANCE = 1e-5  # relative: another number of ranks adds in another order
Sums = dict[str, int]  # of each tensor, over all its boxes


def judge(evidence: Evidence) -> list[Judgement]:
    """All oracles that have to do with the scenario, in the order of the report."""
    live = any(fault.live for fault in evidence.faults)
    storage = any(fault.storage for fault in evidence.faults)
    left_out = set[Callable[[Evidence], Judgement]]()
    left_out |= set() if live else {damage_of_the_live_state_was_noticed}
    left_out |= set() if storage else {saves_go_on_after_faults_of_the_store}
    return [oracle(evidence) for oracle in ORACLES if oracle not in left_out]


def the_faults_happened(evidence: Evidence) -> Judgement:
    name = "every fault of the scenario was injected"
    if evidence.missed:
        return Judgement(
            name, "red", f"{'; '.join(evidence.missed)}. Give the command more steps, or the run more time"
        )
    kinds = ", ".join(fault.kind for fault in evidence.faults)
    unmet = [f"{fault.kind}: nothing met it while it lasted" for fault in evidence.faults if fault.met == 0]
    return _judged(name, unmet, len(evidence.faults), f"{len(evidence.faults)}: {kinds}", "the scenario has none")


def the_job_ended_right(evidence: Evidence) -> Judgement:
    wanted = evidence.scenario["promise"]["exit_code"]
    name = f"every agent that was not taken away ended with {wanted}"
    if evidence.timed_out:
        return Judgement(name, "red", f"not over within {evidence.scenario['limit_s']:g} s")
    left = [life for life in evidence.lives if not life.taken]
    wrong = [f"{life.node} ended with {life.code}" for life in left if life.code != wanted]
    return _judged(name, wrong, len(left), f"{len(left)} agents", "all agents were taken away")


def what_was_restored_was_saved(evidence: Evidence) -> Judgement:
    """Sums over the live state at the save, and over the live state after the restore, element by element."""
    saved, wrong, judged = _saved(evidence), [], 0
    for attempt, marks in _by_attempt(evidence.named("restore")).items():
        for generation in sorted({mark.generation for mark in marks}):
            mine = [mark for mark in marks if mark.generation == generation]
            if attempt not in saved or len(mine) != mine[0].facts["world"]:
                continue  # somebody died before it could say
            judged += 1
            found, different = _sums(mine)
            differs = different | {
                key for key in saved[attempt].keys() | found if found.get(key) != saved[attempt].get(key)
            }
            if differs:
                wrong.append(f"step {mine[0].step} in generation {generation}: {', '.join(sorted(differs)[:5])}")
    done = f"{judged} restores of {len(saved)} saved states"
    return _judged("the restored state is the saved one, bit for bit", wrong, judged, done, "nothing was restored")


def no_damaged_step_stands(evidence: Evidence) -> Judgement:
    name, steps = "every step of the run is whole", len(evidence.checked_steps)
    if evidence.scenario["promise"]["damage"]:
        name = "the damage that was done was found"
        missing = [] if evidence.damage or not steps else ["`ckpt check` found nothing"]
        return _judged(name, missing, steps, "; ".join(evidence.damage[:3]), "the run could not be read")
    return _judged(name, evidence.damage[:5], steps, f"{steps} steps read and verified", "the run could not be read")


def no_committed_step_was_lost(evidence: Evidence) -> Judgement:
    wrong, judged = [], 0
    for fault, restored in _restarts(evidence):
        committed = max((mark.step for mark in evidence.named("commit") if mark.at < fault.at), default=-1)
        judged += 1
        if restored.step < committed:
            wrong.append(f"after {fault.kind} step {restored.step} was restored, though {committed} was committed")
    return _judged("no committed step was lost", wrong, judged, f"{judged} restarts", "nothing was restarted")


def saves_lost_as_promised(evidence: Evidence) -> Judgement:
    promised, worst, wrong, judged = evidence.scenario["promise"]["saves_lost"], 0, [], 0
    for fault, restored in _restarts(evidence):
        begun = {mark.step for mark in evidence.named("save") if mark.at < fault.at and mark.step > restored.step}
        judged, worst = judged + 1, max(worst, len(begun))
        if len(begun) > promised:
            wrong.append(f"{fault.kind} cost the saves of steps {_some(sorted(begun))}")
    name = f"a fault costs {promised} begun saves at most"
    return _judged(name, wrong, judged, f"the worst of {judged} restarts cost {worst}", "nothing was restarted")


def recovered_in_time(evidence: Evidence) -> Judgement:
    bound = evidence.scenario["promise"]["recovery_s"]
    name = f"each fault is recovered from within {bound:g} s"
    judged, wrong, worst = 0, [], 0.0
    for fault in evidence.faults:
        if fault.recovered_at is None and evidence.scenario["promise"]["exit_code"]:
            continue  # it was to end the run
        judged += 1
        since = fault.at if fault.restarts else fault.healed_at or fault.at
        took = math.inf if fault.recovered_at is None else fault.recovered_at - since
        worst = max(worst, took)
        if took > bound:
            wrong.append(f"{fault.kind}: {'never' if math.isinf(took) else f'{took:.1f} s'}")
    return _judged(
        name, wrong, judged, f"the worst of {judged} took {worst:.1f} s", "no fault was to be recovered from"
    )


def losses_are_the_undisturbed_ones(evidence: Evidence) -> Judgement:
    """Of steps that were computed twice, and of all where there is an undisturbed run to compare with.

    Where other batches were made on another number of ranks there is nothing to compare.
    """
    what = "of the undisturbed run" if evidence.reference else "that it was the first time"
    worlds = {mark.facts.get("world") for mark in evidence.named("step")}
    if len(worlds) > 1 and not evidence.named("batch"):
        why = "the number of ranks changed, and the batches with it: elastic.batches keeps them"
        return Judgement(f"each metric is the one {what}", "not judged", why)
    wrong, judged, first = [], 0, dict(evidence.reference)
    for mark in evidence.named("step"):
        if mark.rank != 0 or not mark.facts.get("metrics") or _is_spoilt(evidence, mark):
            continue
        known = first.setdefault(mark.step, mark.facts["metrics"])
        if known is mark.facts["metrics"]:
            continue
        judged += 1
        if differs := [name for name, value in known.items() if not _alike(value, mark.facts["metrics"].get(name))]:
            name = differs[0]
            wrong.append(f"step {mark.step}: {name} {mark.facts['metrics'].get(name)}, expected {known[name]}")
    return _judged(f"each metric is the one {what}", wrong, judged, f"{judged} steps compared",
                   "no step was computed twice with a metric reported; --reference compares all")  # fmt: skip


def each_metric_is_a_number(evidence: Evidence) -> Judgement:
    name, wrong, judged = "each metric is a finite number", list[str](), 0
    for mark in evidence.named("step"):
        if mark.rank == 0 and mark.facts.get("metrics") and not _is_spoilt(evidence, mark):
            judged += 1
            metrics = mark.facts["metrics"].items()
            wrong += [f"step {mark.step}: {key} is {value}" for key, value in metrics if not math.isfinite(value)]
    return _judged(name, wrong[:3], judged, f"{judged} steps", "no metric was reported")


def damage_of_the_live_state_was_noticed(evidence: Evidence) -> Judgement:
    """By a generation that followed, in which nobody else failed; or by a metric that is no number."""
    name, wrong, seen = "damage of the live state was noticed", list[str](), list[str]()
    live = [fault for fault in evidence.faults if fault.live]
    for fault in live:
        spoilt = [mark for mark in evidence.named("step") if mark.generation == fault.generation and mark.at > fault.at]
        metrics = [value for mark in spoilt for value in (mark.facts.get("metrics") or {}).values()]
        later = [mark for mark in evidence.named("restore") if mark.generation > fault.generation]
        others = [
            one for one in evidence.faults if one is not fault and one.restarts and one.generation == fault.generation
        ]
        if later and not others:
            seen.append(f"generation {later[0].generation} followed")
        elif any(not math.isfinite(value) for value in metrics):
            seen.append("a metric was no number")
        elif not others:
            wrong.append(f"{fault.kind}: {fault.what}")
    return _judged(name, wrong, len(seen), "; ".join(seen), "no live state was damaged, or something else failed, too")


def saves_go_on_after_faults_of_the_store(evidence: Evidence) -> Judgement:
    name, wrong, judged = "after a fault of the store saves are committed again", list[str](), 0
    for fault in evidence.faults:
        if not fault.storage or fault.healed_at is None:
            continue
        saves = [mark for mark in evidence.named("save") if mark.at > fault.healed_at]
        commits = [mark for mark in evidence.named("commit") if mark.at > fault.healed_at]
        judged += bool(saves)
        if saves and not commits:
            wrong.append(f"none was after {fault.kind}, {fault.healed_at:.1f} s")
    return _judged(
        name, wrong, judged, f"after {judged} faults", "no fault of the store was healed while steps were saved"
    )


def each_sample_exactly_once(evidence: Evidence) -> Judgement:
    """Of each step the newest generation that made it, all ranks together; for `elastic.batches` of one data set."""
    name, none = "each sample exactly once in a pass", "the command does not use elastic.batches in checkpointer.steps"
    made, wrong, seen, expected = _batches_by_step(evidence), list[str](), set[int](), 0
    for step in sorted(made):
        marks = made[step][max(made[step])]
        number, indices = marks[0].facts["number"], [index for mark in marks for index in mark.facts["indices"]]
        if number != expected:
            wrong.append(f"step {step} was made of batch {number}, expected {expected}")
        if seen.intersection(indices) or len(set(indices)) < len(indices):
            wrong.append(f"batch {number} of step {step} has a sample twice")
        expected = number + 1
        seen.update(indices)
        if len(seen) == marks[0].facts["samples"]:
            seen.clear()
    return _judged(name, wrong[:5], len(made), f"{len(made)} steps", none)


def _batches_by_step(evidence: Evidence) -> dict[int, dict[int, list[Mark]]]:
    """By step and generation, the batches that it was made of: those between two steps of a process."""
    made, since = defaultdict[int, dict[int, list[Mark]]](dict), defaultdict[int, list[Mark]](list)
    for mark in evidence.named("batch", "step"):
        if mark.name == "batch":
            since[mark.pid].append(mark)
        elif batches := since.pop(mark.pid, []):
            made[mark.step].setdefault(mark.generation, []).extend(batches)
    return made


def nothing_is_left(evidence: Evidence) -> Judgement:
    name = "nothing is left behind"
    if evidence.timed_out:
        return Judgement(name, "not judged", "the run was not over")
    return _judged(name, evidence.left[:5], len(evidence.looked_for), f"no {', '.join(evidence.looked_for)}", "")


ORACLES: tuple[Callable[[Evidence], Judgement], ...] = (
    the_faults_happened,
    the_job_ended_right,
    what_was_restored_was_saved,
    no_damaged_step_stands,
    no_committed_step_was_lost,
    saves_lost_as_promised,
    recovered_in_time,
    losses_are_the_undisturbed_ones,
    each_metric_is_a_number,
    damage_of_the_live_state_was_noticed,
    saves_go_on_after_faults_of_the_store,
    each_sample_exactly_once,
    nothing_is_left,
)


def _judged(name: str, wrong: list[str], judged: int, right: str, none: str) -> Judgement:
    if wrong:
        return Judgement(name, "red", "; ".join(wrong))
    return Judgement(name, "green", right) if judged else Judgement(name, "not judged", none)


def _restarts(evidence: Evidence) -> list[tuple[Injection, Mark]]:
    """Each fault after which a newer generation restored, and the first restore of rank 0 there."""
    found = []
    for fault in evidence.faults:
        later = [m for m in evidence.named("restore") if m.at > fault.at and m.generation > fault.generation]
        if later:
            found.append((fault, min(later, key=lambda mark: mark.at)))
    return found


def _by_attempt(marks: Iterable[Mark]) -> Mapping[str, list[Mark]]:
    found = defaultdict[str, list[Mark]](list)
    for mark in marks:
        found[mark.facts["attempt"]].append(mark)
    return found


def _saved(evidence: Evidence) -> dict[str, Sums]:
    """What each attempt to save held, of those of which every rank said so."""
    by_attempt, last = defaultdict[str, list[Mark]](list), dict[int, Mark]()
    for mark in evidence.named("save", "copy"):
        if mark.name == "save":
            last[mark.pid] = mark
        elif (save := last.get(mark.pid)) is not None and save.step == mark.step:
            by_attempt[mark.facts["attempt"]].append(save)
    return {attempt: _sums(marks)[0] for attempt, marks in by_attempt.items() if len(marks) == marks[0].facts["world"]}


def _sums(marks: Iterable[Mark]) -> tuple[Sums, set[str]]:
    """The sum of each tensor over its distinct boxes, of each the lowest rank's; and the keys whose replicas differ."""
    boxes: dict[tuple[str, str], int] = {}
    sums, different = defaultdict[str, int](int), set[str]()
    for mark in sorted(marks, key=lambda one: one.rank):
        for key, offset, shape, value in mark.facts["echo"]:
            box = key, f"{offset}{shape}"
            if box not in boxes:
                boxes[box] = value
                sums[key] = (sums[key] + value) % 2**64
            elif boxes[box] != value:
                different.add(key)
    return dict(sums), different


def _alike(one: float, other: object) -> bool:
    if not isinstance(other, (int, float)):
        return False
    return math.isclose(one, other, rel_tol=METRIC_TOLERANCE) or (math.isnan(one) and math.isnan(other))


def _is_spoilt(evidence: Evidence, mark: Mark) -> bool:
    """Whether it was made by a state that was damaged on purpose, and not yet given up."""
    return evidence.scenario["promise"]["spoilt"] and any(
        fault.live and mark.generation == fault.generation and mark.at > fault.at for fault in evidence.faults
    )


def _some(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:8])) + (", ..." if len(steps) > 8 else "")
