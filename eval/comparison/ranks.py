"""Several processes of one comparison, as torchrun starts them: each answers its part of every task's questions."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

WAIT = timedelta(hours=24)  # the others wait while the first rank measures costs and speed


def rank() -> int:
    """Returns this process's number, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Returns the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start() -> None:
    """Joins the other processes, each on its GPU; does nothing for one process."""
    if world_size() == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=WAIT)


def broadcast_from_rank0(value: Any) -> Any:
    """Returns the first rank's value, in every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def stop() -> None:
    """Leaves the group; does nothing for one process."""
    if dist.is_initialized():
        dist.destroy_process_group()
