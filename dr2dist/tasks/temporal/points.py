"""Points of a pyramid over time: what each is to say of the actions around it, and the loss."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from dr2dist.tasks.temporal.windows import Actions

RADIUS = 1.5
"""Steps of a level from an action's middle up to which its points stand for it."""
FIRST_REACH = 4.0
"""Tokens up to which the first level reaches; each further one twice as far, the last one any."""
ALPHA, GAMMA = 0.25, 2.0
"""Of the focal loss (arXiv 1708.02002). All of these are ActionFormer's (arXiv 2202.07925)."""
SAME = 1e-3
"""Tokens up to which two actions are of the same length."""


class Targets(NamedTuple):
    """What the P points of a window are to say.

    labels: bool [P, classes]. reach: fp32 [P, 2], to start and stop in steps of the point's level.
    valid: bool [P], whether the point lies in the film.
    """

    labels: Tensor
    reach: Tensor
    valid: Tensor


class Points:
    """Where the points of a pyramid lie, in tokens from a window's start, and what they reach.

    length: tokens of a window. levels: each of half as many points, rounded up. at: fp64 [P].
    step: fp64 [P], tokens from a point to the next one.
    """

    def __init__(self, length: int, levels: int) -> None:
        counts = [-(-length // 2**level) for level in range(levels)]
        # A convolution of stride 2 is in the middle of the even ones of its input.
        at = [torch.arange(count) * 2.0**level + 0.5 for level, count in enumerate(counts)]
        self.at = torch.cat(at).double()
        self.step = torch.repeat_interleave(2.0 ** torch.arange(levels), torch.tensor(counts))
        self.step = self.step.double()
        self._most = torch.where(self.step < 2 ** (levels - 1), FIRST_REACH * self.step, np.inf)
        self._least = torch.where(self.step > 1, FIRST_REACH * self.step / 2, 0.0)

    def targets(self, actions: Actions, classes: int, length: float) -> Targets:
        """Of one window.

        actions: [A, 3], in tokens from its start. length: tokens from there to the film's end. A
        point stands for the shortest of the actions that it is near the middle of, and that its
        level reaches the ends of; actions of one length share it.
        """
        starts, stops, labels = torch.from_numpy(actions).T
        at, near = self.at[:, None], RADIUS * self.step[:, None]
        reach = torch.stack([at - starts, stops - at], -1)
        far, middles = reach.amax(-1), (starts + stops) / 2
        inside = (reach.amin(-1) > 0) & ((at - middles).abs() < near)
        inside &= (far >= self._least[:, None]) & (far <= self._most[:, None])
        valid = self.at < length
        lengths = torch.where(inside & valid[:, None], stops - starts, np.inf)
        if not len(actions):
            nothing = torch.zeros(len(at), classes, dtype=torch.bool)
            return Targets(nothing, torch.zeros(len(at), 2), valid)
        shortest, chosen = lengths.min(1)
        shared = (lengths - shortest[:, None] <= SAME) & lengths.isfinite()
        of_class = torch.nn.functional.one_hot(labels.long(), classes).bool()
        own = (shared[:, :, None] & of_class).any(1)
        best = reach[torch.arange(len(at)), chosen] / self.step[:, None]
        best = torch.where(own.any(1, keepdim=True), best, 0.0)
        return Targets(own, best.float(), valid)


def class_loss(logits: Tensor, targets: Targets) -> Tensor:
    """The focal loss of all points in the film and all classes, a sum: scalar fp32.

    logits: [W, P, classes]; targets of W windows, stacked.
    """
    each = sigmoid_focal_loss(
        logits.float(), targets.labels.float(), ALPHA, GAMMA, reduction="none"
    )
    return (each * targets.valid[..., None]).sum()


def reach_loss(reach: Tensor, targets: Targets) -> Tensor:
    """1 - tIoU + (distance of middles / hull)^2 (DIoU, arXiv 1911.08287, in one dimension) of the
    points that stand for an action, a sum: scalar fp32.

    reach: [W, P, 2].
    """
    own = targets.labels.any(-1)
    found, true = reach.float()[own], targets.reach[own]
    # Both have the point in them: neither intersection nor union needs a case of its own.
    inter, hull = torch.minimum(found, true).sum(-1), torch.maximum(found, true).sum(-1)
    middles = ((found[:, 1] - found[:, 0]) - (true[:, 1] - true[:, 0])) / 2
    return (1 - inter / hull + (middles / hull).square()).sum()
