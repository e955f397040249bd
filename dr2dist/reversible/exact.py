"""Exact arithmetic: states are int32 fixed point, and what beta discards is kept, packed.

With `x = X * 2^-K` and rne = round to nearest, ties to even:

    G(X)    = rne(F(x) * 2^K + alpha * X)
    X_{i+1} = G(X_i) + enc(X_{i-1})                  enc(X) = floor(beta * X + 1/2)
    X_{i-1} = dec(X_{i+1} - G(X_i), r)               dec(y, r) = ceil((y - 1/2) / beta) + r

All of it runs in fp64. alpha is a multiple of 2^-16 and X has 31 bits, so alpha * X and
F * 2^K are exact there and G rounds its sum once and then to the grid: a fused multiply-add
gives the same bits as a separate one, and only F itself can differ between two runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dr2dist.reversible.packing import pack, packed_bytes, unpack
from dr2dist.reversible.setting import RANGE_BITS, Setting

INT32 = torch.iinfo(torch.int32)
CPU_TILE = 1 << 16
"""Elements that elementwise work takes at a time on a CPU, so that it stays in the cache."""


class State(NamedTuple):
    """What a chain carries between functions: two tensors of the shape of its tokens.

    Exact: current X_i and previous X_{i-1}, int32. Float: current x_i and previous y_i.
    """

    current: Tensor
    previous: Tensor


class ExactArithmetic:
    """The coupling of one residual function, forth and back, for one setting.

    All tensors given are contiguous and of equal shape; `f` is F's raw output in its own dtype.
    """

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        self.alpha, self.beta = setting.alpha, setting.beta
        self.scale = 2.0**setting.fraction_bits
        self.bits = setting.remainder_bits
        self.dtype = dtype

    def start(self, h: Tensor) -> State:
        """(X_0, X_{-1} = X_0) from the tokens h, whatever their float dtype."""
        state = torch.empty(h.shape, dtype=torch.int32, device=h.device)
        for target, source in _tiles(state, h.contiguous()):
            target.copy_(_to_grid(source.double().mul_(self.scale)))
        return State(state, state)

    def tokens(self, state: Tensor) -> Tensor:
        """x = X * 2^-K in the state dtype: a new tensor."""
        return state.to(self.dtype).mul_(1 / self.scale)

    def hand_out(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """The tokens as a tensor that nothing here writes to again."""
        return self.tokens(state).to(dtype)

    def source(self, state: State) -> Tensor:
        """The tokens x_i that function i saw, from the state after it."""
        return self.tokens(state.previous)

    def target(self, state: State, in_place: bool) -> State:
        """Where `advance` shall write the next state: over X_{i-1} if that may be."""
        if in_place and state.previous is not state.current:
            return State(state.previous, state.current)
        return State(torch.empty_like(state.current), state.current)

    def advance(self, state: State, f: Tensor, out: State, keep: bool) -> Tensor | None:
        """Writes X_{i+1} to out.current (which may be state.previous).

        Returns the packed remainders if they are to be kept: uint8, bits * ceil(n / 8) bytes
        for every tile of n elements.
        """
        bits = self.bits if keep else 0
        remainders = f.new_empty(_remainder_bytes(bits, f.numel(), f), dtype=torch.uint8)
        start = 0
        for target, now, before, branch in _tiles(out.current, *state, f):
            source = before.double()
            image = self._encode(source)
            size = packed_bytes(bits, len(now))
            if size:
                rest = source.sub_(self._preimage(image)).int()
                pack(rest, bits, remainders[start : start + size])
            target.copy_(self._function(branch, now).add_(image.int()))
            start += size
        return remainders if keep else None

    def retreat(self, state: State, f: Tensor, remainders: Tensor) -> State:
        """(X_i, X_{i-1}) from (X_{i+1}, X_i): X_{i-1} is written over X_{i+1}."""
        start = 0
        for after, now, branch in _tiles(*state, f):
            image = after - self._function(branch, now)
            before = self._preimage(image.double()).int()
            size = packed_bytes(self.bits, len(now))
            if size:
                before += unpack(remainders[start : start + size], self.bits, len(now))
            after.copy_(before)
            start += size
        return State(state.previous, state.current)

    def deviation(self, state: State, f: Tensor) -> Tensor:
        """At a chain's start: how many elements break X_1 - G_0(X_0) = enc(X_0); int64 scalar."""
        count = torch.zeros((), dtype=torch.int64, device=f.device)
        for after, now, branch in _tiles(*state, f):
            image = self._encode(now.double()).int()
            count += (after - self._function(branch, now)).ne(image).sum()
        return count

    def outside(self, state: Tensor) -> Tensor:
        """Which samples hold a value outside the range: bool [B, 1, ...]."""
        low, high = torch.aminmax(state.unsqueeze(-1).flatten(1), dim=1)
        limit = 1 << RANGE_BITS
        return ((low <= -limit) | (high >= limit)).view(-1, *[1] * (state.ndim - 1))

    def _function(self, f: Tensor, x: Tensor) -> Tensor:
        """G of one tile, int32."""
        return _to_grid(f.double().mul_(self.scale).add_(x.double(), alpha=self.alpha))

    def _encode(self, x: Tensor) -> Tensor:
        """enc(X), fp64 to fp64."""
        return (x * self.beta).add_(0.5).floor_()

    def _preimage(self, image: Tensor) -> Tensor:
        """The smallest X with enc(X) = image, fp64 to fp64."""
        return (image - 0.5).div_(self.beta).ceil_()


def _to_grid(value: Tensor) -> Tensor:
    """fp64 grid steps to int32, ties to even. NaN and overflow end outside the allowed range."""
    return value.round_().nan_to_num_(INT32.max).clamp_(INT32.min, INT32.max).int()


def _tile(tensor: Tensor) -> int:
    return CPU_TILE if tensor.device.type == "cpu" else max(tensor.numel(), 1)


def _tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat views of the tensors, cut alike."""
    size = _tile(tensors[0])
    return zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)


def _remainder_bytes(bits: int, numel: int, like: Tensor) -> int:
    whole, rest = divmod(numel, _tile(like))
    return whole * packed_bytes(bits, _tile(like)) + packed_bytes(bits, rest)
