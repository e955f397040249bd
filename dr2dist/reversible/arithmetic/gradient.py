"""The gradient of a coupling: what a function's step back does to the gradient of a state."""

from __future__ import annotations

import torch
from torch import Tensor


def couple(target: Tensor, dx: Tensor, of_x: Tensor | None, alpha: float, beta: float) -> None:
    """target = of_x + alpha dx + beta target, rounded once to the tensors' dtype.

    target: dy' before, dx afterwards; with beta 0 nothing that it held counts. dx: dx'. of_x:
    F'(x)^T dx', None where nothing flows through F. Target and dx are contiguous, all of equal
    shape; sums are made in fp32, or fp64 where the target is. On a GPU it is one kernel.
    """
    if target.device.type == "cuda":
        # Triton comes with torch for GPUs only.
        from dr2dist.reversible.arithmetic import triton_kernels

        triton_kernels.couple_gradients(target, dx, of_x, alpha, beta)
        return
    total = target.to(torch.promote_types(target.dtype, torch.float32))
    if beta:
        total.mul_(beta).add_(dx, alpha=alpha)
    else:
        total.copy_(dx).mul_(alpha)
    if of_x is not None:
        total.add_(of_x)
    if total is not target:
        target.copy_(total)
