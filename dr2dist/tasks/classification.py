"""Classification: one label per image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.data.mixup import Mixup
from torch import Tensor
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)

from dr2dist.reversible.transfer import to_device


class Classification:
    """Cross entropy over `num_classes` classes.

    In training only: label_smoothing, a share of each label spread over all classes;
    class_weights, a factor of each class's losses; mixup and cutmix, timm's, with the alphas of
    their beta distributions (0: none).
    """

    best = "accuracy"
    """The metric by which the best weights are chosen; larger is better."""

    def __init__(
        self,
        num_classes: int,
        *,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        self.num_classes = num_classes
        self._smoothing = label_smoothing
        self._weights = None if class_weights is None else torch.tensor(class_weights)
        self._mixup: Mixup | None = None
        if mixup or cutmix:
            self._mixup = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=num_classes)

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] mixed in pairs, B even, and their targets fp32 [B, num_classes].

        Without mixup and cutmix both stay as they are. Draws from numpy's global stream.
        """
        if self._mixup is None:
            return images, labels
        mixed: tuple[Tensor, Tensor] = self._mixup(images.clone(), labels)
        return mixed

    def training_loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch, fp32 scalar. output: logits [B, C]. targets: int64 [B] or [B, C].

        The mean divides by B, not by the weights in the batch, so that it does not depend on
        which samples share a micro-batch.
        """
        if self._weights is not None:
            self._weights = to_device(self._weights, output.device)  # stays there
        each = functional.cross_entropy(
            output.float(),
            targets,
            self._weights,
            reduction="none",
            label_smoothing=self._smoothing,
        )
        return each.mean()

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy, fp32 scalar. output: logits [B, num_classes]. labels: int64 [B]."""
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


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """Factors by which classes of so many samples weigh the same, with mean 1 over samples."""
    total = sum(counts)
    return [total / (len(counts) * count) for count in counts]
