"""Chains as modules: memory, gradients handed over, copies, frozen parts, odd functions."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn

from dr2dist.reversible import Chain
from tests.bounds import chain_bound
from tests.chain_helpers import error
from tests.functions import WIDTH, Mlp, assert_same, make_chain, run, tokens


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
        assert error(one[name], grad) < chain_bound(chain.setting, 4), name


class Counted(Mlp):
    """Counts its calls."""

    calls = 0

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().forward(x, bias)


@pytest.mark.parametrize("memory", ["reverse", "checkpoint"])
def test_gradients_leave_the_graph_function_by_function(memory: str) -> None:
    chain = make_chain(count=4, memory=memory, chunk_size=None)
    seen: list[tuple[str, int]] = []
    output = chain(tokens())
    for place, function in enumerate(chain.functions):
        function.register_forward_pre_hook(lambda *_, place=place: seen.append(("run", place)))
        for parameter in function.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _, place=place: seen.append(("gradient", place))
            )
    output.sum().backward()
    assert [event for event, _ in itertools.groupby(seen)] == [
        (event, place) for place in (3, 2, 1, 0) for event in ("run", "gradient")
    ]


@pytest.mark.parametrize("function", range(4))
@pytest.mark.parametrize("memory", ["reverse", "checkpoint", "store"])
def test_gradients_of_one_function_are_proven_to_the_start(function: int, memory: str) -> None:
    chain = make_chain(count=4, memory=memory)
    chain(tokens()).sin().sum().backward()
    wanted = list(chain.functions[function].parameters())
    output = chain(tokens())
    chain.ledger.last = None
    found = torch.autograd.grad(output.sin().sum(), wanted)
    for parameter, gradient in zip(wanted, found, strict=True):
        assert torch.equal(gradient, parameter.grad)
    assert chain.certificate().failures == 0
    assert chain.certificate().verified == (memory == "reverse")
    chain.set_coefficients(0.5, 0.5)  # no pass is open any more


def test_an_optimizer_may_step_inside_of_the_backward_pass() -> None:
    """As each gradient arrives, so that none is kept: a step at the end gives the same weights."""
    inside, after = make_chain(count=4), make_chain(count=4)

    def step(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.1)
        parameter.grad = None

    for parameter in inside.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    optimizer = torch.optim.SGD(after.parameters(), 0.1)
    for seed in range(3):
        inside(tokens(seed=seed)).square().mean().backward()
        after(tokens(seed=seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(inside.parameters(), after.parameters(), strict=True):
        assert torch.equal(one, other)


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
            assert error(x.grad, wanted.grad) < chain_bound(chain.setting, 5)
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
