"""alpha and beta as pure functions of the applied step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

from dr2dist.reversible.arithmetic.setting import Setting, round_coefficient

Shape = Literal["linear", "cosine"]


class Coefficients(NamedTuple):
    """alpha and beta, exact multiples of 2^-16."""

    alpha: float
    beta: float


class Knot(NamedTuple):
    """Coefficients that are reached at a share (0 to 1) of the run."""

    share: float
    alpha: float
    beta: float


@dataclass(frozen=True)
class Schedule:
    """A path through knots, constant before the first and after the last.

    knots: in order of their shares. steps: optimiser steps of the run. every: the coefficients
    change only at multiples of this many applied steps. shape: of the way between two knots.
    conserve: alpha is 1 - beta, exactly, and the knots' own alphas do not count. alpha_lag: steps
    by which alpha is behind, fewer than `every`.
    """

    knots: tuple[Knot, ...]
    steps: int
    every: int = 1
    shape: Shape = "linear"
    conserve: bool = False
    alpha_lag: int = 0

    def at(self, step: int) -> Coefficients:
        """The coefficients in force for the optimiser step after `step` applied ones."""
        beta = round_coefficient(self._between(self._share(step))[1])
        alpha, _ = self._between(self._share(max(step - self.alpha_lag, 0)))
        return Coefficients(1 - beta if self.conserve else round_coefficient(alpha), beta)

    @property
    def end(self) -> int:
        """The first applied step from which it stays where it is."""
        # 0.07 x 100 is a little more than 7.
        moves = math.ceil(round(self.knots[-1].share * self.steps / self.every, 9))
        return moves * self.every + self.alpha_lag

    def pairs(self) -> list[Coefficients]:
        """Every pair that is ever in force, in order."""
        moves = range(0, self.steps + 1, self.every)
        steps = [move + lag for move in moves for lag in sorted({0, self.alpha_lag})]
        return list(dict.fromkeys(self.at(step) for step in steps if step <= self.steps))

    def _share(self, step: int) -> float:
        """Of the run, up to the last move."""
        return step // self.every * self.every / self.steps

    def _between(self, share: float) -> tuple[float, float]:
        for low, high in pairwise(self.knots):
            if low.share <= share < high.share:
                weight = _ease((share - low.share) / (high.share - low.share), self.shape)
                return (
                    low.alpha + weight * (high.alpha - low.alpha),
                    low.beta + weight * (high.beta - low.beta),
                )
        nearest = self.knots[0] if share < self.knots[0].share else self.knots[-1]
        return nearest.alpha, nearest.beta

    def check(self, setting: Setting, lengths: Sequence[int]) -> None:
        """Raises ValueError if a point of the path is not allowed with the setting, or something of
        it has no effect on any.

        lengths: the number of functions of each chain, whose range the path must keep.
        """
        if setting.remainders == "host" and all(pair.beta == 1 for pair in self.pairs()):
            raise ValueError(
                "beta is 1 all along, so that no bits are discarded: remainders is 'host', which "
                "has no effect"
            )
        for alpha, beta in self.pairs():
            for length in lengths:
                replace(setting, alpha=alpha, beta=beta).check_range(length)


def _ease(weight: float, shape: Shape) -> float:
    return weight if shape == "linear" else (1 - math.cos(math.pi * weight)) / 2
