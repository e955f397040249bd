"""Video classification: one label per film, by the mean over several clips of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from dr2dist.data.batch import Batch
from dr2dist.tasks.clips import SHOWN, ClipTask
from dr2dist.tasks.single_label import LABEL, SingleLabelOptions, SingleLabelTask
from dr2dist.tasks.task import Loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class VideoClassificationOptions(SingleLabelOptions):
    """One class for each film, by cross entropy."""


class VideoClassification(SingleLabelTask, ClipTask):
    """One class for each film, see SingleLabelTask. In evaluation probabilities are the mean of
    those of all its views."""

    name = "video_classification"
    Options = VideoClassificationOptions
    fields: ClassVar[Mapping[str, str]] = {**ClipTask.clip_fields, "label": LABEL}

    def predictions(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Logits [B, num_classes] of the mean of the views' probabilities."""
        views = len(outputs) // len(batch)
        if views == 1:
            return outputs
        by_view = outputs.float().log_softmax(-1).unflatten(0, (-1, views))
        return by_view.logsumexp(1) - math.log(views)

    def loss(self, outputs: Tensor, batch: Batch, normaliser: float, training: bool = True) -> Loss:
        """See Task. In evaluation, of the films' probabilities."""
        return super().loss(self.predictions(outputs, batch), batch, normaliser, training)

    def counted(self) -> dict[str, Any]:
        """accuracy, balanced_accuracy (the mean over classes) and, of more than five classes,
        accuracy_top5."""
        found, count = super().counted(), self.options.num_classes
        if count > 5:
            from torchmetrics.classification import MulticlassAccuracy

            found["accuracy_top5"] = MulticlassAccuracy(count, average="micro", top_k=5)
        return found

    def draw(self, batch: Batch, predictions: Tensor) -> Figure:
        """See Task."""
        return self.show(batch, self.titles(batch, predictions, SHOWN))
