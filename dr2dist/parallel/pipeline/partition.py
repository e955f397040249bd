"""Which layers go to which stage: consecutive ones, with the slowest stage as fast as can be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from dr2dist.errors import UserError


def partition(costs: Sequence[float], stages: int) -> tuple[range, ...]:
    """Ranges of layers, none empty, whose largest sum of costs is the least possible.

    Among equals the second largest counts, and so on. Raises UserError for more stages than layers.
    """
    count = len(costs)
    if stages > count:
        raise UserError(f"parallel.stages is {stages}, the network has {count} layers")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    @cache
    def best(start: int, left: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """(costs of the stages, largest first; where they end) for the layers from `start` on."""
        if left == 1:
            return (sums[count] - sums[start],), (count,)
        found = []
        for end in range(start + 1, count - left + 2):
            rest, ends = best(end, left - 1)
            own = sums[end] - sums[start]
            found.append((tuple(sorted((own, *rest), reverse=True)), (end, *ends)))
        return min(found)

    _, ends = best(0, stages)
    return tuple(range(a, b) for a, b in zip((0, *ends), ends, strict=False))
