"""Structures of tensors, as torch takes them apart (it has no public name for that yet), and of
modules."""

from __future__ import annotations

from torch import nn
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_iter,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

__all__ = [
    "TreeSpec",
    "modules_of",
    "tree_flatten",
    "tree_iter",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
]


def modules_of(module: nn.Module) -> list[nn.Module]:
    """What `module.modules()` gives, in a third of its time: it is asked several times a pass, by
    each function."""
    found: dict[nn.Module, None] = {}
    left = [module]
    while left:
        one = left.pop()
        if one not in found:
            found[one] = None
            left.extend(each for each in reversed(one._modules.values()) if each is not None)
    return list(found)
