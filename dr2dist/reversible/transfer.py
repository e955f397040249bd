"""From the host to a device without the host waiting for what the device is doing."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on the device, in a dtype if one is given; itself where it is both already.

    To a GPU it goes through pinned memory, from which copies are queued like any other work:
    from pageable memory the host would first wait for everything queued before.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    # Another dtype would be made on the host first, in memory that is not pinned.
    return tensor.to(device, non_blocking=True).to(dtype or tensor.dtype)
