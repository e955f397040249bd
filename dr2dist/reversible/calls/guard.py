"""Gradients that would end unseen at what stands for parameters and inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

_TAKEN = (
    "a gradient has come to an activation that was taken inside of a reversible network, such as "
    "by a hook: from there is no way to its parameters; take the loss of outputs instead "
    "(forward_features and forward_head, or forward_intermediates)"
)


class Guard:
    """Watches the stand-ins of a function's parameters and inputs: only `gradients` may come to
    them. What a hook has taken of a run hangs on them, and a loss on it would train nothing."""

    def __init__(self) -> None:
        self._open = False

    def watch(self, leaf: Tensor) -> Tensor:
        """The leaf, at which a gradient from elsewhere raises RuntimeError."""
        if leaf.requires_grad:
            leaf.register_hook(self._check)
        return leaf

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, gradients are asked for by the engine itself."""
        before, self._open = self._open, True
        try:
            yield
        finally:
            self._open = before

    def _check(self, gradient: Tensor) -> None:
        if not self._open:
            raise RuntimeError(_TAKEN)


def without_saved() -> AbstractContextManager[None]:
    """Inside, graphs are made as ever but keep no tensors: for a run that is never differentiated.

    Kernels are chosen as in a run that is, and activations are freed as without gradients. A
    gradient that comes to one of them raises RuntimeError.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, _never)


def _never(kept: None) -> Tensor:
    raise RuntimeError(_TAKEN)
