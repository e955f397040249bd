"""Exponentially averaged weights, sharded as the masters are: each rank averages its share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dr2dist.parallel.fragment import Fragment
from dr2dist.parallel.master_weights import MasterWeights


class ShardedEMA:
    """average = decay * average + (1 - decay) * master, after each applied step.

    Starts from the masters as they are. Holds 4 bytes for each trained parameter of this rank's
    share, on every ZeRO stage; ranks that all hold the same masters share the work. group: of the
    ranks that hold the same layers, None for all.
    """

    def __init__(self, masters: MasterWeights, decay: float, group: Any = None) -> None:
        self._masters, self._group = masters, group
        self._take_in = get_ema_multi_avg_fn(decay)
        self._values = {key: values.clone() for key, values in self._master_shares()}

    def _master_shares(self) -> Iterator[tuple[tuple[str, int], Tensor]]:
        """(parameter, start) and this rank's part of the masters, a view."""
        rank, ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        for fragment in self._trained():
            share = fragment.share(rank, ranks)
            if share.start != share.stop:
                key = fragment.name, fragment.start + share.start
                yield key, fragment.values[share].detach()

    def update(self) -> None:
        """Takes in the masters of the step that was just applied."""
        masters = dict(self._master_shares())
        if self._values:
            # All at once: on a GPU a kernel for each parameter takes longer to start than to run.
            self._take_in(list(self._values.values()), [masters[key] for key in self._values], 0)

    def shares(self) -> list[tuple[tuple[str, int], Tensor]]:
        """((parameter, start), averages [n]) of this rank, themselves."""
        return list(self._values.items())

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds."""
        return sum(value.nbytes for value in self._values.values())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the averages into the network, and the masters back; every rank must call it."""
        before = {(f.name, f.start): f.values.clone() for f in self._trained()}
        for fragment in self._trained():
            fragment.values.copy_(self._whole(fragment))
        self._masters.publish()
        try:
            yield
        finally:
            for fragment in self._trained():
                fragment.values.copy_(before[fragment.name, fragment.start])
            self._masters.publish()

    def _trained(self) -> list[Fragment]:
        return [fragment for fragment in self._masters.fragments if fragment.owner is not None]

    def _whole(self, fragment: Fragment) -> Tensor:
        """All averages of a fragment: of a replicated one, the shares of all ranks."""
        if not fragment.replicated:
            return self._values[fragment.name, fragment.start]
        rank, ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        share = fragment.share(rank, ranks)
        padded = fragment.values.new_zeros(fragment.share(0, ranks).stop)
        if share.start != share.stop:
            own = self._values[fragment.name, fragment.start + share.start]
            padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(parts, padded, group=self._group)
        return torch.cat(parts)[: len(fragment.values)]
