"""Chains against autograd, against each other's memory modes, and inside larger programs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dr2dist.reversible import Chain, reversal
from dr2dist.reversible.arithmetic.setting import growth
from tests.bounds import chain_bound, float_bound
from tests.chain_helpers import Storages, error, plain
from tests.functions import PAIRS, WIDTH, Mlp, assert_same, make_chain, run, smooth, tokens


# Batches of 5 in slices of 2 and 3: the last one is shorter.
@pytest.mark.parametrize("chunk_size", [None, 2, 3])
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
    assert results[0]["x"].abs().min() > 0
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pair", PAIRS)
def test_reconstruction_is_the_input_on_the_grid(pair: tuple[float, float], bf16: bool) -> None:
    for chunk_size in (None, 2):
        chain = make_chain(
            dropout=0.1, drop_path=0.2, alpha=pair[0], beta=pair[1], chunk_size=chunk_size
        )
        x = tokens()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            recorded = chain.record(x)
        bits = chain.setting.remainder_bits
        # The first function needs no remainder: its previous state is its own input.
        per_slice = [len(part) * 7 * WIDTH for part in x.split(chunk_size or len(x))]
        assert recorded.tape.remainder_bytes == 23 * sum(bits * -(-n // 8) for n in per_slice)
        assert torch.equal(chain.reverse(recorded), torch.round(x * 2**18) / 2**18)
        certificate = chain.certificate()
        assert certificate is not None and certificate.verified and not certificate.failures
        assert all(parameter.grad is None for parameter in chain.parameters())


@pytest.mark.parametrize("pair", PAIRS)
def test_branches_matter(pair: tuple[float, float]) -> None:
    chain = make_chain(alpha=pair[0], beta=pair[1])
    x = tokens()
    _, states = chain(x, taps=range(24))
    before = zip(chain.functions, [x, *states], strict=False)
    # A state is the sum of its start and 24 branches, which grows where alpha + beta > 1.
    least = 1 / 25 / growth(*pair, 24)
    assert min(function(state).norm() / state.norm() for function, state in before) > least


@pytest.mark.parametrize(
    ("arithmetic", "memory"), [("exact", "reverse"), ("float", "store"), ("float", "checkpoint")]
)
@pytest.mark.parametrize("pair", PAIRS)
def test_gradients_are_those_of_the_equations_in_fp64(
    pair: tuple[float, float], arithmetic: str, memory: str
) -> None:
    chain = make_chain(alpha=pair[0], beta=pair[1], arithmetic=arithmetic, memory=memory)
    found = run(chain, tokens(), loss=smooth, taps=[3])
    wanted = reference(copy.deepcopy(chain).double(), tap=3)
    bound = chain_bound(chain.setting, len(chain.functions))
    for name in ("output", "x", "bias"):
        assert error(found[name], wanted[name]) < bound
    assert error(found["taps"], wanted["taps"]) < bound
    assert error(list(found["grads"].values()), wanted["grads"]) < bound


def reference(chain: Chain, tap: int) -> dict[str, Any]:
    """What `run` gives with the smooth loss, by the equations in fp64."""
    x = tokens().double().requires_grad_()
    bias = torch.linspace(-1, 1, WIDTH).double().requires_grad_()
    output, tapped = plain(chain, x, (tap,), bias=bias)
    of_x, of_bias, *grads = torch.autograd.grad(
        smooth(output, tapped), [x, bias, *chain.parameters()]
    )
    return {"output": output, "taps": tapped, "x": of_x, "bias": of_bias, "grads": grads}


@pytest.mark.parametrize(
    ("pair", "memory"),
    [
        *((pair, memory) for pair in PAIRS for memory in ("store", "checkpoint")),
        ((0.0, 1.0), "reverse"),
        ((0.3, 0.7), "reverse"),
    ],
)
def test_float_arithmetic_in_fp64_is_the_equations(pair: tuple[float, float], memory: str) -> None:
    chain = make_chain(alpha=pair[0], beta=pair[1], arithmetic="float", memory=memory).double()
    x = tokens().double().requires_grad_()
    bias = torch.linspace(-1, 1, WIDTH).double().requires_grad_()
    output, tapped = chain(x, taps=[3], bias=bias)
    assert output.dtype == torch.float64
    smooth(output, tapped).backward()
    wanted = reference(chain, tap=3)
    bound = chain_bound(chain.setting, len(chain.functions), torch.float64)
    assert error(output, wanted["output"]) < bound
    assert error(x.grad, wanted["x"]) < bound
    assert error(bias.grad, wanted["bias"]) < bound
    assert error([parameter.grad for parameter in chain.parameters()], wanted["grads"]) < bound


def test_exact_arithmetic_of_fp64_tokens_errs_by_the_grid_alone() -> None:
    errors, bounds = [], []
    for fraction_bits in (18, 24):
        chain = make_chain(count=8, alpha=0.5, beta=0.5, fraction_bits=fraction_bits).double()
        x = tokens().double().requires_grad_()
        bias = torch.linspace(-1, 1, WIDTH).double().requires_grad_()
        output, tapped = chain(x, taps=[3], bias=bias)
        assert output.dtype == torch.float64
        smooth(output, tapped).backward()
        assert chain.certificate().failures == 0
        grads = [parameter.grad for parameter in chain.parameters()]
        errors.append(error(grads, reference(chain, tap=3)["grads"]))
        bounds.append(chain_bound(chain.setting, 8, torch.float64))
    assert all(found < bound for found, bound in zip(errors, bounds, strict=True))
    # 2^6 finer, where roundings in floating point would err alike.
    assert errors[0] / errors[1] > 2**6 / 8


def test_conventional_float_is_the_plain_residual_network() -> None:
    for memory in ("store", "checkpoint"):
        chain = make_chain(alpha=1.0, beta=0.0, arithmetic="float", memory=memory)
        x = tokens().requires_grad_()
        wanted = x
        for function in chain.functions:
            wanted = wanted + function(wanted)
        found = chain(x)
        bound = float_bound(len(chain.functions))
        assert error(found, wanted) < bound
        one = torch.autograd.grad(smooth(found, []), x)[0]
        assert error(one, torch.autograd.grad(smooth(wanted, []), x)[0]) < bound


def test_drift_of_float_reversal_is_reported() -> None:
    for pair, drifts in (((0.9, 0.1), True), ((0.0, 1.0), False)):
        chain = make_chain(alpha=pair[0], beta=pair[1], arithmetic="float")
        run(chain, tokens())
        certificate = chain.certificate()
        assert certificate.failures == 0 and certificate.remainder_bytes == 0
        # At beta 0.1 a rounding would grow 10^24 times; at beta 1 it does not.
        assert (certificate.drift > 1) == drifts
        assert (certificate.drift < float_bound(len(chain.functions))) != drifts


@pytest.mark.parametrize("noise", [{"dropout": 0.5}, {"drop_path": 0.5}])
def test_randomness_is_drawn_once_a_pass_and_replayed(noise: dict[str, float]) -> None:
    chain = make_chain(count=4, **noise)
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


def test_randomness_of_a_frozen_prefix_moves_on() -> None:
    outputs = {}
    for memory in ("reverse", "store", "checkpoint"):
        torch.manual_seed(3)
        chain = Chain([Mlp(dropout=0.5), Mlp()], memory=memory)
        chain.functions[0].requires_grad_(False)
        outputs[memory] = [chain(tokens()), chain(tokens()), torch.get_rng_state()]
        outputs[memory][1].sum().backward()
        assert not torch.equal(outputs[memory][0], outputs[memory][1])
    assert_same(outputs["reverse"], outputs["store"])
    assert_same(outputs["reverse"], outputs["checkpoint"])


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


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("beta", [0.1, 0.2, 0.5, 1.0])
def test_no_storage_but_remainders_and_a_sum_stays_for_a_function(
    beta: float, chunk_size: int | None
) -> None:
    x = tokens(6, 9)
    held = {}
    for count in (12, 24):
        chain = make_chain(
            count=count, dropout=0.1, alpha=1 - beta, beta=beta, chunk_size=chunk_size
        )
        with Storages() as storages:
            output = chain(x)
            held[count] = storages.alive
        del output
        assert storages.alive == 0, "a dropped pass frees everything at once"
    sizes = [len(part) * 9 * WIDTH for part in x.split(chunk_size or len(x))]
    remainders = sum(chain.setting.remainder_bits * -(-size // 8) for size in sizes)
    assert held[24] - held[12] == 12 * (remainders + 8)


def test_two_chains_in_a_row_are_one_after_the_other() -> None:
    grads = []
    for memory in ("reverse", "store"):
        first = make_chain(count=3, dropout=0.1, memory=memory)
        second = make_chain(count=3, dropout=0.1, seed=4, memory=memory)
        x = tokens().requires_grad_()
        torch.manual_seed(0)
        second(first(x)[:, 1:]).sin().sum().backward()
        assert first.certificate().failures == second.certificate().failures == 0
        grads.append([x.grad, *(p.grad for chain in (first, second) for p in chain.parameters())])
    assert_same(grads[0], grads[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint_of_torch(reentrant: bool) -> None:
    chain = make_chain(count=3, dropout=0.1)
    grads = []
    for wrapped in (False, True):
        chain.zero_grad(set_to_none=True)
        x = tokens().requires_grad_()
        torch.manual_seed(0)
        if wrapped:
            output = checkpoint(lambda x: chain(x.sin()).cos(), x, use_reentrant=reentrant)
        else:
            output = chain(x.sin()).cos()
        output.sum().backward()
        assert chain.certificate().failures == 0
        grads.append([x.grad, *(parameter.grad for parameter in chain.parameters())])
    assert_same(grads[0], grads[1])


def test_input_and_output_may_be_changed_in_place_while_the_pass_waits() -> None:
    for arithmetic in ("exact", "float"):
        chain = make_chain(count=4, alpha=0.0, beta=1.0, arithmetic=arithmetic)
        found = []
        for change in (False, True):
            x = tokens().requires_grad_()
            inner = x * 2
            output, (tap,) = chain(inner, taps=[-1])
            if change:
                with torch.no_grad():
                    inner.zero_()
                output.mul_(1.0).add_(7)
                tap.add_(3)
            (output.sum() + tap.sum()).backward()
            assert chain.certificate().failures == 0
            found.append(x.grad)
        assert_same(found[0], found[1])


def test_a_gradient_of_a_tap_alone_may_have_any_strides() -> None:
    chain, found = make_chain(3), []
    for permuted in (False, True):
        x = tokens().requires_grad_()
        _, (tap,) = chain(x, taps=[1])
        given = tap.transpose(1, 2).contiguous() if permuted else tap
        with pytest.MonkeyPatch.context() as patch:
            couple = reversal.couple

            def checked(target: Tensor, dx: Tensor, *rest: Any) -> None:
                assert target.is_contiguous() and dx.is_contiguous()
                couple(target, dx, *rest)  # noqa: B023

            patch.setattr(reversal, "couple", checked)
            given.square().sum().backward()
        found.append(x.grad)
    assert_same(*found)


def test_taps_may_repeat_and_count_from_the_end() -> None:
    chain = make_chain(count=5)
    grads = []
    for taps, weights in (([1, 1, -1], (1, 2, 3)), ([1, 4], (3, 3))):
        x = tokens().requires_grad_()
        output, tapped = chain(x, taps=taps)
        assert torch.equal(tapped[-1], output)
        sum(
            weight * tap.sin().sum() for weight, tap in zip(weights, tapped, strict=True)
        ).backward()
        grads.append(x.grad)
    assert error(grads[0], grads[1]) < float_bound(5)
    assert isinstance(chain(tokens(), taps=[]), Tensor)
    with pytest.raises(ValueError, match="tap 5 is outside the 5 functions"):
        chain(tokens(), taps=[5])


def test_gradient_of_the_input_alone() -> None:
    chain = make_chain(count=4)
    x = tokens(batch=1).requires_grad_()
    wanted = torch.autograd.grad(smooth(plain(chain, x)[0], []), x)[0]
    chain.requires_grad_(False)
    found = torch.autograd.grad(smooth(chain(x), []), x)[0]
    assert error(found, wanted) < chain_bound(chain.setting, 4)
    assert all(parameter.grad is None for parameter in chain.parameters())


def test_a_chain_of_nothing_passes_gradients_on() -> None:
    x = tokens().requires_grad_()
    output = Chain([])(x)
    assert (output - x).abs().max() <= 2**-19
    output.backward(torch.full_like(output, 3))
    assert torch.equal(x.grad, torch.full_like(x, 3))


class Stop(torch.autograd.Function):
    """Gives no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_no_gradient_from_above_is_none_below() -> None:
    x = tokens().requires_grad_()
    Stop.apply(make_chain(count=2)(x)).backward()
    assert x.grad is None


def test_batched_names_only_sides_that_are_given() -> None:
    with pytest.raises(ValueError, match="'nope', which is not a side"):
        make_chain(count=2)(tokens(), batched=["nope"], bias=torch.ones(WIDTH))


def test_slices_keep_the_rows_of_a_sample_together() -> None:
    class PerSample(nn.Module):
        """Looks at the rows of each sample together."""

        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return (x + x.unflatten(0, (-1, 3)).mean(1).repeat_interleave(3, 0)).tanh()

    x = torch.randn(12, 5, requires_grad=True)
    for setting, sizes in (
        ({}, {12}),
        ({"chunk_size": 1}, {3}),
        ({"chunk_size": 3}, {9, 3}),
    ):
        calls: list[int] = []
        chain = Chain([PerSample(), PerSample()], alpha=0.5, beta=0.5, **setting)
        chain(x, rows=3).sum().backward()
        assert set(calls[-4:]) <= sizes and all(count % 3 == 0 for count in calls[-4:])
        certificate = chain.certificate()
        assert certificate is not None and certificate.failures == 0
    chain = Chain([PerSample()], chunk_size="auto", chunk_budget=4000)
    with pytest.raises(ValueError, match="3 rows of the batch are one sample"):
        chain(x, rows=3)
