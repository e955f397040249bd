"""Remainders packed into bytes, with as many bits as they need.

A width is cut into parts of 8, 4, 2 and 1 bits; each part is a plane in which contiguous parts
of the tensor share a byte, which costs far less time than neighbours that share one. A plane is
folded: its second half is shifted onto its first, until it is as small as its bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _planes(bits: int, count: int) -> Iterator[tuple[int, int, int]]:
    """(bits of the plane, its lowest bit, its bytes) for each plane that `bits` falls into."""
    low = 0
    for width in (8, 4, 2, 1):
        while bits - low >= width:
            yield width, low, width * _octets(count)
            low += width


def _octets(count: int) -> int:
    return (count + 7) // 8


def packed_bytes(bits: int, count: int) -> int:
    """Bytes that `count` values of `bits` bits take: bits * ceil(count / 8)."""
    return bits * _octets(count)


def pack(values: Tensor, bits: int, out: Tensor) -> None:
    """Packs the values into `out`.

    values: flat [count], whole numbers 0 .. 2^bits - 1 of any dtype.
    out: uint8 [packed_bytes(bits, count)].
    """
    start = 0
    # Several planes are each cut out of the values; and bytes come faster from int32 than fp64.
    values = values.int()
    plane = torch.empty(8 * _octets(len(values)), dtype=torch.uint8, device=values.device)
    plane[len(values) :] = 0
    for width, low, size in _planes(bits, len(values)):
        shifted = values >> low if low else values
        if bits - low > width:
            shifted = shifted & ((1 << width) - 1)
        plane[: len(values)].copy_(shifted)
        _fold(plane, width, out[start : start + size])
        start += size


def _fold(plane: Tensor, width: int, out: Tensor) -> None:
    """Packs bytes of `width` bits; the plane is used up."""
    shift = 4
    while shift > width:
        half = len(plane) // 2
        plane = plane[:half].add_(plane[half:], alpha=1 << shift)
        shift //= 2
    if width == 8:
        out.copy_(plane)
    else:
        torch.add(plane[: len(out)], plane[len(out) :], alpha=1 << shift, out=out)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The values that `pack` was given: uint8 [count], int32 above 8 bits."""
    start = 0
    total: Tensor | None = None
    for width, low, size in _planes(bits, count):
        plane = _unfold(packed[start : start + size], width, 8 * _octets(count))
        if bits > 8:
            plane = plane.int()
        total = plane if total is None else total.add_(plane, alpha=1 << low)
        start += size
    if total is None:
        return packed.new_zeros(count)
    return total[:count]


def _unfold(packed: Tensor, width: int, count: int) -> Tensor:
    plane = packed.new_empty(count)
    plane[: len(packed)] = packed
    size, shift = len(packed), width
    while size < count:
        torch.bitwise_right_shift(plane[:size], shift, out=plane[size : 2 * size])
        plane[: 2 * size].bitwise_and_(_kept(width, shift))
        size, shift = 2 * size, 2 * shift
    return plane


def _kept(width: int, shift: int) -> int:
    """The places of a byte that hold values of `width` bits once a fold by `shift` is undone."""
    return sum(((1 << width) - 1) << place for place in range(0, 8, 2 * shift))
