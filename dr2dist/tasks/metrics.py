"""Metrics that ranks share: torchmetrics', and such as need whole samples side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dr2dist.data.batch import Batch


class TorchMetrics:
    """Metrics of torchmetrics that count as they go, by name; a `Metrics`. For those that keep
    samples until the end, such as average precision, see GatheredMetrics.

    metrics: by name, moved to the device. values: called with predictions and batch, gives what
    all of them are updated with: predictions and what is right, on the device. plain: called with
    the values as numbers and lists, gives them as they are to be told; None to leave them so.
    """

    def __init__(
        self,
        metrics: Mapping[str, Any],
        device: torch.device,
        values: Callable[[Any, Batch], tuple[Tensor, Tensor]],
        plain: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        from torchmetrics import MetricCollection

        # Groups would be found by comparing states after the first batch, where counts of different
        # things are often equal: from then on one metric would be told as another.
        self._metrics = MetricCollection(dict(metrics), compute_groups=False).to(device)
        self._values, self._plain = values, plain

    def update(self, predictions: Any, batch: Batch) -> None:
        """See Metrics."""
        self._metrics.update(*self._values(predictions, batch))

    def compute(self) -> dict[str, Any]:
        """See Metrics."""
        found: dict[str, Any] = {name: v.tolist() for name, v in self._metrics.compute().items()}
        return found if self._plain is None else self._plain(found)


class KeyedMetrics(ABC):
    """Metrics that need all samples side by side, such as average precision; a `Metrics`.

    Gathers what is said of every sample on all ranks and merges parts of one sample by key.
    Samples are brought into the order of their keys, so that the result depends neither on ranks
    nor on ties. A subclass says `entries` and `score`.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[str, Any]] = []

    @abstractmethod
    def entries(self, predictions: Any, batch: Batch) -> Sequence[tuple[str, Any]]:
        """(key, plain values or CPU tensors) of each sample, or part of a sample, of a batch."""

    def merge(self, parts: list[Any]) -> Any:
        """The parts of one sample, such as tiles, as one.

        By default a sample has one part, and ValueError is raised for more.
        """
        (part,) = parts
        return part

    @abstractmethod
    def score(self, samples: list[tuple[str, Any]]) -> dict[str, Any]:
        """The metrics, plain values by name, of all samples: (key, what is said), by rising key."""

    def update(self, predictions: Any, batch: Batch) -> None:
        """See Metrics."""
        self._entries += self.entries(predictions, batch)

    def compute(self) -> dict[str, Any]:
        """See Metrics."""
        everywhere: list[list[tuple[str, Any]]] = [self._entries]
        if dist.is_initialized():
            everywhere = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everywhere, self._entries)
        by_key: dict[str, list[Any]] = {}
        for key, part in (entry for entries in everywhere for entry in entries):
            by_key.setdefault(key, []).append(part)
        return self.score([(key, self.merge(by_key[key])) for key in sorted(by_key)])


class GatheredMetrics(KeyedMetrics):
    """torchmetrics' that keep samples until the end: they see all of them at once, on every rank.

    metrics, values, plain: as of TorchMetrics.
    """

    def __init__(
        self,
        metrics: Mapping[str, Any],
        values: Callable[[Any, Batch], tuple[Tensor, Tensor]],
        plain: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self._metrics, self._values, self._plain = dict(metrics), values, plain
        for metric in self._metrics.values():
            metric.sync_on_compute = False  # each rank has every sample

    def entries(self, predictions: Any, batch: Batch) -> Sequence[tuple[str, Any]]:
        """See KeyedMetrics."""
        found, wanted = (value.cpu() for value in self._values(predictions, batch))
        return list(zip(batch.keys, zip(found, wanted, strict=True), strict=True))

    def score(self, samples: list[tuple[str, Any]]) -> dict[str, Any]:
        """See KeyedMetrics."""
        found, wanted = (torch.stack(each) for each in zip(*(v for _, v in samples), strict=True))
        values = {}
        for name, metric in self._metrics.items():
            metric.update(found, wanted)
            values[name] = metric.compute().tolist()
        return values if self._plain is None else self._plain(values)


class MeanLoss:
    """The mean of held-out batches' losses over all ranks, each weighed by the task's counts of it;
    NaN where one is.

    torchmetrics' own mean leaves a batch whose loss is NaN out, or, told not to, loses the weights.
    """

    def __init__(self, device: torch.device) -> None:
        from torchmetrics import SumMetric

        self._total = SumMetric(nan_strategy="disable").to(device)
        self._counts = SumMetric().to(device)

    def update(self, task: Any, outputs: Any, batch: Batch) -> None:
        """Takes a batch in. task: the Task."""
        counts = task.counts(batch)
        if counts:
            loss = task.loss(outputs, batch, counts, training=False).total
            self._total.update(loss * counts)
            self._counts.update(counts)

    def compute(self) -> Tensor:
        """A scalar; every rank must call it."""
        mean: Tensor = self._total.compute() / self._counts.compute()
        return mean
