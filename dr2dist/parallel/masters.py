"""The fp32 masters and moments that a rank holds, named by parameter, on every ZeRO stage.

Each stage lays parameters out in its own way (whole ones, flat partitions, shards of each).
Here each becomes ranges of flattened parameters, so that what is built on them (checkpoints)
knows no layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """The range [start, start + n) of one flattened parameter that this rank holds.

    values: its master (fp32; a frozen parameter's own dtype), a view [n]. replicated: every
    rank holds the same range. owner, offset: where the optimiser has its moments, None if frozen.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    replicated: bool
    owner: Tensor | None = None
    offset: int = 0

    def share(self, rank: int, ranks: int) -> slice:
        """The part of it that this rank writes, so that all ranks together write it once."""
        if not self.replicated:
            return slice(0, len(self.values))
        size = math.ceil(len(self.values) / ranks)
        return slice(min(rank * size, len(self.values)), min((rank + 1) * size, len(self.values)))


class Masters:
    """Reads and writes masters and moments of a DeepSpeed engine.

    engine: after `deepspeed.initialize`. zero: its stage.
    """

    def __init__(self, engine: Any, zero: int) -> None:
        self._engine = engine
        self._find = (_whole, _partitioned, _partitioned, _sharded)[zero]
        self._zero = zero

    @property
    def fragments(self) -> list[Fragment]:
        """This rank's ranges; found anew, since an engine may move its tensors."""
        if self._zero == 3:
            self._engine.optimizer._partition_all_parameters()
        found = []
        for name, parameter in self._engine.module.named_parameters():
            found += self._find(self._engine.optimizer, name, parameter)
        return found

    def moments(self, fragment: Fragment) -> dict[str, Tensor]:
        """The optimiser's state of a range by name: views [n], and scalars [] such as step."""
        return dict(self._moments(fragment))

    def _moments(self, fragment: Fragment) -> Iterator[tuple[str, Tensor]]:
        if fragment.owner is None:
            return
        for key, value in self._engine.basic_optimizer.state.get(fragment.owner, {}).items():
            if isinstance(value, Tensor) and value.dim() == 0:
                yield key, value
            elif isinstance(value, Tensor):
                flat = value.view(-1)
                yield key, flat.narrow(0, fragment.offset, len(fragment.values))

    def add_moment(self, fragment: Fragment, key: str, value: Tensor) -> None:
        """Puts a moment [n], or a scalar [], in place; makes it if it is not there yet."""
        owner = fragment.owner
        if owner is None:
            return
        state = self._engine.basic_optimizer.state[owner]
        if value.dim() == 0:
            if self._engine.basic_optimizer.defaults.get("fused"):
                value = value.to(owner.device)  # a fused step counts where its values are
            # One scalar serves the whole owner: the largest count of updates in it.
            state[key] = value.clone() if key not in state else torch.maximum(state[key], value)
            return
        whole = state.setdefault(key, torch.zeros_like(owner, requires_grad=False))
        whole.view(-1).narrow(0, fragment.offset, len(value)).copy_(value)

    def publish(self) -> None:
        """Carries written masters over to the weights that the network computes with."""
        optimizer = self._engine.optimizer
        if self._zero in (1, 2):
            optimizer.update_lp_params()
        if self._zero == 3:
            flat = zip(
                optimizer.fp16_partitioned_groups_flat,
                optimizer.fp32_partitioned_groups_flat,
                strict=True,
            )
            for weights, masters in flat:
                weights.data.copy_(masters.data)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _whole(optimizer: Any, name: str, parameter: nn.Parameter) -> list[Fragment]:
    owner = parameter if parameter.requires_grad else None
    values = parameter.detach().view(-1)
    return [Fragment(name, tuple(parameter.shape), 0, values, True, owner)]


def _partitioned(optimizer: Any, name: str, parameter: nn.Parameter) -> list[Fragment]:
    """ZeRO 1 and 2: a flat partition for each group, which cuts through parameters."""
    if not parameter.requires_grad:
        return _whole(optimizer, name, parameter)
    place: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if place is None:
        return []
    return [
        Fragment(
            name,
            tuple(parameter.shape),
            place.lp_fragment_address.start,
            place.hp_fragment.detach(),
            False,
            optimizer.single_partition_of_fp32_groups[place.param_group_index],
            place.hp_fragment_address.start,
        )
    ]


def _sharded(optimizer: Any, name: str, parameter: Any) -> list[Fragment]:
    """ZeRO 3: an equal shard of each parameter, the last one padded."""
    shape = tuple(parameter.ds_shape)
    size = parameter.ds_tensor.ds_numel
    start = optimizer._get_param_partition_rank(parameter) * size
    count = max(0, min(size, math.prod(shape) - start))
    if not count:
        return []
    if not parameter.requires_grad:
        return [Fragment(name, shape, start, parameter.ds_tensor.data.view(-1)[:count], False)]
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    owner = optimizer.fp32_partitioned_groups_flat[group]
    return [Fragment(name, shape, start, owner.detach()[offset:][:count], False, owner, offset)]
