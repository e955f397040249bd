"""What is left to be measured of a chain's setting: its slices, and what keeps its activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dr2dist.errors import UserError
from dr2dist.reversible.arithmetic.setting import Setting
from dr2dist.reversible.budget.costs import Cost, Meter
from dr2dist.reversible.budget.kept import choose
from dr2dist.reversible.calls.slices import Layout

LEAST_TOKENS = 16
"""Slices of fewer tokens are not tried."""


class Planner:
    """Settles the layouts of a network's chains when each is first trained; they stay as they are
    until a batch, or a sample, is larger than those that were measured, in a single process.

    names: of the chains, in order. With a memory budget, chains are reversed until all of them are
    measured, which is after the first pass.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.agree: Callable[[list[int]], list[int]] = _alone
        """Gives all ranks the same times, so that they choose alike."""
        self._sizes: dict[str, tuple[int, int]] = {}
        self._slices: dict[str, tuple[int | None, int | None]] = {}
        self._costs: dict[str, list[Cost]] = {}
        self._kept: dict[str, frozenset[int]] = {}

    def layout(
        self, name: str, setting: Setting, functions: Sequence[nn.Module], meter: Meter
    ) -> Layout:
        """The layout of a chain that trains; `meter` is asked only for what is not settled yet.

        Raises UserError if no slice fits the setting's chunk_budget.
        """
        self._note_size(name, meter.x)
        if name not in self._slices:
            slices = setting.chunk_size, setting.chunk_tokens
            if setting.chunk_size == "auto":
                slices = _slices(functions, meter, setting.chunk_budget or 0)
            self._slices[name] = slices  # type: ignore[assignment]
        layout = Layout(*self._slices[name])
        if setting.memory == "budget" and name not in self._kept:
            self._measure(name, [meter.cost(f, layout) for f in functions], setting)
        return layout._replace(kept=self._kept.get(name, frozenset()))

    def known(self, name: str, setting: Setting) -> Layout:
        """What is settled, for a pass that does not train; before it is, the least slices."""
        given = setting.chunk_size, setting.chunk_tokens
        unsettled = (1, LEAST_TOKENS) if setting.chunk_size == "auto" else given
        return Layout(*self._slices.get(name, unsettled))  # type: ignore[arg-type]

    def _note_size(self, name: str, x: Tensor) -> None:
        """Forgets what is settled if a sample, or the batch, is larger than it was. Ranks that
        choose alike have batches of one size, and one of them must not ask alone."""
        if self.agree is not _alone:
            return
        found = x[0].numel(), x.numel()
        known = self._sizes.get(name, found)  # of what was loaded nothing is known
        self._sizes[name] = max(found[0], known[0]), max(found[1], known[1])
        if self._sizes[name] != known:
            self._slices.pop(name, None)
            self._kept = {}
            for later in self.names[self.names.index(name) :]:  # which will be larger, too
                self._costs.pop(later, None)

    def _measure(self, name: str, costs: list[Cost], setting: Setting) -> None:
        times = self.agree([cost.microseconds for cost in costs])
        self._costs[name] = [
            cost._replace(microseconds=time) for cost, time in zip(costs, times, strict=True)
        ]
        if all(known in self._costs for known in self.names):
            chains = [self._costs[known] for known in self.names]
            plans = choose(chains, setting.memory_budget or 0)
            self._kept = dict(zip(self.names, plans, strict=True))

    def state(self) -> dict[str, Any]:
        """What is settled, as plain values by chain."""
        return {
            name: {
                "chunk_size": slices[0],
                "chunk_tokens": slices[1],
                "kept": sorted(self._kept[name]) if name in self._kept else None,
            }
            for name, slices in self._slices.items()
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes what was settled before."""
        for name, values in state.items():
            self._slices[name] = values["chunk_size"], values["chunk_tokens"]
            if values["kept"] is not None:
                self._kept[name] = frozenset(values["kept"])


def _alone(microseconds: list[int]) -> list[int]:
    return microseconds


def _slices(
    functions: Sequence[nn.Module], meter: Meter, budget: int
) -> tuple[int | None, int | None]:
    """The largest slices whose working set stays within `budget` bytes, for every function.

    From small to large, so that nothing far beyond the budget is ever tried.
    """

    def fits(layout: Layout) -> bool:
        return all(meter.working_set(function, layout) <= budget for function in functions)

    batch, length = meter.x.shape[:2]
    if not fits(Layout(1)):
        found = _largest(lambda tokens: fits(Layout(1, tokens)), LEAST_TOKENS, length)
        if found is None:
            least = max(meter.working_set(f, Layout(1, LEAST_TOKENS)) for f in functions)
            raise UserError(
                f"chunk_budget is {budget} bytes, but the smallest slice of this network's "
                f"functions takes {least}"
            )
        return 1, found
    return _largest(lambda samples: fits(Layout(samples)), 1, batch), None


def _largest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The largest of least, 2 * least, .. , most that fits; None if not even the first does."""
    found = None
    size = least
    while fits(min(size, most)):
        found = min(size, most)
        if found == most:
            break
        size *= 2
    return found
