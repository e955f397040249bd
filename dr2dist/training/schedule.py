"""The learning rate as a pure function of the applied step."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, *, peak: float, warmup: float, end: float) -> float:
    """The rate for the optimiser step after `step` applied ones.

    Rises linearly over `warmup`, a share of the run, then falls to `end` along a cosine.
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    share = (step - rising) / max(1, steps - rising)
    return end + (peak - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
