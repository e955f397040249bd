"""What a forward pass leaves for its backward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dr2dist.reversible.certificate import Flags, Probe
from dr2dist.reversible.exact import ExactArithmetic, State
from dr2dist.reversible.floating import FloatArithmetic
from dr2dist.reversible.replay import Autocast, Randomness
from dr2dist.reversible.runner import Call
from dr2dist.reversible.setting import Setting


@dataclass
class Sides:
    """Inputs that all functions of a chain share.

    values: by keyword; tensors are differentiable. batched: names of those whose dim 0 is the
    batch, cut with its slices.
    """

    values: dict[str, Any]
    batched: Collection[str] = ()

    def of(self, function: Any) -> dict[str, Any]:
        """The sides that a function takes: those it names in `sides`, otherwise all."""
        names = getattr(function, "sides", None)
        if names is None:
            return self.values
        return {name: self.values[name] for name in names if name in self.values}

    def cut(self, values: dict[str, Any], part: slice) -> dict[str, Any]:
        """The values for one slice of the batch."""
        return {k: v[part] if k in self.batched else v for k, v in values.items()}


@dataclass(eq=False)
class Tape:
    """One pass of one segment: everything that its reversal needs, and no activation.

    setting, autocast, randomness, sides: frozen, never read again from outside. dtype: what F
    is called with. first: index of the first function that is reversed. sums: int64 [functions],
    the bits of F's outputs. remainders, inputs, calls: per function, one entry for each slice
    (inputs: the whole state), filled according to the memory mode.
    """

    setting: Setting
    autocast: Autocast
    randomness: Randomness
    sides: Sides
    dtype: torch.dtype
    first: int
    sums: Tensor
    flags: Flags
    x_needs_grad: bool
    probe: Probe | None = None
    start_sum: Tensor | None = None
    remainders: list[list[Tensor | None]] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    open: bool = True

    @property
    def remainder_bytes(self) -> int:
        """Bytes of remainders held now."""
        parts = (part for parts in self.remainders for part in parts)
        return sum(part.nbytes for part in parts if part is not None)

    def close(self) -> None:
        """Ends the tape: nothing of it can be used again."""
        self.open = False
        self.remainders, self.inputs, self.calls = [], [], []


def arithmetic_of(setting: Setting, state_dtype: torch.dtype) -> ExactArithmetic | FloatArithmetic:
    """The arithmetic that a setting names."""
    kind = ExactArithmetic if setting.arithmetic == "exact" else FloatArithmetic
    return kind(setting, state_dtype)


def state_dtype(h: Tensor) -> torch.dtype:
    """Tokens of a chain are fp32, or fp64 where the input is."""
    return torch.promote_types(h.dtype, torch.float32)


def slices(batch: int, chunk_size: int | None) -> Iterator[slice]:
    """The slices of the batch, in order."""
    step = chunk_size or max(batch, 1)
    return (slice(start, min(start + step, batch)) for start in range(0, max(batch, 1), step))


def part_of(state: State, part: slice) -> State:
    """A slice of both tensors of a state (views)."""
    return State(state.current[part], state.previous[part])
