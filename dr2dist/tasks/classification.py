"""Classification: one label per image."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)


class Classification:
    """Cross entropy over `num_classes` classes."""

    best = "accuracy"
    """The metric by which the best weights are chosen; larger is better."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Mean loss, fp32 scalar. output: logits [B, num_classes]. labels: int64 [B]."""
        return functional.cross_entropy(output.float(), labels)

    def metrics(self) -> MetricCollection:
        """accuracy, and balanced_accuracy: the mean of the classes' own accuracies."""
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(self.num_classes, average="micro"),
                "balanced_accuracy": MulticlassAccuracy(self.num_classes, average="macro"),
            }
        )

    def report(self) -> MetricCollection:
        """All of metrics(), with class_accuracy [C], confusion [C, C] and calibration_error.

        confusion: counts, row the label, column the prediction. calibration_error: expected
        |confidence - accuracy| over 15 bins.
        """
        more = {
            "class_accuracy": MulticlassAccuracy(self.num_classes, average="none"),
            "confusion": MulticlassConfusionMatrix(self.num_classes),
            "calibration_error": MulticlassCalibrationError(self.num_classes, n_bins=15),
        }
        return MetricCollection({**dict(self.metrics().items()), **more})
