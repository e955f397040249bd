"""The choice of functions that keep their activations, against all choices."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from dr2dist.reversible.budget.costs import Cost
from dr2dist.reversible.budget.kept import choose, extra_bytes


def saved(chains: list[list[Cost]], plan: Sequence[frozenset[int]]) -> int:
    """Microseconds that a plan saves."""
    pairs = zip(chains, plan, strict=True)
    return sum(costs[index].microseconds for costs, kept in pairs for index in kept)


@pytest.mark.parametrize("seed", range(30))
def test_the_plan_is_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    chains = [
        [Cost(draw.randint(1, 40), draw.randint(1, 30), 7) for _ in range(draw.randint(1, 5))]
        for _ in range(draw.randint(1, 3))
    ]
    choices = [
        [
            frozenset(kept)
            for count in range(len(costs) + 1)
            for kept in itertools.combinations(range(len(costs)), count)
        ]
        for costs in chains
    ]
    found = set()
    for budget in (0, 20, 60, 10**6):
        best = max(
            saved(chains, kept)
            for kept in itertools.product(*choices)
            if sum(map(extra_bytes, chains, kept)) <= budget
        )
        plan = choose(chains, budget)
        found.add(tuple(plan))
        assert sum(map(extra_bytes, chains, plan)) <= budget
        assert saved(chains, plan) == best
    assert len(found) > 1  # plans differ between budgets
