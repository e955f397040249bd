"""Exact arithmetic: states are fixed point, and what beta discards is kept, packed.

With `x = X * s` and rne = round to nearest, ties to even; s is 2^-K in 32 bits, and in 16 bits a
power of two of each channel:

    G(X)    = rne(g * F(x) / s + alpha * X)          g: 1, or `factor` of the setting
    X_{i+1} = G(X_i) + enc(X_{i-1})                  enc(X) = floor(beta * X + 1/2)
    X_{i-1} = dec(X_{i+1} - G(X_i), r)               dec(y, r) = ceil(y / beta - 1 / (2 beta)) + r

All of it runs in fp64. alpha and g are multiples of 2^-16 and X has 31 bits, so alpha * X and
g * F / s are exact there (of F in fp32) and G rounds its sum once and then to the grid: a fused
multiply-add gives the same bits as a separate one, and only F itself can differ between two runs.
dec uses 1 / beta rounded to fp64; 2^-18 in its offset keeps that error away from the integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dr2dist.reversible.arithmetic.checksum import BLOCK, OutputChecksum, checksum
from dr2dist.reversible.arithmetic.packing import pack, packed_bytes, unpack
from dr2dist.reversible.arithmetic.scales import (
    NEAR,
    ChannelScales,
    Rows,
    channel_peaks,
    inner_size,
)
from dr2dist.reversible.arithmetic.setting import LIMITS, Setting
from dr2dist.reversible.arithmetic.state import State

INT32 = torch.iinfo(torch.int32)
CPU_TILE = BLOCK
"""About how many elements elementwise work takes at a time on a CPU, to stay in a cache."""
GPU_TILE = 1 << 22
"""The same on a GPU, where kernels (`fused.py`) stand for this arithmetic, except in tests."""
PEAK = 1 << 40
"""Peaks of channels are told up to here."""


class ExactArithmetic:
    """The coupling of one residual function, forth and back, for one setting.

    All tensors given are contiguous and of equal shape; `f` is F's raw output in its own dtype.
    dtype: of the tokens. scales: of the channels, for states of 16 bits. wide: states are held in
    32 bits on the grid of these scales, which has the same numbers and no limit to speak of: where
    nothing is to be reversed.
    """

    def __init__(
        self,
        setting: Setting,
        dtype: torch.dtype,
        scales: ChannelScales | None = None,
        wide: bool = False,
    ) -> None:
        self.alpha, self.beta, self.factor = setting.alpha, setting.beta, setting.factor
        self.scales, self.scale = scales, 2.0**setting.fraction_bits
        self.inverse = 1 / setting.beta
        self.bits = setting.remainder_bits
        self.dtype = dtype
        self.narrow = scales is not None and not wide
        self.held = torch.int16 if self.narrow else torch.int32
        self.limit: int = LIMITS[16 if self.narrow else 32]
        self.half = torch.tensor(0.5, dtype=torch.float64)
        self.offset = torch.tensor(-(self.inverse / 2 + 2.0**-18), dtype=torch.float64)

    def start(self, h: Tensor) -> State:
        """(X_0, X_{-1} = X_0) from the tokens h, whatever their float dtype."""
        state = torch.empty(h.shape, dtype=self.held, device=h.device)
        rows = self._rows(h, onto_grid=True)
        for start, target, source in _tiles(rows, state, h.contiguous()):
            doubles = source.to(torch.float64, copy=True)  # h is not ours to write to
            target.copy_(self._clamp(rows.onto(doubles, start).round_()))
        return State(state, state)

    def tokens(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """x = X * s, rounded to the state dtype and then to `dtype`: a new tensor."""
        x = torch.empty(state.shape, dtype=self.dtype, device=state.device)
        rows = self._rows(state, onto_grid=False)
        for start, target, source in _tiles(rows, x, state):
            rows.onto(target.copy_(source), start)
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
        self,
        state: State,
        f: Tensor,
        out: State,
        keep: bool,
        seen: OutputChecksum | None,
        factor: float = 1.0,
    ) -> Tensor | None:
        """Writes X_{i+1} to out.current (which may be state.previous); `seen` looks at all of it.

        factor: g. What leaves the range is noted, and the state then undefined; in 16 bits, and
        where nothing looks, it ends outside the allowed range. Returns the packed remainders if
        they are to be kept: uint8, bits * ceil(n / 8) bytes.
        """
        bits = self.bits if keep else 0
        remainders = f.new_empty(packed_bytes(bits, f.numel()), dtype=torch.uint8)
        rows, place = self._rows(f, onto_grid=True, factor=factor), 0
        room = _Room(rows, f)
        for start, target, now, before, branch in _tiles(rows, out.current, *state, f):
            source = room.cut(0, before).copy_(before)
            image = self._image(source, room.cut(1, before))
            total = self._function(branch, now, room, start).add_(image)
            size = packed_bytes(bits, len(now))
            if size:
                source.sub_(self._preimage(image))
                pack(source, bits, remainders[place : place + size])
            if seen:
                self._look(total, seen, start, f.shape)
                seen.again(branch, room.cut(3, branch))
            else:
                self._clamp(total)
            target.copy_(total)
            place += size
        return remainders if keep else None

    def _look(self, total: Tensor, seen: OutputChecksum, start: int, shape: torch.Size) -> None:
        """Notes a tile's extremes, and in 16 bits the peaks of channels where some are near their
        limit; what is beyond is held there."""
        low, high = seen.state(total)
        if self.narrow and not (float(low) > -NEAR and float(high) < NEAR):
            assert self.scales is not None
            finite = total.nan_to_num(0.0, 0.0, 0.0).clamp_(-PEAK, PEAK)
            seen.note_peaks(_near(_tile_peaks(finite, start, shape, self.scales)))
            self._clamp(total)

    def retreat(
        self,
        state: State,
        f: Tensor,
        remainders: Tensor,
        seen: OutputChecksum,
        factor: float = 1.0,
    ) -> State:
        """(X_i, X_{i-1}) from (X_{i+1}, X_i): X_{i-1} is written over X_{i+1}. factor: g."""
        rows, place = self._rows(f, onto_grid=True, factor=factor), 0
        room = _Room(rows, f)
        for start, after, now, branch in _tiles(rows, *state, f):
            seen.again(branch, room.cut(3, branch))
            image = room.cut(0, after).copy_(after)
            before = self._preimage(image.sub_(self._function(branch, now, room, start)))
            size = packed_bytes(self.bits, len(now))
            if size:
                # The smallest X may have been none of 16 bits.
                before += unpack(remainders[place : place + size], self.bits, len(now))
            after.copy_(before)
            place += size
        return State(state.previous, state.current)

    def deviation(self, state: State, f: Tensor, seen: OutputChecksum) -> Tensor:
        """At a chain's start: how many elements break X_1 - G_0(X_0) = enc(X_0); int64 scalar."""
        count = torch.zeros((), dtype=torch.int64, device=f.device)
        rows = self._rows(f, onto_grid=True)
        room = _Room(rows, f)
        for start, after, now, branch in _tiles(rows, *state, f):
            seen.again(branch, room.cut(3, branch))
            image = self._image(room.cut(0, now).copy_(now), room.cut(1, now))
            count += image.add_(self._function(branch, now, room, start)).ne(after).sum()
        return count

    def sums(self, state: State) -> Tensor:
        """int64 checksums of the state's tensors; X_0 alone where it is its own previous state."""
        parts = state[:1] if state.previous is state.current else state
        return torch.stack([checksum(part) for part in parts])

    def outside(self, state: Tensor) -> Tensor:
        """Which samples hold a value outside the range: bool [B, 1, ...]."""
        low, high = torch.aminmax(state.unsqueeze(-1).flatten(1), dim=1)
        outside = (low <= -self.limit) | (high >= self.limit)
        return outside.view(-1, *[1] * (state.ndim - 1))

    def peaks(self, state: Tensor) -> Tensor | None:
        """The largest |X| of channels near their limit, 0 for others: int64 [channels]; None for
        states of 32 bits."""
        if self.scales is None or not self.narrow:
            return None
        return _near(channel_peaks(state, self.scales.dim).long())

    def _rows(self, like: Tensor, onto_grid: bool, factor: float = 1.0) -> Rows:
        if self.scales is None:
            return Rows(1, factor * (self.scale if onto_grid else 1 / self.scale))
        rows = self.scales.rows(like, onto_grid)
        return rows if factor == 1 else Rows(rows.width, rows.factors * factor)

    def _function(self, f: Tensor, x: Tensor, room: _Room, start: int) -> Tensor:
        """G of one tile, fp64, in two of the room's places."""
        scaled = room.rows.onto(room.cut(2, f).copy_(f), start)
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

    def _clamp(self, value: Tensor) -> Tensor:
        """Grid steps that a state can hold, in place; NaN and overflow end outside the range."""
        low, high = (-self.limit, self.limit) if self.narrow else (INT32.min, INT32.max)
        return value.nan_to_num_(high).clamp_(low, high)


class _Room:
    """Memory for what a tile needs on its way, reused by all tiles: it stays in the cache.

    rows: how F's output is brought onto the grid.
    """

    def __init__(self, rows: Rows, like: Tensor) -> None:
        self.rows = rows
        size = min(_tile(like, rows.width), like.numel())
        self._doubles = torch.empty(4, size, dtype=torch.float64, device=like.device)

    def cut(self, place: int, like: Tensor) -> Tensor:
        """Place 0 .. 3, fp64, as long as a tile."""
        return self._doubles[place, : len(like)]


def _near(peaks: Tensor) -> Tensor:
    return peaks.where(peaks >= NEAR, 0)


def _tile_peaks(total: Tensor, start: int, shape: torch.Size, scales: ChannelScales) -> Tensor:
    """The largest magnitudes of a tile by channel, int64; 0 for channels it has nothing of."""
    count, inner = len(scales.exponents), inner_size(shape, scales.dim)
    if inner == 1:
        return channel_peaks(total.view(-1, count), -1).long()
    of_rows = total.view(-1, inner).abs().amax(1).long()
    channel = torch.arange(len(of_rows), device=total.device).add_(start // inner) % count
    peaks = torch.zeros(count, dtype=torch.int64, device=total.device)
    return peaks.scatter_reduce_(0, channel, of_rows, "amax")


def _tile(tensor: Tensor, width: int) -> int:
    """Elements of all tiles but the last: about as many as they should be, in whole octets and
    rows."""
    wanted = CPU_TILE if tensor.device.type == "cpu" else GPU_TILE
    tiles, unit = max(1, round(tensor.numel() / wanted)), math.lcm(8, width)
    return unit * max(1, math.ceil(tensor.numel() / (unit * tiles)))


def _tiles(rows: Rows, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """(first element, flat views of the tensors), cut alike."""
    size = _tile(tensors[0], rows.width)
    cut = zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)
    return ((number * size, *views) for number, views in enumerate(cut))
