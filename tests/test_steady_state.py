"""A step waits for nothing on its device; remainders and 8 bytes a function grow with depth."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dr2dist
from dr2dist.reversible.budget.costs import Watermark
from tests.functions import make_chain, tokens
from tests.models import build

READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "item"}
"""Operations whose result the host needs before it goes on."""


class HostReads(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.calls = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        name = function.overloadpacket.__name__
        if name in READS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"chunk_size": 2},
    {"chunk_size": 1, "chunk_tokens": 12},
    {"arithmetic": "float"},
    {"memory": "store"},
    {"memory": "checkpoint"},
    {"memory": "budget", "memory_budget": 10**6},
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_forward_and_backward_read_nothing_to_the_host(kind: str, setting: dict[str, Any]) -> None:
    net = dr2dist.convert(build(kind, depth=3).train(), 0.7, 0.3, **setting)
    images = torch.randn(3, 3, 32, 32)
    net(images).sum().backward()
    net(images).sum().backward()
    with HostReads() as mode:
        net(images).sum().backward()
    assert mode.calls > 100
    assert not mode.found


@pytest.mark.parametrize(("beta", "bits"), [(0.5, 1), (0.1, 4), (1.0, 0)])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_only_remainders_and_8_bytes_a_function_grow_with_depth(
    beta: float, bits: int, chunk_size: int | None
) -> None:
    x = tokens(8)
    shallow, deep = (peak(x, depth, beta, chunk_size) for depth in (4, 12))
    assert deep - shallow == 8 * (bits * x.numel() // 8 + 8)


def peak(x: torch.Tensor, depth: int, beta: float, chunk_size: int | None) -> int:
    """The most bytes that were alive in a step."""
    chain = make_chain(depth, alpha=0.0, beta=beta, chunk_size=chunk_size)
    for _ in range(2):  # gradients are there from the first
        with Watermark() as mark:
            chain(x).sum().backward()
    return mark.peak
