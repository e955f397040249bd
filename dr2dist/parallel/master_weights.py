"""The fp32 masters and moments that a rank holds, named by parameter, on every ZeRO stage.

Each stage lays parameters out in its own way (whole ones, flat partitions, shards of each).
Here each becomes ranges of flattened parameters, so that what is built on them (checkpoints)
knows no layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dr2dist.parallel.originals import Original, Originals, bounds


@dataclass(frozen=True)
class Fragment:
    """The range [start, start + n) of one flattened parameter that this rank holds.

    values: its master, fp32, a view [n]; of a frozen parameter what was given. replicated: every
    rank holds the same range. owner, offset: where the optimiser has its moments, None if frozen.
    beside: whether the values are apart from the weights that the network computes with.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    replicated: bool
    owner: Tensor | None = None
    offset: int = 0
    beside: bool = True

    def share(self, rank: int, ranks: int) -> slice:
        """The part of it that this rank writes, so that all ranks together write it once."""
        if not self.replicated:
            return slice(0, len(self.values))
        return slice(*bounds(len(self.values), rank, ranks))


class MasterWeights:
    """Reads and writes masters and moments of a DeepSpeed engine.

    engine: after `deepspeed.initialize`. zero: its stage. originals: what it rounded; trained
    masters start from there, and of frozen parameters this rank's share is kept. group: the ranks
    that hold the same layers, None for all.
    """

    def __init__(
        self, engine: Any, zero: int, originals: Originals | None = None, group: Any = None
    ) -> None:
        self._engine, self._zero, self._group = engine, zero, group
        self._frozen: Originals = {}
        if originals:
            self._take(originals)

    def _take(self, originals: Originals) -> None:
        held = {name: p.dtype for name, p in self._engine.module.named_parameters()}
        for fragment in self.fragments:
            original = originals.get(fragment.name)
            if original is None:
                continue
            first = max(fragment.start, original.start)
            last = min(fragment.start + len(fragment.values), original.start + len(original.values))
            now = fragment.values[first - fragment.start : last - fragment.start]
            given = original.values[first - original.start : last - original.start]
            # Where ranks were given different values the engine has taken those of rank 0.
            same = given.to(held[fragment.name]) == now.to("cpu", held[fragment.name])
            values = torch.where(same, given, now.to("cpu", given.dtype))
            if fragment.owner is None:
                self._frozen[fragment.name] = Original(first, values)
            else:
                now.copy_(values)

    @property
    def fragments(self) -> list[Fragment]:
        """This rank's ranges; found anew, since an engine may move its tensors."""
        find, found = self._layout(), []
        for name, parameter in self._engine.module.named_parameters():
            if name in self._frozen:
                found += _kept(self._frozen[name], name, parameter)
            else:
                found += find(name, parameter)
        return found

    def _layout(self) -> Callable[[str, Any], list[Fragment]]:
        optimizer = self._engine.optimizer
        if self._zero == 3:
            optimizer._partition_all_parameters()
            return partial(_sharded, optimizer)
        if self._zero:
            return partial(_partitioned, _flat_places(optimizer))
        return partial(_whole, _fp32_copies(optimizer))

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's masters and frozen originals, beside the weights."""
        return sum(fragment.values.nbytes for fragment in self.fragments if fragment.beside)

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

    def publish(self, frozen: bool = False) -> None:
        """Carries written masters over to the weights that the network computes with.

        frozen: frozen parameters' too. Every rank must call it.
        """
        optimizer = self._engine.optimizer
        if frozen:
            self._publish_frozen()
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
        if not self._zero:
            for weight, master in _fp32_copies(optimizer).items():
                weight.data.copy_(master.data)

    def _publish_frozen(self) -> None:
        for name, parameter in self._engine.module.named_parameters():
            if name not in self._frozen:
                continue
            values = self._frozen[name].values
            if self._zero == 3:
                parameter.ds_tensor.data.view(-1)[: len(values)].copy_(values)
            else:
                parameter.data.view(-1).copy_(self._gathered(values, parameter))

    def _gathered(self, share: Tensor, parameter: Tensor) -> Tensor:
        """All ranks' shares of a parameter, in its type and on its device."""
        ranks = dist.get_world_size(self._group)
        padded = parameter.new_zeros(bounds(parameter.numel(), 0, ranks)[1])
        padded[: len(share)] = share
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(parts, padded, group=self._group)
        return torch.cat(parts)[: parameter.numel()]


def _kept(original: Original, name: str, parameter: Any) -> list[Fragment]:
    """A share of a frozen parameter as it was given."""
    if not len(original.values):
        return []
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    return [Fragment(name, shape, original.start, original.values, False)]


def _fp32_copies(optimizer: Any) -> dict[Tensor, Tensor]:
    """MasterWeights by weight where an engine without ZeRO has them, which it does in fp16."""
    pairs = zip(
        getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True
    )
    return {w: m for weights, masters in pairs for w, m in zip(weights, masters, strict=True)}


def _whole(copies: dict[Tensor, Tensor], name: str, parameter: nn.Parameter) -> list[Fragment]:
    master = copies.get(parameter, parameter)
    owner = master if parameter.requires_grad else None
    values = master.detach().view(-1)
    beside = master is not parameter
    return [Fragment(name, tuple(parameter.shape), 0, values, True, owner, beside=beside)]


def _flat_places(optimizer: Any) -> dict[Tensor, tuple[Tensor, int]]:
    """ZeRO 1 and 2: this rank's partition that a parameter's group has, and where in it the
    parameter begins; it may begin before the partition, and end after it.

    The flat order is DeepSpeed's own: it may deal parameters out to ranks, or pad them.
    """
    places = {}
    for group, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        begin = dist.get_rank(optimizer.real_dp_process_group[group]) * len(flat)
        parameters = optimizer.round_robin_bit16_groups[group]
        offsets = optimizer.round_robin_bit16_offsets[group]
        for parameter, offset in zip(parameters, offsets, strict=True):
            places[parameter] = flat, offset - begin
    return places


def _partitioned(
    places: dict[Tensor, tuple[Tensor, int]], name: str, parameter: nn.Parameter
) -> list[Fragment]:
    if not parameter.requires_grad:
        return _whole({}, name, parameter)
    flat, begin = places[parameter]
    first, last = max(begin, 0), min(begin + parameter.numel(), len(flat))
    if first >= last:
        return []
    values = flat.detach()[first:last]
    return [Fragment(name, tuple(parameter.shape), first - begin, values, False, flat, first)]


def _sharded(optimizer: Any, name: str, parameter: Any) -> list[Fragment]:
    """ZeRO 3: an equal shard of each parameter, the last one padded."""
    shape = tuple(parameter.ds_shape)
    size = parameter.ds_tensor.ds_numel
    start = optimizer._get_param_partition_rank(parameter) * size
    count = max(0, min(size, math.prod(shape) - start))
    if not count:
        return []
    if not parameter.requires_grad:
        values = parameter.ds_tensor.data.view(-1)[:count]
        return [Fragment(name, shape, start, values, False, beside=False)]
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    owner = optimizer.fp32_partitioned_groups_flat[group]
    return [Fragment(name, shape, start, owner.detach()[offset:][:count], False, owner, offset)]
