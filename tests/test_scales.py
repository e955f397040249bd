"""Scales of 16-bit states: found with headroom, widened where states grow, found again where one
sample was unlike all others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dr2dist.reversible import Chain
from dr2dist.reversible.arithmetic.scales import FINEST, NEAR, ChannelScales
from tests.functions import WIDTH, tokens
from tests.test_state_bits import assert_same, train


def test_scales_are_powers_of_two_with_headroom_for_each_channel() -> None:
    largest = [0.0, 1e-9, 0.25, 1.0, 1.0001, 300.0, float("1e5")]
    scales = ChannelScales.find(largest)
    for value, exponent in zip(largest, scales.exponents, strict=True):
        steps = value / 2.0**exponent
        assert steps <= NEAR
        assert steps > NEAR / 2 or exponent == FINEST
    wider = scales.with_room([0, NEAR - 1, NEAR, 2 * NEAR - 1, 2 * NEAR, 5 * NEAR, 64 * NEAR])
    more = [b - a for a, b in zip(scales.exponents, wider.exponents, strict=True)]
    assert more == [0, 0, 1, 1, 2, 3, 7]


def test_channels_of_a_map_have_their_own_scales() -> None:
    torch.manual_seed(0)
    functions = [nn.Conv2d(6, 6, 3, padding=1) for _ in range(4)]
    x = torch.randn(2, 6, 8, 8) * torch.tensor([1e-3, 1, 10, 100, 1, 1]).view(6, 1, 1)
    found = []
    for memory in ("store", "reverse"):
        options: Any = {"memory": memory, "state_bits": 16, "channel_dim": 1}
        chain = Chain(copy.deepcopy(functions), **options)
        found.append(train(chain, x))
        assert chain.certificate().failures == 0
        assert chain.scales is not None and len(chain.scales.exponents) == 6
        assert len(set(chain.scales.exponents)) > 2
    assert_same(*found)


class Growing(nn.Module):
    """A branch that is as large as it is told to be, in one channel."""

    def __init__(self, channel: int) -> None:
        super().__init__()
        self.size = 1.0
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("pick", nn.functional.one_hot(torch.tensor(channel), WIDTH).float())

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self.pick
        return torch.tanh(self.layer(x)) * (1 + own * (self.size - 1))


def growing_chain(**options: Any) -> tuple[Chain, list[Growing]]:
    torch.manual_seed(0)
    functions = [Growing(channel) for channel in (3, 7, 3, 11)]
    return Chain(functions, state_bits=16, **options), functions


def scales_of(chain: Chain) -> ChannelScales:
    """Those that the pass which is open has; the chain's own may be larger by now."""
    (tape,) = [tape for tape in chain._tapes if tape.open]
    scales = getattr(tape.arithmetic, "scales", None)
    assert isinstance(scales, ChannelScales)
    return scales


def test_channels_near_their_limit_are_given_room_before_they_reach_it() -> None:
    chain, functions = growing_chain()
    x, scales = tokens(4), []
    for step in range(60):
        for function in functions:
            function.size = 1.06**step  # 33 times in all, never twice in a step
        train(chain, x)
        assert chain.certificate().failures == 0
        scales.append(chain.scales)
    assert scales[0] is not None and scales[-1] is not None
    more = [b - a for a, b in zip(scales[0].exponents, scales[-1].exponents, strict=True)]
    assert all(2 <= more[channel] <= 6 for channel in (3, 7, 11))
    assert sum(more) - sum(more[channel] for channel in (3, 7, 11)) < WIDTH  # others stay behind


def test_a_pass_with_a_jump_is_run_again_with_room() -> None:
    chain, functions = growing_chain()
    x = tokens(4)
    train(chain, x)
    functions[1].size = 100.0
    before, stream = chain.scales, torch.get_rng_state()
    chain.zero_grad()
    output = chain(x)
    used = scales_of(chain)
    output.square().sum().backward()
    assert chain.certificate().failures == 0
    assert before is not None and used.exponents[7] >= before.exponents[7] + 5
    first = [output, *(p.grad.clone() for p in chain.parameters())]
    torch.set_rng_state(stream)
    chain.set_scales(used)
    assert_same(first, train(chain, x))  # as if it had had them from the start


def test_one_sample_that_is_unlike_all_others_spoils_no_later_pass() -> None:
    """Its scales would leave usual states a few bits, and for ever."""
    chain, _ = growing_chain(on_failure="record")
    exact = Chain(copy.deepcopy(list(chain.functions)), state_bits=32)
    x = tokens(4)

    def error() -> float:
        found, wanted = ([v.detach() for v in train(c, x)] for c in (chain, exact))
        pairs = zip(found, wanted, strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)

    usual = error()
    outlier = torch.cat([1000 * x[:1], x[1:]])
    with pytest.warns(UserWarning, match="unlike all others"):
        waiting = chain(outlier)
    scales = chain.scales
    train(chain, x)  # while another pass waits
    assert scales is not None and scales.stale and chain.scales != scales
    waiting.sum().backward()
    assert chain.certificate().failures == 0
    assert error() < 2 * usual
    before = chain.scales
    train(chain, torch.cat([1e12 * x[:1], x[1:]]))  # nothing would be left of the others
    assert chain.certificate().failures > 0 and chain.scales == before
    assert error() < 2 * usual


def test_scales_are_of_states_of_16_bits_and_of_all_channels() -> None:
    chain, _ = growing_chain()
    with pytest.raises(ValueError, match=r"allowed are none: its states have 32 bits"):
        Chain([nn.Identity()]).set_scales(ChannelScales((0,) * WIDTH))
    train(chain, tokens(4))
    with pytest.raises(ValueError, match=f"scales of 2 channels are given; it has {WIDTH}"):
        chain.set_scales(ChannelScales((0, 0)))


def test_what_is_no_number_widens_nothing() -> None:
    chain, functions = growing_chain(on_failure="record")
    train(chain, tokens(4))
    before = chain.scales
    functions[1].size = float("nan")
    train(chain, tokens(4))
    assert chain.certificate().failures > 0
    functions[1].size = 1.0
    train(chain, tokens(4))
    assert chain.certificate().failures == 0
    assert chain.scales == before


def test_scales_do_not_change_while_a_pass_waits() -> None:
    chain, _ = growing_chain()
    output = chain(tokens(4))
    assert chain.scales is not None
    with pytest.raises(RuntimeError, match="scales cannot change while a forward pass waits"):
        chain.set_scales(chain.scales.with_room([1 << 20] * WIDTH))
    output.sum().backward()
    chain.set_scales(chain.scales.with_room([1 << 20] * WIDTH))


def test_finding_scales_leaves_no_trace() -> None:
    """Neither in running statistics nor in the stream of random numbers."""
    torch.manual_seed(0)
    states = []
    for known in (False, True):
        functions = [nn.Sequential(nn.BatchNorm1d(17), nn.Dropout(0.5)) for _ in range(3)]
        chain = Chain(functions, state_bits=16).train()
        if known:
            chain.set_scales(states[0][0])
        torch.manual_seed(5)
        x = torch.randn(4, 17, 8, generator=torch.Generator().manual_seed(1))
        output = chain(x.requires_grad_())
        states.append((scales_of(chain), output, torch.rand(3), *chain.buffers()))
    assert states[0][0] == states[1][0]
    assert all(map(torch.equal, states[0][1:], states[1][1:]))
