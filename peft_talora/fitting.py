"""How many images of a batch fit into memory: tried before training, in all processes together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size

from .engine import fork_random
from .sharding import split_by


def find_batch_size(accelerator: Accelerator, batch_size: int, attempt: Callable[[int], None]) -> int:
    """The largest divisor of a batch size that fits, so that a step can be made up of several whole batches.

    Random numbers are drawn as if nothing had been tried. With DeepSpeed, whose backward passes are optimiser steps,
    and with FSDP, which splits the model afterwards, nothing is tried.

    Args:
        accelerator: What the other processes are known by; the size is the same in all.
        batch_size: The size to begin with.
        attempt: Takes a size, and does with so many images what a step does, without another process.

    Raises:
        RuntimeError: If not even one image fits.
    """
    if split_by(accelerator) is not None:
        return batch_size
    smaller = iter([size for size in range(batch_size - 1, 0, -1) if batch_size % size == 0])

    @find_executable_batch_size(starting_batch_size=batch_size, reduce_batch_size_fn=lambda: next(smaller, 0))
    def largest(size: int) -> int:
        full = False
        with fork_random(accelerator.device):
            try:
                attempt(size)
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
                full = True
        if accelerator.reduce(torch.tensor(float(full), device=accelerator.device), "sum") > 0:
            # The first error would keep what was held when it was raised.
            raise RuntimeError("a process is out of memory.")
        return size

    try:
        return largest()
    except RuntimeError as error:
        if "No executable batch size found" not in str(error):
            raise
        raise RuntimeError(
            "not even one image fits into memory: lower `image_size`, or use `activation_checkpointing`"
        ) from error
