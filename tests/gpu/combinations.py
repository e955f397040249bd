"""A small set of settings in which every two values that go together meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from typing import Any

FACTORS: dict[str, tuple[Any, ...]] = {
    "memory": ("reverse", "store", "checkpoint", "budget"),
    "precision": ("fp32", "tf32", "bf16 autocast", "bf16 weights"),
    "attention": ("default", "math", "efficient", "flash"),
    "dropout": (False, True),
    "slices": ("none", "samples", "tokens"),
    "compile": (False, True),
    "states": ("32 bits", "16 bits", "16 bits, host"),
}
"""bf16 weights are what functions have under ZeRO 1 to 3 in bf16."""

Pair = tuple[tuple[str, Any], tuple[str, Any]]


@dataclass(frozen=True)
class Combination:
    """One value of each factor."""

    memory: str
    precision: str
    attention: str
    dropout: bool
    slices: str
    compile: bool
    states: str

    @property
    def name(self) -> str:
        """For people."""
        parts = [self.memory, self.precision, self.attention, f"slices {self.slices}", self.states]
        parts += ["dropout"] * self.dropout + ["compiled"] * self.compile
        return ", ".join(parts)

    @property
    def allowed(self) -> bool:
        """Flash attention takes bf16 only, and only reversal leaves remainders."""
        if self.states.endswith("host") and self.memory in ("store", "checkpoint"):
            return False
        return self.attention != "flash" or self.precision.startswith("bf16")

    def pairs(self) -> set[Pair]:
        """All pairs of values that meet in it."""
        return set(combinations(asdict(self).items(), 2))


def every(factors: Mapping[str, Sequence[Any]] = FACTORS) -> Iterator[Combination]:
    """All that are allowed."""
    found = (Combination(*values) for values in product(*factors.values()))
    return (one for one in found if one.allowed)


def covering() -> list[Combination]:
    """Enough of them that every pair of values that is allowed meets in one: each time the one
    that adds most."""
    candidates = list(every())
    missing = set().union(*(one.pairs() for one in candidates))
    chosen = []
    while missing:
        best = max(candidates, key=lambda one: len(one.pairs() & missing))
        chosen.append(best)
        missing -= best.pairs()
    return chosen
