"""Ranges of flattened parameters: what a rank holds or writes of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


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


def bounds(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """Where a rank's share of `count` values begins and ends."""
    size = math.ceil(count / ranks)
    return min(rank * size, count), min((rank + 1) * size, count)
