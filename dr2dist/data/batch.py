"""What a task makes of samples, as it goes to the network and to the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dr2dist.reversible.transfer import to_device
from dr2dist.reversible.trees import tree_map


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B samples.

    inputs: of the network, by name, [B, ...] each. targets: the task's own, a pytree of tensors.
    keys: the samples' names, B of them. count: samples that count: all, or none of a batch that
    only fills in. skipped: samples that were left out as unreadable.
    """

    inputs: dict[str, Tensor]
    targets: Any
    keys: list[str]
    count: int
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> Batch:
        """The same in pinned memory, from which a GPU can fetch it beside the host's work."""
        return self._map(lambda value: value.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The same on a device; the host does not wait for it."""
        return self._map(lambda value: to_device(value, device))

    def _map(self, change: Any) -> Batch:
        def each(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return replace(
            self, inputs=tree_map(each, self.inputs), targets=tree_map(each, self.targets)
        )
