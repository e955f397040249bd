"""What memory modes have in common: every bit of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import dr2dist
from tests.pool import Pool


def assert_modes_agree(pool: Pool, kind: str, zero: int, **options: Any) -> None:
    """Two steps of an engine have the same losses and weights in all memory modes."""
    found = [
        pool.run(
            "tests.cases:curve",
            kind=kind,
            zero=zero,
            steps=2,
            memory=memory,
            memory_budget=150_000 if memory == "budget" else None,
            **options,
        )[0]
        for memory in ("reverse", "store", "checkpoint", "budget")
    ]
    for losses, weights, _ in found[1:]:
        assert losses == found[0][0]
        for name, value in weights.items():
            assert torch.equal(value, found[0][1][name]), name


def one_step(model: nn.Module, x: Tensor, bf16: bool, **setting: Any) -> list[Tensor | None]:
    """Output and all gradients of a converted model's step, whose reversal is proven."""
    net = dr2dist.convert(model, **setting).train()
    x = x.clone().requires_grad_()
    net.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = net(x)
    output.float().square().sum().backward()
    assert net.certificate().failures == 0
    return [output.detach(), x.grad, *(p.grad for p in net.parameters())]
