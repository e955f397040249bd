"""timm's SwinTransformer: one chain between patch mergings, on maps [B, H, W, C]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from dr2dist.backbones.backbone import Stem, is_built_as
from dr2dist.backbones.branch import BranchSpec
from dr2dist.backbones.compute import match_buffer
from dr2dist.backbones.maps import MapBackbone, Parts
from dr2dist.backbones.slicing import Given, Run, Slicing, Tokenwise, shallow_copy
from dr2dist.reversible.calls.slices import Ranges, TokenSlice


def _attention(block: Any, x: Tensor) -> Tensor:
    x = block.norm1(x)
    match_buffer(block, "attn_mask", x)  # its values, 0 and -100, are exact in any
    return block.drop_path1(block._attn(x))


def _mlp(block: Any, x: Tensor) -> Tensor:
    return block.drop_path2(block.mlp(block.norm2(x)))


class Windows(Slicing):
    """Rows of windows. A shifted block's rows begin `shift` rows down, and the last wrap around."""

    across = ("attn",)

    def ranges(self, part: Any, shape: torch.Size, tokens: int, sides: Given) -> Sequence[Ranges]:
        """See Slicing. None where windows stick out of the map."""
        height, width = shape[1:3]
        rows, columns = part.window_size
        if height % rows or width % columns or getattr(part, "dynamic_mask", False):
            return []
        step = rows * max(tokens // (rows * width), 1)
        return [
            _wrapped(start + part.shift_size[0], min(step, height - start), height)
            for start in range(0, height, step)
        ]

    def compute(self, run: Run, part: Any, x: Tensor, told: TokenSlice, sides: Given) -> Any:
        """See Slicing: the slice is a map without a vertical shift, with its windows' masks."""
        mask = part.attn_mask
        if mask is not None:
            windows = x.shape[2] // part.window_size[1]
            first = (told.ranges[0].start - part.shift_size[0]) % told.length
            rows = slice(first // part.window_size[0], None)
            mask = mask.unflatten(0, (-1, windows))[rows][: x.shape[1] // part.window_size[0]]
        band = shallow_copy(part)
        band._buffers = {**part._buffers, "attn_mask": None if mask is None else mask.flatten(0, 1)}
        band.shift_size = (0, part.shift_size[1])
        return run(band, x)


def _wrapped(start: int, count: int, height: int) -> Ranges:
    """`count` rows from `start` on, of which the last may be the map's first ones."""
    start %= height
    stop = start + count
    if stop <= height:
        return (slice(start, stop),)
    return (slice(start, height), slice(0, stop - height))


PARTS: Parts = {
    SwinTransformerBlock: (
        BranchSpec(("norm1", "attn", "drop_path1"), _attention, slicing=Windows()),
        BranchSpec(("norm2", "mlp", "drop_path2"), _mlp, slicing=Tokenwise()),
    )
}


class SwinBackbone(MapBackbone):
    """A chain for each stage; patch mergings are the transitions."""

    name = "swin"
    patterns = ("swin_*",)
    classes = (SwinTransformer,)
    tail = ("norm", "head")
    parts = PARTS

    def matches(self, model: nn.Module) -> bool:
        """See Backbone."""
        return is_built_as(model, SwinTransformer)

    def stem(self, model: Any, images: Tensor, /, **options: Any) -> Stem:
        """No options."""
        return Stem(model.patch_embed(images))
