"""Which functions keep their activations, so that the most time is saved for the bytes allowed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dr2dist.reversible.budget.costs import Cost


class _Plan(NamedTuple):
    """A choice for the functions so far, and whether the last of them keeps its activations."""

    size: int
    saved: int
    kept: tuple[tuple[int, int], ...]
    last: bool


def extra_bytes(costs: Sequence[Cost], kept: frozenset[int]) -> int:
    """Bytes that a chain holds beyond full reversal if these functions keep their activations.

    Each kept function has its graph. Where reversal ends below kept functions, it needs a state to
    go on from; where a chain's last function is kept, its last state is not needed.
    """
    total, before = 0, True
    for index, cost in enumerate(costs):
        now = index in kept
        total += cost.kept if now else 0
        total += cost.state if now and not before else 0
        before = now
    return total - (costs[-1].state if costs and before else 0)


def choose(chains: Sequence[Sequence[Cost]], budget: int) -> list[frozenset[int]]:
    """The kept functions of each chain that save the most time within `budget` extra bytes.

    Exact: the best of all choices by `extra_bytes`, found from those that no other beats in both
    bytes and time. Among equals the one with fewer bytes.
    """
    plans = [_Plan(0, 0, (), False)]
    for number, costs in enumerate(chains):
        plans = [plan._replace(last=True) for plan in plans]
        for index, cost in enumerate(costs):
            plans = _thinned(
                grown for plan in plans for grown in _grown(plan, (number, index), cost)
            )
        if costs:
            state = costs[-1].state
            plans = [plan._replace(size=plan.size - state * plan.last) for plan in plans]
    allowed = [plan for plan in plans if plan.size <= budget]
    best = max(allowed, key=lambda plan: (plan.saved, -plan.size))
    return [
        frozenset(index for chain, index in best.kept if chain == number)
        for number in range(len(chains))
    ]


def _grown(plan: _Plan, place: tuple[int, int], cost: Cost) -> tuple[_Plan, _Plan]:
    """The plan with the next function reversed, and kept."""
    size = plan.size + cost.kept + (0 if plan.last else cost.state)
    kept = _Plan(size, plan.saved + cost.microseconds, (*plan.kept, place), True)
    return plan._replace(last=False), kept


def _thinned(plans: Iterable[_Plan]) -> list[_Plan]:
    """Without the plans that another beats in bytes and time, for either last choice."""
    result: list[_Plan] = []
    ordered = sorted(plans, key=lambda plan: (plan.size, -plan.saved))
    for last in (False, True):
        most = -1
        for plan in ordered:
            if plan.last == last and plan.saved > most:
                most = plan.saved
                result.append(plan)
    return result
