"""Asynchronous saves of the libraries compared, behind one small interface. Measures nothing: `worker.py` does."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
from contenders import sync_directories
from gpt2 import TrainingState


class AsyncContender:
    """Saves a state again and again below `folder`; all methods are collective."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def prepare(self, state: TrainingState) -> None:
        """Do what a run does once, before its saves. Not timed."""

    def begin(self, state: TrainingState) -> Callable[[], None]:
        """Begin a save; what is returned waits until it is durable."""
        raise NotImplementedError

    def guard(self) -> AbstractContextManager[Any]:
        """What has to stand around the optimizer's step."""
        return nullcontext()

    def close(self) -> None:
        """Release everything."""


class Holdfast(AsyncContender):
    """This library."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: Path) -> None:
        import ckpt

        super().__init__(folder)
        self._checkpointer = ckpt.Checkpointer(folder / "run", **self.options)

    def begin(self, state: TrainingState) -> Callable[[], None]:
        self.count += 1
        handle = self._checkpointer.save(self.count, {"model": state.model, "optim": state.optim})
        return lambda: (handle.wait(600), None)[1]

    def close(self) -> None:
        self._checkpointer.close()


class HoldfastInPlace(Holdfast):
    """Everything is copied before `save` returns."""

    options: ClassVar[dict[str, Any]] = {"overlap": False}


class HoldfastBlocking(Holdfast):
    """`save` returns once the step is durable."""

    def begin(self, state: TrainingState) -> Callable[[], None]:
        self.count += 1
        self._checkpointer.save(self.count, {"model": state.model, "optim": state.optim}, blocking=True)
        return lambda: None


class HoldfastSkipping(Holdfast):
    """Leaves out what the store cannot take."""

    options: ClassVar[dict[str, Any]] = {"busy": "skip"}

    def begin(self, state: TrainingState) -> Callable[[], None]:
        super().begin(state)
        return lambda: self._checkpointer.wait_until_finished(600)


class Dcp(AsyncContender):
    """torch.distributed.checkpoint, staging in the caller and writing in a thread."""

    def __init__(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict

        super().__init__(folder)
        self._dcp, self._get = dcp, get_state_dict
        self._group = dist.new_group(backend="gloo")
        self._options = self.options()

    def options(self) -> dict[str, Any]:
        return {}

    def begin(self, state: TrainingState) -> Callable[[], None]:
        self.count += 1
        path = self.folder / str(self.count)
        model, optim = self._get(state.model, state.optim)
        writer = self._dcp.FileSystemWriter(path, sync_files=True, overwrite=False)
        said = self._dcp.async_save(
            {"model": model, "optim": optim}, storage_writer=writer, process_group=self._group, **self._options
        )
        future = getattr(said, "upload_completion", said)

        def wait() -> None:
            future.result(600)
            sync_directories(path)

        return wait

    def close(self) -> None:
        if stager := self._options.get("async_stager"):
            stager.close()
        dist.destroy_process_group(self._group)


class DcpShared(Dcp):
    """Stages into shared memory that is kept; pinned memory needs CUDA."""

    def options(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        chosen = StagingOptions(
            use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
        )
        return {"async_stager": DefaultStager(chosen)}


class DcpProcess(DcpShared):
    """Writes in a process of its own."""

    def options(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        return {**super().options(), "async_checkpointer_type": AsyncCheckpointerType.PROCESS}
