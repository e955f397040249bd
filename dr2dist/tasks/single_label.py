"""What tasks of one label a sample share, whatever the sample is: options, loss, metrics, rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import Field, model_validator
from timm.data.mixup import Mixup
from torch import Tensor
from torch.nn import functional

from dr2dist.config.section import Unit
from dr2dist.data.batch import Batch
from dr2dist.data.index import Index
from dr2dist.data.labels import class_index
from dr2dist.data.stream import Values
from dr2dist.errors import UserError
from dr2dist.reversible.transfer import to_device
from dr2dist.tasks.classes import ClassOptions, ClassTask, Weight, mean_of_present
from dr2dist.tasks.confusion import draw_confusion
from dr2dist.tasks.metrics import TorchMetrics
from dr2dist.tasks.task import Loss, Row, loss_of_samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SingleLabelOptions(ClassOptions):
    """One class for each sample, by cross entropy."""

    label_smoothing: Unit = Field(0.0, description="share of a label spread over all classes")
    class_weights: tuple[Weight, ...] | None = Field(
        None, description="a factor of each class's losses in training; null: 1"
    )
    balance_classes: bool = Field(
        False, description="factors by which every class counts equally over the training data"
    )
    mixup: float = Field(0.0, ge=0, description="alpha of timm's mixup in a micro-batch; 0: none")
    cutmix: float = Field(0.0, ge=0, description="alpha of timm's cutmix; with both, either")

    def check_micro_batch(self, micro_batch: int) -> None:
        """See TaskOptions."""
        if (self.mixup or self.cutmix) and micro_batch % 2:
            raise ValueError(
                f"train.micro_batch is {micro_batch}: task.mixup and task.cutmix mix pairs, "
                "allowed is an even number"
            )

    def idle(self) -> dict[str, str]:
        """See Section."""
        return {"class_weights": "balance_classes"} if self.balance_classes else {}

    @model_validator(mode="after")
    def _one_weight_a_class(self) -> Self:
        self.check_one_a_class("class_weights")
        return self


LABEL = "cls;txt;json#label"
"""What may carry a label."""


class SingleLabelTask(ClassTask):
    """Cross entropy over num_classes classes; the best has the highest accuracy.

    Outputs are logits [B, num_classes], targets {"label": int64 [B]}, in training after mixing
    fp32 [B, num_classes]. A task has it before what says its input: the last class's transform is
    of inputs alone.
    """

    Options = SingleLabelOptions
    best = ("accuracy", "max")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        said, count = self.options, self.options.num_classes
        self._weights = None if said.class_weights is None else torch.tensor(said.class_weights)
        self._mixup: Mixup | None = None
        if said.mixup or said.cutmix:
            self._mixup = Mixup(said.mixup, said.cutmix, label_smoothing=0.0, num_classes=count)

    def check_index(self, index: Index, source: str) -> None:
        """See Task."""
        self.check_classes(index, source)

    def learn_from(self, index: Index) -> None:
        """See Task."""
        if not self.options.balance_classes:
            return
        counts = index.class_counts()
        if counts is None:
            raise UserError("task.balance_classes: the index does not say every sample's class")
        for name, count in zip(index.classes, counts, strict=True):
            if not count:
                raise UserError(f"task.balance_classes: data.train has no sample of class '{name}'")
        self._weights = torch.tensor(balanced_weights(counts))

    def transform(self, data: Any = None) -> Callable[[Values], Values]:
        """See Task."""
        inner = super().transform(data)  # type: ignore[safe-super]
        return _Prepared(inner, self.classes)

    def augment(self, batch: Batch) -> Batch:
        """Inputs [B, C, ..., H, W] mixed in pairs, an even number of them, rectangles of cutmix
        through all frames of a clip; and targets [B, num_classes]."""
        if self._mixup is None:
            return batch
        (name,) = self.inputs
        whole = batch.inputs[name]
        maps = whole.flatten(1, -3).clone()  # what timm mixes is of four dimensions
        mixed, labels = self._mixup(maps, batch.targets["label"])
        return replace(batch, inputs={name: mixed.view_as(whole)}, targets={"label": labels})

    def loss(self, outputs: Tensor, batch: Batch, normaliser: float, training: bool = True) -> Loss:
        """See Task. A sample's loss is divided by no weight: it does not depend on which others
        share its micro-batch."""
        labels = to_device(batch.targets["label"], outputs.device)
        # Not kept there: loader processes get the task as it is.
        weights = None if self._weights is None else to_device(self._weights, outputs.device)
        each = functional.cross_entropy(
            outputs.float(),
            labels,
            weights if training else None,
            reduction="none",
            label_smoothing=self.options.label_smoothing if training else 0.0,
        )
        return loss_of_samples(each, outputs, batch, normaliser)

    def metrics(self, device: torch.device) -> TorchMetrics:
        """accuracy, and balanced_accuracy: the mean over classes that there are samples of."""
        return TorchMetrics(self.counted(), device, _values, self._plain)

    def report(self, device: torch.device) -> TorchMetrics:
        """All of metrics(), with class_accuracy by name (null where there is no sample),
        absent_classes, confusion (counts, rows labels, columns predictions), calibration_error
        (expected |confidence - accuracy| over 15 bins) and classes."""
        from torchmetrics import classification

        count = self.options.num_classes
        more = {
            "calibration_error": classification.MulticlassCalibrationError(count, n_bins=15),
            "confusion": classification.MulticlassConfusionMatrix(count),
        }
        return TorchMetrics({**self.counted(), **more}, device, _values, self._described)

    def counted(self) -> dict[str, Any]:
        """torchmetrics' metrics by name, of which balanced_accuracy are counts by class."""
        # Here, since a data worker builds the task as well and never measures: seconds of imports.
        from torchmetrics import classification

        count = self.options.num_classes
        return {
            "accuracy": classification.MulticlassAccuracy(count, average="micro"),
            "balanced_accuracy": classification.MulticlassStatScores(count, average=None),
        }

    def _recalls(self, found: dict[str, Any]) -> dict[str, float | None]:
        """Each class's share of right predictions, None without samples."""
        # True and false positives, true and false negatives, samples.
        scores = zip(self.classes, found["balanced_accuracy"], strict=True)
        return {name: right / all_ if all_ else None for name, (right, *_, all_) in scores}

    def _plain(self, found: dict[str, Any]) -> dict[str, Any]:
        return {**found, "balanced_accuracy": mean_of_present(self._recalls(found))}

    def _described(self, found: dict[str, Any]) -> dict[str, Any]:
        by_class = self.told_by_class("class_accuracy", self._recalls(found))
        return {**self._plain(found), **by_class}

    def rows(self, predictions: Tensor) -> list[Row]:
        """class, probability, and p_NAME for each class."""
        return [self._row(shares) for shares in predictions.float().softmax(-1).tolist()]

    def _row(self, shares: list[float]) -> Row:
        best = max(range(len(shares)), key=shares.__getitem__)
        said = {"class": self.classes[best], "probability": round(shares[best], 6)}
        return {**said, **self.shares_by_name(shares)}

    def titles(self, batch: Batch, predictions: Tensor, count: int) -> list[tuple[str, str, bool]]:
        """Of the first samples: what is predicted, what is true, and whether that is right."""
        labels = batch.targets["label"][:count].tolist()
        found = predictions[:count].argmax(-1).tolist()
        return [
            (self.classes[one], self.classes[other], one == other)
            for one, other in zip(found, labels, strict=True)
        ]

    @classmethod
    def picture(cls, report: Mapping[str, Any]) -> Figure:
        """The confusion matrix."""
        return draw_confusion(report)


class _Prepared:
    """The image's transform, and the label as a number."""

    def __init__(self, transform: Callable[[Values], Values], classes: Sequence[str]) -> None:
        self.transform, self.classes = transform, classes

    def __call__(self, values: Values) -> Values:
        values = self.transform(values)
        if "label" in values:
            values["label"] = class_index(values["label"], self.classes)
        return values


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """Factors by which classes of so many samples weigh the same, with mean 1 over samples."""
    total = sum(counts)
    return [total / (len(counts) * count) for count in counts]


def _values(predictions: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    labels = to_device(batch.targets["label"], predictions.device)
    # Not logits: torchmetrics takes a batch of them that lie between 0 and 1 for probabilities.
    # Logarithms it never does, for one of each sample's is below 0; unlike probabilities they keep
    # small classes apart.
    return predictions.float().log_softmax(-1), labels
