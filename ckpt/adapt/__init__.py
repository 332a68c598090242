"""From the user's objects to plain values and memory, and back. The only package that knows torch's state."""

from ckpt.adapt.fence import Fence, Versions
from ckpt.adapt.members import bind_state, collect_state
from ckpt.adapt.state import Bound, Collected, Saved, Wanted, decode_value
from ckpt.adapt.tensors import Local, bytes_view
from ckpt.adapt.wrappers import PerRank, Rng, Shard

__all__ = [
    "Bound",
    "Collected",
    "Fence",
    "Local",
    "PerRank",
    "Rng",
    "Saved",
    "Shard",
    "Versions",
    "Wanted",
    "bind_state",
    "bytes_view",
    "collect_state",
    "decode_value",
]
