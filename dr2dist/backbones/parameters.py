"""Parameters by patterns of their names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from dr2dist.errors import UserError, nearest


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Takes the parameters that match out of training.

    Raises UserError for a pattern that matches none, or if nothing is left to train.
    """
    for pattern in patterns:
        for parameter in matching(model, pattern, "model.freeze"):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model.freeze: every parameter matches, so nothing is left to train")


def matching(model: nn.Module, pattern: str, key: str) -> list[nn.Parameter]:
    """Parameters whose names match a pattern; key: what it is called. Raises UserError for none."""
    named = dict(model.named_parameters())
    found = [parameter for name, parameter in named.items() if fnmatchcase(name, pattern)]
    if not found:
        raise UserError(f"{key}: '{pattern}' matches no parameter{nearest(pattern, named)}")
    return found
