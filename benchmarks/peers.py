"""torch-checkpointing and torchsnapshot behind the interfaces of the other contenders, each by its documented recipe.

Both come from PyPI with the `bench` extra. What either needs to run on these machines at all is done here and named.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from async_contenders import AsyncContender
from contenders import Contender, fsync_path, sync_directories
from gpt2 import TrainingState, set_hyperparameters
from torch.distributed.tensor import DTensor


class TorchCheckpointing(Contender):
    """torch-checkpointing 0.1.1, without its direct I/O (EINVAL here) and its gather of metadata (asks for CUDA)."""

    def __init__(self) -> None:
        self._manager: Any = None
        manager(sync=True).close()  # whatever is missing is missed now

    def prepare_save(self, path: Path, state: TrainingState) -> None:
        self._manager = manager(sync=True)

    def save(self, path: Path, state: TrainingState) -> None:
        self._manager.save(str(path), state_dict(state))
        sync_tree(path, state.rank, state.world)

    def finish_save(self) -> None:
        self._manager.close()

    def prepare_load(self, path: Path, state: TrainingState) -> None:
        self._manager = manager(sync=True)

    def load(self, path: Path, state: TrainingState) -> None:
        from torch.distributed.checkpoint.state_dict import set_state_dict

        found = self._manager.load(str(path), into=state_dict(state))
        set_state_dict(state.model, state.optim, model_state_dict=found["model"], optim_state_dict=found["optim"])

    def finish_load(self, state: TrainingState) -> None:
        set_hyperparameters(state)  # a load that reshards leaves the optimizer's groups as they were, without a word
        self._manager.close()


class TorchCheckpointingAsync(AsyncContender):
    """Its asynchronous saver: shared memory, a process that writes, and its lock around the optimizer's step."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._manager = manager(sync=False)

    def begin(self, state: TrainingState) -> Callable[[], None]:
        self.count += 1
        path = self.folder / str(self.count)
        future = self._manager.save(str(path), state_dict(state))

        def wait() -> None:
            future.result(600)
            dist.barrier()
            sync_tree(path, state.rank, state.world)

        return wait

    def guard(self) -> AbstractContextManager[Any]:
        return self._manager.lock()

    def close(self) -> None:
        self._manager.close()


class Torchsnapshot(Contender):
    """torchsnapshot 0.1.0. It knows no DTensor; ShardedTensors around the same memory are made before it is timed."""

    def __init__(self) -> None:
        import torchsnapshot

        self._library = torchsnapshot
        self._app: dict[str, Any] = {}

    def prepare_save(self, path: Path, state: TrainingState) -> None:
        self._app = app_state(state)

    def save(self, path: Path, state: TrainingState) -> None:
        self._library.Snapshot.take(str(path), self._app, replicated=["**"])
        sync_tree(path, state.rank, state.world)

    def prepare_load(self, path: Path, state: TrainingState) -> None:
        self._app = app_state(state)

    def load(self, path: Path, state: TrainingState) -> None:
        self._library.Snapshot(str(path)).restore(self._app)

    def finish_load(self, state: TrainingState) -> None:
        set_hyperparameters(state)


class TorchsnapshotAsync(AsyncContender):
    """Its asynchronous take: a copy in the caller, then files written by a thread."""

    def __init__(self, folder: Path) -> None:
        import torchsnapshot

        super().__init__(folder)
        self._library = torchsnapshot
        self._app: dict[str, Any] = {}

    def prepare(self, state: TrainingState) -> None:
        self._app = app_state(state)

    def begin(self, state: TrainingState) -> Callable[[], None]:
        self.count += 1
        path = self.folder / str(self.count)
        pending = self._library.Snapshot.async_take(str(path), self._app, replicated=["**"])

        def wait() -> None:
            pending.wait()
            dist.barrier()
            sync_tree(path, state.rank, state.world)

        return wait


def manager(*, sync: bool) -> Any:
    """A CheckpointManager that reshards."""
    from torch_checkpointing import CheckpointManager, ItemSpec, metadata_manager
    from torch_checkpointing.config import AsyncCheckpointSaverConfig, SyncCheckpointSaverConfig
    from torch_checkpointing.default_resharder import DefaultResharder
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    def gather(self: object, data: Any, process_group: Any = None) -> dict[int, Any]:
        found = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(found, data, group=process_group)
        return dict(enumerate(found))

    logging.getLogger("torch_checkpointing").setLevel(logging.ERROR)
    metadata_manager.DefaultMetadataManager._all_gather_pickled_data = gather
    return CheckpointManager.Config(
        items={name: ItemSpec(resharder=DefaultResharder()) for name in ("model", "optim")},
        save=SyncCheckpointSaverConfig() if sync else AsyncCheckpointSaverConfig(),
        storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
    ).build()


def state_dict(state: TrainingState) -> dict[str, Any]:
    """Model and optimizer by names, as DCP's helper gives them."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optim = get_state_dict(state.model, state.optim)
    return {"model": model, "optim": optim}


def app_state(state: TrainingState) -> dict[str, Any]:
    """What torchsnapshot saves and restores: tensors that share the memory of `state`."""
    from torchsnapshot import StateDict

    parameters = dict(state.model.named_parameters())
    optim = {f"{key}.{name}": v for key, p in parameters.items() for name, v in state.optim.state[p].items()}
    return {
        "model": StateDict(**{key: _sharded(value, state.rank) for key, value in parameters.items()}),
        "optim": StateDict(**{key: _sharded(value, state.rank) for key, value in optim.items()}),
    }


def _sharded(value: torch.Tensor, rank: int) -> Any:
    from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    tensor = value.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local()
    shards = [Shard.from_tensor_and_offsets(local, list(offset), rank)] if local.numel() else []
    return init_from_local_shards(shards, *tensor.shape)


def sync_tree(path: Path, rank: int, world: int) -> None:
    """Make every file under `path` durable, shared out among the ranks, and then the directories."""
    dist.barrier()
    for file in sorted(file for file in path.rglob("*") if file.is_file())[rank::world]:
        fsync_path(file)
    for folder in [folder for folder in path.rglob("*") if folder.is_dir()] if rank == 0 else []:
        fsync_path(folder)
    sync_directories(path)
