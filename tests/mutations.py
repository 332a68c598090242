"""The library, broken on purpose: a mutation changes a module as it is imported, in the processes of a run alone."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

VARIABLE = "HOLDFAST_TEST_MUTATION"


def restores_the_step_before(holder: Any) -> None:
    find = holder.find_commit
    holder.find_commit = lambda view, step: (
        find(view, step) if step or len(view.standing()) < 2 else view.standing()[-2]
    )


def reads_nothing(reading: Any) -> None:
    reading.read_data = lambda *arguments, **more: None


def verifies_nothing(reading: Any) -> None:
    reading.verify = lambda *arguments: None


def loses_writes(posix: Any) -> None:
    def write(self: Any, at: int, memory: memoryview) -> None:
        """As a disk that says it has."""

    posix._DataFile.write = write


def lets_training_go_on_over_the_copy(fence: Any) -> None:
    fence.Fence.guard = lambda self, optimizers, wait: None
    fence.Versions.changed = lambda self: []


def copies_late(stage: Any) -> None:
    copy = stage.Copy._copy

    def late(self: Any, *arguments: Any) -> None:
        time.sleep(0.3)
        copy(self, *arguments)

    stage.Copy._copy = late


def saves_the_first_state_again(stage: Any) -> None:
    begin, first = stage.Stage.begin, list[Any]()

    def again(self: Any, place: Any, pending: Any, plan: Any, tensors: Any, *rest: Any, **more: Any) -> None:
        first[:] = first or [tensor.detach().clone() for tensor in tensors]
        begin(self, place, pending, plan, first, *rest, **more)

    stage.Stage.begin = again


def skips_a_batch(data: Any) -> None:
    load = data.Batches.load_state_dict

    def skip(self: Any, state: Any) -> None:
        load(self, state)
        self._done += 1

    data.Batches.load_state_dict = skip


def keeps_the_keeper(process: Any) -> None:
    process.Keeper._may_end = lambda self: False


def hides_the_failure(leading: Any) -> None:
    leading.EXIT_FRUITLESS = 0


def lets_two_writers_have_one_slot(posix: Any) -> None:
    posix.PosixStore.create = lambda self, path, data: self.put(path, data)


def forgets_names(posix: Any) -> None:
    posix._fsync_directory = lambda directory: None


def lets_stale_writers_pass(log: Any) -> None:
    why_not = log._Fold._why_not
    log.check_fence = lambda view, generation, holder_nonce: None
    log._Fold._why_not = lambda self, entry: None if isinstance(entry, log.Commit) else why_not(self, entry)


def deletes_what_is_kept(retention: Any) -> None:
    retention.kept_for_itself = lambda view, keep: {view.standing()[-1].attempt: "the newest step"}


MUTATIONS: dict[str, tuple[tuple[str, Callable[[Any], None]], ...]] = {
    "restores the step before": (("ckpt.holder", restores_the_step_before),),
    "reads nothing": (("ckpt.reading", reads_nothing),),
    "verifies nothing": (("ckpt.reading", verifies_nothing),),
    "loses writes": (("ckpt.stores.posix", loses_writes),),
    "no fence": (("ckpt.adapt.fence", lets_training_go_on_over_the_copy), ("ckpt.stage", copies_late)),
    "saves the first state again": (("ckpt.stage", saves_the_first_state_again),),
    "skips a batch": (("elastic.data", skips_a_batch),),
    "keeps the keeper": (("ckpt.keeper.process", keeps_the_keeper),),
    "hides the failure": (("elastic.leading", hides_the_failure),),
    "two writers of one slot": (("ckpt.stores.posix", lets_two_writers_have_one_slot),),
    "no fsync of directories": (("ckpt.stores.posix", forgets_names),),
    "no generation fence": (("ckpt.log", lets_stale_writers_pass),),
    "deletes what is kept": (("ckpt.retention", deletes_what_is_kept),),
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds as others do, and has the mutations of a module done once it is loaded."""

    def __init__(self, changes: Sequence[tuple[str, Callable[[Any], None]]]) -> None:
        self._changes = dict(changes)

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self._changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        assert spec.loader is not None
        load, change = spec.loader.exec_module, self._changes[name]

        def exec_module(module: Any) -> None:
            load(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def pytest_addoption() -> None:
    """As a plugin (`-p mutations`): in front of what pytest finds modules with, before tests import any."""
    arm()


def arm() -> None:
    """Break in this process what the environment says."""
    if name := os.environ.get(VARIABLE):
        sys.meta_path.insert(0, _Finder(MUTATIONS[name]))
