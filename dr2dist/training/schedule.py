"""The learning rate as a pure function of the applied step, from timm's schedulers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.scheduler import (
    CosineLRScheduler,
    MultiStepLRScheduler,
    PolyLRScheduler,
    TanhLRScheduler,
)
from timm.scheduler.scheduler import Scheduler

from dr2dist.config.optim import Optim


def learning_rate(optim: Optim, steps: int) -> Callable[[int], float]:
    """A function from applied steps to the rate of the next one, for a run of `steps`.

    The rate rises linearly over `optim.warmup`, a share of the run, and reaches `optim.lr` with
    the first step after it; then timm's schedule takes the rest of the run.
    """
    rising = round(optim.warmup * steps)
    # A scheduler of timm writes into an optimiser; this one has nothing else to do.
    carrier = torch.optim.SGD([torch.zeros(1)], optim.lr)
    scheduler = _scheduler(optim, carrier, steps - rising, rising)

    def rate(step: int) -> float:
        scheduler.step_update(step)
        return float(carrier.param_groups[0]["lr"])

    return rate


def _scheduler(optim: Optim, carrier: torch.optim.Optimizer, rest: int, rising: int) -> Scheduler:
    # timm starts warming up at its first value itself, so that is one part of the way, not 0.
    first = optim.lr / max(1, rising)
    options = {
        "warmup_t": rising,
        "warmup_lr_init": first,
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    if optim.schedule == "multistep":
        # timm's milestone m acts on the step before it.
        milestones = [round(share * (rest + rising)) - rising + 1 for share in optim.decay_at]
        return MultiStepLRScheduler(carrier, milestones, optim.decay_rate, **options)
    options |= {"t_initial": max(2, rest), "lr_min": optim.min_lr}
    if optim.schedule == "poly":
        return PolyLRScheduler(carrier, power=optim.power, **options)
    kinds = {"cosine": CosineLRScheduler, "tanh": TanhLRScheduler}
    return kinds[optim.schedule](carrier, **options)
