"""Residual functions compiled one by one, so that a recompute uses the first run's kernels."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from dr2dist.reversible.trees import has_hooks, modules_of


def _call(function: nn.Module, x: Tensor, **sides: Any) -> Any:
    return function(x, **sides)


class CompiledFunctions:
    """Functions by torch.compile, for tensors of one shape each.

    Shapes are never generalised: which kernels run would then depend on what was seen before, and
    a recompute might use others than its first run. Functions of the same modules and numbers
    share what is compiled for them.
    """

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def call(self, function: nn.Module, x: Tensor, **sides: Any) -> Any:
        """Runs the function; on some of a sample's tokens, and with hooks, as it stands: code that
        is compiled does not look whether there are any."""
        if "tokens" in sides or any(map(has_hooks, modules_of(function))):
            return function(x, **sides)
        kind = _kind(function)
        if kind not in self._compiled:
            self._compiled[kind] = torch.compile(_fresh(), dynamic=False)
        return self._compiled[kind](function, x, **sides)


def _fresh() -> Callable[..., Any]:
    """A copy of `_call` with code of its own: torch keeps only some versions of each code, and
    runs what is beyond them uncompiled, without a word."""
    return FunctionType(_call.__code__.replace(), _call.__globals__, _call.__name__)


def _kind(function: nn.Module) -> tuple[Any, ...]:
    """What functions that can share compiled code have in common."""
    modules = tuple(
        (type(module), *((k, v) for k, v in vars(module).items() if isinstance(v, int | float)))
        for module in function.modules()
    )
    shapes = tuple((tuple(p.shape), p.dtype) for p in function.parameters())
    return getattr(function, "compute", None), modules, shapes
