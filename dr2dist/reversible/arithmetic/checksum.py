"""Sums of bits, weighted by position: two runs that differ have different sums.

The sum is taken modulo 2^64, of each element's bits read as a signed integer d times an odd 64-bit
weight. One changed element always shows: an odd weight times a change of less than 2^64 is never 0.
Two changed elements hide only if w_i d_i = -w_j d_j modulo 2^64. For weights drawn at random that
has a chance of 2^-(63 - z), with z the number of zero bits that both changes end with: at most
2^-32 for fp32 and int32, and 2^-48 for bf16, reached when only signs were flipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dr2dist.reversible.constants import Constants

BLOCK = 1 << 18
"""Elements whose weights are drawn one by one; those of the next block are the same ones times
a number of the block's."""

_BITS_AS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


_known = Constants()


def _weights(device: torch.device) -> Tensor:
    """Odd random numbers, int64 [BLOCK]; always the same ones."""

    def make() -> Tensor:
        low, high = -(1 << 63), (1 << 63) - 1
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randint(low, high, (BLOCK,), generator=generator, device="cpu")
        return (drawn | 1).to(device)

    return _known.get(device, make)


def _block_weight(block: int) -> int:
    """The odd factor of a block, as a signed 64-bit integer: SplitMix64 (Steele, Lea and Flood,
    OOPSLA 2014) of its number."""
    mask = (1 << 64) - 1
    z = (block + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    z = (z ^ z >> 31) | 1
    return z - (1 << 64) if z >> 63 else z


def weighted_sums(value: Tensor, place: int = 0, scratch: Tensor | None = None) -> Iterator[Tensor]:
    """Weighted sums of parts of a contiguous tensor: int64 scalars on its device, to be added up.

    place: of its first element among all whose sums are added. However a tensor is cut, the sums
    come to the same; on a GPU the weights are those of the fused kernels. scratch: 8-byte elements
    to overwrite, as many as the value or a block has.
    """
    if value.device.type == "cuda":
        # What a kernel has summed in one run may be summed here in the other.
        from dr2dist.reversible.arithmetic.triton_kernels import weighted_bits

        yield weighted_bits(value, place)
        return
    flat = value.view(_BITS_AS[value.element_size()]).view(-1)
    weights, start = _weights(value.device), 0
    while start < len(flat):
        block, offset = divmod(place + start, BLOCK)
        count = min(BLOCK - offset, len(flat) - start)
        if scratch is None:
            scratch = torch.empty(min(BLOCK, len(flat)), dtype=torch.int64, device=value.device)
        wide = scratch.view(torch.int64)[:count].copy_(flat[start : start + count])
        yield wide.mul_(weights[offset : offset + count]).sum().mul_(_block_weight(block))
        start += count


def checksum(value: Tensor) -> Tensor:
    """The weighted sum of a whole contiguous tensor: int64 scalar on its device."""
    return torch.stack([*weighted_sums(value), value.new_zeros((), dtype=torch.int64)]).sum()


class OutputChecksum:
    """What the slices of one function showed, gathered while they are in the cache anyway.

    bits: int64 scalar, 0 at first, that the weighted sum of all outputs' bits is added to. largest:
    fp64 scalar, raised to the largest magnitude of states, or of outputs; not finite where one was
    not; None in a second run, which shows no other. peaks: int64 [channels], raised to the largest
    |X| that states of 16 bits had, of channels that were near their limit. place: how many elements
    of the function's output it has seen so far.

    On a GPU kernels add and raise by atomic operations: in any order they come to the same.
    """

    def __init__(
        self, bits: Tensor, largest: Tensor | None = None, peaks: Tensor | None = None
    ) -> None:
        self.bits, self.largest, self.peaks, self.place = bits, largest, peaks, 0

    @classmethod
    def on(cls, device: torch.device, peaks: Tensor | None = None) -> OutputChecksum:
        """Of a single function."""
        largest = torch.zeros((), dtype=torch.float64, device=device)
        return cls(torch.zeros((), dtype=torch.int64, device=device), largest, peaks)

    def output(self, f: Tensor) -> None:
        """F's raw output, or a part of it: its bits' sum, and its largest magnitude."""
        self.again(f)
        self._magnitude(*torch.aminmax(f))

    def again(self, f: Tensor, scratch: Tensor | None = None) -> None:
        """The same from a recompute: the sum alone. scratch: as `weighted_sums` takes it."""
        for part in weighted_sums(f, self.place, scratch):
            self.bits.add_(part)
        self.advance(f.numel())

    def state(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The fixed-point state made of F's output, in fp64, before it becomes integers: (least,
        largest).

        NaN and infinity of the one are in the other.
        """
        low, high = torch.aminmax(state)
        self._magnitude(low, high)
        return low, high

    def note_peaks(self, peaks: Tensor) -> None:
        """The largest |X| of channels near their limit, 0 for others: int64 [channels]."""
        if self.peaks is not None:
            torch.maximum(self.peaks, peaks, out=self.peaks)

    def advance(self, count: int) -> None:
        """So many more elements of the output were seen."""
        self.place += count

    def _magnitude(self, low: Tensor, high: Tensor) -> None:
        assert self.largest is not None
        largest = torch.maximum(-low, high).double()
        torch.maximum(self.largest, largest, out=self.largest)
