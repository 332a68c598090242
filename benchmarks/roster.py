"""Who takes part in the benchmarks, by name."""

from collections.abc import Callable
from pathlib import Path

import async_contenders
import contenders
import peers
from async_contenders import AsyncContender
from contenders import Contender

CONTENDERS: dict[str, Callable[[], Contender]] = {
    "limit": contenders.Limit,
    "holdfast": contenders.Holdfast,
    "dcp": contenders.Dcp,
    "torch-checkpointing": peers.TorchCheckpointing,
    "torchsnapshot": peers.Torchsnapshot,
    "torch.save": contenders.TorchSave,
    "safetensors": contenders.Safetensors,
}

ASYNC_CONTENDERS: dict[str, Callable[[Path], AsyncContender]] = {
    "holdfast": async_contenders.Holdfast,
    "holdfast, no overlap": async_contenders.HoldfastInPlace,
    "holdfast, blocking": async_contenders.HoldfastBlocking,
    "holdfast, skipping": async_contenders.HoldfastSkipping,
    "dcp": async_contenders.Dcp,
    "dcp shared": async_contenders.DcpShared,
    "dcp process": async_contenders.DcpProcess,
    "torch-checkpointing": peers.TorchCheckpointingAsync,
    "torchsnapshot": peers.TorchsnapshotAsync,
}
