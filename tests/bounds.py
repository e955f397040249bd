"""How far results may lie apart: from the arithmetic alone, never from what a machine gave."""

from __future__ import annotations

import torch

from dr2dist.reversible import Setting
from dr2dist.reversible.arithmetic.setting import growth

ROUNDINGS = 8
"""Of a residual function on a value's way: a norm's statistics, its quotient, its scale, two
products, an activation, and the sum of the recursion with its two coefficients."""


def float_bound(num_functions: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative error of `num_functions` functions in floating point.

    Each rounding errs by half an epsilon at most; at worst all of them add up.
    """
    return num_functions * ROUNDINGS * torch.finfo(dtype).eps / 2


def grid_bound(setting: Setting, num_functions: int) -> float:
    """Relative error of a chain on the grid, for tokens whose size is about one.

    A function rounds twice, its own sum and beta's product, by half a step each; at worst all of
    them add up. The growth of states is that of their errors, so that it cancels.
    """
    return num_functions * 2.0**-setting.fraction_bits


def chain_bound(setting: Setting, num_functions: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative error of a chain's outputs and gradients against the equations without rounding."""
    rounded = float_bound(num_functions, dtype)
    if setting.arithmetic == "exact":
        return rounded + grid_bound(setting, num_functions)
    if setting.memory != "reverse":
        return rounded
    # Function after function, reversal divides a rounding by beta, of states that have grown.
    return (
        rounded * growth(setting.alpha, setting.beta, num_functions) / setting.beta**num_functions
    )


def mean_bound(num_functions: int, dtype: torch.dtype) -> float:
    """Relative error of a loss that is the mean over samples: independent roundings of half an
    epsilon add up in quadrature.
    """
    return (num_functions * ROUNDINGS) ** 0.5 * torch.finfo(dtype).eps / 2
