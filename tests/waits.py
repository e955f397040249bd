"""What would make the host wait for a GPU, found on fake devices or on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
}
"""What needs a value on the host, or a size that depends on values."""


class Waits(TorchDispatchMode):
    """Notes each operation at which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if function in READS:
            self.found.append(str(function))
        result = function(*args, **options)
        if self._crosses(args, result) and not self._queued(args, options):
            self.found.append(str(function))
        return result

    @staticmethod
    def _crosses(args: Any, result: Any) -> bool:
        """Whether a GPU and the host take part, and not just with a number of the host's."""
        values = [x for x in tree_leaves((args, result)) if isinstance(x, Tensor)]
        kinds = {x.device.type for x in values}
        if kinds != {"cpu", "cuda"}:
            return False
        copies = len(args) == 1 or (len(args) > 1 and isinstance(args[1], Tensor) and args[1].dim())
        return bool(copies) or all(x.dim() == 0 for x in values)

    @staticmethod
    def _queued(args: Any, options: dict[str, Any]) -> bool:
        return bool(options.get("non_blocking") or (len(args) > 2 and args[2] is True))
