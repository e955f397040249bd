"""Parameters of a network on the meta device, made and sharded for ZeRO-3 one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from dr2dist.parallel.originals import Originals, narrows, own_share


def shard(
    net: nn.Module,
    weights: Callable[[str], Tensor],
    config: dict[str, Any],
    dtype: torch.dtype,
) -> Originals:
    """Puts this rank's shard of each parameter in its place; every rank must call it.

    weights: the whole values of a parameter by name, on the CPU; they are forgotten before the
    next ones are asked for. config: DeepSpeed's. dtype: what they are held in. Parameters stay
    the same objects, so an optimiser may hold them already. Returns this rank's shares of the
    values that were rounded, as they were given.
    """
    rounded = {}
    for name, parameter in net.named_parameters():
        values = weights(name)
        if narrows(values.dtype, dtype):
            rounded[name] = own_share(values)
        real = nn.Parameter(values.to(dtype), requires_grad=parameter.requires_grad)
        del values
        torch.utils.swap_tensors(parameter, real)
        # DeepSpeed shards what a module holds; this one holds nothing else.
        holder = nn.ParameterList([parameter])
        deepspeed.zero.Init(module=holder, config_dict_or_path=config)
    return rounded
