"""The scales of 16-bit states, the same on all ranks: found before the first step, and widened
between steps where a channel has come near its limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dr2dist.parallel.agreement import from_all
from dr2dist.reversible import Chain
from dr2dist.reversible.arithmetic.scales import ChannelMaxima, ChannelScales

Scales = Mapping[str, ChannelScales | None]
"""By chain."""


def without_scales(chains: Iterable[Chain]) -> list[Chain]:
    """Chains whose states have 16 bits and no scales yet, or stale ones."""
    narrow = (chain for chain in chains if chain.setting.by_channel)
    return [chain for chain in narrow if chain.scales is None or chain.scales.stale]


def scales_of(chains: Iterable[Chain]) -> Scales:
    """Those in force, by chain."""
    return {chain.name: chain.scales for chain in chains}


def put_back(chains: Iterable[Chain], scales: Scales) -> None:
    """What `scales_of` has given is in force again."""
    for chain in chains:
        chain.set_scales(scales[chain.name])


def settle(chains: Iterable[Chain], since: Scales) -> list[str]:
    """Makes scales stale that had to grow far in a step; the chains' names."""
    grown = []
    for chain in chains:
        start = since[chain.name]
        if chain.scales is not None and start is not None:
            chain.set_scales(chain.scales.settled(start))
            grown += [chain.name] if chain.scales.stale else []
    return grown


def find_scales(chains: Sequence[Chain], measure: Callable[[], Any]) -> None:
    """Gives chains scales from one pass; every rank must call it.

    measure: runs the network without gradients, its states not on a grid. The largest value of each
    channel on any rank counts: ranks may see other samples, and stages other functions.
    """
    for chain in chains:
        chain.maxima = ChannelMaxima(chain.channel_dim)
    try:
        measure()
        own = {chain.name: _values(chain.maxima) for chain in chains}
    finally:
        for chain in chains:
            chain.maxima = None
    found = from_all(own)
    for chain in chains:
        known = [values for row in found if (values := row[chain.name]) is not None]
        largest = [max(column) for column in zip(*known, strict=True)]
        chain.set_scales(ChannelScales.find(largest, chain.channel_dim))


def _values(maxima: ChannelMaxima | None) -> list[float] | None:
    """None where this rank has run no function of the chain."""
    return None if maxima is None or maxima.values is None else maxima.values.tolist()


def make_room(
    chains: Sequence[Chain],
    near: Mapping[str, int],
    peaks: Mapping[str, Tensor | None],
    since: Scales,
    device: torch.device,
) -> list[str]:
    """Widens the scales of channels that came near their limit on any rank; every rank must call
    it, with the verdict's `near` and its own peaks. Returns what was widened, for messages; nothing
    where a channel would have grown beyond MOST since the step began.
    """
    widened = []
    for chain in chains:
        if chain.scales is None or not near.get(chain.name):
            continue
        own = peaks[chain.name]
        if own is None:
            own = torch.zeros(len(chain.scales.exponents), dtype=torch.int64, device=device)
        largest = own.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        scales = chain.scales.with_room(largest.tolist(), since[chain.name])
        if scales is None:
            return []
        changed = sum(a != b for a, b in zip(scales.exponents, chain.scales.exponents, strict=True))
        chain.set_scales(scales)
        widened.append(f"{chain.name}: {changed} of {len(scales.exponents)} channels")
    return widened
