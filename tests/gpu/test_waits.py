"""Inside a step the host hands work over and waits for none of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import dr2dist
from tests.models import build, images
from tests.pool import Pool
from tests.waits import Waits


@contextmanager
def nothing_waits(device: torch.device) -> Iterator[None]:
    """Fails where the host waits; on the CPU, where it reads a value that a GPU would have."""
    if device.type == "cpu":
        with Waits() as waits:
            yield
        assert not waits.found
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


TOKENS = {"chunk_size": 1, "chunk_tokens": 9}
ON_GPU = product(
    ["cuda"],
    ["vit", "eva-rope", "beit", "swin"],
    ["reverse", "checkpoint", "store"],
    [{}, {"chunk_size": 2}, TOKENS],
)
CASES = [
    ("cpu", "vit", "reverse", TOKENS),
    ("cpu", "eva-rope", "checkpoint", {}),
    *(pytest.param(*case, marks=pytest.mark.gpu) for case in ON_GPU),
]


@pytest.mark.parametrize(("place", "kind", "memory", "slices"), CASES)
def test_a_step_of_a_plain_loop(place: str, kind: str, memory: str, slices: dict[str, int]) -> None:
    device = torch.device(place)
    options: Any = {"memory": memory, **slices}
    noise = {} if kind == "swin" else {"proj_drop_rate": 0.1}
    net = dr2dist.convert(build(kind, depth=2, **noise), **options).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    x = images(2).to(device)
    labels = torch.zeros(len(x), dtype=torch.int64, device=device)
    nn.functional.cross_entropy(net(x), labels).backward()  # kernels are compiled, memory is had
    optimizer.step()
    with nothing_waits(device):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    assert net.certificate().messages == ()


@pytest.mark.gpu
@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_of_an_engine_until_its_verdict(one_rank: Pool, zero: int, bf16: bool) -> None:
    assert one_rank.run("tests.gpu.cases:engine_waits", zero=zero, bf16=bf16) == [3]


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_of_zero_3_until_its_verdict(two_gpus: None, two_ranks: Pool, bf16: bool) -> None:
    # A rank that is alone gathers from nobody, and DeepSpeed waits (NoGatherCoalescedHandle).
    assert two_ranks.run("tests.gpu.cases:engine_waits", zero=3, bf16=bf16) == [3, 3]


def test_an_engine_steps_where_the_test_runs(one_rank: Pool, device: torch.device) -> None:
    assert one_rank.run("tests.gpu.cases:engine_step", zero=2, bf16=False) == [3]
