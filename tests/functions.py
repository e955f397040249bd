"""Residual functions for tests of chains."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional

from dr2dist.reversible import Chain

WIDTH = 32
PAIRS = [(1.0, 0.1), (0.9, 0.1), (0.63, 0.37), (0.5, 0.5), (0.3, 0.7), (0.0, 1.0)]


class Mlp(nn.Module):
    """norm, two layers, scale: a branch that matters, with a side if one is given."""

    def __init__(self, dropout: float = 0.0, drop_path: float = 0.0, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(0.1 + 0.9 * torch.rand(width))
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)
        for layer in (self.inner, self.outer):
            nn.init.normal_(layer.bias, std=0.5)
            nn.init.normal_(layer.weight, std=1.5 / layer.in_features**0.5)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        hidden = functional.gelu(self.inner(self.norm(x)))
        branch = self.scale * self.dropout(self.outer(hidden))
        if bias is not None:
            branch = branch + torch.tanh(branch) * bias
        return self.drop_path(branch)


def make_chain(
    count: int = 24, dropout: float = 0.0, drop_path: float = 0.0, seed: int = 0, **setting: Any
) -> Chain:
    """A chain of `count` branches with seeded weights."""
    torch.manual_seed(seed)
    return Chain([Mlp(dropout, drop_path) for _ in range(count)], **setting)


def tokens(batch: int = 5, length: int = 7, seed: int = 1) -> Tensor:
    """Random tokens [batch, length, WIDTH]."""
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


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
