"""The contract of a backbone: what a model family says, so that its models can be reversible."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dr2dist.backbones.channels import input_channels
from dr2dist.errors import UserError

OUTPUT = "output"
"""The feature that is the backbone's whole output: tokens after its last layer and norm."""


@dataclass
class Stem:
    """What enters the first layer.

    tokens: [B, ...], floating. sides: inputs that all functions share, by name: tensors or pytrees
    of them, which are differentiable, and plain values. batched: names of those sides whose tensors
    have the rows of tokens in dim 0, also of those that a transition makes later. rows: of tokens
    [B * rows, ...], that are one sample, where it is cut into parts. apart: functions treat such
    rows one by one, so that their slices may part them; otherwise slices keep them together, as
    those of transitions and tail always do.
    """

    tokens: Tensor
    sides: dict[str, Any] = field(default_factory=dict)
    batched: Sequence[str] = ()
    rows: int = 1
    apart: bool = False


class ChainOf(NamedTuple):
    """Residual functions at one resolution, which are reversed as one chain.

    name: by which the certificate calls it. functions: modules in order, two or so a block, each
    called as function(tokens, **sides) and computing its branch alone, without the addition, to
    the tokens' shape; see `Chain` and `Branch`. channel_dim: of the tokens.
    """

    name: str
    functions: list[nn.Module]
    channel_dim: int = -1


class Transition(NamedTuple):
    """What stands before, between or after chains and is not reversible.

    name: for people to read. module: maps tokens [B, ...] to tokens, and is run again in the
    backward pass, in slices of the batch. sides: True for a module that is called as
    module(tokens, sides) and gives (tokens, sides), for all functions behind it: on whole batches,
    with its activations kept.
    """

    name: str
    module: nn.Module
    sides: bool = False


class FeatureInfo(NamedTuple):
    """Tokens that a head can ask for.

    name: of the feature. chain, function: after which function of which chain, both counted from
    0; OUTPUT is after all, and the norm. channels: its width. stride: input units (pixels of
    images) to one token. layout: of the tokens, such as "BNC" or "BHWC". rows: of the tokens that
    are one sample, in the order of time; see `Stem`. places: of layout BNC on clips, frames, rows
    and columns of the grid that N counts.
    """

    name: str
    chain: int
    function: int
    channels: int
    stride: int
    layout: str
    rows: int = 1
    places: tuple[int, int, int] | None = None


class Backbone(ABC):
    """How models of one family split into stem, chains with transitions between them, and head.

    A new family is one subclass, an object of which is given to `register_backbone`.
    """

    name: str
    """Of the family, in messages; a family that is registered later under it takes its place."""
    patterns: tuple[str, ...]
    """Model names that it covers, for people to read."""
    classes: tuple[type[nn.Module], ...] = ()
    """What its models are built as, for people to read."""
    input: str | None = "image"
    """The one of a batch's inputs that is the stem's; None: the stem takes all of them, by name."""
    tail: tuple[str, ...] | None = None
    """The model's modules and parameters that `norm` and `head` use, missing ones included.

    Where they are named, both run in slices of the batch and keep no activations; where not, they
    run as they stand.
    """

    def build(self, name: str, **options: Any) -> nn.Module | None:
        """A model of the family's own by its name in a configuration; None for all others, which
        timm makes.

        options: `model.options`, and those of num_classes, img_size (height, width), in_chans,
        drop_path_rate and proj_drop_rate that are asked for.
        """
        return None

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether the model is built as this family is. Decided by structure."""

    @abstractmethod
    def layers(self, model: Any) -> list[ChainOf | Transition]:
        """Chains and transitions between stem and norm, in order.

        Every walk over a network follows it: forward, features, stages, costs, export. Raises
        UserError for an unknown block.
        """

    @abstractmethod
    def stem(self, model: Any, inputs: Any, /, **options: Any) -> Stem:
        """Inputs, a tensor [B, ...] or several by name (see `input`), to tokens and sides.

        options: what else the network is called with, such as attn_mask.
        """

    def norm(self, model: Any, tokens: Tensor) -> Tensor:
        """What ends `forward_features` after the last layer: tokens [B, ...] to features [B, ...].

        The default is the model's `norm`.
        """
        result: Tensor = model.norm(tokens)
        return result

    def head(self, model: Any, features: Tensor) -> Any:
        """Features [B, ...] to the model's output; the default is timm's own `forward_head`."""
        return model.forward_head(features)

    def preprocessing(self, model: Any) -> dict[str, Any]:
        """How samples become inputs, as plain values, for the task's transform.

        By default of images: size (height, width), channels, mean and std of each.
        """
        cfg, channels = model.pretrained_cfg, input_channels(model)
        mean, std = list(cfg["mean"]), list(cfg["std"])
        if channels != len(mean):
            mean, std = ([sum(v) / len(v)] * channels for v in (mean, std))
        return {"size": list(input_size(model)), "channels": channels, "mean": mean, "std": std}

    def example(self, model: Any) -> Any:
        """Inputs of one sample, on the model's device: what `stem` takes, with a batch of 1."""
        first = next(p for p in model.parameters() if p.is_floating_point())
        shape = (1, input_channels(model), *input_size(model))
        return torch.zeros(shape, dtype=first.dtype, device=first.device)

    def features(self, model: Any) -> list[FeatureInfo]:
        """What a head of a task can ask for; the last one is OUTPUT. Empty unless a family says."""
        return []

    def to_map(self, model: Any, tokens: Tensor) -> Tensor:
        """Tokens of a feature as a map [B, C, H, W]. Raises UserError where there is none."""
        raise UserError(f"{self.name} models have no maps")

    def intermediates(self, net: Any, inputs: Any, /, **options: Any) -> Any:
        """`forward_intermediates` of a converted network, with timm's arguments and outputs.

        Raises UserError where a family gives none, as by default.
        """
        raise UserError(f"{self.name} models give no intermediate features")


def input_size(model: Any) -> tuple[int, int]:
    """Height and width in pixels of the images that a timm model is built for."""
    height, width = built_size(model) or model.pretrained_cfg["input_size"][1:]
    return int(height), int(width)


def built_size(model: Any) -> tuple[int, int] | None:
    """The same where a timm model is built for one size; None for others."""
    found: tuple[int, int] | None = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return found


COMPUTES = ("forward", "forward_features", "forward_head")
"""Methods of a model that a converted network has its own way for."""


def is_built_as(model: nn.Module, *kinds: type) -> bool:
    """Whether a model is of one of the classes and computes what the class does.

    A subclass with a `forward`, `forward_features` or `forward_head` of its own does not: what
    `Backbone.matches` is to know.
    """
    return any(isinstance(model, kind) and own_method(model, kind) is None for kind in kinds)


def own_method(model: nn.Module, kind: type) -> str | None:
    """The first of those methods that a model of a class does not have from it; None if all are."""
    own = type(model)
    return next((n for n in COMPUTES if getattr(own, n, None) is not getattr(kind, n, None)), None)
