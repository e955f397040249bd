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
