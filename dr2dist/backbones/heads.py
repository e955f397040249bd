"""Heads that tasks bring, beside the one that a model has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

TASK_HEAD = "task_head"


class TaskHead(nn.Module):
    """A head that a task brings.

    module: called with a list of features [B, ...]. taps: their names, see `Backbone.features`.
    """

    def __init__(self, module: nn.Module, taps: Sequence[str]) -> None:
        super().__init__()
        self.module, self.taps = module, tuple(taps)

    def forward(self, features: list[Tensor]) -> Any:
        """Features to the head's outputs, any pytree of [B, ...]."""
        return self.module(features)


def attach_head(model: nn.Module, module: nn.Module, taps: Sequence[str]) -> None:
    """Gives a model a task's head, before it is converted; its own is not used then."""
    setattr(model, TASK_HEAD, TaskHead(module, taps))
