"""Classification: one label per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from dr2dist.data.batch import Batch
from dr2dist.tasks.images import IMAGE, SHOWN, ImageTask
from dr2dist.tasks.single_label import LABEL, SingleLabelOptions, SingleLabelTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ClassificationOptions(SingleLabelOptions):
    """One class for each image, by cross entropy."""


class Classification(SingleLabelTask, ImageTask):
    """One class for each image, see SingleLabelTask."""

    name = "classification"
    Options = ClassificationOptions
    fields: ClassVar[Mapping[str, str]] = {"image": IMAGE, "label": LABEL}

    def draw(self, batch: Batch, predictions: Tensor) -> Figure:
        """See Task."""
        return self.show(batch, self.titles(batch, predictions, SHOWN))
