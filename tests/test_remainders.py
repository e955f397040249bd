"""Remainders that wait in the host's memory: the same bits, and few bytes on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dr2dist
from dr2dist.reversible import Chain, Setting
from tests.functions import make_chain, tokens
from tests.models import build, images


def tape_of(chain: Chain) -> Any:
    (tape,) = [tape for tape in chain._tapes if tape.open]
    return tape


@pytest.mark.parametrize("state_bits", [16, 32])
@pytest.mark.parametrize("layout", [{}, {"chunk_size": 2}, {"memory": "budget"}])
def test_the_host_gives_back_the_same_bits(layout: dict[str, Any], state_bits: int) -> None:
    results = []
    budget = 100_000 if layout.get("memory") == "budget" else None
    for place in ("device", "host"):
        options: Any = {**layout, "state_bits": state_bits, "memory_budget": budget}
        net = dr2dist.convert(build("swin"), remainders=place, **options)
        for _ in range(2):
            net.zero_grad()
            output = net(images(3))
            output.square().sum().backward()
        assert net.certificate().failures == 0
        results.append([output, *(p.grad for p in net.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("depth", [6, 24, 48])
def test_at_most_two_functions_remainders_are_on_the_device(depth: int) -> None:
    chain = make_chain(depth, remainders="host", chunk_size=2)
    x = tokens(4)
    output = chain(x)
    tape = tape_of(chain)
    one = Setting().remainder_bits * x.numel() // 8
    assert tape.remainders.nbytes == (depth - 1) * one
    assert tape.remainders.on_device == 0  # none of a pass that waits
    output.square().sum().backward()
    assert tape.remainders.most_on_device == 2 * one
    assert tape.remainders.nbytes == 0
    certificate = chain.certificate()
    assert certificate is not None and certificate.remainder_bytes == (depth - 1) * one


def test_a_pass_can_be_reversed_twice() -> None:
    chain = make_chain(6, remainders="host")
    output = chain(tokens(4)).square().sum()
    output.backward(retain_graph=True)
    first = [p.grad.clone() for p in chain.parameters()]
    tape = tape_of(chain)
    assert tape.remainders.on_device == 0
    chain.zero_grad()
    output.backward()
    assert all(map(torch.equal, first, (p.grad for p in chain.parameters())))


@pytest.mark.parametrize(
    "options",
    [{"memory": "store"}, {"memory": "checkpoint"}, {"arithmetic": "float"}],
)
def test_a_place_without_effect_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="remainders is 'host', which has an effect only with"):
        make_chain(2, remainders="host", **options)
    with pytest.raises(ValueError, match="remainders is 'disk', allowed is device, host"):
        make_chain(2, remainders="disk")
