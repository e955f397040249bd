"""Triton kernels of exact arithmetic, and how they are launched.

Each program has a share of the elements: ELEMENTS of them, BYTES bytes of a plane of remainders.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 256
"""Of a plane of remainders, a program's share: 8 elements each."""

ELEMENTS = 8 * BYTES


def weighted_bits(value: Tensor, place: int) -> Tensor:
    """The sum of a contiguous tensor's bits, each element's times a weight: int64 scalar.

    Element i's bits, as a signed integer, count splitmix64(place + i) | 1 times, all modulo 2^64:
    odd weights see every change of one element, and weights that differ by place see two that
    would cancel.
    """
    total = torch.zeros((), dtype=torch.int64, device=value.device)
    launch(sum_bits, value, value, total, place, value.numel(), share=BYTES)
    return total


def couple_gradients(
    target: Tensor, dx: Tensor, of_x: Tensor | None, alpha: float, beta: float
) -> None:
    """See gradient.couple."""
    launch(
        gradient,
        target,
        target,
        dx,
        dx if of_x is None else of_x.contiguous(),
        target.numel(),
        alpha,
        beta,
        wide=tl.float64 if target.dtype == torch.float64 else tl.float32,
        through=of_x is not None,
        kept=beta != 0,
        block=ELEMENTS,
    )


def launch(kernel: Any, like: Tensor, *arguments: Any, **constants: Any) -> None:
    """Runs a kernel, a program for each ELEMENTS of `like`, on that tensor's device.

    Triton itself takes the current device and its stream, wherever the tensors are.
    """
    with torch.cuda.device_of(like):
        kernel[_grid(like)](*arguments, **constants)


def _grid(tensor: Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), ELEMENTS),)


@triton.jit
def start(  # type: ignore[no-untyped-def]
    h,
    state,
    scales,
    count,
    channels: tl.constexpr,
    inner: tl.constexpr,
    narrow: tl.constexpr,
    block: tl.constexpr,
):
    """Tokens to X_0."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    scale = _of_channel(scales, at, channels, inner)
    value = tl.load(h + at, mask=at < count).to(tl.float64) * scale
    held = _nearest(_held(value, narrow))
    tl.store(state + at, held.to(state.dtype.element_ty), mask=at < count)


@triton.jit
def tokens(  # type: ignore[no-untyped-def]
    state,
    x,
    steps,
    count,
    channels: tl.constexpr,
    inner: tl.constexpr,
    wide: tl.constexpr,
    block: tl.constexpr,
):
    """A state's tokens: rounded to `wide` first, as everywhere, and then to x's own dtype."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    step = _of_channel(steps, at, channels, inner).to(wide)
    value = tl.load(state + at, mask=at < count).to(wide) * step
    tl.store(x + at, value.to(x.dtype.element_ty), mask=at < count)


@triton.jit
def gradient(  # type: ignore[no-untyped-def]
    target,
    dx,
    of_x,
    count,
    alpha,
    beta,
    wide: tl.constexpr,
    through: tl.constexpr,
    kept: tl.constexpr,
    block: tl.constexpr,
):
    """See gradient.couple. through, kept: whether of_x, and the target, count."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    total = tl.load(dx + at, mask=inside).to(wide) * tl.cast(alpha, wide)
    if kept:
        total += tl.load(target + at, mask=inside).to(wide) * tl.cast(beta, wide)
    if through:
        total += tl.load(of_x + at, mask=inside).to(wide)
    tl.store(target + at, total.to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["place"])
def advance(  # type: ignore[no-untyped-def]
    before,
    now,
    f,
    out,
    remainders,
    sums,
    largest,
    peaks,
    scales,
    place,
    count,
    alpha,
    beta,
    channels: tl.constexpr,
    inner: tl.constexpr,
    narrow: tl.constexpr,
    peaked: tl.constexpr,
    bits: tl.constexpr,
    share: tl.constexpr,
):
    """A step forth, its remainders in `bits` planes, and what it notes of f and of the state: in 16
    bits, the peaks of channels near their limit. largest: of fp64, as int64, which order alike."""
    octet, at = _places(share)
    inside = at < count
    source, x, branch = _loaded(before, now, f, at, inside)
    image = _image(source, beta)
    scale = _of_channel(scales, at, channels, inner)
    total = _function(branch, x, alpha, scale) + image
    if peaked:
        _note_peaks(total, peaks, at, inside, channels, inner)
    total = tl.where(total == total, total, float("inf"))
    _store_bits(source - _preimage(image, beta), octet, remainders, count, bits)
    tl.atomic_add(sums, _weighted(branch, at, place))
    tl.atomic_max(largest, tl.max(tl.abs(total)).to(tl.int64, bitcast=True))
    tl.store(out + at, _held(total, narrow).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["place"])
def retreat(  # type: ignore[no-untyped-def]
    after,
    now,
    f,
    remainders,
    sums,
    scales,
    place,
    count,
    alpha,
    beta,
    channels: tl.constexpr,
    inner: tl.constexpr,
    bits: tl.constexpr,
    share: tl.constexpr,
):
    """A step back, over the state after it, and the sum of f's bits."""
    octet, at = _places(share)
    inside = at < count
    total, x, branch = _loaded(after, now, f, at, inside)
    scale = _of_channel(scales, at, channels, inner)
    before = _preimage(total - _function(branch, x, alpha, scale), beta)
    found = before.to(tl.int32) + _load_bits(octet, remainders, count, bits)
    tl.atomic_add(sums, _weighted(branch, at, place))
    tl.store(after + at, found.to(after.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["place"])
def deviation(  # type: ignore[no-untyped-def]
    after,
    now,
    f,
    deviations,
    sums,
    scales,
    place,
    count,
    alpha,
    beta,
    channels: tl.constexpr,
    inner: tl.constexpr,
    share: tl.constexpr,
):
    """How many elements a chain's first step would give another value, and the sum of f's bits."""
    _, at = _places(share)
    inside = at < count
    found, x, branch = _loaded(after, now, f, at, inside)
    scale = _of_channel(scales, at, channels, inner)
    total = _function(branch, x, alpha, scale) + _image(x, beta)
    tl.atomic_add(deviations, tl.sum((total != found).to(tl.int64)))
    tl.atomic_add(sums, _weighted(branch, at, place))


@triton.jit(do_not_specialize=["place"])
def sum_bits(value, total, place, count, share: tl.constexpr):  # type: ignore[no-untyped-def]
    """See weighted_bits."""
    _, at = _places(share)
    element = tl.load(value + at, mask=at < count, other=0)
    tl.atomic_add(total, _weighted(element, at, place))


@triton.jit
def _places(share: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's bytes of a plane, [octets], and their elements, [octets, 8]."""
    octet = tl.program_id(0).to(tl.int64) * share + tl.arange(0, share)
    return octet, octet[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _loaded(state, now, f, at, inside):  # type: ignore[no-untyped-def]
    """Elements of two states in fp64, and of f in its own dtype; zeros outside."""
    one = tl.load(state + at, mask=inside, other=0).to(tl.float64)
    other = tl.load(now + at, mask=inside, other=0).to(tl.float64)
    return one, other, tl.load(f + at, mask=inside, other=0)


@triton.jit
def _of_channel(  # type: ignore[no-untyped-def]
    values, at, channels: tl.constexpr, inner: tl.constexpr
):
    """The value of each element's channel, fp64."""
    return tl.load(values + at // inner % channels).to(tl.float64)


@triton.jit
def _note_peaks(  # type: ignore[no-untyped-def]
    total, peaks, at, inside, channels: tl.constexpr, inner: tl.constexpr
):
    """Raises the peaks of channels that are near their limit; infinity and NaN are no peaks."""
    size = tl.abs(total)
    near = inside & (size >= 16384.0) & (size < float("inf"))
    whole = tl.minimum(tl.where(near, size, 0.0), 1099511627776.0).to(tl.int64)
    tl.atomic_max(peaks + at // inner % channels, whole, mask=near)


@triton.jit
def _function(branch, x, alpha, scale):  # type: ignore[no-untyped-def]
    """G in fp64."""
    return _nearest(branch.to(tl.float64) * scale + x * _double(alpha))


@triton.jit
def _nearest(value):  # type: ignore[no-untyped-def]
    """1.5 * 2^52 leaves no room for a fraction: adding it rounds to nearest even."""
    return (value + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def _image(source, beta):  # type: ignore[no-untyped-def]
    return tl.floor(source * _double(beta) + 0.5)


@triton.jit
def _preimage(image, beta):  # type: ignore[no-untyped-def]
    inverse = 1.0 / _double(beta)
    return tl.ceil(image * inverse - (inverse * 0.5 + 0.000003814697265625))


@triton.jit
def _double(value):  # type: ignore[no-untyped-def]
    return tl.cast(value, tl.float64)


@triton.jit
def _held(total, narrow: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a state can hold; NaN ends outside the range."""
    total = tl.where(total == total, total, float("inf"))
    if narrow:
        held = tl.minimum(tl.maximum(total, -32767.0), 32767.0)
    else:
        most = tl.full([], 2147483647.0, tl.float64)  # a bare number would be one of fp32: 2^31
        held = tl.minimum(tl.maximum(total, -2147483648.0), most)
    return held


@triton.jit
def _weighted(branch, at, place):  # type: ignore[no-untyped-def]
    """A program's sum of its elements' bits, each times the odd weight of its place.

    What lies outside the tensor was loaded as zeros and adds nothing. Products wrap at 2^64.
    """
    mixed = (at + place).to(tl.uint64) + 0x9E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
    weight = (mixed ^ (mixed >> 31)) | 1
    return tl.sum(_bits(branch) * weight.to(tl.int64, bitcast=True))


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
