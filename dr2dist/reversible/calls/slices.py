"""How the work of one function is cut: into samples, and inside a sample into its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dr2dist.reversible.arithmetic.setting import Setting
from dr2dist.reversible.arithmetic.state import State
from dr2dist.reversible.trees import modules_of

Ranges = tuple[slice, ...]
"""What one slice takes of dim 1, in order: usually one range, two where windows wrap around."""


class Layout(NamedTuple):
    """What a chain's setting comes to: frozen into each tape, and into checkpoints.

    chunk_size: samples per slice, None for all. chunk_tokens: tokens per slice inside a sample,
    None for all. rows: of the batch, that are one sample: only slices of tokens are inside a row.
    kept: functions that keep their activations, memory mode budget only.
    """

    chunk_size: int | None = None
    chunk_tokens: int | None = None
    kept: frozenset[int] = frozenset()
    rows: int = 1

    @classmethod
    def given(cls, setting: Setting, rows: int = 1) -> Layout:
        """What a setting says itself, where nothing of it is measured."""
        assert not isinstance(setting.chunk_size, str)
        return cls(setting.chunk_size, setting.chunk_tokens, rows=rows)


@dataclass(frozen=True)
class TokenSlice:
    """What a function is told that runs on some of a sample's tokens.

    ranges: of dim 1, what the tokens given are. length: the whole of dim 1. context: what the
    function gave for all tokens, [B, length, ...] each; None asks for what it gives for these.
    factor: what it drew for the whole sample.
    """

    ranges: Ranges
    length: int
    context: tuple[Tensor, ...] | None = None
    factor: Tensor | None = None


@runtime_checkable
class TokenSliced(Protocol):
    """A residual function that can run on some of a sample's tokens at a time.

    Called as function(x, tokens=TokenSlice(...), **sides) with x [1, n, ...]. Given a context, it
    returns its branch for these tokens. Without, it returns what its branch needs to know of
    them: a tuple of tensors [1, n, ...], of which the context is made.
    """

    needs_context: bool
    """Whether a token's branch depends on other tokens."""

    def token_ranges(
        self, shape: torch.Size, tokens: int, sides: dict[str, Any]
    ) -> Sequence[Ranges]:
        """Slices of about `tokens` tokens each that cover dim 1 once; none if it cannot."""
        ...

    def draw(self, x: Tensor) -> Tensor | None:
        """What is random for a sample as a whole, like DropPath's factor; None if nothing is."""
        ...


class Slice(NamedTuple):
    """One slice: some samples, and of a single one perhaps only some of dim 1."""

    samples: slice
    ranges: Ranges | None = None

    def views(self, tensor: Tensor) -> list[Tensor]:
        """Contiguous views of a contiguous tensor [B, N, ...], in order."""
        return self.cut(tensor[self.samples])

    def cut(self, tensor: Tensor) -> list[Tensor]:
        """The same of a tensor that holds only the slice's samples."""
        return [tensor] if self.ranges is None else [tensor[:, found] for found in self.ranges]

    def states(self, state: State) -> list[State]:
        """Views of both tensors of a state."""
        return [State(*views) for views in zip(*map(self.views, state), strict=True)]

    def split(self, value: Tensor) -> list[Tensor]:
        """A tensor of the slice's own shape, cut as `views` cuts."""
        if self.ranges is None or len(self.ranges) == 1:
            return [value]
        return list(value.split([found.stop - found.start for found in self.ranges], dim=1))


def joined(views: Sequence[Tensor]) -> Tensor:
    """The views of a slice as one tensor."""
    return views[0] if len(views) == 1 else torch.cat(tuple(views), dim=1)


def sample_slices(batch: int, chunk_size: int | None) -> Iterator[slice]:
    """The slices of the batch, in order."""
    step = chunk_size or max(batch, 1)
    return (slice(start, min(start + step, batch)) for start in range(0, max(batch, 1), step))


def slices_of(
    function: nn.Module, shape: torch.Size, layout: Layout, sides: dict[str, Any]
) -> list[list[Slice]]:
    """The work on tokens of a shape: for each slice of the batch, its slices of tokens."""
    if mixes_samples(function):
        return [[Slice(slice(0, shape[0]))]]
    ranges: Sequence[Ranges] = ()
    if layout.chunk_tokens is not None and isinstance(function, TokenSliced):
        ranges = function.token_ranges(shape, layout.chunk_tokens, sides)
    size = layout.chunk_size
    if not ranges:
        slices = sample_slices(shape[0], None if size is None else size * layout.rows)
        return [[Slice(samples)] for samples in slices]
    slices = sample_slices(shape[0], size)
    return [[Slice(samples, found) for found in ranges] for samples in slices]


def mixes_samples(module: nn.Module) -> bool:
    """Whether its output for one sample depends on others: it is run on whole batches."""
    return any(
        isinstance(part, _BatchNorm) and (part.training or part.running_mean is None)
        for part in modules_of(module)
    )
