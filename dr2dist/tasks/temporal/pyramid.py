"""A pyramid over time with local attention, and what is said at each of its points.

After ActionFormer (arXiv 2202.07925), without its drop paths and their scales.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from dr2dist.backbones.backbone import FeatureInfo
from dr2dist.errors import UserError

PRIOR = 0.01
"""The probability that every point says of every class before training."""

_SPACE = {"BHTWC": (1, 3), "BTHWC": (2, 3)}
"""Dimensions of height and width."""


class Sequence(nn.Module):
    """A feature of clips as a sequence: [B * rows, ...] to [B, T, C], the mean over each frame.

    Raises UserError for a feature that does not say where its tokens lie in time.
    """

    def __init__(self, info: FeatureInfo) -> None:
        super().__init__()
        self.info = info
        if info.places is None and info.layout not in _SPACE:
            raise UserError(
                f"the feature {info.name} of layout {info.layout} says nothing of time; allowed "
                "are video models, such as videomae_small_patch16"
            )

    def forward(self, tokens: Tensor) -> Tensor:
        """In the tokens' dtype."""
        info = self.info
        if info.places is None:
            frames = tokens.mean(_SPACE[info.layout])
        else:
            frames = tokens.unflatten(1, (info.places[0], -1)).mean(2)
        return frames.reshape(-1, info.rows * frames.shape[1], frames.shape[2])


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of [B, C, T]."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T]."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class LocalAttention(nn.Module):
    """Attention of which a token sees those at most half a window away; [B, C, T] to
    [B, C, ceil(T / stride)].

    window: an odd number of tokens; None: all.
    """

    def __init__(self, width: int, heads: int, window: int | None, stride: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.query, self.key, self.value = (
            nn.Sequential(
                nn.Conv1d(width, width, 3, stride, 1, groups=width, bias=False),
                ChannelNorm(width),
                nn.Conv1d(width, width, 1),
            )
            for _ in range(3)
        )
        self.project = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T]."""
        inputs = (self.query(x), self.key(x), self.value(x))
        q, k, v = (each.unflatten(1, (self.heads, -1)).transpose(2, 3) for each in inputs)
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=self._near(q))
        return self.project(found.transpose(2, 3).flatten(1, 2))

    def _near(self, q: Tensor) -> Tensor | None:
        length = q.shape[2]
        if self.window is None or length <= self.window // 2 + 1:
            return None
        places = torch.arange(length, device=q.device)
        return (places[:, None] - places).abs() <= self.window // 2


class Block(nn.Module):
    """Attention and MLP, each added to what it is given; a stride of 2 halves the sequence."""

    def __init__(self, width: int, heads: int, window: int | None, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(width), ChannelNorm(width)
        self.attention = LocalAttention(width, heads, window, stride)
        self.skip = nn.MaxPool1d(3, stride, 1) if stride > 1 else nn.Identity()
        self.mlp = nn.Sequential(
            nn.Conv1d(width, 4 * width, 1), nn.GELU(), nn.Conv1d(4 * width, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T]."""
        x = self.skip(x) + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PyramidHead(nn.Module):
    """Logits and reach of every point of a pyramid of levels, each half as long as the one before.

    Called with a list of one feature. Gives {"logits": [B, P, classes], "reach": [B, P, 2]}, of all
    points level after level; reach: how far it is from the point to an action's start and stop, in
    steps of its level, never below 0.
    """

    def __init__(
        self,
        info: FeatureInfo,
        classes: int,
        width: int,
        heads: int,
        levels: int,
        window: int | None,
    ) -> None:
        super().__init__()
        self.sequence = Sequence(info)
        self.norm = nn.LayerNorm(info.channels)
        self.project = _convolutions(info.channels, width)
        self.stem = nn.Sequential(*(Block(width, heads, window) for _ in range(2)))
        more = range(levels - 1)
        self.branches = nn.ModuleList(Block(width, heads, window, stride=2) for _ in more)
        self.norms = nn.ModuleList(ChannelNorm(width) for _ in range(levels))
        last = [nn.Conv1d(width, outputs, 3, padding=1) for outputs in (classes, 2)]
        nn.init.constant_(last[0].bias, -math.log(1 / PRIOR - 1))  # type: ignore[arg-type]
        self.classify = nn.Sequential(_convolutions(width, width), last[0])
        self.regress = nn.Sequential(_convolutions(width, width), last[1])
        self.scales = nn.Parameter(torch.ones(levels))

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        """See the class."""
        tokens = self.norm(self.sequence(features[0]))
        states = [self.stem(self.project(tokens.transpose(1, 2)))]
        for branch in self.branches:
            states.append(branch(states[-1]))
        levels = [norm(state) for norm, state in zip(self.norms, states, strict=True)]
        logits = [self.classify(level) for level in levels]
        reach = [self.regress(level) * self.scales[k] for k, level in enumerate(levels)]
        return {
            "logits": torch.cat(logits, 2).transpose(1, 2),
            "reach": torch.cat(reach, 2).relu().transpose(1, 2),
        }


def _convolutions(inputs: int, width: int) -> nn.Sequential:
    """Two of three tokens each, with norms."""
    steps: list[nn.Module] = []
    for channels in (inputs, width):
        convolution = nn.Conv1d(channels, width, 3, padding=1, bias=False)
        steps += [convolution, ChannelNorm(width), nn.ReLU()]
    return nn.Sequential(*steps)
