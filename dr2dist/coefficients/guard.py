"""A path that moves on only while training allows it: decisions from what all ranks know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from dr2dist.reversible.certificate import worst_drift

HORIZON = 20
"""Steps over which the loss is smoothed (exponentially, from its first value on)."""

Action = Literal["move", "hold", "back"]


class Bounds(NamedTuple):
    """Above `hold` a path stays, above `back` it goes back; once a value holds it, it moves on only
    when that value is below half of `hold`."""

    hold: float
    back: float

    def judge(self, value: float, holding: bool) -> tuple[Action, float]:
        """What a value allows, and the bound that says so. One that is no number allows nothing."""
        if not value <= self.back:
            return "back", self.back
        bound = self.hold / 2 if holding else self.hold
        return "move" if value <= bound else "hold", bound


@dataclass(frozen=True)
class Limits:
    """loss: of the smoothed loss above its lowest, in units of the loss. drift: of the worst
    relative error of a reconstruction since the last decision; None where it is not judged."""

    loss: Bounds
    drift: Bounds | None


class Decision(NamedTuple):
    """What was decided, the step of the path that is now in force, and why."""

    action: Action
    place: int
    reason: str


@dataclass
class Memory:
    """What a guard remembers, plain values for a checkpoint.

    place: the step of the path that is in force. holding: what kept it from moving at the last
    decision, by name. drift: the worst since then.
    """

    place: int = 0
    holding: list[str] = field(default_factory=list)
    smoothed: float | None = None
    lowest: float | None = None
    drift: float | None = None


class Guard:
    """Walks along a path, one move forward, none, or one back at a time.

    every: applied steps between decisions, and the path's steps of one move. last: where the path
    ends. A pure function of the losses and drifts that it is told, so that all ranks, which hear
    the same, decide the same.
    """

    def __init__(self, limits: Limits, every: int, last: int, memory: Memory) -> None:
        self.limits, self.every, self.last, self.memory = limits, every, last, memory

    def note(self, applied: int, loss: float, drift: float | None) -> Decision | None:
        """Takes note of an applied step (of number `applied`); a decision where one is due.

        loss: mean over all ranks. drift: worst over all ranks, None in exact arithmetic.
        """
        memory = self.memory
        known = loss if memory.smoothed is None else memory.smoothed
        memory.smoothed = known + (loss - known) / HORIZON
        lowest = memory.smoothed if memory.lowest is None else memory.lowest
        memory.lowest = min(lowest, memory.smoothed)
        memory.drift = worst_drift((memory.drift, drift))
        return None if applied % self.every else self._decide()

    def _decide(self) -> Decision:
        memory, found = self.memory, self._findings()
        action, reason = max(found.values(), key=lambda one: ORDER.index(one[0]))
        way = {"move": self.every, "hold": 0, "back": -self.every}[action]
        memory.place = min(max(memory.place + way, 0), self.last)
        memory.holding = [name for name, (said, _) in found.items() if said != "move"]
        memory.drift = None
        return Decision(action, memory.place, reason)

    def _findings(self) -> dict[str, tuple[Action, str]]:
        """What each value allows, with the reason."""
        memory, limits = self.memory, self.limits
        assert memory.smoothed is not None and memory.lowest is not None
        found: dict[str, tuple[Action, str]] = {}
        for name, value, bounds in (
            ("loss", memory.smoothed - memory.lowest, limits.loss),
            ("drift", memory.drift, limits.drift),
        ):
            if value is not None and bounds is not None:
                action, bound = bounds.judge(value, name in memory.holding)
                found[name] = action, f"{PHRASES[name]} {value:.3g}, bound {bound:.3g}"
        return found


PHRASES = {"loss": "smoothed loss above its lowest", "drift": "drift"}
ORDER: tuple[Action, ...] = ("move", "hold", "back")
