"""Images with other than three channels."""

from __future__ import annotations

import logging
from typing import Any

from timm.models import adapt_input_conv, get_model_traits
from torch import Tensor, nn

log = logging.getLogger(__name__)


def input_channels(model: nn.Module) -> int:
    """Channels of the images that a model takes: as it says itself, otherwise as its first
    convolution does; 3 where neither is there. A wrapper is asked for what it is around."""
    for module in model.modules():
        said = getattr(module, "in_chans", None)
        if isinstance(said, int):
            return said
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            return module.in_channels
    return 3


def with_channels(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A timm model's weights, the first convolution's adapted to its channels.

    As timm adapts its own pretrained ones: repeated and scaled, for one channel summed.
    """
    state = dict(state)
    for name in _first_convolutions(model):
        weight, wanted = state.get(f"{name}.weight"), model.get_submodule(name)
        if weight is None or weight.ndim < 4 or wanted.weight.shape[1] == weight.shape[1]:
            continue
        given = weight.shape[1]
        rows = weight.flatten(2, -2)  # of a video model, frames are rows beside each other
        adapted = adapt_input_conv(wanted.in_channels, rows, given)
        state[f"{name}.weight"] = adapted.unflatten(2, weight.shape[2:-1])
        log.info("%s: weights of %d channels are adapted to %d", name, given, wanted.in_channels)
    return state


def _first_convolutions(model: Any) -> tuple[str, ...]:
    found = get_model_traits(model).get(
        "first_conv", getattr(model, "pretrained_cfg", {}).get("first_conv")
    )
    return (found,) if isinstance(found, str) else tuple(found or ())
