"""What goes over cuts between stages beside the tokens: sides and taps, as single tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dr2dist.backbones.walk import Flow
from dr2dist.reversible.trees import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

Key = tuple[Any, int]
"""A tensor of a side, by the side's name and the place among its leaves, or a tap."""


@dataclass(frozen=True)
class Carried:
    """A tensor that crosses a cut.

    shape: for one sample. rows: rows of a sample in dim 0, None where all samples share it.
    trained: whether a gradient of it comes back.
    """

    key: Key
    shape: tuple[int, ...]
    rows: int | None
    trained: bool

    def shape_of(self, batch: int) -> tuple[int, ...]:
        """For a number of samples."""
        return self.shape if self.rows is None else (batch * self.rows, *self.shape[1:])


def tensors_of(flow: Flow) -> dict[Key, Tensor]:
    """The tensors of a flow's sides and taps."""
    found: dict[Key, Tensor] = {
        (name, place): leaf
        for name, value in flow.sides.items()
        for place, leaf in enumerate(tree_leaves(value))
        if isinstance(leaf, Tensor)
    }
    return {**found, **flow.taps}


class Skeleton:
    """A flow's sides without their tensors: every stage knows it, so that only tensors travel."""

    def __init__(self, flow: Flow) -> None:
        self.batched, self.rows, self.apart = flow.batched, flow.rows, flow.apart
        self._sides: dict[str, tuple[list[Any], TreeSpec]] = {}
        for name, value in flow.sides.items():
            leaves, form = tree_flatten(value)
            self._sides[name] = [None if isinstance(v, Tensor) else v for v in leaves], form
        self._tensors = {key for key in tensors_of(flow) if isinstance(key[0], str)}

    @property
    def plain(self) -> dict[str, list[Any]]:
        """The plain values of each side, in the places of its leaves; None where tensors are."""
        return {name: leaves for name, (leaves, _) in self._sides.items()}

    def fill(self, value: Any, tensors: Mapping[Key, Tensor]) -> Flow:
        """A flow of tokens and these tensors; sides of which one is missing are left out."""
        sides = {}
        for name, (leaves, form) in self._sides.items():
            keys = [(name, place) for place in range(len(leaves))]
            if all(key in tensors for key in keys if key in self._tensors):
                filled = zip(keys, leaves, strict=True)
                sides[name] = tree_unflatten([tensors.get(key, v) for key, v in filled], form)
        taps = {key: tensor for key, tensor in tensors.items() if not isinstance(key[0], str)}
        return Flow(value, sides, self.batched, self.rows, taps, self.apart)
