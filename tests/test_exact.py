"""The arithmetic and its certificate against their specification."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from dr2dist.reversible import Chain, Setting, State
from dr2dist.reversible.arithmetic.checksum import OutputChecksum
from dr2dist.reversible.arithmetic.exact import CPU_TILE, ExactArithmetic
from dr2dist.reversible.arithmetic.packing import pack, packed_bytes, unpack
from dr2dist.reversible.arithmetic.setting import growth, round_coefficient
from tests.chain_helpers import Liar
from tests.functions import Mlp, make_chain, tokens

BETAS = [2.0**-16, 3 * 2.0**-16, 0.001, 0.03, 0.1, 0.125, 0.2, 0.37, 0.5, 0.63, 0.7, 0.99, 1.0]

CPU = torch.device("cpu")


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
    remainders = arithmetic.advance(State(now, before), f, out, True, OutputChecksum.on(CPU))
    assert remainders is not None
    exact = Fraction(round_coefficient(beta))
    bits = (math.ceil(1 / exact) - 1).bit_length()
    assert 2**bits >= 1 / exact > (2 ** (bits - 1) if bits else 0)
    assert remainders.nbytes == bits * math.ceil(len(now) / 8)
    for x, image in zip(before[-90:].tolist(), out.current[-90:].tolist(), strict=True):
        assert image == math.floor(exact * x + Fraction(1, 2))
    assert len(now) < CPU_TILE
    rest = int(unpack(remainders, bits, len(now)).max())
    assert rest < 1 / exact
    if beta > 0.01:  # 200,000 random values meet every remainder
        assert rest == math.ceil(1 / exact) - 1
    state = arithmetic.retreat(
        State(out.current.clone(), now.clone()),
        f,
        remainders,
        OutputChecksum.on(CPU),
    )
    assert torch.equal(state.current, now)
    assert torch.equal(state.previous, before)


@pytest.mark.parametrize("count", [int(1.4 * CPU_TILE), int(1.6 * CPU_TILE), 5 * CPU_TILE + 3])
def test_a_step_over_several_tiles_is_undone(count: int) -> None:
    arithmetic = ExactArithmetic(Setting(0.5, 0.1), torch.float32)
    before, now = states(count, 1) // 4, states(count, 2) // 4
    f = torch.randn(now.shape)
    out = State(torch.empty_like(now), now)
    remainders = arithmetic.advance(State(now, before), f, out, True, OutputChecksum.on(CPU))
    assert remainders is not None
    assert remainders.nbytes == 4 * math.ceil(len(now) / 8)
    state = arithmetic.retreat(
        State(out.current, now.clone()), f, remainders, OutputChecksum.on(CPU)
    )
    assert torch.equal(state.previous, before)


def test_a_step_is_undone_for_any_multiple_of_the_coefficients_step() -> None:
    generator = torch.Generator().manual_seed(0)
    before, now = states(3000, 1), states(3000, 2)
    f = torch.zeros(now.shape)
    for step in torch.randint(1, 2**16 + 1, (200,), generator=generator).tolist():
        arithmetic = ExactArithmetic(Setting(0.0, step * 2.0**-16), torch.float32)
        out = State(torch.empty_like(now), now)
        remainders = arithmetic.advance(State(now, before), f, out, True, OutputChecksum.on(CPU))
        assert remainders is not None
        state = arithmetic.retreat(
            State(out.current, now.clone()), f, remainders, OutputChecksum.on(CPU)
        )
        assert torch.equal(state.previous, before), step


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
    arithmetic.advance(State(now, torch.zeros_like(now)), f, out, False, None)
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
        ({"chunk_size": 1.5}, "chunk_size is 1.5"),
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


def messages(chain: Chain) -> tuple[str, ...]:
    certificate = chain.certificate()
    assert certificate is not None
    assert certificate.failures == len(certificate.messages)
    return certificate.messages


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_one_deviating_element_names_its_function_wherever_it_is(bf16: bool) -> None:
    for liar in range(8):
        torch.manual_seed(0)
        functions = [Liar() if index == liar else Mlp() for index in range(8)]
        chain = Chain(functions, name="body", on_failure="record")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = chain(tokens())
        output.sum().backward()
        assert messages(chain) == (
            f"body: the recompute of function {liar} differs from its first run",
        )


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_flipped_remainder_bit_is_found_at_any_of_many_functions(bf16: bool) -> None:
    chain = make_chain(count=24, alpha=0.5, beta=0.5, name="body", chunk_size=2)
    chain.on_failure = "record"
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for place in (1, 2, 3, 7, 12, 17, 21, 22, 23):
            recorded = chain.record(tokens(5, 3))
            recorded.tape.remainders.part(place, place % 3)[place % 8] ^= 1 << place % 8
            chain.reverse(recorded)
            assert messages(chain), place


def test_bad_values_are_reported_also_where_nothing_is_reversed() -> None:
    nan = tokens()
    nan[0, 0, 0] = torch.nan
    for frozen in (0, 3):
        # These coefficients bring any state back into the range with the first function.
        chain = make_chain(count=4, alpha=0.1, beta=0.1, name="body", on_failure="record")
        for function in list(chain.functions)[:frozen]:
            function.requires_grad_(False)
        for x in (tokens() * 1e9, -tokens() * 1e9):
            chain(x).sum().backward()
            assert messages(chain)[0].startswith("body: the state after function 0 left")
        for x in (nan, tokens() * torch.inf):
            chain(x).sum().backward()
            assert messages(chain)[0] == "body: the tokens that enter are not finite"
        chain(tokens()).sum().backward()
        assert messages(chain) == ()


def test_inference_gives_nan_for_the_sample_that_left_the_range() -> None:
    chain = make_chain(count=6, alpha=0.3, beta=0.3, chunk_size=2)
    x = tokens()
    with torch.no_grad():
        good = chain(x)
        for bad in (torch.nan, torch.inf, 1e9):
            spoilt = x.clone()
            spoilt[3, 1, 4] = bad
            output, (tap,) = chain(spoilt, taps=[2])
            others = [0, 1, 2, 4]
            assert torch.equal(output[others], good[others])
            assert output[3].isnan().all() and tap[3].isnan().all()
        chain.functions[2].scale.data[0] = torch.nan
        assert chain(x).isnan().all()
