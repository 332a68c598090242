"""The libraries compared, and the machine's limit, behind one small interface.

Owns how each contender is used: by its documented recipe, loading into tensors that exist already, and equally durable:
when `save` returns on every rank, files, the checkpoint's directories and the directory above are all fsynced.
Measures nothing: `worker.py` does.
"""

import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpt2 import TrainingState, set_hyperparameters
from torch import Tensor

DIRECT_BLOCK_BYTES = 8 << 20
READ_BLOCK_BYTES = 8 << 20
PAGE_BYTES = 4096


class Contender:
    """One way to save and load; all methods are collective. `prepare_*` and `finish_*` are not timed."""

    def prepare_save(self, path: Path, state: TrainingState) -> None:
        """Do what a run does once, before its saves."""

    def save(self, path: Path, state: TrainingState) -> None:
        """Make `state` durable under `path`, which does not exist yet."""
        raise NotImplementedError

    def finish_save(self) -> None:
        """Release what `prepare_save` took."""

    def prepare_load(self, path: Path, state: TrainingState) -> None:
        """Get ready for `load`; the checkpoint's files are in the page cache already."""

    def load(self, path: Path, state: TrainingState) -> None:
        """Bring the values of the checkpoint under `path` into the tensors of `state`, in place."""
        raise NotImplementedError

    def load_cold(self, path: Path, state: TrainingState) -> None:
        """`load`, where none of the files is in the page cache."""
        self.load(path, state)

    def finish_load(self, state: TrainingState) -> None:
        """Release what `prepare_load` took; after it `state` is checked."""


class Holdfast(Contender):
    """This library. A Checkpointer is made before the save; in the first save of its run

    the start of the keeper, the `start` record, the exchange of shardings and fresh memory are inside the timed region.
    Digests are on: they always are.
    """

    def __init__(self) -> None:
        import ckpt

        missing = [name for name in ("Checkpointer", "restore") if not hasattr(ckpt, name)]
        if missing:
            raise ImportError(f"ckpt has no {' and no '.join(missing)} yet")
        self._ckpt: Any = ckpt
        self._checkpointer: Any = None

    def prepare_save(self, path: Path, state: TrainingState) -> None:
        self._checkpointer, self._step = self._ckpt.Checkpointer(str(path)), 0

    def save(self, path: Path, state: TrainingState) -> None:
        self._step += 1
        self._checkpointer.save(self._step, {"model": state.model, "optim": state.optim}, blocking=True).wait()

    def finish_save(self) -> None:
        self._checkpointer.close()
        self._checkpointer = None

    def load(self, path: Path, state: TrainingState) -> None:
        self._ckpt.restore(str(path), {"model": state.model, "optim": state.optim})


class Dcp(Contender):
    """torch.distributed.checkpoint by its tutorial; `sync_files` fsyncs the files, the directories are ours to sync."""

    def __init__(self) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import state_dict

        self._dcp = dcp
        self._get, self._set = state_dict.get_state_dict, state_dict.set_state_dict

    def save(self, path: Path, state: TrainingState) -> None:
        writer = self._dcp.FileSystemWriter(path, sync_files=True, overwrite=False)
        self._dcp.save(self._state_dict(state), storage_writer=writer)
        sync_directories(path)

    def load(self, path: Path, state: TrainingState) -> None:
        values = self._state_dict(state)
        self._dcp.load(values, storage_reader=self._dcp.FileSystemReader(path))
        # The tensors are in place already; this brings the optimizer's hyperparameters.
        self._set(state.model, state.optim, model_state_dict=values["model"], optim_state_dict=values["optim"])

    def _state_dict(self, state: TrainingState) -> dict[str, Any]:
        model, optim = self._get(state.model, state.optim)
        return {"model": model, "optim": optim}


class TorchSave(Contender):
    """torch.save of each rank's own tensors to a file of its own; the load maps the file (no second copy in memory)."""

    def save(self, path: Path, state: TrainingState) -> None:
        payload = {"tensors": _local_tensors(state), "groups": _hyperparameters(state)}
        path.mkdir(exist_ok=True)
        with open(path / f"rank{state.rank}.pt", "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        sync_directories(path)

    def load(self, path: Path, state: TrainingState) -> None:
        payload = torch.load(path / f"rank{state.rank}.pt", weights_only=True, mmap=True)
        for key, target in _local_tensors(state).items():
            target.copy_(payload["tensors"][key])
        _set_hyperparameters(state, payload["groups"])


class Safetensors(Contender):
    """safetensors with one file per rank; the hyperparameters stand in the header's metadata."""

    def __init__(self) -> None:
        import safetensors.torch

        self._safetensors = safetensors

    def save(self, path: Path, state: TrainingState) -> None:
        path.mkdir(exist_ok=True)
        file = path / f"rank{state.rank}.safetensors"
        metadata = {"groups": json.dumps(_hyperparameters(state))}
        self._safetensors.torch.save_file(_local_tensors(state), file, metadata=metadata)
        fsync_path(file)
        sync_directories(path)

    def load(self, path: Path, state: TrainingState) -> None:
        with self._safetensors.safe_open(path / f"rank{state.rank}.safetensors", "pt") as file:
            for key, target in _local_tensors(state).items():
                target.copy_(file.get_tensor(key))
            _set_hyperparameters(state, json.loads(file.metadata()["groups"]))


class Limit(Contender):
    """What the machine can do with this rank's bytes and nothing else to think of.

    save: O_DIRECT writes of a preallocated file, fsync. load: preadv from the page cache, or direct I/O from the disk,
    into memory that has been touched. copy: memcpy of the tensors into memory that has been touched. Where all ranks
    hold the whole state, each takes an equal part of it.
    """

    def __init__(self) -> None:
        self._arena: mmap.mmap | None = None

    def prepare_save(self, path: Path, state: TrainingState) -> None:
        self._arena = _touched_arena(sum(part.numel() for part in self._own(state, state.rank)))
        self.copy(state)

    def copy(self, state: TrainingState) -> None:
        """Copy the tensors into the arena."""
        for part, tensor in self._parts(state):
            part.copy_(tensor)

    def save(self, path: Path, state: TrainingState) -> None:
        assert self._arena is not None
        path.mkdir(exist_ok=True)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT
        descriptor = os.open(path / f"rank{state.rank}.raw", flags)
        try:
            os.posix_fallocate(descriptor, 0, len(self._arena))
            for offset, block in _blocks(self._arena, DIRECT_BLOCK_BYTES):
                _require_all(os.pwrite(descriptor, block, offset), block)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_directories(path)

    def finish_save(self) -> None:
        self._arena = None

    def prepare_load(self, path: Path, state: TrainingState) -> None:
        self._arena = _touched_arena(sum(part.numel() for part in self._own(state, state.rank)))

    def load(self, path: Path, state: TrainingState) -> None:
        self._read(path, state, os.O_RDONLY)

    def load_cold(self, path: Path, state: TrainingState) -> None:
        self._read(path, state, os.O_RDONLY | os.O_DIRECT)

    def _read(self, path: Path, state: TrainingState, flags: int) -> None:
        assert self._arena is not None
        descriptor = os.open(path / f"rank{state.rank}.raw", flags)
        try:
            for offset, block in _blocks(self._arena, READ_BLOCK_BYTES):
                _require_all(os.preadv(descriptor, [block], offset), block)
        finally:
            os.close(descriptor)

    def finish_load(self, state: TrainingState) -> None:
        for part, tensor in self._parts(state):
            tensor.copy_(part)
        for rank in range(state.world) if _is_whole(state) else ():
            for part in self._own(state, rank):
                dist.broadcast(part, rank)
        set_hyperparameters(state)
        self._arena = None

    def _parts(self, state: TrainingState) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each non-empty tensor, as bytes, with its place in the arena."""
        offset = 0
        for source in self._own(state, state.rank):
            yield torch.frombuffer(self._arena, dtype=torch.uint8, count=source.numel(), offset=offset), source
            offset += source.numel()

    def _own(self, state: TrainingState, rank: int) -> Iterator[Tensor]:
        """The bytes of each tensor that `rank` has to move, if any."""
        for tensor in _local_tensors(state).values():
            flat = tensor.view(-1)
            if _is_whole(state):
                flat = flat[flat.numel() * rank // state.world : flat.numel() * (rank + 1) // state.world]
            if flat.numel():
                yield flat.view(torch.uint8)


def fsync_path(path: Path) -> None:
    """Fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directories(path: Path) -> None:
    """Make the names under `path` durable, and `path` itself, once every rank has created its own."""
    dist.barrier()
    if dist.get_rank() == 0:
        fsync_path(path)
        fsync_path(path.parent)


def _is_whole(state: TrainingState) -> bool:
    return isinstance(state.model, torch.nn.parallel.DistributedDataParallel)


def _local_tensors(state: TrainingState) -> dict[str, Tensor]:
    return {tensor.key: tensor.local for tensor in state.tensors()}


def _hyperparameters(state: TrainingState) -> list[dict[str, Any]]:
    return [{name: value for name, value in g.items() if name != "params"} for g in state.optim.param_groups]


def _set_hyperparameters(state: TrainingState, groups: list[dict[str, Any]]) -> None:
    for group, loaded in zip(state.optim.param_groups, groups, strict=True):
        group.update({name: tuple(value) if isinstance(value, list) else value for name, value in loaded.items()})


def _touched_arena(size_bytes: int) -> mmap.mmap:
    """Anonymous memory of at least `size_bytes` (whole pages), every page of it faulted in."""
    arena = mmap.mmap(-1, -(-size_bytes // PAGE_BYTES) * PAGE_BYTES)
    torch.frombuffer(arena, dtype=torch.uint8).fill_(1)
    return arena


def _blocks(arena: mmap.mmap, block_bytes: int) -> Iterator[tuple[int, memoryview]]:
    """Cut the arena into (offset, block)."""
    view = memoryview(arena)
    for offset in range(0, len(arena), block_bytes):
        yield offset, view[offset : offset + block_bytes]


def _require_all(moved_bytes: int, block: memoryview) -> None:
    if moved_bytes != len(block):
        raise OSError(f"moved {moved_bytes} of {len(block)} bytes")
