"""Chains against autograd, and against each other's memory modes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dr2dist.reversible import Chain
from tests.functions import PAIRS, WIDTH, assert_same, make_chain, run, smooth, tokens


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pair", PAIRS)
def test_all_memory_modes_agree_in_every_bit(
    pair: tuple[float, float], bf16: bool, chunk_size: int | None
) -> None:
    results = []
    for memory in ("reverse", "store", "checkpoint"):
        chain = make_chain(
            dropout=0.1,
            drop_path=0.2,
            alpha=pair[0],
            beta=pair[1],
            memory=memory,
            chunk_size=chunk_size,
        )
        results.append(run(chain, tokens(), bf16, taps=[3, 23, 10]))
        certificate = chain.certificate()
        assert certificate is not None and certificate.failures == 0
        assert certificate.verified == (memory == "reverse")
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("pair", PAIRS)
def test_reconstruction_is_the_input_on_the_grid(pair: tuple[float, float]) -> None:
    for chunk_size in (None, 2):
        chain = make_chain(
            dropout=0.1, drop_path=0.2, alpha=pair[0], beta=pair[1], chunk_size=chunk_size
        )
        x = tokens()
        recorded = chain.record(x)
        bits = chain.setting.remainder_bits
        # The first function needs no remainder: its previous state is its own input.
        per_slice = [len(part) * 7 * WIDTH for part in x.split(chunk_size or len(x))]
        assert recorded.tape.remainder_bytes == 23 * sum(bits * -(-n // 8) for n in per_slice)
        assert torch.equal(chain.reverse(recorded), torch.round(x * 2**18) / 2**18)
        certificate = chain.certificate()
        assert certificate is not None and certificate.verified and not certificate.failures
        assert all(parameter.grad is None for parameter in chain.parameters())


def test_branches_matter() -> None:
    chain = make_chain(alpha=0.9, beta=0.1)
    x = tokens()
    for function in chain.functions:
        assert function(x).norm() / x.norm() > 0.1


def plain(
    chain: Chain, x: Tensor, bias: Tensor, alpha: float, beta: float, taps: tuple[int, ...]
) -> tuple[Tensor, list[Tensor]]:
    """The two equations, by plain autograd."""
    y = beta * x
    tapped = []
    for index, function in enumerate(chain.functions):
        x, y = function(x, bias=bias) + alpha * x + y, beta * x
        if index in taps:
            tapped.append(x)
    return x, tapped


@pytest.mark.parametrize("memory", ["reverse", "store", "checkpoint"])
@pytest.mark.parametrize("pair", PAIRS)
def test_gradients_are_those_of_the_equations_in_fp64(
    pair: tuple[float, float], memory: str
) -> None:
    chain = make_chain(alpha=pair[0], beta=pair[1], memory=memory)
    found = run(chain, tokens(), loss=smooth, taps=[3])
    reference = copy.deepcopy(chain).double()
    x = tokens().double().requires_grad_()
    bias = torch.linspace(-1, 1, WIDTH).double().requires_grad_()
    setting = chain.setting
    output, (tap,) = plain(reference, x, bias, setting.alpha, setting.beta, (3,))
    smooth(output, [tap]).backward()

    def error(one: Tensor, other: Tensor) -> float:
        return float((one.double() - other).norm() / other.norm())

    assert error(found["output"], output.detach()) < 1e-5
    assert error(found["x"], x.grad) < 1e-5
    assert error(found["bias"], bias.grad) < 1e-5
    wanted = [parameter.grad for parameter in reference.parameters()]
    whole = torch.cat([grad.flatten() for grad in wanted])
    assert error(torch.cat([grad.flatten() for grad in found["grads"].values()]), whole) < 1e-5


def test_float_arithmetic_in_fp64_is_the_equations() -> None:
    chain = make_chain(alpha=0.3, beta=0.7, arithmetic="float", memory="reverse").double()
    x = tokens().double().requires_grad_()
    bias = torch.linspace(-1, 1, WIDTH).double().requires_grad_()
    grads = []
    setting = chain.setting
    for output in (
        chain(x, bias=bias),
        plain(chain, x, bias, setting.alpha, setting.beta, ())[0],
    ):
        grads.append(torch.autograd.grad(output.sin().sum(), [x, bias], retain_graph=False))
    for one, other in zip(*grads, strict=True):
        assert (one - other).norm() / other.norm() < 1e-5
    assert chain.certificate().drift < 1e-8


def test_conventional_float_is_the_plain_residual_network() -> None:
    for memory in ("store", "checkpoint"):
        chain = make_chain(alpha=1.0, beta=0.0, arithmetic="float", memory=memory)
        x = tokens().requires_grad_()
        wanted = x
        for function in chain.functions:
            wanted = wanted + function(wanted)
        assert (chain(x) - wanted).abs().max() < 1e-6 * wanted.abs().max()
        one = torch.autograd.grad(chain(x).sin().sum(), x)[0]
        other = torch.autograd.grad(wanted.sin().sum(), x)[0]
        assert (one - other).norm() / other.norm() < 1e-5


def test_drift_of_float_reversal_is_reported() -> None:
    for pair, drifts in (((0.9, 0.1), True), ((0.0, 1.0), False)):
        chain = make_chain(alpha=pair[0], beta=pair[1], arithmetic="float")
        run(chain, tokens())
        certificate = chain.certificate()
        assert certificate.failures == 0 and certificate.remainder_bytes == 0
        assert (certificate.drift > 1) == drifts
        assert (certificate.drift < 1e-5) != drifts


def test_randomness_is_drawn_once_a_pass_and_replayed() -> None:
    chain = make_chain(count=4, dropout=0.5)
    torch.manual_seed(5)
    first = chain(tokens())
    second = chain(tokens())
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(chain(tokens()), first)
    chain.eval()
    state = torch.get_rng_state()
    chain(tokens().requires_grad_()).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


class Functional(nn.Module):
    """A user's function with randomness that no module announces."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x * self.weight, 0.3) + torch.rand(()) * x


def test_randomness_without_a_module_is_replayed_too() -> None:
    grads = []
    for memory in ("reverse", "store"):
        torch.manual_seed(0)
        chain = Chain([Functional() for _ in range(3)], memory=memory)
        chain(tokens()).square().sum().backward()
        grads.append([parameter.grad for parameter in chain.parameters()])
        assert chain.certificate().failures == 0
    assert_same(grads[0], grads[1])
