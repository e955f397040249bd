"""What a chain is called with that it cannot take."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor


def check_inputs(
    chain: str,
    x: Tensor,
    taps: Sequence[int],
    count: int,
    batched: Collection[str],
    sides: dict[str, Any],
) -> None:
    """Raises ValueError for tokens that are not floating, a tap outside of the `count` functions,
    and a name in `batched` that no side has."""
    if not x.is_floating_point():
        raise ValueError(f"{chain}: tokens are {x.dtype}, a floating dtype is needed")
    for tap in taps:
        if not -count <= tap < count:
            raise ValueError(f"{chain}: tap {tap} is outside the {count} functions run")
    for name in batched:
        if name not in sides:
            raise ValueError(f"{chain}: batched names {name!r}, which is not a side given")


@torch.compiler.disable
def refuse_compiling() -> None:
    """Raises RuntimeError: a chain that trains is traced by torch.compile."""
    raise RuntimeError(
        "torch.compile around a reversible chain would run its functions by other kernels than "
        "their recompute: compile the functions themselves by compile=True (convert, or "
        "reversible.compile), or use memory='store'"
    )
