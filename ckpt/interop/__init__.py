"""Other libraries' checkpoints: into a run, out of it, and torch's DCP straight onto it (`ckpt.interop.dcp`).

tree        a checkpoint as nested dicts, and the names that its tensors and values have in a run (pure)
optimizers  optimizer state dicts of torch, by parameter, and back (pure)
files       tensors as ranges of files; destinations that appear whole or not at all
hf          safetensors files, and the sharded layout of Hugging Face
folder      what Accelerate and the Trainer of transformers leave: weights and a training beside them
torchfile   what torch.save wrote; trusted: the child process for pickles that are trusted
dcpfiles    directories of torch.distributed.checkpoint; metadata: their pickle, read without running it
moving      `ckpt export` and `ckpt import`
"""

from typing import Final, Literal, get_args

Format = Literal["safetensors", "hf", "dcp", "torch"]
FORMATS: Final[tuple[Format, ...]] = get_args(Format)
Source = Literal["auto", "safetensors", "hf", "dcp", "torch", "training"]
SOURCES: Final[tuple[Source, ...]] = get_args(Source)
SHARD_BYTES: Final = 5_000_000_000  # files of the Hugging Face layout, at most
