"""The GPU kernels have the same bits as the plain arithmetic; without a GPU, interpreted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from dr2dist.reversible import Setting, State
from dr2dist.reversible.arithmetic import triton_kernels
from dr2dist.reversible.arithmetic.checksum import OutputChecksum
from dr2dist.reversible.arithmetic.exact import ExactArithmetic
from dr2dist.reversible.arithmetic.fused import FusedArithmetic
from dr2dist.reversible.arithmetic.scales import NEAR, ChannelScales
from dr2dist.reversible.arithmetic.triton_kernels import ELEMENTS, weighted_bits
from dr2dist.reversible.budget.costs import Watermark
from dr2dist.reversible.certificate import NEVER, Flags
from tests.functions import make_chain, tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SETTINGS = [(0.5, 0.5), (0.9, 0.1), (0.0, 1.0), (0.63, 0.37), (0.0, 2.0**-16), (0.999, 0.001)]


def states(count: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**29), 2**29, (count,), generator=generator).int().to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
def test_a_step_forth_and_back_has_the_plain_versions_bits(
    alpha: float, beta: float, dtype: torch.dtype, device: torch.device
) -> None:
    setting = Setting(alpha, beta, gain="consistent")
    plain = ExactArithmetic(setting, torch.float32)
    kernels = FusedArithmetic(setting, torch.float32)
    for count in (1, 13, 2048, 5003):
        factor = setting.factor if count % 2 and dtype != torch.float64 else 1.0
        before, now = states(count, 1, device), states(count, 2, device)
        f = (torch.randn(count, generator=torch.Generator().manual_seed(3)) * 50).to(device, dtype)
        found = []
        for arithmetic in (plain, kernels):
            seen, again = OutputChecksum.on(f.device), OutputChecksum.on(f.device)
            out = State(torch.empty_like(now), now.clone())
            remainders = arithmetic.advance(State(now, before), f, out, True, seen, factor)
            assert remainders.nbytes == setting.remainder_bits * -(-count // 8)
            x = arithmetic.tokens(out.current, torch.float32)
            state = arithmetic.retreat(
                State(out.current.clone(), now.clone()), f, remainders, again, factor
            )
            assert torch.equal(state.current, now)
            assert torch.equal(state.previous, before)
            assert torch.equal(seen.bits, again.bits)
            found.append((out.current, x))
            assert float(seen.largest) == out.current.abs().max()
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
def test_a_step_of_16_bits_has_the_plain_versions_bits_and_peaks(
    alpha: float, beta: float, dim: int, device: torch.device
) -> None:
    setting, shape = Setting(alpha, beta, state_bits=16, gain="consistent"), (3, 24, 35)
    generator = torch.Generator().manual_seed(4)
    scales = ChannelScales(tuple(n % 21 - 15 for n in range(shape[dim])), dim)
    h, f, more = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    steps = scales.values(device, onto_grid=False).view(-1, *[1] * (2 - dim)) * 2**12
    found = []
    for kind in (ExactArithmetic, FusedArithmetic):
        arithmetic = kind(setting, torch.float32, scales)
        state = arithmetic.start(h * steps)
        seen, again = (
            OutputChecksum.on(device, torch.zeros(shape[dim], dtype=torch.int64).to(device))
            for _ in range(2)
        )
        state = State(state.current, arithmetic.start(more * steps).current)
        out = State(torch.empty_like(state.current), state.current.clone())
        factor = setting.factor if dim == 2 else 1.0
        remainders = arithmetic.advance(state, f * steps, out, True, seen, factor)
        x = arithmetic.tokens(out.current, torch.float32)
        found.append([*state, out.current, x, seen.peaks])
        assert out.current.dtype == torch.int16
        if float(seen.largest) < arithmetic.limit:
            back = arithmetic.retreat(
                State(out.current.clone(), out.previous), f * steps, remainders, again, factor
            )
            assert torch.equal(back.previous, state.previous)
            assert torch.equal(seen.bits, again.bits)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert int(found[0][-1].max()) >= NEAR  # the test is of channels near their limit, too


@pytest.mark.parametrize("dim", [1, 2])
def test_steps_of_16_bits_back_to_a_chains_start(dim: int, device: torch.device) -> None:
    setting, shape = Setting(0.9, 0.1, state_bits=16), (2, 33, 40)
    scales = ChannelScales(tuple(n % 7 - 14 for n in range(shape[dim])), dim)
    generator = torch.Generator().manual_seed(5)
    steps = scales.values(device, onto_grid=False).view(-1, *[1] * (2 - dim)) * 2**11
    h, f = (torch.randn(shape, generator=generator).to(device) * steps for _ in range(2))
    for kind in (ExactArithmetic, FusedArithmetic):
        arithmetic = kind(setting, torch.float32, scales)
        state = arithmetic.start(h)
        out = State(torch.empty_like(state.current), state.current)
        arithmetic.advance(state, f, out, False, OutputChecksum.on(f.device))
        assert int(arithmetic.deviation(out, f, OutputChecksum.on(f.device))) == 0
        out.current[0, 3, 7] += 1
        assert int(arithmetic.deviation(out, f, OutputChecksum.on(f.device))) == 1


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_become_states_and_states_tokens_as_in_the_plain_version(
    dtype: torch.dtype, state_dtype: torch.dtype, device: torch.device
) -> None:
    h = torch.randn(5003, generator=torch.Generator().manual_seed(1)).to(device, dtype) * 3000
    h[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.5 / 2**18])
    setting = Setting(0.5, 0.5)
    plain, kernels = (kind(setting, state_dtype) for kind in (ExactArithmetic, FusedArithmetic))
    before = h.clone()
    state = plain.start(h).current
    assert torch.equal(state, kernels.start(h).current)
    assert torch.equal(h[1:], before[1:])  # both leave the tokens as they were given
    for asked in DTYPES:
        if asked != torch.bfloat16 or device.type == "cuda":  # the interpreter cuts bits off there
            assert torch.equal(plain.tokens(state, asked), kernels.tokens(state, asked))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
def test_a_chains_start_is_compared_in_one_pass(
    alpha: float, beta: float, dtype: torch.dtype, device: torch.device
) -> None:
    setting = Setting(alpha, beta)
    now, count = states(5003, 2, device), 5003
    f = (torch.randn(count, generator=torch.Generator().manual_seed(3)) * 50).to(device, dtype)
    kernels = FusedArithmetic(setting, torch.float32)
    first, again, seen = (OutputChecksum.on(device) for _ in range(3))
    out = State(torch.empty_like(now), now)
    kernels.advance(State(now, now), f, out, False, first)
    reached = State(out.current, now)
    assert int(kernels.deviation(reached, f, again)) == 0
    assert torch.equal(first.bits, again.bits)
    for index in (0, 2047, 5002):
        out.current[index] += 1
    assert int(kernels.deviation(reached, f, seen)) == 3
    plain = ExactArithmetic(setting, torch.float32)
    assert int(plain.deviation(reached, f, OutputChecksum.on(f.device))) == 3


def test_nothing_as_large_as_the_tensors_is_made_on_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_kernels, "launch", lambda *_, **__: None)
    count = 1 << 24
    f = torch.empty(count, dtype=torch.bfloat16, device="meta")
    now, before = (torch.empty(count, dtype=torch.int32, device="meta") for _ in range(2))
    kernels, state = FusedArithmetic(Setting(0.5, 0.5), torch.float32), State(now, before)
    rest = torch.empty(count // 8, dtype=torch.uint8, device="meta")
    for call in (
        lambda: kernels.deviation(state, f, OutputChecksum.on(f.device)),
        lambda: kernels.retreat(state, f, rest, OutputChecksum.on(f.device)),
        lambda: kernels.sums(state),
        lambda: weighted_bits(f, 0),
        lambda: kernels.advance(state, f, State(before, now), False, OutputChecksum.on(f.device)),
    ):
        with Watermark() as mark:
            call()
        # A few numbers of 8 bytes for each program.
        assert mark.peak <= 64 * count // ELEMENTS


def splitmix64(value: int) -> int:
    """The number that Steele, Lea and Flood's generator gives from a state (OOPSLA 2014)."""
    mask = (1 << 64) - 1
    mixed = (value + 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)


@pytest.mark.parametrize("place", [0, 1, 4097, 2**31 + 5, 2**40])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32])
def test_a_sum_weights_each_element_by_its_place(
    dtype: torch.dtype, place: int, device: torch.device
) -> None:
    value = (torch.randn(2500, generator=torch.Generator().manual_seed(5)) * 1000).to(dtype)
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = value.view(sizes[value.element_size()]).tolist()
    total = sum((splitmix64(place + i) | 1) * each for i, each in enumerate(bits)) % 2**64
    assert int(weighted_bits(value.to(device), place)) % 2**64 == total


def test_sums_in_pieces_are_the_sum_of_the_whole(device: torch.device) -> None:
    value = torch.randn(6000, generator=torch.Generator().manual_seed(6), dtype=torch.bfloat16)
    value = value.to(device)
    kernels = FusedArithmetic(Setting(0.5, 0.5), torch.float32)
    pieces, now = OutputChecksum.on(device), states(6000, 1, device)
    for start, stop in ((0, 100), (100, 4000), (4000, 6000)):
        part = now[start:stop]
        out = State(torch.empty_like(part), part)
        kernels.advance(State(part, part), value[start:stop], out, False, pieces)
    assert torch.equal(weighted_bits(value, 0), pieces.bits)


def changes(f: Tensor, seed: int) -> Tensor:
    """One element changed in one bit, or two so that a plain sum of their bits stays."""
    chance = random.Random(seed)
    bits = f.view({2: torch.int16, 4: torch.int32}[f.element_size()]).clone()
    one, other = chance.sample(range(len(bits)), 2)
    kind = chance.randrange(3)
    if kind == 0:
        bits[one] ^= 1 << chance.randrange(8 * f.element_size() - 1)
    if kind == 1:
        step = 1 << chance.randrange(8)
        bits[one] += step
        bits[other] -= step
    if kind == 2:
        bits[one], bits[other] = bits[other].clone(), bits[one].clone()
    changed = bits.view(f.dtype)
    return changes(f, seed + 1_000_003) if torch.equal(bits.view(f.dtype), f) else changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_change_of_an_output_is_seen_by_each_kernel(
    dtype: torch.dtype, device: torch.device
) -> None:
    kernels = FusedArithmetic(Setting(0.5, 0.5), torch.float32)
    f = torch.randn(2100, generator=torch.Generator().manual_seed(7)).to(device, dtype)
    now, first = states(2100, 1, device), OutputChecksum.on(device)
    out = State(torch.empty_like(now), now)
    rest = kernels.advance(State(now, now), f, out, True, first)
    for seed in range(60):
        changed = changes(f, seed)
        seen = OutputChecksum.on(f.device)
        if seed % 3 == 0:
            kernels.retreat(State(out.current.clone(), now), changed, rest, seen)
        elif seed % 3 == 1:
            kernels.deviation(State(out.current, now), changed, seen)
        else:
            seen.bits.add_(weighted_bits(changed, 0))
        assert not torch.equal(seen.bits, first.bits), seed


class Placed:
    """Stands for a kernel; notes of which tensor the device was the current one."""

    def __init__(self, kernel: Any, current: list[Tensor], log: list[bool]) -> None:
        self.kernel, self.current, self.log = kernel, current, log

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            given = [x for x in arguments if isinstance(x, Tensor)]
            self.log.append(bool(self.current) and self.current[-1].device == given[0].device)
            self.kernel[grid](*arguments, **constants)

        return launch


def test_kernels_are_launched_on_the_device_of_their_tensors(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    current: list[Tensor] = []
    log: list[bool] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr("torch.cuda.device_of", device_of)
    kernels = ("start", "tokens", "advance", "retreat", "deviation", "sum_bits")
    for name in kernels:
        kernel = Placed(getattr(triton_kernels, name), current, log)
        monkeypatch.setattr(triton_kernels, name, kernel)
    arithmetic = FusedArithmetic(Setting(0.5, 0.5), torch.float32)
    state = arithmetic.start(torch.ones(9, device=device))
    f = arithmetic.tokens(state.current, torch.float32)
    out = State(torch.empty_like(state.current), state.current)
    rest = arithmetic.advance(state, f, out, True, OutputChecksum.on(f.device))
    arithmetic.deviation(out, f, OutputChecksum.on(f.device))
    arithmetic.retreat(out, f, rest, OutputChecksum.on(f.device))
    weighted_bits(f, 0)
    assert log == [True] * len(kernels)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6, -1e6])
def test_what_is_not_allowed_is_noted_in_16_bits(value: float, device: torch.device) -> None:
    scales = ChannelScales((0,) * 30)
    for kind in (ExactArithmetic, FusedArithmetic):
        arithmetic = kind(Setting(0.5, 0.5, state_bits=16), torch.float32, scales)
        now = torch.ones(100, 30, dtype=torch.int16, device=device)
        f = torch.zeros(100, 30, device=device)
        f[50, 7] = value
        flags = Flags(f.device, 30)
        seen = OutputChecksum.on(f.device, flags.peaks)
        out = State(torch.empty_like(now), now)
        arithmetic.advance(State(now, now), f, out, False, seen)
        flags.note_functions(3, seen.largest[None], arithmetic.limit)
        assert flags.tensor.tolist()[:2] == [3, NEVER if abs(value) == 1e6 else 3]
        assert bool(arithmetic.outside(out.current)[50])
        peak = 10**6 + (1 if value > 0 else -1) if abs(value) == 1e6 else 0
        assert flags.peaks.tolist() == [0] * 7 + [peak] + [0] * 22


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6, -1e6])
def test_what_is_not_allowed_is_noted(value: float, device: torch.device) -> None:
    kernels = FusedArithmetic(Setting(0.5, 0.5), torch.float32)
    now = states(3000, 1, device)
    f = torch.zeros(3000, device=device)
    f[2500] = value
    flags, seen, out = Flags(f.device), OutputChecksum.on(f.device), State(now.clone(), now)
    kernels.advance(State(now, now), f, out, False, seen)
    flags.note_functions(3, seen.largest[None], kernels.limit)
    assert flags.tensor.tolist()[:2] == [3, NEVER if abs(value) == 1e6 else 3]
    assert bool(kernels.outside(out.current.view(3000, 1))[2500])


def test_a_chain_on_kernels_trains_like_one_without(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    results = []
    for kind in (ExactArithmetic, FusedArithmetic):
        monkeypatch.setattr(
            "dr2dist.reversible.segment.arithmetic_of",
            lambda setting, dtype, device, scales, wide, kind=kind: kind(
                setting, dtype, scales, wide
            ),
        )
        chain = make_chain(5, alpha=0.7, beta=0.3, chunk_size=2).to(device)
        x = tokens(5).to(device).requires_grad_()
        output = chain(x)
        output.square().sum().backward()
        certificate = chain.certificate()
        assert certificate is not None
        assert certificate.failures == 0
        assert certificate.verified
        assert x.grad is not None
        results.append([output, x.grad, *(p.grad for p in chain.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
