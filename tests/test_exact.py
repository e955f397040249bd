"""The arithmetic against its specification."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from dr2dist.reversible import Setting, State
from dr2dist.reversible.exact import CPU_TILE, ExactArithmetic
from dr2dist.reversible.packing import pack, packed_bytes, unpack
from dr2dist.reversible.setting import growth, round_coefficient

BETAS = [2.0**-16, 3 * 2.0**-16, 0.001, 0.03, 0.1, 0.125, 0.2, 0.37, 0.5, 0.63, 0.7, 0.99, 1.0]


def states(count: int, seed: int) -> torch.Tensor:
    """int32 over the whole allowed range, with its ends and the smallest values."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(-(2**30) + 1, 2**30, (count,), generator=generator)
    small = torch.arange(-40, 40)
    return torch.cat([wide, small, torch.tensor([2**30 - 1, 1 - 2**30])]).int()


@pytest.mark.parametrize("beta", BETAS)
def test_a_step_is_undone_bit_for_bit_with_the_least_bits(beta: float) -> None:
    # alpha 0 and no branch leave X_{i+1} = enc(X_{i-1}): the whole range fits.
    arithmetic = ExactArithmetic(Setting(0.0, beta), torch.float32)
    before, now = states(200_000, 1), states(200_000, 2)
    f = torch.zeros(now.shape)
    out = State(torch.empty_like(now), now)
    remainders = arithmetic.advance(State(now, before), f, out, keep=True)
    assert remainders is not None
    exact = Fraction(round_coefficient(beta))
    bits = (math.ceil(1 / exact) - 1).bit_length()
    assert 2**bits >= 1 / exact > (2 ** (bits - 1) if bits else 0)
    tiles = [len(part) for part in now.split(CPU_TILE)]
    assert remainders.nbytes == sum(bits * math.ceil(n / 8) for n in tiles)
    for x, image in zip(before[-90:].tolist(), out.current[-90:].tolist(), strict=True):
        assert image == math.floor(exact * x + Fraction(1, 2))
    state = arithmetic.retreat(State(out.current.clone(), now.clone()), f, remainders)
    assert torch.equal(state.current, now)
    assert torch.equal(state.previous, before)


def test_bits_for_known_betas() -> None:
    wanted = {1.0: 0, 0.99: 1, 0.5: 1, 0.49: 2, 0.25: 2, 0.2: 3, 0.125: 3, 0.1: 4, 0.0625: 4}
    assert {beta: Setting(0.0, beta).remainder_bits for beta in wanted} == wanted


@pytest.mark.parametrize("bits", range(1, 17))
def test_packing_is_undone_in_bits_times_eighths(bits: int) -> None:
    for count in (1, 7, 8, 9, 1000, 1003):
        generator = torch.Generator().manual_seed(bits * count)
        values = torch.randint(2**bits, (count,), generator=generator, dtype=torch.int32)
        packed = torch.empty(packed_bytes(bits, count), dtype=torch.uint8)
        pack(values, bits, packed)
        assert packed.nbytes == bits * math.ceil(count / 8)
        assert torch.equal(unpack(packed, bits, count), values)


def test_the_function_rounds_the_true_sum_once() -> None:
    setting = Setting(0.63, 0.37, fraction_bits=18)
    arithmetic = ExactArithmetic(setting, torch.float32)
    now = (states(2000, 3) // 4).int()
    f = torch.randn(now.shape, generator=torch.Generator().manual_seed(4)) * 100
    out = State(torch.empty_like(now), now)
    arithmetic.advance(State(now, torch.zeros_like(now)), f, out, keep=False)
    alpha = Fraction(setting.alpha)
    for x, branch, found in zip(now.tolist(), f.tolist(), out.current.tolist(), strict=True):
        true = Fraction(branch) * 2**18 + alpha * x
        assert abs(found - true) <= Fraction(1, 2) + Fraction(1, 2**20)


def test_coefficients_are_rounded_and_conserve_is_exact() -> None:
    for step in range(1, 65537, 97):
        beta = round_coefficient(step / 65537)
        setting = Setting(1 - beta, beta)
        assert setting.alpha + setting.beta == 1
        assert (setting.beta * 65536).is_integer()


def test_what_is_not_allowed_is_refused_with_the_reason() -> None:
    cases = [
        ({"beta": 0.0}, "nothing can reverse"),
        ({"beta": 1.01}, "beta is 1.01"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"fraction_bits": 40}, "fraction_bits is 40"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ]
    for values, message in cases:
        with pytest.raises(ValueError, match=message):
            Setting(**values)
    Setting(1.0, 0.0, "float", "store")


def test_growth_is_that_of_the_recursion() -> None:
    for alpha, beta in ((1.0, 0.1), (0.9, 0.1), (0.5, 0.25)):
        before, now = 1.0, 1.0
        for _ in range(200):
            before, now = now, alpha * now + beta * before
        assert now / before == pytest.approx(growth(alpha, beta, 1), rel=1e-9)
    with pytest.raises(ValueError, match=r"grow .* times over 96 functions"):
        Setting(1.0, 0.1).check_range(96)
    Setting(1.0, 0.1).check_range(24)
    Setting(0.9, 0.1).check_range(1000)
