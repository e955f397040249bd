"""What a chain gives: its last tokens, or the mean of its last two."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import dr2dist
from dr2dist.inference.portable import plain as plain_network
from dr2dist.reversible import Chain
from tests.bounds import chain_bound
from tests.chain_helpers import error, plain
from tests.functions import WIDTH, assert_same, make_chain, run, smooth, tokens
from tests.models import build
from tests.pool import Pool

CURVE = "tests.stage_cases:curve"


def reference(chain: Chain, taps: tuple[int, ...]) -> dict[str, Any]:
    """The mean's pass by the equations, in fp64."""
    x = tokens().double().requires_grad_()
    bias = torch.linspace(-1, 1, WIDTH).double().requires_grad_()
    _, states = plain(chain, x, tuple(range(len(chain.functions))), bias=bias)
    output = (states[-1] + [x, *states][-2]) / 2
    tapped = [*states[:-1], output]
    of_x, of_bias, *grads = torch.autograd.grad(
        smooth(output, [tapped[tap] for tap in taps]), [x, bias, *chain.parameters()]
    )
    return {"output": output, "x": of_x, "bias": of_bias, "grads": grads}


@pytest.mark.parametrize(("count", "taps"), [(1, (0,)), (2, (0, 1)), (8, (3, 6, 7)), (8, ())])
@pytest.mark.parametrize(
    ("arithmetic", "pair"), [("exact", (0.9, 0.1)), ("exact", (0.5, 0.5)), ("float", (0.3, 0.7))]
)
def test_gradients_are_those_of_the_equations(
    arithmetic: str, pair: tuple[float, float], count: int, taps: tuple[int, ...]
) -> None:
    chain = make_chain(
        count, alpha=pair[0], beta=pair[1], arithmetic=arithmetic, memory="store", hand_on="mean"
    )
    found = run(chain, tokens(), loss=smooth, taps=list(taps))
    wanted = reference(copy.deepcopy(chain).double(), taps)
    bound = chain_bound(chain.setting, count)
    for name in ("output", "x", "bias"):
        assert error(found[name], wanted[name]) < bound
    assert error(list(found["grads"].values()), wanted["grads"]) < bound


@pytest.mark.parametrize("state_bits", [16, 32])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_all_memory_modes_agree_in_every_bit(count: int, bf16: bool, state_bits: int) -> None:
    results = []
    for memory in ("reverse", "store", "checkpoint"):
        chain = make_chain(
            count, dropout=0.1, drop_path=0.2, memory=memory, hand_on="mean",
            chunk_size=2, state_bits=state_bits,
        )  # fmt: skip
        results.append(run(chain, tokens(), bf16, taps=[0, -1]))
        assert chain.certificate().failures == 0
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("count", [1, 6])
def test_it_is_the_mean_of_the_last_two_in_every_pass(count: int) -> None:
    chain, x = make_chain(count, hand_on="mean"), tokens()
    last = make_chain(count)
    x = torch.round(x * 2**18) / 2**18  # as a chain begins
    _, states = last(x, taps=range(count))
    wanted = ([x, *states][-2] * 0.5 + states[-1] * 0.5).detach()
    recorded = chain.record(x)
    with torch.no_grad():
        inferred, (tapped,) = chain(x, taps=[-1])
    for found in (chain(x), inferred, tapped, recorded.output):
        assert torch.equal(found, wanted)
    assert torch.equal(chain.reverse(recorded), x)
    assert torch.equal(chain(x, until=count - 1), [x, *states][-2])  # not its end


def test_a_kept_graph_is_reversed_twice_alike() -> None:
    chain, x = make_chain(5, hand_on="mean"), tokens().requires_grad_()
    output = chain(x)
    found: list[Tensor] = []
    for keep in (True, False):
        x.grad = None
        output.square().sum().backward(retain_graph=keep)
        assert x.grad is not None
        found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("arithmetic", "cut"),
    [
        ("exact", 8),
        pytest.param("exact", 9, marks=pytest.mark.slow),
        *(pytest.param("float", cut, marks=pytest.mark.slow) for cut in (8, 9)),
    ],
)
def test_a_cut_before_the_last_function_changes_nothing(
    arithmetic: str, cut: int, one_rank: Pool, two_ranks: Pool
) -> None:
    """One function of the chain stands behind the cut, or none."""
    options: dict[str, Any] = {"kind": "vit", "steps": 3, "arithmetic": arithmetic}
    options |= {"alpha": 0.5, "beta": 0.5, "hand_on": "mean"}
    ((wanted, weights, *_),) = one_rank.run(CURVE, stages=1, **options)
    (plain_losses, *_), *_ = one_rank.run(CURVE, stages=1, **{**options, "hand_on": "last"})
    assert plain_losses[0] != wanted[0]
    for returned in (True, False):
        found, *_ = two_ranks.run(CURVE, stages=2, cuts=(cut,), returned=returned, **options)
        assert found[0] == pytest.approx(wanted, rel=1e-4)
        assert all(error(found[1][name], weights[name]) < 1e-3 for name in ("head.weight",))


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_files_and_plain_programs_know_it(kind: str, arithmetic: str, tmp_path: Any) -> None:
    net = dr2dist.convert(build(kind, depth=2), arithmetic=arithmetic, hand_on="mean").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = net(images)
        assert error(plain_network(net)(images), wanted) < 1e-5
        assert error(dr2dist.convert(build(kind, depth=2)).eval()(images), wanted) > 1e-3


def test_without_a_second_state_it_is_refused() -> None:
    with pytest.raises(ValueError, match="beta is 0, which keeps no second state: hand_on mean"):
        make_chain(2, alpha=1, beta=0, arithmetic="float", memory="store", hand_on="mean")
    with pytest.raises(ValueError, match="hand_on is 'first', allowed is last, mean"):
        make_chain(2, hand_on="first")
