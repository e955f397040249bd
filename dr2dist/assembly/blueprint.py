"""All that says which network learns which task, and the function that makes both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dr2dist.backbones.build import build_deferred, build_model
from dr2dist.backbones.convert import family_of
from dr2dist.backbones.heads import attach_head
from dr2dist.backbones.lora import add_adapters, set_values, targets_of, values_of
from dr2dist.backbones.parameters import freeze
from dr2dist.config import Config
from dr2dist.config.schema import Lora
from dr2dist.config.task import TaskOptions
from dr2dist.errors import UserError
from dr2dist.tasks.registry import make_task
from dr2dist.tasks.task import Task

How = Literal["whole", "in parts", "meta"]
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Blueprint:
    """A network and its task as plain values.

    model, image_size, in_channels, options, drop_path, dropout, weights: see `build_model`. task:
    the section `task`. classes: names by label. preprocessing: what samples become, instead of what
    the model says. frozen: patterns of parameters that are not trained. lora: adapters, which are
    trained with the head alone. seed: of new weights.
    """

    model: str
    task: TaskOptions
    classes: tuple[str, ...] = ()
    weights: str | None = None
    image_size: tuple[int, int] | None = None
    in_channels: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    drop_path: float = 0.0
    dropout: float = 0.0
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    frozen: Sequence[str] = ()
    lora: Lora | None = None
    seed: int | None = None

    @classmethod
    def of(cls, config: Config, classes: Sequence[str]) -> Blueprint:
        """A configuration's, for data of some classes."""
        said = config.model
        return cls(
            model=said.name,
            task=config.task,
            classes=tuple(classes),
            weights=said.given_weights,
            image_size=said.image_size,
            in_channels=said.in_channels,
            options=said.options,
            drop_path=said.drop_path,
            dropout=said.dropout,
            preprocessing=config.data.preprocessing(),
            frozen=said.freeze,
            lora=said.lora,
            seed=config.train.seed,
        )

    def described(self) -> dict[str, Any]:
        """What an exported file says of it."""
        return {
            "model": self.model,
            "image_size": self.image_size,
            "in_channels": self.in_channels,
            "options": dict(self.options),
            "lora": None if self.lora is None else self.lora.model_dump(),
            "task": self.task.effective(),
            "classes": list(self.classes),
        }

    def _arguments(self) -> dict[str, Any]:
        """Of build_model, beside name and weights."""
        return {
            "image_size": self.image_size,
            "in_channels": self.in_channels,
            "num_classes": self.task.outputs(),
            "drop_path": self.drop_path,
            "dropout": self.dropout,
            "options": self.options,
        }


class Assembled(NamedTuple):
    """model: with the task's head, if it brings one. weights: gives the values of parameters by
    name where they are made one at a time."""

    model: nn.Module
    task: Task
    weights: Read | None


def assemble(blueprint: Blueprint, how: How = "whole") -> Assembled:
    """The model, before it is converted, and the task.

    how: "whole" with its weights; "in parts" on the meta device, with values to be had one at a
    time, where they do not come from a hub; "meta" without any. Raises UserError for what cannot be
    built.
    """
    made: list[Task] = []

    def finish(model: nn.Module) -> None:
        made.append(_finish(blueprint, model))

    if blueprint.seed is not None and how != "meta":
        torch.default_generator.manual_seed(blueprint.seed)  # models are built on the CPU
    name, weights, options = blueprint.model, blueprint.weights, blueprint._arguments()
    read = None
    if how == "meta":
        with torch.device("meta"):
            model = build_model(name, weights=None, finish=finish, **options)
    elif how == "in parts" and weights != "hub":
        model, read = build_deferred(name, weights=weights, finish=finish, **options)
    else:
        model = build_model(name, weights=weights, finish=finish, **options)
    if blueprint.lora is not None:
        read = _adapt(blueprint, blueprint.lora, model, read, how)
    freeze(model, blueprint.frozen)
    return Assembled(model, made[0], read)


def _adapt(
    blueprint: Blueprint, lora: Lora, model: nn.Module, read: Read | None, how: How
) -> Read | None:
    """Gives the model its adapters; returns what gives the values of parameters, if `read` did."""
    real = how != "meta" and read is None
    bare = assemble(replace(blueprint, lora=None, frozen=()), "meta").model if real else model
    targets = targets_of(bare, lora.targets)
    add_adapters(model, targets, lora.rank, lora.alpha, lora.dropout)
    if real:
        set_values(model, blueprint.seed or 0)
    return None if read is None else values_of(model, blueprint.seed or 0, read)


def _finish(blueprint: Blueprint, model: nn.Module) -> Task:
    """The task for a model, which gets the head that the task brings."""
    family = family_of(model)
    preprocessing = {**family.preprocessing(model), **blueprint.preprocessing}
    with torch.device("cpu"):  # a task's own tensors are real, whatever the model's are
        task = make_task(blueprint.task, blueprint.classes, preprocessing)
    head = task.head(family.features(model))
    if head is not None:
        attach_head(model, head.module, head.taps)
    elif not blueprint.task.outputs():
        raise UserError(
            f"task {task.name}: has no head of its own, and its options say no outputs for the "
            "backbone's"
        )
    return task
