"""Multi-label classification: any number of classes for each image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from dr2dist.data.batch import Batch
from dr2dist.data.index import Index
from dr2dist.data.labels import check_named_once, class_index
from dr2dist.data.stream import Values
from dr2dist.errors import UserError
from dr2dist.reversible.transfer import to_device
from dr2dist.tasks.classes import ClassOptions, ClassTask, Weight, mean_of_present
from dr2dist.tasks.images import IMAGE, SHOWN, ImageTask
from dr2dist.tasks.metrics import GatheredMetrics
from dr2dist.tasks.task import Loss, Row, loss_of_samples, words_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class MultilabelOptions(ClassOptions):
    """Any number of classes for each image, by binary cross entropy of each."""

    threshold: float = Field(0.5, gt=0, lt=1, description="probability from which a class is said")
    positive_weights: tuple[Weight, ...] | None = Field(
        None, description="a factor of each class's losses where it is there; null: 1"
    )

    @model_validator(mode="after")
    def _one_weight_a_class(self) -> Self:
        self.check_one_a_class("positive_weights")
        return self


class Multilabel(ClassTask, ImageTask):
    """The mean over classes of binary cross entropy; the best has the highest mean average
    precision.

    A sample's labels are numbers or names of classes: in JSON a list or one of them, in text
    between spaces, commas or semicolons; each is named once. Outputs are logits [B, num_classes],
    targets {"labels": fp32 [B, num_classes]} of 0 and 1.
    """

    name = "multilabel"
    Options = MultilabelOptions
    fields: ClassVar[Mapping[str, str]] = {"image": IMAGE, "labels": "json#labels;txt;cls"}
    best = ("mean_average_precision", "max")

    def check_index(self, index: Index, source: str) -> None:
        """See Task. An index without classes has labels that are numbers."""
        count = self.options.num_classes
        if index.classes and len(index.classes) != count:
            raise UserError(
                f"task.num_classes is {count}, {source} has {len(index.classes)} classes"
            )
        if index.classes:
            self.check_names(index, source)

    def transform(self, data: Any = None) -> Callable[[Values], Values]:
        """See Task."""
        return _Prepared(super().transform(data), self.classes)

    def loss(self, outputs: Tensor, batch: Batch, normaliser: float, training: bool = True) -> Loss:
        """See Task."""
        labels = to_device(batch.targets["labels"], outputs.device)
        said = self.options.positive_weights if training else None
        weights = None if said is None else to_device(torch.tensor(said), outputs.device)
        each = functional.binary_cross_entropy_with_logits(
            outputs.float(), labels, pos_weight=weights, reduction="none"
        ).mean(1)
        return loss_of_samples(each, outputs, batch, normaliser)

    def metrics(self, device: torch.device) -> GatheredMetrics:
        """mean_average_precision over classes that there are samples of, and f1, over classes."""
        return GatheredMetrics(self._measured(), _values, self._plain)

    def report(self, device: torch.device) -> GatheredMetrics:
        """All of metrics(), with average_precision by class (null where there is no sample),
        absent_classes and classes."""
        return GatheredMetrics(self._measured(), _values, self._described)

    def _measured(self) -> dict[str, Any]:
        from torchmetrics import classification

        count, threshold = self.options.num_classes, self.options.threshold
        return {
            "average_precision": classification.MultilabelAveragePrecision(count, average=None),
            "f1": classification.MultilabelF1Score(count, threshold=threshold, average="macro"),
            "scores": classification.MultilabelStatScores(count, threshold=threshold, average=None),
        }

    def _by_class(self, found: dict[str, Any]) -> dict[str, float | None]:
        pairs = zip(found["average_precision"], found["scores"], strict=True)
        values = [one if support else None for one, (*_, support) in pairs]
        return dict(zip(self.classes, values, strict=True))

    def _plain(self, found: dict[str, Any]) -> dict[str, Any]:
        mean = mean_of_present(self._by_class(found))
        return {"mean_average_precision": mean, "f1": found["f1"]}

    def _described(self, found: dict[str, Any]) -> dict[str, Any]:
        by_class = self.told_by_class("average_precision", self._by_class(found))
        return {**self._plain(found), **by_class}

    def rows(self, predictions: Tensor) -> list[Row]:
        """classes, those said, between semicolons, and p_NAME for each class."""
        return [self._row(shares) for shares in predictions.float().sigmoid().tolist()]

    def _row(self, shares: list[float]) -> Row:
        return {"classes": self._said(shares), **self.shares_by_name(shares)}

    def _said(self, shares: Sequence[float]) -> str:
        limit = self.options.threshold
        named = zip(self.classes, shares, strict=True)
        return ";".join(name for name, share in named if share >= limit)

    def draw(self, batch: Batch, predictions: Tensor) -> Figure:
        """See Task."""
        found = [self._said(s) for s in predictions[:SHOWN].float().sigmoid().tolist()]
        true = [self._said(row) for row in batch.targets["labels"][:SHOWN].tolist()]
        pairs = zip(found, true, strict=True)
        return self.show(batch, [(one, other, one == other) for one, other in pairs])


class _Prepared:
    """The image's transform, and the labels as 0 and 1."""

    def __init__(self, transform: Callable[[Values], Values], classes: Sequence[str]) -> None:
        self.transform, self.classes = transform, classes

    def __call__(self, values: Values) -> Values:
        values = self.transform(values)
        if "labels" in values:
            values["labels"] = self._hot(values["labels"])
        return values

    def _hot(self, labels: Any) -> Tensor:
        numbers = [class_index(label, self.classes) for label in _listed(labels)]
        check_named_once(labels, [self.classes[number] for number in numbers])
        hot = torch.zeros(len(self.classes))
        hot[numbers] = 1
        return hot


def _listed(labels: Any) -> list[Any]:
    if isinstance(labels, str):
        return words_of(labels)
    return list(labels) if isinstance(labels, list) else [labels]


def _values(predictions: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    labels = to_device(batch.targets["labels"], predictions.device)
    # torchmetrics takes all for logits where one is not between 0 and 1, and NaN is not. Instead
    # a class of which nothing is known is not said.
    return predictions.float().sigmoid().nan_to_num(0.0), labels.long()
