"""Held-out samples through the engine: metrics over all ranks, and a look at some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import SumMetric

from dr2dist.data.batch import Batch
from dr2dist.errors import UserError
from dr2dist.parallel.engine import ReversibleEngine
from dr2dist.tasks.metrics import MeanLoss
from dr2dist.tasks.task import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def validate(
    engine: ReversibleEngine, task: Task, batches: Iterable[Batch], stopping: Callable[[], bool]
) -> tuple[dict[str, float], Figure | None] | None:
    """All held-out samples, each counted once over all ranks; every rank must call it.

    Returns the metrics with loss, samples and skipped, and what the task draws of replica 0's
    first batch. It is the averaged weights that are validated, if there are any. stopping: whether
    all ranks are to leave off, asked before each batch on all of them; then it returns None.
    """
    device = engine.device
    metrics = task.metrics(device)
    loss, count, skipped = MeanLoss(device), SumMetric().to(device), SumMetric().to(device)
    look: Figure | None = None
    engine.net.eval()
    with torch.no_grad(), engine.averaged():
        for batch in batches:
            # Every rank runs every batch, since ZeRO-3 gathers weights as it goes.
            if stopping():
                engine.net.train()
                return None
            output = engine.forward(batch.inputs if engine.first else None)
            if not engine.last:
                continue
            skipped.update(batch.skipped)
            if batch.count:
                predicted = task.predictions(output, batch)
                metrics.update(predicted, batch)
                loss.update(task, output, batch)
                count.update(batch.count)
                if look is None and engine.replica == 0:
                    look = task.draw(batch, predicted)
    look = engine.from_last(look)
    engine.net.train()
    own = {"loss": loss.compute(), "samples": count.compute(), "skipped": skipped.compute()}
    found = metrics.compute()
    if task.best[0] not in found:
        raise UserError(
            f"task {task.name}: best is {task.best[0]}, its metrics are {', '.join(found)}"
        )
    return {name: _number(task, name, value) for name, value in {**own, **found}.items()}, look


def _number(task: Task, name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        kind = type(value).__name__
        raise UserError(f"task {task.name}: the metric {name} is a {kind}, not a number") from None
