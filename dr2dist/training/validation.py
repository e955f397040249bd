"""Held-out samples through the engine: metrics over all ranks, and a look at some of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric

from dr2dist.data.stream import Batch
from dr2dist.parallel.engine import ReversibleEngine
from dr2dist.reversible.transfer import to_device
from dr2dist.tasks.classification import Classification

SHOWN = 8
"""Images of a look."""


class Look(NamedTuple):
    """Some held-out samples: images fp32 [n, 3, H, W], labels and predicted classes int64 [n]."""

    images: Tensor
    labels: Tensor
    predicted: Tensor


def validate(
    engine: ReversibleEngine, task: Classification, batches: Iterable[Batch]
) -> tuple[dict[str, float], Look | None]:
    """All held-out samples, each counted once over all ranks; every rank must call it.

    Returns the metrics with loss, samples and skipped, and, where images enter, a look at this
    replica's first batch. It is the averaged weights that are validated, if there are any.
    """
    device = engine.device
    metrics = task.metrics().to(device)
    loss, count, skipped = MeanMetric().to(device), SumMetric().to(device), SumMetric().to(device)
    images = labels = predicted = None
    engine.net.eval()
    with torch.no_grad(), engine.averaged():
        for batch in batches:
            # Every rank runs every batch, since ZeRO-3 gathers weights as it goes.
            output = engine.forward(batch["image"] if engine.first else None)
            if engine.first and batch["count"] and images is None:
                images, labels = batch["image"][:SHOWN], batch["label"][:SHOWN]
            if not engine.last:
                continue
            skipped.update(batch["skipped"])
            if batch["count"]:
                targets = to_device(batch["label"], device)
                metrics.update(output.float(), targets)
                loss.update(task.loss(output, targets), weight=batch["count"])
                count.update(batch["count"])
                if predicted is None:
                    predicted = output[:SHOWN].argmax(-1).cpu()
    predicted = engine.from_last(predicted)
    engine.net.train()
    found = {
        "loss": loss.compute(),
        "samples": count.compute(),
        "skipped": skipped.compute(),
        **metrics.compute(),
    }
    values = {name: float(value) for name, value in found.items()}
    if images is None or labels is None or predicted is None:
        return values, None
    return values, Look(images, labels, predicted)
