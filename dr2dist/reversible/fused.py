"""Exact arithmetic on a GPU: each step of a state is one Triton kernel, one read and one write.

The same bits as the plain version (`dr2dist/reversible/exact.py`) for every state in range; only
the layout of the packed remainders differs. Compared with it under Triton's interpreter; what
these kernels save has not been measured on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dr2dist.reversible.certificate import Witness
from dr2dist.reversible.exact import ExactArithmetic
from dr2dist.reversible.packing import packed_bytes
from dr2dist.reversible.state import State

BYTES = 256
"""Of a plane of remainders, a program's share: 8 elements each."""

ELEMENTS = 8 * BYTES


class FusedArithmetic(ExactArithmetic):
    """The coupling in kernels. Remainders are planes of one bit, 8 neighbours to a byte.

    Coefficients travel as fp32, which holds every multiple of 2^-16 up to 1, and every 2^k.
    """

    def tokens(self, state: Tensor) -> Tensor:
        """See ExactArithmetic."""
        x = torch.empty(state.shape, dtype=self.dtype, device=state.device)
        _tokens[_grid(x)](state, x, x.numel(), 1 / self.scale, block=ELEMENTS)
        return x

    def advance(
        self, state: State, f: Tensor, out: State, keep: bool, seen: Witness | None
    ) -> Tensor | None:
        """See ExactArithmetic. A state outside the range ends there in any case."""
        bits = self.bits if keep else 0
        count = f.numel()
        remainders = f.new_empty(packed_bytes(bits, count), dtype=torch.uint8)
        sums, extremes = _notes(f)
        _advance[_grid(f)](
            state.previous,
            state.current,
            f,
            out.current,
            remainders,
            sums,
            extremes,
            count,
            self.alpha,
            self.beta,
            self.scale,
            bits=bits,
            share=BYTES,
        )
        if seen:
            seen.summed(sums, extremes)
        return remainders if keep else None

    def retreat(self, state: State, f: Tensor, remainders: Tensor, seen: Witness) -> State:
        """See ExactArithmetic."""
        sums, _ = _notes(f)
        _retreat[_grid(f)](
            state.current,
            state.previous,
            f,
            remainders,
            sums,
            f.numel(),
            self.alpha,
            self.beta,
            self.scale,
            bits=self.bits,
            share=BYTES,
        )
        seen.summed(sums)
        return State(state.previous, state.current)


def _grid(tensor: Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), ELEMENTS),)


def _notes(f: Tensor) -> tuple[Tensor, Tensor]:
    """(int64 [programs], fp64 [2, programs]), for each program's sum of bits, and extremes."""
    programs = _grid(f)[0]
    sums = torch.empty(programs, dtype=torch.int64, device=f.device)
    return sums, torch.empty(2, programs, dtype=torch.float64, device=f.device)


@triton.jit
def _tokens(state, x, count, step, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    value = tl.load(state + at, mask=at < count).to(x.dtype.element_ty)
    tl.store(x + at, value * tl.cast(step, x.dtype.element_ty), mask=at < count)


@triton.jit
def _advance(  # type: ignore[no-untyped-def]
    before,
    now,
    f,
    out,
    remainders,
    sums,
    extremes,
    count,
    alpha,
    beta,
    scale,
    bits: tl.constexpr,
    share: tl.constexpr,
):
    octet, at = _places(share)
    inside = at < count
    source = tl.load(before + at, mask=inside, other=0).to(tl.float64)
    x = tl.load(now + at, mask=inside, other=0).to(tl.float64)
    branch = tl.load(f + at, mask=inside, other=0)
    image = tl.floor(source * tl.cast(beta, tl.float64) + 0.5)
    total = _function(branch, x, alpha, scale) + image
    total = tl.where(total == total, total, float("inf"))
    _store_bits(source - _preimage(image, beta), octet, remainders, count, bits)
    program = tl.program_id(0)
    tl.store(sums + program, tl.sum(_bits(branch)))
    tl.store(extremes + program, tl.min(total))
    tl.store(extremes + tl.num_programs(0) + program, tl.max(total))
    held = tl.minimum(tl.maximum(total, -2147483648.0), 2147483647.0)
    tl.store(out + at, held.to(tl.int32), mask=inside)


@triton.jit
def _retreat(  # type: ignore[no-untyped-def]
    after,
    now,
    f,
    remainders,
    sums,
    count,
    alpha,
    beta,
    scale,
    bits: tl.constexpr,
    share: tl.constexpr,
):
    octet, at = _places(share)
    inside = at < count
    total = tl.load(after + at, mask=inside, other=0).to(tl.float64)
    x = tl.load(now + at, mask=inside, other=0).to(tl.float64)
    branch = tl.load(f + at, mask=inside, other=0)
    before = _preimage(total - _function(branch, x, alpha, scale), beta)
    found = before.to(tl.int32) + _load_bits(octet, remainders, count, bits)
    tl.store(sums + tl.program_id(0), tl.sum(_bits(branch)))
    tl.store(after + at, found, mask=inside)


@triton.jit
def _places(share: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's bytes of a plane, [octets], and their elements, [octets, 8]."""
    octet = tl.program_id(0).to(tl.int64) * share + tl.arange(0, share)
    return octet, octet[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _function(branch, x, alpha, scale):  # type: ignore[no-untyped-def]
    """G in fp64. 1.5 * 2^52 leaves no room for a fraction: adding it rounds to nearest even."""
    value = branch.to(tl.float64) * tl.cast(scale, tl.float64) + x * tl.cast(alpha, tl.float64)
    return (value + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def _preimage(image, beta):  # type: ignore[no-untyped-def]
    inverse = 1.0 / tl.cast(beta, tl.float64)
    return tl.ceil(image * inverse - (inverse * 0.5 + 0.000003814697265625))


@triton.jit
def _bits(branch):  # type: ignore[no-untyped-def]
    """The elements' bits as int64."""
    if branch.dtype.primitive_bitwidth == 64:
        found = branch.to(tl.int64, bitcast=True)
    elif branch.dtype.primitive_bitwidth == 32:
        found = branch.to(tl.int32, bitcast=True).to(tl.int64)
    else:
        found = branch.to(tl.int16, bitcast=True).to(tl.int64)
    return found


@triton.jit
def _store_bits(rest, octet, remainders, count, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    octets = (count + 7) // 8
    value = rest.to(tl.int32)
    for bit in tl.static_range(bits):
        plane = ((value >> bit) & 1) << tl.arange(0, 8)[None, :]
        packed = tl.sum(plane, axis=1).to(tl.uint8)
        tl.store(remainders + bit * octets + octet, packed, mask=octet < octets)


@triton.jit
def _load_bits(octet, remainders, count, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    octets = (count + 7) // 8
    value = tl.zeros([octet.shape[0], 8], dtype=tl.int32)
    for bit in tl.static_range(bits):
        packed = tl.load(remainders + bit * octets + octet, mask=octet < octets, other=0)
        value += ((packed.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1) << bit
    return value
