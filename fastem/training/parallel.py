"""Processes that train together: each draws its own crops, DistributedDataParallel averages their gradients.

`torchrun --nproc-per-node 4 -m fastem train image-prior ...` starts them, on one machine or several that share the
output folder. Alone, every function here is the obvious one for a single process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Joins the processes that torchrun started, if it did, for the duration of the block.

    Yields:
        The device of this process: its own GPU where `device` is "cuda", else `device`.

    Raises:
        ValueError: if there are more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}; "
                "start torchrun with --nproc-per-node of that number, or give --device cpu"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if dist.is_initialized():
        yield device
        return
    # what is decided together, such as when to stop, travels as CPU tensors and waits for no kernel
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 is the one that reports and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def averaged(model: nn.Module) -> nn.Module:
    """The model with gradients averaged over the processes; itself where there is one."""
    return nn.parallel.DistributedDataParallel(model) if size() > 1 else model


def total(values: Tensor) -> Tensor:
    """`values` summed over the processes."""
    if size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def least(value: float) -> float:
    """The smallest `value` that any process has."""
    if size() == 1:
        return value
    values = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values.item()


def gathered(values: Tensor) -> list[Tensor]:
    """The CPU tensor `values` (of one shape everywhere) of each process, in their order."""
    if size() == 1:
        return [values]
    everyone = [torch.empty_like(values) for _ in range(size())]
    dist.all_gather(everyone, values)
    return everyone
