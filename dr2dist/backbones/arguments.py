"""What a timm model was made with, as far as it can be read off it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def arguments_of(net: Any, usual: nn.Module) -> dict[str, bool | int | float | str]:
    """Arguments of timm.create_model by which a converted network differs from a usual model.

    usual: the model of the same class that is made without them. Only arguments of the class
    itself, and only numbers and names.
    """
    kinds: list[Any] = [kind for kind in type(usual).__mro__ if issubclass(kind, nn.Module)]
    known = {name for kind in kinds for name in inspect.signature(kind.__init__).parameters}
    found = {}
    for name in sorted(known - _NOT_OF_WEIGHTS):
        read = _READERS.get(name, lambda model, name=name: getattr(model, name, None))
        own, other = _value(read, net), _value(read, usual)
        if own is not None and own != other:
            found[name] = own
    return found


_NOT_OF_WEIGHTS = {"img_size", "num_classes", "in_chans", "weight_init"}
"""Arguments that are said elsewhere, or that leave no trace."""


def _value(read: Callable[[Any], Any], model: Any) -> bool | int | float | str | None:
    try:
        value = read(model)
    except (AttributeError, IndexError, TypeError):
        return None  # a model of another shape
    return value if type(value) in (bool, int, float, str) else None


def _first(model: Any) -> Any:
    """The first block of a model, or of its first layer."""
    return model.blocks[0] if hasattr(model, "blocks") else model.layers[0].blocks[0]


def _same(values: Any) -> Any:
    """The one value of all, if it is one."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _scaled(model: Any) -> float | None:
    """A start for the scales of residual branches, which are read with the weights."""
    block = _first(model)
    scale = getattr(getattr(block, "ls1", None), "gamma", getattr(block, "gamma_1", None))
    return None if scale is None else 1.0


def _widened(layer: nn.Linear) -> float:
    return layer.out_features / layer.in_features


def _is_there(module: Any) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


_READERS: dict[str, Callable[[Any], Any]] = {
    "class_token": lambda model: model.cls_token is not None,
    "depth": lambda model: len(model.blocks),
    "fc_norm": lambda model: _is_there(model.fc_norm),
    "init_values": _scaled,
    "mlp_ratio": lambda model: (
        _first(model).mlp.fc1.out_features / _first(model).mlp.fc1.in_features
    ),
    "num_heads": lambda model: _same(block.attn.num_heads for block in model.blocks),
    "patch_size": lambda model: _same(model.patch_embed.patch_size),
    "pre_norm": lambda model: _is_there(model.norm_pre),
    "qk_norm": lambda model: _is_there(_first(model).attn.q_norm),
    "qkv_bias": lambda model: _first(model).attn.qkv.bias is not None,
    "reg_tokens": lambda model: model.num_reg_tokens,
    "window_size": lambda model: _same(_first(model).attn.window_size),
}
"""By timm's name of the argument, where the model has no attribute of that name."""
