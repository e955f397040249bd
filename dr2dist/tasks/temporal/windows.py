"""Windows of long films: where they begin, when their frames are shown, which actions they see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dr2dist.data.film import Footage
from dr2dist.tasks.sampling import Kind, Times, mean_rate

Actions = NDArray[np.float64]
"""Of a film: [A, 3], each (start, stop, class), in seconds of its own time."""

TRIES = 100
"""Random windows that are looked at for one with an action in it."""
MOMENT = 1e-3
"""Seconds up to which a film, or an action, has no length, and two actions are the same."""


class Window(NamedTuple):
    """start: seconds. step: seconds from one of its frames to the next."""

    start: float
    step: float


@dataclass(frozen=True)
class WindowSampling:
    """How windows of a number of frames are taken from a film.

    kind: "stride" takes frames that are `stride` frames of `rate` a second apart, the film's own
    mean rate for None; "segments" spreads them over the whole film, which is one window then.
    overlap: share of a window that the next one sees again in evaluation. visible: the least share
    of an action that lies in a window for it to be learnt there.
    """

    frames: int
    kind: Kind = "stride"
    stride: int = 4
    rate: float | None = None
    overlap: float = 0.5
    visible: float = 0.75

    def drawn(self, film: Footage, actions: Actions) -> Window:
        """A random one, with an action in it if some tries find one (ActionFormer's truncation,
        arXiv 2202.07925, code). Draws from torch's global stream."""
        step = self._step(film)
        room = max(film.seconds - self.frames * step, 0.0)
        window = Window(room * float(torch.rand(())), step)
        for _ in range(TRIES if room and len(actions) else 0):
            if len(self.seen(actions, window)):
                break
            window = Window(room * float(torch.rand(())), step)
        return window

    def spread(self, film: Footage) -> list[Window]:
        """Those of an evaluation: evenly spread, over the whole film, neighbours with at least the
        overlap."""
        step = self._step(film)
        length = self.frames * step
        room = film.seconds - length
        if room <= MOMENT:
            return [Window(0.0, step)]
        count = 1 + int(np.ceil(room / (length * (1 - self.overlap)) - 1e-6))
        return [Window(float(start), step) for start in np.linspace(0.0, room, count)]

    def times(self, film: Footage, window: Window) -> Times:
        """When its frames are shown; after the film's end, its last one."""
        found = window.start + np.arange(self.frames) * window.step
        return found.clip(0.0, film.times[-1])

    def seen(self, actions: Actions, window: Window) -> Actions:
        """Actions of which enough lies in a window, as far as they do."""
        stop = window.start + self.frames * window.step
        inside = actions.copy()
        inside[:, :2] = inside[:, :2].clip(window.start, stop)
        shares = (inside[:, 1] - inside[:, 0]) / (actions[:, 1] - actions[:, 0])
        return inside[shares >= self.visible]

    def _step(self, film: Footage) -> float:
        if self.kind == "segments":
            return max(film.seconds, MOMENT) / self.frames
        return self.stride / (self.rate or mean_rate(film))


def different(actions: Sequence[Sequence[float]]) -> Actions:
    """Actions that have a length, each once."""
    found = np.array(actions, np.float64).reshape(-1, 3)
    found = found[found[:, 1] - found[:, 0] > MOMENT]
    kept: list[int] = []
    for number, one in enumerate(found):
        same = (np.abs(found[kept] - one)[:, :2] <= MOMENT).all(1) & (found[kept, 2] == one[2])
        if not same.any():
            kept.append(number)
    return found[kept]
