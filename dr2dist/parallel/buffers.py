"""A network's buffers as they were before a step, in case that the step is not applied."""

from __future__ import annotations

import torch
from torch import nn


class Buffers:
    """A copy of all buffers of a network, persistent or not, such as running statistics."""

    def __init__(self, net: nn.Module) -> None:
        self._kept = [
            (module, name, buffer, buffer.clone())
            for module in net.modules()
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Gives every buffer the value that it had, also where a module has replaced it."""
        for module, name, buffer, value in self._kept:
            buffer.copy_(value)
            setattr(module, name, buffer)
