"""Exact arithmetic: states are int32 fixed point, and what beta discards is kept, packed.

With `x = X * 2^-K` and rne = round to nearest, ties to even:

    G(X)    = rne(F(x) * 2^K + alpha * X)
    X_{i+1} = G(X_i) + enc(X_{i-1})                  enc(X) = floor(beta * X + 1/2)
    X_{i-1} = dec(X_{i+1} - G(X_i), r)               dec(y, r) = ceil(y / beta - 1 / (2 beta)) + r

All of it runs in fp64. alpha is a multiple of 2^-16 and X has 31 bits, so alpha * X and
F * 2^K are exact there and G rounds its sum once and then to the grid: a fused multiply-add
gives the same bits as a separate one, and only F itself can differ between two runs. dec uses
1 / beta rounded to fp64; 2^-18 in its offset keeps that error away from the integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dr2dist.reversible.arithmetic.checksum import BLOCK, OutputChecksum, checksum
from dr2dist.reversible.arithmetic.packing import pack, packed_bytes, unpack
from dr2dist.reversible.arithmetic.setting import RANGE_BITS, Setting
from dr2dist.reversible.arithmetic.state import State

INT32 = torch.iinfo(torch.int32)
CPU_TILE = BLOCK
"""About how many elements elementwise work takes at a time on a CPU, to stay in a cache."""
GPU_TILE = 1 << 22
"""The same on a GPU, where kernels (`fused.py`) stand for this arithmetic, except in tests."""


class ExactArithmetic:
    """The coupling of one residual function, forth and back, for one setting.

    All tensors given are contiguous and of equal shape; `f` is F's raw output in its own dtype.
    """

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        self.alpha, self.beta = setting.alpha, setting.beta
        self.scale = 2.0**setting.fraction_bits
        self.inverse = 1 / setting.beta
        self.bits = setting.remainder_bits
        self.dtype = dtype
        self.half = torch.tensor(0.5, dtype=torch.float64)
        self.offset = torch.tensor(-(self.inverse / 2 + 2.0**-18), dtype=torch.float64)

    def start(self, h: Tensor) -> State:
        """(X_0, X_{-1} = X_0) from the tokens h, whatever their float dtype."""
        state = torch.empty(h.shape, dtype=torch.int32, device=h.device)
        for target, source in _tiles(state, h.contiguous()):
            doubles = source.to(torch.float64, copy=True)  # h is not ours to write to
            target.copy_(_clamp(doubles.mul_(self.scale).round_()))
        return State(state, state)

    def tokens(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """x = X * 2^-K, rounded to the state dtype and then to `dtype`: a new tensor."""
        x = torch.empty(state.shape, dtype=self.dtype, device=state.device)
        for target, source in _tiles(x, state):
            target.copy_(source).mul_(1 / self.scale)
        return x.to(dtype)

    def hand_out(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """The tokens as a tensor that nothing here writes to again."""
        return self.tokens(state, dtype)

    def source(self, state: State, dtype: torch.dtype) -> Tensor:
        """The tokens x_i that function i saw, from the state after it."""
        return self.tokens(state.previous, dtype)

    def reached(self, state: State, dtype: torch.dtype) -> Tensor:
        """The same tokens once `retreat` has been there."""
        return self.tokens(state.previous, dtype)

    def target(self, state: State, in_place: bool) -> State:
        """Where `advance` shall write the next state: over X_{i-1} if that may be."""
        if in_place and state.previous is not state.current:
            return State(state.previous, state.current)
        return State(torch.empty_like(state.current), state.current)

    def advance(
        self, state: State, f: Tensor, out: State, keep: bool, seen: OutputChecksum | None
    ) -> Tensor | None:
        """Writes X_{i+1} to out.current (which may be state.previous); `seen` looks at all of it.

        What is no int32 is noted, and the state then undefined; where nothing looks, it ends
        outside the allowed range.
        Returns the packed remainders if they are to be kept: uint8, bits * ceil(n / 8) bytes.
        """
        bits = self.bits if keep else 0
        remainders = f.new_empty(packed_bytes(bits, f.numel()), dtype=torch.uint8)
        room, start = self._room(f), 0
        for target, now, before, branch in _tiles(out.current, *state, f):
            source = room.cut(0, before).copy_(before)
            image = self._image(source, room.cut(1, before))
            total = self._function(branch, now, room).add_(image)
            size = packed_bytes(bits, len(now))
            if size:
                source.sub_(self._preimage(image))
                pack(source, bits, remainders[start : start + size])
            if seen:
                seen.state(total)
                seen.again(branch, room.cut(3, branch))
            else:
                _clamp(total)
            target.copy_(total)
            start += size
        return remainders if keep else None

    def retreat(self, state: State, f: Tensor, remainders: Tensor, seen: OutputChecksum) -> State:
        """(X_i, X_{i-1}) from (X_{i+1}, X_i): X_{i-1} is written over X_{i+1}."""
        room, start = self._room(f), 0
        for after, now, branch in _tiles(*state, f):
            seen.again(branch, room.cut(3, branch))
            image = room.cut(0, after).copy_(after).sub_(self._function(branch, now, room))
            before = self._preimage(image)
            size = packed_bytes(self.bits, len(now))
            after.copy_(before)
            if size:
                after += unpack(remainders[start : start + size], self.bits, len(now))
            start += size
        return State(state.previous, state.current)

    def deviation(self, state: State, f: Tensor, seen: OutputChecksum) -> Tensor:
        """At a chain's start: how many elements break X_1 - G_0(X_0) = enc(X_0); int64 scalar."""
        count = torch.zeros((), dtype=torch.int64, device=f.device)
        room = self._room(f)
        for after, now, branch in _tiles(*state, f):
            seen.again(branch, room.cut(3, branch))
            image = self._image(room.cut(0, now).copy_(now), room.cut(1, now))
            count += image.add_(self._function(branch, now, room)).ne(after).sum()
        return count

    def sums(self, state: State) -> Tensor:
        """int64 checksums of the state's tensors; X_0 alone where it is its own previous state."""
        parts = state[:1] if state.previous is state.current else state
        return torch.stack([checksum(part) for part in parts])

    def outside(self, state: Tensor) -> Tensor:
        """Which samples hold a value outside the range: bool [B, 1, ...]."""
        low, high = torch.aminmax(state.unsqueeze(-1).flatten(1), dim=1)
        limit = 1 << RANGE_BITS
        return ((low <= -limit) | (high >= limit)).view(-1, *[1] * (state.ndim - 1))

    def _function(self, f: Tensor, x: Tensor, room: _Room) -> Tensor:
        """G of one tile, fp64, in two of the room's places."""
        scaled = room.cut(2, f).copy_(f).mul_(self.scale)
        return scaled.add_(room.cut(3, f).copy_(x), alpha=self.alpha).round_()

    def _image(self, source: Tensor, out: Tensor) -> Tensor:
        """enc(X), fp64: product and sum are exact, so that one pass may do both."""
        return torch.add(self.half, source, alpha=self.beta, out=out).floor_()

    def _preimage(self, image: Tensor) -> Tensor:
        """The smallest X with enc(X) = image, fp64 integers, in place.

        The offset keeps away from integers by more than a product's rounding, so that it makes
        no difference whether that is rounded before the sum.
        """
        return torch.add(self.offset, image, alpha=self.inverse, out=image).ceil_()

    def _room(self, like: Tensor) -> _Room:
        return _Room(min(_tile(like), like.numel()), like.device)


class _Room:
    """Memory for what a tile needs on its way, reused by all tiles: it stays in the cache."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._doubles = torch.empty(4, size, dtype=torch.float64, device=device)

    def cut(self, place: int, like: Tensor) -> Tensor:
        """Place 0 .. 3, fp64, as long as a tile."""
        return self._doubles[place, : len(like)]


def _clamp(value: Tensor) -> Tensor:
    """Grid steps that int32 can hold, in place; NaN and overflow end outside the range."""
    return value.nan_to_num_(INT32.max).clamp_(INT32.min, INT32.max)


def _tile(tensor: Tensor) -> int:
    """Elements of all tiles but the last: about as many as they should be, in whole octets."""
    wanted = CPU_TILE if tensor.device.type == "cpu" else GPU_TILE
    tiles = max(1, round(tensor.numel() / wanted))
    return 8 * max(1, math.ceil(tensor.numel() / (8 * tiles)))


def _tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat views of the tensors, cut alike."""
    size = _tile(tensors[0])
    return zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)
