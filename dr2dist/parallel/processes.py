"""The process group of a run, as the launcher sets it up."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import torch
import torch.distributed as dist


def join() -> torch.device:
    """Joins the process group that the launcher describes; returns this rank's device."""
    if torch.cuda.is_available():
        deepspeed.init_distributed("nccl")
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    # DeepSpeed would compile a shared-memory collective at first use, which takes a compiler
    # and a minute; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    return torch.device("cpu")


def share_cores() -> None:
    """Splits this node's cores among its ranks, unless the user has set the number of threads."""
    if "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))


def largest(value: float) -> float:
    """The largest of all ranks' values."""
    return _reduced(value, dist.ReduceOp.MAX)


def total(value: float) -> float:
    """The sum of all ranks' values."""
    return _reduced(value, dist.ReduceOp.SUM)


def slowest(times: list[int]) -> list[int]:
    """Each time as the slowest rank measured it."""
    found: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, times)
    return [max(each) for each in zip(*found, strict=True)]


def _reduced(value: float, how: Any) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        tensor = tensor.cuda()
    dist.all_reduce(tensor, how)
    return float(tensor)
