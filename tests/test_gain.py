"""A gain of 1 + beta on the functions behind a chain's first one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dr2dist
from dr2dist.inference.exported import load
from dr2dist.inference.portable import plain as plain_network
from dr2dist.reversible import Chain
from dr2dist.reversible.arithmetic.setting import Setting
from tests.bounds import chain_bound
from tests.chain_helpers import error
from tests.functions import WIDTH, assert_same, make_chain, run, smooth, tokens
from tests.models import build
from tests.pool import Pool
from tests.test_saved import trained

GAIN: dict[str, Any] = {"gain": "consistent"}
CURVE = "tests.stage_cases:curve"


def reference(chain: Chain) -> dict[str, Any]:
    """The equations with the gain, in fp64."""
    alpha, beta = chain.setting.alpha, chain.setting.beta
    start = tokens().double().requires_grad_()
    bias = torch.linspace(-1, 1, WIDTH).double().requires_grad_()
    x, y = start, beta * start
    for index, function in enumerate(chain.functions):
        gain = 1 + beta if index else 1
        x, y = gain * function(x, bias=bias) + alpha * x + y, beta * x
    of_x, of_bias, *grads = torch.autograd.grad(smooth(x, []), [start, bias, *chain.parameters()])
    return {"output": x, "x": of_x, "bias": of_bias, "grads": grads}


@pytest.mark.parametrize(
    ("arithmetic", "memory", "pair"),
    [
        ("exact", "reverse", (0.9, 0.1)),
        ("exact", "reverse", (0.5, 0.5)),
        ("float", "store", (0.9, 0.1)),
        ("float", "reverse", (0.3, 0.7)),
    ],
)
def test_gradients_are_those_of_the_equations(
    arithmetic: str, memory: str, pair: tuple[float, float]
) -> None:
    setting = {"alpha": pair[0], "beta": pair[1], "arithmetic": arithmetic, "memory": memory}
    chain = make_chain(8, **setting, **GAIN)
    found, wanted = run(chain, tokens(), loss=smooth), reference(copy.deepcopy(chain).double())
    bound = (1 + pair[1]) * chain_bound(chain.setting, 8)
    for name in ("output", "x", "bias"):
        assert error(found[name], wanted[name]) < bound
    assert error(list(found["grads"].values()), wanted["grads"]) < bound


@pytest.mark.parametrize("state_bits", [16, 32])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_all_memory_modes_agree_in_every_bit(bf16: bool, state_bits: int) -> None:
    results = []
    for memory in ("reverse", "store", "checkpoint"):
        chain = make_chain(
            9, dropout=0.1, drop_path=0.2, memory=memory, chunk_size=2, state_bits=state_bits,
            alpha=0.875, beta=0.125, **GAIN,
        )  # fmt: skip
        results.append(run(chain, tokens(), bf16, taps=[0, -1]))
        assert chain.certificate().failures == 0
        with torch.no_grad():
            inferred = chain.eval()(tokens(), bias=torch.linspace(-1, 1, WIDTH))
        trained_ = chain(tokens().requires_grad_(), bias=torch.linspace(-1, 1, WIDTH))
        assert torch.equal(inferred, trained_)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


class Same(nn.Module):
    """Gives one vector, wherever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.given = nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.given.expand_as(x)


@pytest.mark.parametrize("count", [1, 2, 12])
@pytest.mark.parametrize("beta", [0.1, 0.125, 0.5])
def test_where_functions_are_the_same_it_is_the_pretrained_network(beta: float, count: int) -> None:
    function, x = Same(), tokens()
    wanted = x + count * function.given
    found = [
        error(Chain([function] * count, alpha=1 - beta, beta=beta, gain=gain)(x), wanted)
        for gain in ("consistent", "none")
    ]
    # Grid steps for each function, of which later ones leave less than all.
    assert found[0] < 4 * count * 2.0**-18
    assert count == 1 or found[1] > 100 * found[0]


@pytest.mark.parametrize(
    ("kind", "arithmetic"),
    [
        ("swin", "exact"),
        ("vit", "float"),
        pytest.param("vit", "exact", marks=pytest.mark.slow),
        pytest.param("swin", "float", marks=pytest.mark.slow),
    ],
)
def test_stages_files_and_plain_programs_know_it(
    kind: str, arithmetic: str, one_rank: Pool, two_ranks: Pool, tmp_path: Any
) -> None:
    """A chain's middle on another stage has no first function."""
    options: dict[str, Any] = {"kind": kind, "steps": 3, "arithmetic": arithmetic, **GAIN}
    options |= {"alpha": 0.5, "beta": 0.5}
    ((wanted, *_),) = one_rank.run(CURVE, stages=1, **options)
    ((without, *_),) = one_rank.run(CURVE, stages=1, **{**options, "gain": "none"})
    assert without[0] != pytest.approx(wanted[0], rel=1e-4)
    (found, *_), *_ = two_ranks.run(CURVE, stages=2, cuts=(4,), **options)
    assert found == pytest.approx(wanted, rel=1e-4)
    net = trained(kind, arithmetic=arithmetic, **GAIN).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        output = net(images)
        assert error(plain_network(net)(images), output) < 1e-5
        dr2dist.save(net, tmp_path / "file.safetensors")
        assert torch.equal(load(tmp_path / "file.safetensors")(images), output)


def test_a_networks_state_says_it() -> None:
    """Also that there is none; a state of timm's says nothing, and changes nothing."""
    images = torch.randn(2, 3, 32, 32)
    joined = dr2dist.convert(build("vit", depth=2), gain="consistent", hand_on="mean").eval()
    plain_one = dr2dist.convert(build("vit", depth=2, seed=1)).eval()
    states = [copy.deepcopy(net.state_dict()) for net in (joined, plain_one)]
    with torch.no_grad():
        outputs = [net(images) for net in (joined, plain_one)]
        for state, wanted in zip(states, outputs, strict=True):
            for into in (joined, plain_one):
                into.load_state_dict(state)
                assert torch.equal(into(images), wanted)
        joined.load_state_dict(states[0])
        joined.load_state_dict(build("vit", depth=2).state_dict(), strict=False)
        assert torch.equal(joined(images), outputs[0])
    assert "reversible_gain_hand_on" not in states[1]


def test_where_it_is_one_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta is 0: gain consistent, which is 1 \+ beta, has no"):
        Setting(1, 0, "float", "store", gain="consistent")
