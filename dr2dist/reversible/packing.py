"""Remainders packed into bytes, with as many bits as they need.

A width is cut into parts of 8, 4, 2 and 1 bits; each part is a plane in which contiguous parts
of the tensor share a byte, which costs far less time than neighbours that share one.
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

    values: flat int32 [count], each in 0 .. 2^bits - 1. out: uint8 [packed_bytes(bits, count)].
    """
    start = 0
    padded = torch.nn.functional.pad(values, (0, -len(values) % 8))
    for width, low, size in _planes(bits, len(values)):
        plane = ((padded >> low) & ((1 << width) - 1)).to(torch.uint8).view(8 // width, size)
        target = out[start : start + size]
        target.copy_(plane[0])
        for place in range(1, 8 // width):
            target |= plane[place] << (place * width)
        start += size


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The int32 [count] values that `pack` was given."""
    values = torch.zeros(8 * _octets(count), dtype=torch.int32, device=packed.device)
    start = 0
    for width, low, size in _planes(bits, count):
        plane = packed[start : start + size]
        parts = values.view(8 // width, size)
        for place in range(8 // width):
            parts[place] |= ((plane >> (place * width)) & ((1 << width) - 1)).int() << low
        start += size
    return values[:count]
