"""What goes wrong in a pass is found and named."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dr2dist
from dr2dist.reversible import Chain
from tests.functions import Mlp, make_chain, tokens
from tests.models import build, images


class Clock(nn.Module):
    """Cannot be replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * (time.perf_counter_ns() % 1000 + 1) / 1000


def _fault_messages(chain: Chain, x: Tensor, between: Any = None) -> tuple[str, ...]:
    chain.on_failure = "record"
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
            chain = make_chain(
                count=6, alpha=pair[0], beta=pair[1], name="body", on_failure="record"
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                recorded = chain.record(tokens())
            recorded.tape.remainders.part(place, 0)[17] ^= 1
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


@pytest.mark.parametrize("frozen", [1, 4])
@pytest.mark.parametrize("memory", ["reverse", "store"])
def test_a_recorded_chain_is_undone_to_its_start_whatever_of_it_is_frozen(
    frozen: int, memory: Any
) -> None:
    chain = make_chain(count=4, memory=memory)
    for function in chain.functions[:frozen]:
        function.requires_grad_(False)
    x = tokens()
    found = chain.reverse(chain.record(x))
    assert float((found - x).abs().max()) <= 2.0**-19  # half a step of the grid
    certificate = chain.certificate()
    assert certificate is not None and certificate.failures == 0 and certificate.verified


@pytest.mark.parametrize(
    "setting", [{}, {"state_bits": 16}, {"arithmetic": "float"}, {"chunk_size": 1}]
)
def test_a_batch_of_no_samples_is_none_behind_a_network_too(setting: dict[str, Any]) -> None:
    for kind in ("vit", "convnext"):
        net = dr2dist.convert(build(kind, depth=2), **setting)
        with torch.no_grad():
            assert net(images(2)[:0]).shape == (0, 5)
        net(images(2)[:0]).sum().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None and not parameter.grad.any(), name
        assert net.state_dict().keys() == dr2dist.convert(build(kind, depth=2)).state_dict().keys()
    chain = make_chain(**setting)
    output, (tap,) = chain(tokens()[:0], taps=[1])
    assert output.shape == tap.shape == tokens()[:0].shape
    with pytest.raises(ValueError, match="have no element to record"):
        chain.record(tokens()[:0])
