"""torchvision's Video Swin (swin3d_t, _s, _b): one chain between patch mergings.

Tokens are maps [B, H, T, W, C]: rows of the picture come first, since they are what slices of
tokens are made of. A clip has few frames, and often one window of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchvision.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torchvision.models.video.swin_transformer import (
    PatchEmbed3d,
    ShiftedWindowAttention3d,
    SwinTransformer3d,
)

from dr2dist.backbones.backbone import OUTPUT, Backbone, ChainOf, FeatureInfo, Stem, Transition
from dr2dist.backbones.branch import BranchSpec, branches
from dr2dist.backbones.slicing import Given, Run, Slicing, Tokenwise, replaced_modules
from dr2dist.errors import UserError
from dr2dist.reversible.calls.slices import Ranges, TokenSlice

SHAPES: dict[str, dict[str, Any]] = {
    "swin3d_t": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "swin3d_s": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]},
    "swin3d_b": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
}
FRAMES, SIZE = 16, (224, 224)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""Of torchvision's weights."""
MASKED = -100.0
"""What the model adds to the logits of tokens that only a shift has brought together."""


def _attention(block: Any, x: Tensor) -> Tensor:
    """x: [B, H, T, W, C]. A slice's attention takes its rows as they are."""
    x = block.norm1(x)
    attention = block.attn
    whole = isinstance(attention, ShiftedWindowAttention3d)
    x = attention(x.transpose(1, 2)).transpose(1, 2) if whole else attention(x)
    return block.stochastic_depth(x)


def _mlp(block: Any, x: Tensor) -> Tensor:
    return block.stochastic_depth(block.mlp(block.norm2(x)))


class _Axis(NamedTuple):
    """One of height, time and width. size: of the map. window, shift: those in force at it."""

    size: int
    window: int
    shift: int

    @property
    def padded(self) -> int:
        """The size that windows fill."""
        return -(-self.size // self.window) * self.window

    def regions(self, places: Tensor) -> Tensor:
        """By which tokens of a window see each other, for places in the shifted map."""
        if not self.shift:
            return torch.zeros_like(places)
        last, wrapped = self.padded - self.window, self.padded - self.shift
        return (places >= last).long() + (places >= wrapped).long()


def _axes(attention: Any, height: int, frames: int, width: int) -> tuple[_Axis, _Axis, _Axis]:
    """Height, time and width; a window that is larger than the map is the map, without a shift."""
    windows, shifts = attention.window_size, attention.shift_size
    sizes = ((height, 1), (frames, 0), (width, 2))
    found = [
        _Axis(size, size, 0) if size <= windows[k] else _Axis(size, windows[k], shifts[k])
        for size, k in sizes
    ]
    return found[0], found[1], found[2]


class _Windows(Slicing):
    """Rows of windows. A shifted block's rows begin `shift` rows down, and the last wrap around."""

    smaller_inside = True
    across = ("attn",)

    def ranges(self, part: Any, shape: torch.Size, tokens: int, sides: Given) -> Sequence[Ranges]:
        """See Slicing."""
        if type(part.attn) is not ShiftedWindowAttention3d:
            return []
        rows, *_ = _axes(part.attn, *shape[1:4])
        step = max(tokens // (rows.window * shape[2] * shape[3]), 1) * rows.window
        return [
            _rows(start + rows.shift, min(step, rows.padded - start), rows)
            for start in range(0, rows.padded, step)
        ]

    def compute(self, run: Run, part: Any, x: Tensor, told: TokenSlice, sides: Given) -> Any:
        """See Slicing."""
        return run(replaced_modules(part, {"attn": _Band(part.attn, told)}), x)


def _rows(start: int, count: int, rows: _Axis) -> Ranges:
    """Those of the map among `count` padded rows from `start` on, of which the last may wrap."""
    start %= rows.padded
    stop = start + count
    pairs = ((start, min(stop, rows.size)), (0, min(max(stop - rows.padded, 0), rows.size)))
    return tuple(slice(first, last) for first, last in pairs if last > first)


class _Band:
    """Attention of some rows of windows: called on their rows [1, n, T, W, C], in their order."""

    def __init__(self, attention: Any, told: TokenSlice) -> None:
        self.attention, self.told = attention, told

    def __call__(self, x: Tensor) -> Tensor:
        rows, frames, columns = _axes(self.attention, self.told.length, *x.shape[2:4])
        shifted, index, there = (each.to(x.device) for each in self._shifted(rows, x.shape[1]))
        padding = (0, 0, 0, columns.padded - columns.size, 0, frames.padded - frames.size)
        padded = functional.pad(x, (*padding, 0, 1))[:, index]  # -1 is the row of zeros
        rolled = padded.roll((-frames.shift, -columns.shift), (2, 3))
        places = [
            shifted,
            *(torch.arange(axis.padded, device=x.device) for axis in (frames, columns)),
        ]
        axes = (rows, frames, columns)
        found = _attend(self.attention, rolled, axes, places)
        whole = found.roll((frames.shift, columns.shift), (2, 3))
        return whole[:, there, : frames.size, : columns.size]

    def _shifted(self, rows: _Axis, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the band's padded rows: (places in the shifted map, which of the `length` rows is
        there, -1 for none, and those with one). On the CPU: nobody waits for a GPU's numbers."""
        first = (self.told.ranges[0].start - rows.shift) % rows.padded // rows.window * rows.window
        count, real = 0, 0
        while real < length:
            count += rows.window
            places = torch.arange(first, first + count)
            there = (places + rows.shift) % rows.padded < rows.size
            real = int(there.sum())
        return places, torch.where(there, there.cumsum(0) - 1, -1), there.nonzero()[:, 0]


def _attend(attention: Any, x: Tensor, axes: Sequence[_Axis], places: Sequence[Tensor]) -> Tensor:
    """Attention inside windows of a shifted map [1, H, T, W, C] that they fill.

    places: of rows, frames and columns in the whole shifted map.
    """
    rows, frames, columns = (axis.window for axis in axes)
    channels, heads = x.shape[-1], attention.num_heads
    windows = _cut(x[0], rows, frames, columns)
    qkv = functional.linear(windows, attention.qkv.weight, attention.qkv.bias)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    bias = attention.get_relative_position_bias([frames, rows, columns]).to(q.dtype)
    labels = None
    if any(axis.shift for axis in axes):
        regions = [axis.regions(place) for axis, place in zip(axes, places, strict=True)]
        label = 9 * regions[0][:, None, None] + 3 * regions[1][:, None] + regions[2]
        labels = _cut(label[..., None], rows, frames, columns)[..., 0]
    dropped = attention.attention_dropout if attention.training else 0.0
    # The bias is learnt, so that the logits of a window are kept for it; those of one at a time.
    found = torch.cat(
        [
            checkpoint(
                _window,
                *(each[n : n + 1] for each in (q, k, v)),
                bias,
                None if labels is None else labels[n],
                dropped,
                use_reentrant=False,
                preserve_rng_state=dropped > 0,
            )
            for n in range(len(q))
        ]
    )
    found = found.transpose(1, 2).reshape(windows.shape)
    found = functional.linear(found, attention.proj.weight, attention.proj.bias)
    found = functional.dropout(found, attention.dropout, attention.training)
    counts = [x.shape[1] // rows, x.shape[2] // frames, x.shape[3] // columns]
    split = found.view(*counts, frames, rows, columns, channels)
    return split.permute(0, 4, 1, 3, 2, 5, 6).reshape(x.shape)


def _window(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, labels: Tensor | None, dropped: float
) -> Tensor:
    """Attention in a window, [1, heads, N, D]. labels: [N], of which equal ones see each other."""
    mask = bias
    if labels is not None:
        mask = bias + (labels[:, None] != labels).to(bias.dtype) * MASKED
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped)


def _cut(x: Tensor, rows: int, frames: int, columns: int) -> Tensor:
    """[H, T, W, C] to windows [n, frames * rows * columns, C], frames first, as the bias has it."""
    height, length, width, channels = x.shape
    split = x.view(
        height // rows, rows, length // frames, frames, width // columns, columns, channels
    )
    return split.permute(0, 2, 4, 3, 1, 5, 6).reshape(-1, frames * rows * columns, channels)


PARTS = {
    SwinTransformerBlock: (
        BranchSpec(("norm1", "attn", "stochastic_depth"), _attention, (), _Windows(), alone=False),
        BranchSpec(("norm2", "mlp", "stochastic_depth"), _mlp, (), Tokenwise(), alone=False),
    )
}


class _Merging(nn.Module):
    """A patch merging on maps whose rows come first."""

    def __init__(self, merging: PatchMerging) -> None:
        super().__init__()
        self.merging = merging

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, T, W, C] to [B, H / 2, T, W / 2, 2 C], odd sides rounded up."""
        merged: Tensor = self.merging(x.transpose(1, 2))
        return merged.transpose(1, 2).contiguous()


class Swin3dBackbone(Backbone):
    """A chain for each stage; patch mergings are the transitions. Any size and length will do."""

    name = "swin3d"
    patterns = ("swin3d_*",)
    classes = (SwinTransformer3d,)
    input = "video"
    tail = ("norm", "avgpool", "head")

    def build(self, name: str, **options: Any) -> nn.Module | None:
        """See Backbone. Options: frames of a clip (16), and those of SwinTransformer3d.

        Raises UserError for windows that are not of three sides.
        """
        if name not in SHAPES:
            return None
        frames, size = int(options.pop("frames", FRAMES)), options.pop("img_size", SIZE)
        channels = options.pop("in_chans", 3)
        shape = {
            "patch_size": [2, 4, 4],
            "window_size": [8, 7, 7],
            "stochastic_depth_prob": options.pop("drop_path_rate", 0.0),
            "dropout": options.pop("proj_drop_rate", 0.0),
            **SHAPES[name],
            **{key: _listed(value) for key, value in options.items()},
        }
        if any(len(shape[key]) != 3 for key in ("patch_size", "window_size")):
            raise UserError("model.options: patch_size and window_size are of time, height, width")
        embed = _embedding(channels)
        model = SwinTransformer3d(**{"num_classes": 1000, **shape}, patch_embed=embed)
        model.clip_size = (frames, *size)
        return model

    def matches(self, model: nn.Module) -> bool:
        """See Backbone."""
        own: Any = type(model)
        return (
            isinstance(model, SwinTransformer3d)
            and own.forward is SwinTransformer3d.forward
            and isinstance(model.patch_embed, PatchEmbed3d)
        )

    def layers(self, model: Any) -> list[ChainOf | Transition]:
        """See Backbone."""
        found: list[ChainOf | Transition] = []
        for index, stage in enumerate(model.features):
            name = f"features.{index}"
            if isinstance(stage, PatchMerging):
                found.append(Transition(name, _Merging(stage)))
            else:
                found.append(ChainOf(name, branches(list(stage), PARTS, name)))
        return found

    def stem(self, model: Any, clips: Tensor, /, **options: Any) -> Stem:
        """Clips [B, C, T, H, W]. No options."""
        tokens = model.pos_drop(model.patch_embed(clips))
        return Stem(tokens.transpose(1, 2).contiguous())

    def norm(self, model: Any, tokens: Tensor) -> Tensor:
        """Features [B, T, H, W, C]."""
        result: Tensor = model.norm(tokens.transpose(1, 2))
        return result

    def head(self, model: Any, features: Tensor) -> Any:
        """Logits of the mean over all places."""
        return model.head(torch.flatten(model.avgpool(features.permute(0, 4, 1, 2, 3)), 1))

    def preprocessing(self, model: Any) -> dict[str, Any]:
        """Of clips: as of images, frames, and tubelet, the frames of a token."""
        frames, *size = _clip_size(model)
        proj = model.patch_embed.proj
        channels, taken = proj.in_channels, {"frames": frames, "tubelet": proj.stride[0]}
        mean, std = ([sum(v) / 3] * channels if channels != 3 else v for v in (MEAN, STD))
        return {**taken, "size": size, "channels": channels, "mean": mean, "std": std}

    def example(self, model: Any) -> Tensor:
        """See Backbone."""
        weight = model.patch_embed.proj.weight
        return weight.new_zeros(1, weight.shape[1], *_clip_size(model))

    def features(self, model: Any) -> list[FeatureInfo]:
        """See Backbone: after each stage. Strides are of height and width."""
        stages = [stage for stage in model.features if not isinstance(stage, PatchMerging)]
        width, (_, patch, _) = model.patch_embed.proj.out_channels, model.patch_embed.proj.stride
        infos = [
            FeatureInfo(f"stages.{k}", k, 2 * len(stage) - 1, width * 2**k, patch * 2**k, "BHTWC")
            for k, stage in enumerate(stages)
        ]
        return [*infos, infos[-1]._replace(name=OUTPUT, layout="BTHWC")]


def _clip_size(model: Any) -> tuple[int, int, int]:
    """Frames, height and width that a model is measured at."""
    found: tuple[int, int, int] = getattr(model, "clip_size", (FRAMES, *SIZE))
    return found


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _embedding(channels: int) -> Any:
    def embed(patch_size: list[int], embed_dim: int, norm_layer: Any) -> PatchEmbed3d:
        return PatchEmbed3d(patch_size, channels, embed_dim, norm_layer)

    return embed
