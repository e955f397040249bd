"""Regression: numbers for each image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from dr2dist.config.task import TaskOptions
from dr2dist.data.batch import Batch
from dr2dist.data.fields import Fields
from dr2dist.data.index import Index
from dr2dist.data.stream import Values
from dr2dist.errors import UserError
from dr2dist.reversible.transfer import to_device
from dr2dist.tasks.images import IMAGE, SHOWN, ImageTask
from dr2dist.tasks.metrics import TorchMetrics
from dr2dist.tasks.task import Loss, Row, loss_of_samples, words_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


OTHERS = ("path", "error")
"""Columns of predictions that are not the task's."""


class RegressionOptions(TaskOptions):
    """Numbers for each image."""

    targets: tuple[str, ...] = Field(
        ("target",), min_length=1, description="names of the numbers, in their order"
    )
    loss: Literal["l2", "l1", "huber"] = Field("l2", description="of the scaled numbers")
    mean: tuple[float, ...] | None = Field(
        None, description="what is taken from each number before it is learnt; null: 0"
    )
    std: tuple[float, ...] | None = Field(
        None, description="what each is divided by then, over 0; null: 1"
    )

    def outputs(self) -> int:
        """See TaskOptions."""
        return len(self.targets)

    @model_validator(mode="after")
    def _columns(self) -> Self:
        for number, name in enumerate(self.targets):
            if name in OTHERS or name in self.targets[:number]:
                why = "is a column of predict's own" if name in OTHERS else "is there twice"
                raise ValueError(f"targets are {list(self.targets)}: '{name}' {why}")
        return self

    @model_validator(mode="after")
    def _one_for_each(self) -> Self:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.targets):
                raise ValueError(
                    f"{name} has {len(values)} values, allowed is one for each of targets, "
                    f"{len(self.targets)}"
                )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std is {list(self.std)}, allowed is over 0")
        return self


class Regression(ImageTask):
    """Outputs [B, T] for the scaled targets; the best has the least mean absolute error.

    A sample's target is a number or T of them: in JSON or an array, or in text between spaces,
    commas or semicolons. Targets are {"target": fp32 [B, T]}, in their own units.
    """

    name = "regression"
    Options = RegressionOptions
    fields: ClassVar[Mapping[str, str]] = {"image": IMAGE, "target": "json#target;txt;npy;cls"}
    best = ("mae", "min")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        said, count = self.options, len(self.options.targets)
        self._mean = torch.tensor(said.mean or (0.0,) * count)
        self._std = torch.tensor(said.std or (1.0,) * count)

    def check_index(self, index: Index, source: str) -> None:
        """See Task. The number of a named class is no quantity."""
        first = index.members(index.shards[0])[0]
        if index.classes and "cls" in Fields(self.fields).wanted(first.extensions):
            more = ", ..." if len(index.classes) > 3 else ""
            raise UserError(
                f"task: regression learns numbers, and {source} says of its samples nothing but "
                f"which class they are of ({', '.join(index.classes[:3])}{more})"
            )

    def transform(self, data: Any = None) -> Callable[[Values], Values]:
        """See Task."""
        return _Prepared(super().transform(data), len(self.options.targets))

    def loss(self, outputs: Tensor, batch: Batch, normaliser: float, training: bool = True) -> Loss:
        """See Task; the mean over a sample's numbers."""
        mean, std = (to_device(value, outputs.device) for value in (self._mean, self._std))
        wanted = (to_device(batch.targets["target"], outputs.device) - mean) / std
        function = {
            "l1": functional.l1_loss,
            "l2": functional.mse_loss,
            "huber": functional.smooth_l1_loss,
        }[self.options.loss]
        each = function(outputs.float(), wanted, reduction="none").mean(1)
        return loss_of_samples(each, outputs, batch, normaliser)

    def predictions(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Numbers in their own units, fp32 [B, T]."""
        return self.in_units(outputs)

    def in_units(self, outputs: Tensor) -> Tensor:
        """See Task."""
        mean, std = (to_device(value, outputs.device) for value in (self._mean, self._std))
        return outputs.float() * std + mean

    def metrics(self, device: torch.device) -> TorchMetrics:
        """mae and rmse over all numbers, in their own units."""
        from torchmetrics import MeanAbsoluteError, MeanSquaredError

        measured = {"mae": MeanAbsoluteError(), "rmse": MeanSquaredError(squared=False)}
        return TorchMetrics(measured, device, _values)

    def rows(self, predictions: Tensor) -> list[Row]:
        """Each number by its name."""
        return [dict(zip(self.options.targets, row, strict=True)) for row in predictions.tolist()]

    def draw(self, batch: Batch, predictions: Tensor) -> Figure:
        """See Task."""
        found, true = predictions[:SHOWN].tolist(), batch.targets["target"][:SHOWN].tolist()
        texts = [[" ".join(f"{value:.4g}" for value in row) for row in rows]
                 for rows in (found, true)]  # fmt: skip
        return self.show(batch, [(one, other, True) for one, other in zip(*texts, strict=True)])


class _Prepared:
    """The image's transform, and the target as a tensor."""

    def __init__(self, transform: Callable[[Values], Values], count: int) -> None:
        self.transform, self.count = transform, count

    def __call__(self, values: Values) -> Values:
        values = self.transform(values)
        if "target" in values:
            values["target"] = self._numbers(values["target"])
        return values

    def _numbers(self, target: Any) -> Tensor:
        if isinstance(target, str):
            target = words_of(target)
        try:
            numbers = np.asarray(target, dtype=np.float32).reshape(-1)
        except (TypeError, ValueError):
            raise ValueError(f"target {target!r}, allowed are numbers") from None
        if len(numbers) != self.count or not np.isfinite(numbers).all():
            raise ValueError(f"target {target!r}, allowed are {self.count} finite numbers")
        return torch.from_numpy(numbers.copy())


def _values(predictions: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    return predictions, to_device(batch.targets["target"], predictions.device)
