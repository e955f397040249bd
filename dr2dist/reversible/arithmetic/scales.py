"""The grid of 16-bit states: a power of two for each channel of a chain.

`x = X * 2^exponent`. All functions of a chain share its scales, since X_{i+1} and X_{i-1} are added
on one grid. They change only between optimiser steps: to larger ones, and where they had to grow
far at once, as for a sample that is unlike all others, to new ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dr2dist.reversible.constants import Constants
from dr2dist.reversible.transfer import to_device

NEAR = 1 << 14
"""Steps from which on a channel is near its limit, and is given room at the next boundary: scales
that were found begin at most here."""

WIDENINGS = 32
"""Attempts of a pass or a step, each with larger scales, before it is given up."""

SPARE = 5
"""Doublings in one pass or step by which usual states keep the eight bits that bf16 has. Scales
that have grown by more are found again."""

MOST = 14
"""Doublings in one pass or step after which nothing would be left of usual states: what needs more
is not held."""

GREW = (
    f"states were more than {2**SPARE} times as large as their scales allow for, as of a sample "
    "that is unlike all others; scales are found again in the next pass"
)
"""What is said then."""

FINEST = -18
"""The smallest exponent: channels of zeros have a range too, and no grid need be finer."""


class Rows(NamedTuple):
    """A contiguous tensor, flattened, as rows of `width` elements that `factors` multiplies.

    factors: a number, or [1, width] where every row has all channels, or [rows, 1] where each row
    is of one channel.
    """

    width: int
    factors: float | Tensor

    def onto(self, flat: Tensor, start: int) -> Tensor:
        """Multiplies a part of the flattened tensor, from element `start` on, in place."""
        if not isinstance(self.factors, Tensor):
            return flat.mul_(self.factors)
        factors = self.factors
        if len(factors) > 1:
            first = start // self.width
            factors = factors[first : first + len(flat) // self.width]
        flat.view(-1, self.width).mul_(factors)
        return flat


@dataclass(frozen=True)
class ChannelScales:
    """exponents: by channel. dim: of tokens, that holds the channels. stale: whether the next pass
    or step that trains is to find others."""

    exponents: tuple[int, ...]
    dim: int = -1
    stale: bool = False
    _known: Constants = field(default_factory=Constants, init=False, repr=False, compare=False)

    @classmethod
    def find(cls, largest: Sequence[float], dim: int = -1) -> ChannelScales:
        """Scales with headroom for the largest |x| of each channel: 2^ceil(log2(2 x)) / 2^15."""
        return cls(tuple(max(FINEST, _exponent(value) - 14) for value in largest), dim)

    def with_room(
        self, peaks: Sequence[int], since: ChannelScales | None = None
    ) -> ChannelScales | None:
        """Scales by which no channel would have been near its limit; None where one would have
        grown by more than MOST.

        peaks: the largest |X| of each channel that was, any smaller number for others. since: the
        scales that the pass, or the step, began with.
        """
        more = (max(0, int(peak).bit_length() - NEAR.bit_length() + 1) for peak in peaks)
        grown = tuple(old + new for old, new in zip(self.exponents, more, strict=True))
        room = ChannelScales(grown, self.dim)
        return room if room.doublings(since or self) <= MOST else None

    def doublings(self, since: ChannelScales) -> int:
        """By how many the channel that has grown most has."""
        each = zip(self.exponents, since.exponents, strict=True)
        return max((new - old for new, old in each), default=0)

    def settled(self, since: ChannelScales, name: str | None = None) -> ChannelScales:
        """These, stale if they had to grow far, of which a chain's name makes a warning."""
        stale = self.doublings(since) > SPARE
        if stale and name is not None:
            warnings.warn(f"{name}: {GREW}", stacklevel=4)
        # Otherwise the same object, which keeps its tensors on devices from one step to the next.
        return self if stale == self.stale else replace(self, stale=stale)

    def check(self, name: str, known: ChannelScales | None, by_channel: bool) -> None:
        """Raises ValueError if a chain cannot take these. known: those that it has. by_channel:
        whether its states have 16 bits."""
        count = len(self.exponents)
        if not by_channel:
            raise ValueError(f"{name}: scales are given; allowed are none: its states have 32 bits")
        if known is not None and len(known.exponents) != count:
            raise ValueError(
                f"{name}: scales of {count} channels are given; it has {len(known.exponents)}"
            )

    def values(self, device: torch.device, onto_grid: bool) -> Tensor:
        """The scales' reciprocals, which bring tokens onto the grid, or themselves: fp32
        [channels]."""

        def make() -> Tensor:
            sign = -1 if onto_grid else 1
            scales = [math.ldexp(1.0, sign * exponent) for exponent in self.exponents]
            return to_device(torch.tensor(scales, device="cpu"), device)

        return self._known.get((device, onto_grid), make)

    def rows(self, like: Tensor, onto_grid: bool) -> Rows:
        """How a tensor of tokens becomes grid steps, or how those become tokens."""
        values = self.values(like.device, onto_grid)
        inner = inner_size(like.shape, self.dim)
        if inner == 1:
            return Rows(len(values), values.view(1, -1))
        outer = like.numel() // (inner * len(values))
        return Rows(inner, values.repeat(outer).view(-1, 1))


class ChannelMaxima:
    """The largest |x| of each channel over states of a chain, fp32 [channels] on its device.

    dim: of tokens, that holds the channels.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.values: Tensor | None = None

    def note(self, tokens: Tensor) -> None:
        """Takes note of a state's tokens."""
        found = channel_peaks(tokens, self.dim).float().nan_to_num_(0.0, 0.0, 0.0)
        self.values = found if self.values is None else torch.maximum(self.values, found)

    def scales(self) -> ChannelScales:
        """Those that they come to, read to the host."""
        assert self.values is not None
        return ChannelScales.find(self.values.tolist(), self.dim)


def inner_size(shape: torch.Size, dim: int) -> int:
    """Elements between two neighbours in a dimension of a contiguous tensor."""
    return math.prod(shape[range(len(shape))[dim] + 1 :])


def channel_peaks(value: Tensor, dim: int) -> Tensor:
    """The largest magnitude of each channel, in the value's dtype: [channels]."""
    return value.abs().movedim(dim, -1).flatten(0, -2).amax(0)


def _exponent(value: float) -> int:
    """ceil(log2(value)) of a finite number; very small where it is 0."""
    mantissa, exponent = math.frexp(value)
    return -1100 if value == 0 else exponent - (mantissa == 0.5)
