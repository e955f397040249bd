"""The process group of a run, as the launcher sets it up."""

from __future__ import annotations

import os
import statistics
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from dr2dist.errors import UserError
from dr2dist.launching.place import Place, own_place
from dr2dist.parallel import adapter
from dr2dist.parallel.agreement import from_all
from dr2dist.parallel.meeting import LIMIT, meet, take_interface


def init_distributed(limit: float = LIMIT) -> torch.device:
    """Joins the process group of its place, see `own_place`; returns this rank's device.

    A rank's GPU becomes its process's current one, for all that names none. Raises UserError, on
    all ranks of a node, if it has fewer GPUs than ranks, and if not all ranks are there after
    `limit` seconds.
    """
    place = _place()
    if torch.cuda.is_available():
        device = torch.device("cuda", _own_gpu(torch.cuda.device_count()))
        # Before the group is made, which DeepSpeed binds to the device of the local rank.
        torch.cuda.set_device(device)
        _form_group(place, "nccl", limit, device if place.ranks > 1 else None)
        return device
    adapter.refuse_compiled_collectives()
    _form_group(place, "gloo", limit)
    return torch.device("cpu")


def _form_group(
    place: Place, backend: str, limit: float, device: torch.device | None = None
) -> None:
    if not dist.is_initialized():
        store = meet(place, limit)
        take_interface(place)
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.ranks, device_id=device
        )
    deepspeed.init_distributed(backend)  # which takes the group that is there


def _place() -> Place:
    """This process's. Raises UserError where nothing has started it as a rank."""
    place = own_place()
    if place is None:
        raise UserError("this process is no rank: start it with 'dr2dist train' or a launcher")
    return place


def _own_gpu(gpus: int) -> int:
    """The number of this rank's GPU among those of its node."""
    own = _local_rank()
    ranks = max(_local_ranks(), own + 1)
    if ranks > gpus:
        raise UserError(
            f"this node has {ranks} ranks and {gpus} GPU(s), and NCCL needs one for each rank: "
            f"start at most {gpus} here, or make more visible (CUDA_VISIBLE_DEVICES)"
        )
    return own


def _local_rank() -> int:
    """This rank's number on its node."""
    return _place().local_rank


def _local_ranks() -> int:
    """Ranks of this node."""
    return _place().local_ranks


def ranks_of_node(rank: int, ranks: int) -> range:
    """The ranks of a rank's node: launchers number those of a node one after another."""
    first = rank - _local_rank()
    return range(max(0, first), min(ranks, first + _local_ranks()))


def nodes_of(replicas: int) -> int:
    """Nodes that replicas are spread over evenly, a node's one after another; 1 where they are not.
    Every rank must call it."""
    most, least = largest(_local_ranks()), -largest(-_local_ranks())
    return max(1, replicas // int(most)) if most == least and not replicas % int(most) else 1


def share_cores() -> None:
    """Splits this node's cores among its ranks, unless the user has set the number of threads."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // _local_ranks()))


def largest(value: float) -> float:
    """The largest of all ranks' values."""
    return _reduced(value, dist.ReduceOp.MAX)


def total(value: float) -> float:
    """The sum of all ranks' values."""
    return _reduced(value, dist.ReduceOp.SUM)


def averages(values: dict[str, float]) -> dict[str, float]:
    """Each value's mean over the ranks that have it; every rank must call it."""
    return {name: statistics.mean(own.values()) for name, own in _by_name(values).items()}


def spread(values: dict[str, float]) -> dict[str, float]:
    """Of each value NAME_least, NAME_median and NAME_most over the ranks that have it, and
    NAME_rank, the first one with the most; every rank must call it."""
    found: dict[str, float] = {}
    for name, own in _by_name(values).items():
        ordered = sorted(own.values())
        found[f"{name}_least"], found[f"{name}_most"] = ordered[0], ordered[-1]
        found[f"{name}_median"] = statistics.median(ordered)
        found[f"{name}_rank"] = next(rank for rank, each in own.items() if each == ordered[-1])
    return found


def _by_name(values: dict[str, float]) -> dict[str, dict[int, float]]:
    """Of all ranks: by name and rank."""
    everywhere = from_all(values)
    names = dict.fromkeys(name for each in everywhere for name in each)
    return {
        name: {rank: each[name] for rank, each in enumerate(everywhere) if name in each}
        for name in names
    }


def slowest(times: list[int]) -> list[int]:
    """Each time as the slowest rank measured it."""
    return [max(each) for each in zip(*from_all(times), strict=True)]


def _reduced(value: float, how: Any) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        tensor = tensor.cuda()
    dist.all_reduce(tensor, how)
    return float(tensor)
