"""Chains against autograd, against each other's memory modes, and against faults."""

from __future__ import annotations

import copy
import gc
import pickle
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dr2dist.reversible import Chain
from tests.functions import PAIRS, WIDTH, Mlp, make_chain, tokens


def rough(output: Tensor, taps: list[Tensor]) -> Tensor:
    """A loss whose gradient shows every bit of its input."""
    return output.sin().sum() + sum(tap.cos().sum() for tap in taps)


def smooth(output: Tensor, taps: list[Tensor]) -> Tensor:
    """A loss that does not amplify what the grid rounds off."""
    return output.square().mean() + sum(tap.square().mean() for tap in taps)


def run(
    chain: Chain, x: Tensor, bf16: bool = False, loss: Any = rough, **options: Any
) -> dict[str, Any]:
    """One training pass: output, gradients of input, side and parameters, RNG afterwards."""
    chain.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    bias = torch.linspace(-1, 1, WIDTH).requires_grad_()
    torch.manual_seed(11)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        result = chain(x, bias=bias, **options)
    output, taps = result if options.get("taps") else (result, [])
    loss(output, taps).backward()
    grads = {name: p.grad.clone() for name, p in chain.named_parameters() if p.grad is not None}
    return {
        "output": output.detach(),
        "taps": [tap.detach() for tap in taps],
        "x": x.grad,
        "bias": bias.grad,
        "rng": torch.get_rng_state(),
        "grads": grads,
    }


def assert_same(one: Any, other: Any) -> None:
    """Equal in every bit."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    else:
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)


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


class Clock(nn.Module):
    """Cannot be replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * (time.perf_counter_ns() % 1000 + 1) / 1000


def alive() -> int:
    """Bytes of all storages that tensors refer to."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if type(item) in (Tensor, nn.Parameter):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("pair", [(0.9, 0.1), (0.8, 0.2), (0.5, 0.5), (0.0, 1.0)])
def test_a_waiting_pass_holds_remainders_and_eight_bytes_a_function(
    pair: tuple[float, float],
) -> None:
    x = tokens(6, 9)
    held = {}
    for count in (12, 24):
        chain = make_chain(count=count, dropout=0.1, alpha=pair[0], beta=pair[1], chunk_size=4)
        chain(x)  # whatever a first pass allocates for good
        before = alive()
        output = chain(x)
        held[count] = alive() - before
        del output
    remainders = sum(chain.setting.remainder_bits * -(-b * 9 * WIDTH // 8) for b in (4, 2))
    assert held[24] - held[12] == 12 * (remainders + 8)


def test_each_parameter_gets_one_gradient_a_pass() -> None:
    shared = Mlp()
    chain = Chain([Mlp(), shared, Mlp(), shared], chunk_size=2)
    counts: dict[str, int] = {}
    for name, parameter in chain.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _, name=name: counts.update({name: counts.get(name, 0) + 1})
        )
    bias = torch.ones(WIDTH, requires_grad=True)
    chain(tokens(), bias=bias).sum().backward()
    assert counts and set(counts.values()) == {1}
    one = {name: parameter.grad for name, parameter in chain.named_parameters()}
    x = tokens()
    y = chain.setting.beta * x
    for function in chain.functions:
        x, y = function(x, bias=bias) + chain.setting.alpha * x + y, chain.setting.beta * x
    names, parameters = zip(*chain.named_parameters(), strict=True)
    wanted = torch.autograd.grad(x.sum(), parameters)
    for name, grad in zip(names, wanted, strict=True):
        assert torch.allclose(one[name], grad, rtol=1e-3, atol=1e-4), name


def _fault_messages(chain: Chain, x: Tensor, between: Any = None) -> tuple[str, ...]:
    output = chain(x)
    if between is not None:
        between()
    output.sum().backward()
    certificate = chain.certificate()
    assert certificate.failures == len(certificate.messages)
    return certificate.messages


@pytest.mark.parametrize("memory", ["reverse", "checkpoint"])
def test_a_function_that_changes_is_named(memory: str) -> None:
    chain = Chain([Mlp(), Mlp(), Clock(), Mlp()], memory=memory, name="body")
    messages = _fault_messages(chain, tokens())
    assert messages == ("body: the recompute of function 2 differs from its first run",)


def test_a_weight_that_changes_between_the_passes_is_named() -> None:
    chain = make_chain(count=6, name="body")
    messages = _fault_messages(chain, tokens(), lambda: chain.functions[4].scale.data.mul_(2.0**20))
    assert any("function 4 differs" in message for message in messages)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_flipped_remainder_is_found_wherever_it_is(bf16: bool) -> None:
    for place in range(1, 6):
        for pair in ((0.9, 0.1), (0.5, 0.5), (0.3, 0.7)):
            chain = make_chain(count=6, alpha=pair[0], beta=pair[1], name="body")
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                recorded = chain.record(tokens())
            recorded.tape.remainders[place][0][17] ^= 1
            chain.reverse(recorded)
            certificate = chain.certificate()
            assert certificate.failures, (place, pair)
            assert all(message.startswith("body: ") for message in certificate.messages)


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_nan_and_overflow_are_named(arithmetic: str) -> None:
    chain = make_chain(count=6, arithmetic=arithmetic, name="body")
    chain.functions[3].outer.weight.data[0, 0] = float("nan")
    messages = _fault_messages(chain, tokens())
    assert "body: the output of function 3 is not finite" in messages
    if arithmetic == "exact":
        chain = make_chain(count=6, name="body")
        chain.functions[2].scale.data.fill_(1e6)
        assert any("after function 2 left" in line for line in _fault_messages(chain, tokens()))
        chain = make_chain(count=6, name="body")
        assert any(
            "after function 0 left" in line for line in _fault_messages(chain, tokens() * 1e5)
        )


class Counted(Mlp):
    """Counts its calls."""

    calls = 0

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().forward(x, bias)


@pytest.mark.parametrize("memory", ["reverse", "store", "checkpoint"])
def test_a_frozen_prefix_runs_once_and_the_rest_trains(memory: str) -> None:
    torch.manual_seed(0)
    chain = Chain([Counted() for _ in range(6)], memory=memory)
    wanted = run(copy.deepcopy(chain), tokens())["grads"]
    for function in chain.functions[:3]:
        function.requires_grad_(False)
    x = tokens()
    chain(x, bias=torch.linspace(-1, 1, WIDTH)).sin().sum().backward()
    again = 1 if memory == "store" else 2
    assert [function.calls for function in chain.functions] == [1] * 3 + [again] * 3
    assert chain.certificate().failures == 0
    for name, parameter in chain.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, wanted[name])
        else:
            assert parameter.grad is None


def test_an_input_without_gradient_still_trains_and_a_frozen_chain_keeps_no_tape() -> None:
    chain = make_chain(count=3)
    output = chain(tokens())
    assert output.requires_grad
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in chain.parameters())
    chain.requires_grad_(False)
    assert not chain(tokens()).requires_grad
    x = tokens().requires_grad_()
    chain(x).sum().backward()
    assert x.grad is not None


def test_inference_equals_training_and_draws_nothing() -> None:
    chain = make_chain(count=6, chunk_size=2)
    output = chain(tokens().requires_grad_()).detach()
    with torch.no_grad():
        assert torch.equal(chain(tokens()), output)
    assert chain.certificate() is None


def test_open_passes_hold_the_coefficients() -> None:
    chain = make_chain(count=3)
    output = chain(tokens())
    chain.set_coefficients(*(chain.setting.alpha, chain.setting.beta))
    with pytest.raises(RuntimeError, match="waits for its backward"):
        chain.set_coefficients(0.5, 0.5)
    output.sum().backward()
    chain.set_coefficients(0.5, 0.5)
    dropped = chain(tokens())
    del dropped
    gc.collect()
    chain.set_coefficients(0.25, 0.75)
    assert chain.setting.beta == 0.75


@pytest.mark.parametrize("memory", ["reverse", "store", "checkpoint"])
def test_second_backwards_repeat_or_raise(memory: str) -> None:
    chain = make_chain(count=3, dropout=0.2, memory=memory)
    x = tokens().requires_grad_()
    output = chain(x).sin().sum()
    output.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in chain.parameters()]
    output.backward()
    for parameter, grad in zip(chain.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, 2 * grad)
    assert chain.certificate().failures == 0
    with pytest.raises(RuntimeError):
        output.backward()
    output = chain(x)
    output.backward(torch.ones_like(output))
    with pytest.raises(RuntimeError, match="already reversed"):
        output.backward(torch.ones_like(output))
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(chain(x).sum(), x, create_graph=True)


def test_passes_interleave() -> None:
    chain = make_chain(count=4, dropout=0.2)
    single = []
    for seed in (1, 2):
        chain.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        chain(tokens(seed=seed)).sin().sum().backward()
        single.append([parameter.grad.clone() for parameter in chain.parameters()])
    chain.zero_grad(set_to_none=True)
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs.append(chain(tokens(seed=seed)))
    for output in outputs:
        output.sin().sum().backward()
    for parameter, one, two in zip(chain.parameters(), *single, strict=True):
        assert torch.equal(parameter.grad, one + two)


def test_nothing_handed_out_is_written_to() -> None:
    chain = make_chain(count=5)
    for arithmetic in ("exact", "float"):
        chain = make_chain(count=5, arithmetic=arithmetic, alpha=0.0, beta=1.0)
        x = tokens().requires_grad_()
        kept = x.detach().clone()
        output, (tap,) = chain(x, taps=[2])
        values, tapped = output.detach().clone(), tap.detach().clone()
        grad, of_tap = torch.randn_like(output), torch.randn_like(tap)
        given = grad.clone(), of_tap.clone()
        torch.autograd.backward([output, tap], [grad, of_tap])
        assert torch.equal(x, kept)
        assert torch.equal(output, values) and torch.equal(tap, tapped)
        assert torch.equal(grad, given[0]) and torch.equal(of_tap, given[1])


def test_copies_and_pickles_stand_alone() -> None:
    chain = make_chain(count=3)
    pending = chain(tokens())
    for other in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert_same(run(other, tokens()), run(copy.deepcopy(chain), tokens()))
        other.set_coefficients(0.5, 0.5)
    fresh = make_chain(count=3, seed=9)
    fresh.load_state_dict(chain.state_dict())
    assert_same(run(fresh, tokens()), run(copy.deepcopy(chain), tokens()))
    pending.sum().backward()
    assert chain.certificate().failures == 0


def test_modules_held_in_bf16() -> None:
    results = []
    for memory in ("reverse", "store"):
        chain = make_chain(count=6, dropout=0.1, memory=memory, chunk_size=2).bfloat16()
        x = tokens().bfloat16().requires_grad_()
        torch.manual_seed(0)
        output = chain(x)
        assert output.dtype == torch.bfloat16
        output.float().sin().sum().backward()
        assert x.grad.dtype == torch.bfloat16
        assert {parameter.grad.dtype for parameter in chain.parameters()} == {torch.bfloat16}
        assert chain.certificate().failures == 0
        results.append([output.detach(), x.grad, *(p.grad for p in chain.parameters())])
    assert_same(results[0], results[1])


class Normed(nn.Module):
    """BatchNorm on maps [B, H, W, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def test_running_statistics_are_updated_once() -> None:
    states = []
    for memory in ("reverse", "store"):
        chain = Chain([Normed(), Normed()], memory=memory)
        chain(tokens().view(5, 1, 7, WIDTH)).square().sum().backward()
        assert chain.certificate().failures == 0
        states.append(dict(chain.named_buffers()))
    assert int(states[0]["functions.0.norm.num_batches_tracked"]) == 1
    assert_same(states[0], states[1])


class Odd(nn.Module):
    """Returns its input itself, and has a parameter that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Still(nn.Module):
    """A branch that does not depend on x."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


def test_unusual_functions_and_inputs() -> None:
    for arithmetic in ("exact", "float"):
        chain = Chain([Odd(), Mlp(), Still(), Mlp(), Odd()], arithmetic=arithmetic)
        x = tokens(5, 7).transpose(0, 1).requires_grad_()
        chain(x).sum().backward()
        wanted = x.detach().clone().requires_grad_()
        y, z = chain.setting.beta * wanted, wanted
        for function in chain.functions:
            z, y = function(z) + chain.setting.alpha * z + y, chain.setting.beta * z
        z.sum().backward()
        if arithmetic == "exact":
            assert chain.certificate().failures == 0
            assert (x.grad - wanted.grad).norm() / wanted.grad.norm() < 1e-5
    with pytest.raises(ValueError, match="shapes must be equal"):
        Chain([nn.Linear(WIDTH, 3)])(tokens())
    with pytest.raises(ValueError, match="floating dtype"):
        Chain([Odd()])(torch.ones(2, 3, dtype=torch.int64))


class Masked(nn.Module):
    """Takes a side that carries the batch, and one that is no tensor."""

    sides = ("mask", "flag")

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, flag: bool) -> Tensor:
        assert flag and len(mask) == len(x)
        return self.layer(x) * mask[:, None, None]


def test_sides_are_cut_with_the_batch_and_given_only_where_asked_for() -> None:
    torch.manual_seed(0)
    layers = [Masked(), Mlp(), Masked()]
    layers[1].sides = ("bias",)
    grads = []
    for memory in ("reverse", "store"):
        chain = Chain(layers, memory=memory, chunk_size=2)
        mask = torch.rand(5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        bias = torch.ones(WIDTH, requires_grad=True)
        sides = {"mask": mask, "bias": bias, "flag": True}
        chain(tokens(), batched=["mask"], **sides).sin().sum().backward()
        assert chain.certificate().failures == 0
        grads.append([mask.grad, bias.grad])
    assert_same(grads[0], grads[1])
    assert all(grad.abs().min() > 0 for grad in grads[0])
