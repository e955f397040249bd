"""Weights as they were given, where an engine holds them in a narrower type.

DeepSpeed rounds weights to bf16 or fp16 first and makes its masters of what is left. So what was
given is kept aside until masters exist, and for frozen weights, which have no masters, for good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dr2dist.parallel.fragment import bounds


@dataclass(frozen=True)
class Original:
    """The range [start, start + n) of a flattened parameter as it was given, on the CPU."""

    start: int
    values: Tensor


Originals = dict[str, Original]


def originals(net: nn.Module, held: torch.dtype, whole: bool, group: Any) -> Originals:
    """What an engine that holds `held` would round away, by name; empty if it rounds nothing.

    whole: all values of trained parameters, otherwise this rank's share of them; of frozen ones
    there is always a share. group: the ranks that share, None for all.
    """
    found = {}
    for name, parameter in net.named_parameters():
        if not narrows(parameter.dtype, held):
            continue
        if whole and parameter.requires_grad:
            # Not a copy: the engine gives the parameter other memory.
            found[name] = Original(0, parameter.detach().reshape(-1).cpu())
        else:
            found[name] = own_share(parameter.detach(), group)
    return found


def own_share(tensor: Tensor, group: Any = None) -> Original:
    """This rank's share of a tensor, a copy; all are equal but the last ones, as ZeRO-3 cuts."""
    start, stop = bounds(tensor.numel(), dist.get_rank(group), dist.get_world_size(group))
    return Original(start, tensor.reshape(-1)[start:stop].cpu().clone())


def narrows(given: torch.dtype, held: torch.dtype) -> bool:
    """Whether values of a type are rounded when they are held in another."""
    return torch.finfo(held).bits < torch.finfo(given).bits
