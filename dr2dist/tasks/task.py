"""What a task is: everything of a run that depends on what is learnt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from dr2dist.backbones.backbone import FeatureInfo
from dr2dist.config.task import Data, TaskOptions
from dr2dist.data.batch import Batch
from dr2dist.data.index import Index
from dr2dist.data.stream import Values
from dr2dist.reversible.trees import tree_leaves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
"""What is predicted of a sample, for a line of CSV or an object of JSON."""


class Loss(NamedTuple):
    """A micro-batch's loss.

    total: scalar fp32 with a graph, a sum over what `counts` counts, divided by the normaliser.
    finite: bool [B], samples whose outputs are, see `finite_samples`. parts: named shares of the
    total, scalars, which records have as loss_NAME.
    """

    total: Tensor
    finite: Tensor
    parts: Mapping[str, Tensor] = {}


class Head(NamedTuple):
    """A head of the task's own.

    module: called as module(features) with a list of tensors [B, ...], one for each tap, in the
    feature's layout; gives a tensor or a pytree of some, [B, ...] each. taps: names of the
    backbone's features that it is given, in its order.
    """

    module: nn.Module
    taps: tuple[str, ...]


class Metrics(Protocol):
    """Numbers of a validation, which count each sample once over all ranks."""

    def update(self, predictions: Any, batch: Batch) -> None:
        """Takes in a batch's predictions, what `Task.predictions` gave, with what is right."""

    def compute(self) -> dict[str, Any]:
        """Plain values by name, the same on every rank; every rank must call it."""


class Task(ABC):
    """One kind of learning: fields of samples, losses, metrics and what is shown of them.

    A new task is one subclass, given to `register_task`. Subclasses take the constructor's
    arguments as they are.

    options: the section `task`. classes: names by label, as the shards' index has them.
    preprocessing: how samples become the network's inputs, as plain values: the backbone's
    `preprocessing` with what the section `data` says instead.
    """

    name: ClassVar[str]
    """By which configurations choose it, as task.name."""
    Options: ClassVar[type[TaskOptions]] = TaskOptions
    """The section `task`: a subclass of TaskOptions with the task's own settings."""
    Data: ClassVar[type[Data]] = Data
    """The section `data`: a subclass where the task has settings of its own."""
    fields: ClassVar[Mapping[str, str]]
    """What of a sample is read, in webdataset's syntax: {"image": "jpg;png", "label": "cls"}.

    One of the extensions is there; of several data.fields must say which counts. json#key takes a
    key of a JSON file.
    """
    inputs: ClassVar[tuple[str, ...]]
    """Those fields that are inputs of the network; prediction has no others."""
    best: ClassVar[tuple[str, Literal["max", "min"]]]
    """The metric by which the best weights are chosen, and which of its values are better."""

    def __init__(
        self,
        options: Any,
        classes: Sequence[str] = (),
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        self.options, self.classes, self.preprocessing = (
            options,
            tuple(classes),
            dict(preprocessing or {}),
        )

    def check_index(self, index: Index, source: str) -> None:  # noqa: B027  (most take any)
        """Raises UserError if shards are not what the task was made for. source: their name."""

    def learn_from(self, index: Index) -> None:  # noqa: B027  (most tasks need nothing)
        """Takes what training needs to know of all training data, such as counts of classes."""

    @abstractmethod
    def transform(self, data: Any = None) -> Callable[[Values], Values]:
        """Decoded fields to what `collate` takes, for training, or for evaluation without data.

        data: the section `data`. In evaluation there may be inputs only. What is given must be
        picklable. It may draw from the global CPU streams of torch, numpy and random, which are
        seeded by (seed, epoch, sample). A ValueError that it raises ends the run with the sample's
        name.
        """

    def collate(self, samples: Sequence[Values]) -> tuple[dict[str, Tensor], Any]:
        """Transformed samples to (inputs [B, ...] by name, targets): what is there, stacked.

        The default's targets are tensors [B, ...] by the names of their fields.
        """
        stacked = default_collate(list(samples))
        inputs = {name: stacked.pop(name) for name in self.inputs}
        return inputs, stacked

    def head(self, features: Sequence[FeatureInfo]) -> Head | None:
        """The task's own head; None for the backbone's, with as many outputs as options say.

        features: what the backbone has, see `Backbone.features`. It may be called more than once,
        and under torch's meta device, where tensors have no values: what losses need is made in the
        constructor. Raises UserError for a backbone that lacks what the head needs.
        """
        return None

    def augment(self, batch: Batch) -> Batch:
        """A training batch changed as a whole, as by mixing samples: a new one, of the same counts.
        Draws from the global streams of the CPU, which are seeded; it is called wherever inputs or
        targets of the batch are needed."""
        return batch

    def counts(self, batch: Batch) -> float:
        """How many things of a batch its loss is a sum over, by its targets alone."""
        return float(batch.count)

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch, normaliser: float, training: bool = True) -> Loss:
        """The loss of the network's outputs: a sum, divided by the normaliser.

        normaliser: the mean of `counts` over all micro-batches of an optimiser step, which makes
        the gradient independent of how samples are cut into them. A batch of which nothing counts
        gives a zero that has a graph. training: with what regularises training only.
        """

    def in_units(self, outputs: Any) -> Any:
        """The network's outputs as a program without dr2dist is to give them: tensors of the same
        shapes, in the units of what is predicted. The default is the outputs.
        """
        return outputs

    def predictions(self, outputs: Any, batch: Batch) -> Any:
        """What the outputs say, of the task's own type: boxes after suppression, seconds.

        batch: its targets are missing where files are predicted for. The default is the outputs.
        """
        return outputs

    @abstractmethod
    def metrics(self, device: torch.device) -> Metrics:
        """Numbers of a validation; a new object. device: of the network's outputs."""

    def report(self, device: torch.device) -> Metrics:
        """All that `dr2dist evaluate` tells; what it gives are values of JSON.

        The default is what a validation gives.
        """
        return self.metrics(device)

    @abstractmethod
    def rows(self, predictions: Any) -> list[Row]:
        """One row for each sample of a batch, in their order, of plain values by column."""

    def draw(self, batch: Batch, predictions: Any) -> Figure | None:
        """Some held-out samples with what is predicted of them; None if there is nothing to see."""
        return None

    def draw_rows(self, rows: Sequence[Row]) -> Figure | None:
        """What is predicted of files as a picture; None if rows say all. rows: see `predict`."""
        return None

    @classmethod
    def picture(cls, report: Mapping[str, Any]) -> Figure | None:
        """A report, what `report` gives, as a picture; None if there is none."""
        return None

    def pretrained_cfg(self) -> dict[str, Any]:
        """What a loaded model's pretrained_cfg says of how samples are prepared."""
        return {}


def finite_samples(outputs: Any) -> Tensor:
    """bool [B]: samples all of whose outputs are finite. outputs: a pytree of [B, ...]."""
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    fine = [leaf.detach().isfinite().reshape(len(leaf), -1).all(1) for leaf in leaves]
    return torch.stack(fine).all(0)


def loss_of_samples(each: Tensor, outputs: Any, batch: Batch, normaliser: float) -> Loss:
    """The loss of a task that has one a sample, [B]: nothing, with a graph, of a batch that only
    fills in."""
    counted = each if batch.count else each * 0
    return Loss(counted.sum() / normaliser, finite_samples(outputs))


def words_of(text: str) -> list[str]:
    """Of a member's text: between spaces, commas or semicolons."""
    return text.replace(",", " ").replace(";", " ").split()
