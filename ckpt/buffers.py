"""Host memory between tensors and files, and the few threads that work on it. Knows no plan and no file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from ckpt.plan import ALIGN_BYTES, RUN_BYTES
from ckpt.slices import Slice, whole

T = TypeVar("T")


def each(
    items: Iterable[T], act: Callable[[T, torch.Tensor], None], threads: int, buffer_bytes: int = RUN_BYTES
) -> None:
    """Run `act(item, buffer)` for each item on `threads` threads, each with one `buffer` of its own.

    Items are taken in order, one thread at a time. The first error ends them all and is raised.
    """
    queue, lock, stop = iter(items), threading.Lock(), threading.Event()

    def work() -> None:
        buffer = aligned(buffer_bytes)
        while not stop.is_set():
            with lock:
                item = next(queue, None)
            if item is None:
                return
            try:
                act(item, buffer)
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(threads, thread_name_prefix="ckpt-io") as pool:
        done, _ = wait([pool.submit(work) for _ in range(threads)], return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


def aligned(nbytes: int) -> torch.Tensor:
    """Page-aligned host memory, pinned where there is a CUDA device."""
    raw = torch.empty(nbytes + ALIGN_BYTES, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return raw[-raw.data_ptr() % ALIGN_BYTES :][:nbytes]


def typed(buffer: torch.Tensor, at: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The bytes from `at` on as a tensor: a view where `at` is aligned for `dtype`, else a copy."""
    nbytes = dtype.itemsize
    for n in shape:
        nbytes *= n
    raw = buffer[at : at + nbytes]
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(tuple(shape))


def narrow(tensor: torch.Tensor, box: Slice) -> torch.Tensor:
    """The view of `box` in `tensor`."""
    if box == whole(tuple(tensor.shape)):
        return tensor
    for dim, (offset, length) in enumerate(zip(box.offset, box.shape, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor
