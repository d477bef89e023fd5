"""One process or many (torchrun, with NCCL on GPUs and gloo on CPUs), by the same functions.

Without torchrun there is no process group. Then this process is rank 0 of 1.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError

# How long a rank waits for another before it gives up: longer than rank 0 takes to evaluate alone,
# and short enough to free the machine when a rank has died.
TIMEOUT = timedelta(minutes=30)


class DeviceError(UserError):
    """There is no such device for this process."""


def init_distributed(device: Literal["auto", "cuda", "cpu"] = "auto") -> torch.device:
    """Join the process group, if torchrun has set RANK, WORLD_SIZE and LOCAL_RANK.

    Returns the device of this process. "auto" is a GPU where there is one. Raises DeviceError if
    there is no GPU for this process.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        gpus = torch.cuda.device_count()
        if gpus == 0:
            raise DeviceError("device=cuda, but PyTorch sees no GPU here: use --device cpu")
        if local_rank >= gpus:
            raise DeviceError(
                f"process {local_rank} of this machine has no GPU, there are {gpus}:"
                f" use torchrun --nproc_per_node={gpus}"
            )
        torch.cuda.set_device(local_rank)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        # Both backends on GPUs: objects and barriers then travel over the CPU, not through the GPU.
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # After a restart torchrun's store still has the addresses of the processes before.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        options = dict(store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        dist.init_process_group(backend, **options)
    return torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")


def shutdown() -> None:
    """Leave the group, if there is one."""
    if _has_group():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if _has_group() else 0


def world_size() -> int:
    return dist.get_world_size() if _has_group() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that writes."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if _has_group():
        dist.barrier()


def reduce_mean(tensor: Tensor) -> Tensor:
    """The mean over ranks of a tensor of any shape, the same on every rank, without gradient.

    For counts, such as the mean over ranks of the number of positives. The tensor itself does not
    change. Whole numbers give a float. The function does not wait for the GPU.
    """
    total = tensor.detach().clone()
    if _has_group():
        dist.all_reduce(total)
    return total / world_size()


def broadcast_buffers(module: nn.Module) -> None:
    """Give all ranks the buffers of rank 0: the statistics that its checkpoint holds."""
    if _has_group():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank. A value is anything that can be pickled."""
    values = [value]
    if _has_group():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: Any) -> list[Any] | None:
    """On rank 0 the values of all ranks, in rank order, and None on the other ranks. A value is
    anything that can be pickled."""
    if not _has_group():
        return [value]
    gathered = [None] * world_size() if is_main() else None
    dist.gather_object(value, gathered)
    return gathered


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()
