"""What a rank of a run will hold, by kind, foretold from shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from dr2dist.config import Config
from dr2dist.reversible import Setting


class Footprint(NamedTuple):
    """Bytes of a rank without pipeline stages.

    weights, gradients, optimiser: masters and moments. states: of a micro-batch's largest chain,
    two and their gradients, in memory mode reverse; remainders: of all its chains. What else a step
    takes is the working set of one function, on a slice.
    """

    weights: int
    gradients: int
    optimiser: int
    states: int
    remainders: int

    def describe(self) -> str:
        """A line for people."""
        kinds = zip(self._fields, self, strict=True)
        listed = ", ".join(f"{_told(size)} of {name}" for name, size in kinds if size)
        return f"{listed}, beside one function's working set"


def footprint(
    config: Config,
    replicas: int,
    parameters: Sequence[int],
    elements: dict[int, list[int]],
    setting: Setting,
) -> Footprint:
    """What a rank of so many replicas will hold.

    parameters: all, and those that are trained, in numbers. elements: of a sample's tokens behind
    each function, by chain. setting: of the chains, at the smallest beta.
    """
    whole, trained = parameters
    zero = config.parallel.zero
    # Without ZeRO weights and tokens are fp32 in bf16 runs too, and functions run under autocast.
    narrow = config.train.precision != "fp32" and zero > 0
    width, batch = (2 if narrow else 4), config.train.micro_batch
    summed = 4 if config.train.precision == "bf16" and zero > 1 else width
    moments = {"adamw": 2, "sgd": int(config.optim.momentum > 0)}[config.optim.name]
    masters = 1 if narrow or zero else 0
    shares = [replicas if zero >= stage else 1 for stage in (3, 2, 1)]
    states = remainders = 0
    if setting.memory == "reverse":
        largest = max(max(sizes) for sizes in elements.values())
        held = 4 if setting.arithmetic == "float" else setting.state_bits // 8
        states = batch * largest * (2 * held + 2 * width)
        bits = setting.remainder_bits if setting.keeps_remainders else 0
        # The first function of a chain keeps none: it reverses by y = beta x.
        remainders = batch * sum(sum(sizes[1:]) for sizes in elements.values()) * bits // 8
    return Footprint(
        width * whole // shares[0],
        summed * trained // shares[1],
        4 * (masters + moments) * trained // shares[2],
        states,
        0 if setting.remainders == "host" else remainders,
    )


def elements_of(measured: Sequence[Any]) -> dict[int, list[int]]:
    """Of a sample's tokens behind each function, by the number of its chain's item."""
    found: dict[int, list[int]] = {}
    for each in measured:
        if each.place.kind == "function":
            found.setdefault(each.place.item, []).append(math.prod(each.flow.value.shape))
    return found


def _told(size: int) -> str:
    for unit, width in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= width:
            return f"{size / width:.1f} {unit}"
    return f"{size / 2**10:.1f} KiB"
