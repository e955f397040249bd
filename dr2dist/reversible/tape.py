"""What a forward pass leaves for its backward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dr2dist.reversible.arithmetic.exact import ExactArithmetic
from dr2dist.reversible.arithmetic.floating import FloatArithmetic
from dr2dist.reversible.arithmetic.scales import ChannelScales
from dr2dist.reversible.arithmetic.setting import Memory, Setting
from dr2dist.reversible.arithmetic.state import State
from dr2dist.reversible.calls.kernels import Kernels
from dr2dist.reversible.calls.replay import Randomness, function_context
from dr2dist.reversible.calls.runner import Call
from dr2dist.reversible.calls.sliced import SlicedCall, Stream
from dr2dist.reversible.calls.slices import Layout, Slice
from dr2dist.reversible.certificate import Flags, Probe
from dr2dist.reversible.remainders import Remainders
from dr2dist.reversible.trees import tree_map_only

Arithmetic = ExactArithmetic | FloatArithmetic


@dataclass
class Sides:
    """Inputs that all functions of a chain share.

    values: by keyword, each a tensor or a pytree of some; they are differentiable. batched: names
    of those whose tensors have the batch in dim 0, which are cut with its slices.
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
        return {
            name: tree_map_only(Tensor, lambda t: t[part], value) if name in self.batched else value
            for name, value in values.items()
        }

    def work(
        self, function: Any, slices: list[list[Slice]], shape: torch.Size
    ) -> Iterator[SlicedCall]:
        """A function on each slice of tokens of a shape, with its part of the sides."""
        own = self.of(function)
        length = shape[1] if len(shape) > 1 else 1
        for number, parts in enumerate(slices):
            yield SlicedCall(function, parts, number, length, self.cut(own, parts[0].samples))


class Kept(NamedTuple):
    """A function's run on one slice of the batch with all its graphs."""

    work: SlicedCall
    calls: list[Call]
    contexts: list[Call]


@dataclass(eq=False)
class Tape:
    """One pass of one segment: everything that its reversal needs, and no activation.

    setting, layout, arithmetic, kernels, randomness, sides: frozen, never read again from
    outside. dtype: what F is called with. begin: functions of the chain before the segment.
    first: index of the first function that is reversed. owned: by function from there on, its
    trained parameters that none before it uses; none under a nested runner.
    sums: int64 [functions], the bits of F's outputs.

    By function, as far as its memory mode needs them: parts, its slices; remainders; inputs, its
    state; kept, its graphs; states, what reversal goes on from below functions that keep theirs;
    starts, what it must find where a reversed stretch began.
    used: whether a reversal that frees all this has begun. open: whether none has ended.
    """

    setting: Setting
    layout: Layout
    arithmetic: Arithmetic
    kernels: Kernels
    randomness: Randomness
    sides: Sides
    dtype: torch.dtype
    begin: int
    first: int
    owned: list[list[nn.Parameter]]
    sums: Tensor
    flags: Flags
    remainders: Remainders
    x_needs_grad: bool
    parts: dict[int, list[list[Slice]]] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, list[Kept]] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)
    starts: dict[int, Tensor | Probe] = field(default_factory=dict)
    drift: Tensor | None = None
    used: bool = False
    open: bool = True

    def mode(self, index: int) -> Memory:
        """How function `index` comes by its activations."""
        if self.setting.memory != "budget":
            return self.setting.memory
        return "store" if index in self.layout.kept else "reverse"

    def starts_chain(self, index: int) -> bool:
        """Whether a function sees a chain's first state, which is its own previous one: nothing
        of it is discarded."""
        return self.begin + index == 0

    def factor(self, index: int) -> float:
        """By which function `index`'s output is multiplied."""
        return factor_of(self.arithmetic, self.begin + index)

    def starts_stretch(self, index: int) -> bool:
        """Whether reversal ends at function `index`, for now or for good."""
        first = index == self.first or self.mode(index - 1) != "reverse"
        return self.mode(index) == "reverse" and first

    def ends_stretch(self, index: int) -> bool:
        """Whether function `index` keeps its activations and the one before it does not."""
        reversed_before = index > self.first and self.mode(index - 1) == "reverse"
        return self.mode(index) == "store" and reversed_before

    def stream(self, index: int) -> Stream:
        """The context of calls of function `index` with gradients."""

        def at(key: tuple[int, ...]) -> AbstractContextManager[None]:
            return function_context(self.kernels, self.randomness, self.begin + index, key)

        return at

    def work(self, index: int, function: Any, shape: torch.Size) -> Iterator[SlicedCall]:
        """Function `index` on each slice of the batch."""
        return self.sides.work(function, self.parts[index], shape)

    def may_overwrite(self, index: int) -> bool:
        """Whether function `index` may write its state over the oldest one."""
        # In floating point graphs hold the state itself.
        floating = isinstance(self.arithmetic, FloatArithmetic)
        if self.mode(index) == "checkpoint" or (self.mode(index) == "store" and floating):
            return False
        return index not in self.states and index - 1 not in self.states

    def needs_grad(self, index: int) -> bool:
        """Whether gradients flow to the tokens of function `index`."""
        return self.x_needs_grad or index > self.first

    @property
    def remainder_bytes(self) -> int:
        """Bytes of remainders held now, wherever they are."""
        return self.remainders.nbytes

    def free(self, index: int) -> None:
        """Drops what only the reversal of function `index` needed."""
        self.remainders.free(index)
        for held in (self.inputs, self.kept, self.states, self.starts):
            held.pop(index, None)

    def close(self) -> None:
        """Ends the tape: nothing of it can be used again."""
        self.open = False
        for index in list(self.parts):
            self.free(index)


def arithmetic_of(
    setting: Setting,
    dtype: torch.dtype,
    device: torch.device,
    scales: ChannelScales | None = None,
    wide: bool = False,
) -> Arithmetic:
    """The arithmetic that a setting names, for tokens of a state dtype on a device.

    scales, wide: as ExactArithmetic takes them. Raises ValueError for tokens that the kernels of a
    GPU cannot be exact on.
    """
    if setting.arithmetic == "float":
        return FloatArithmetic(setting, dtype)
    if device.type == "cuda":
        if setting.factor != 1 and dtype == torch.float64:
            raise ValueError(
                "gain 'consistent' multiplies outputs in fp64, which on a GPU is the same in all "
                "kernels for tokens of fp32 or less: found fp64"
            )
        # Triton comes with torch for GPUs only.
        from dr2dist.reversible.arithmetic.fused import FusedArithmetic

        return FusedArithmetic(setting, dtype, scales, wide)
    return ExactArithmetic(setting, dtype, scales, wide)


def factor_of(arithmetic: Arithmetic, index: int) -> float:
    """By which the output of a chain's function is multiplied: the first one's by 1."""
    return arithmetic.factor if index else 1.0


def state_dtype(h: Tensor) -> torch.dtype:
    """Tokens of a chain are fp32, or fp64 where the input is."""
    return torch.promote_types(h.dtype, torch.float32)


def token_dtype(h: Tensor) -> torch.dtype:
    """What F is called with, tokens are handed out in and their gradients are held in."""
    return state_dtype(h) if torch.is_autocast_enabled(h.device.type) else h.dtype
