"""timm's SwinTransformer: one chain between patch mergings, on maps [B, H, W, C]."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from timm.models._features import feature_take_indices
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from dr2dist.backbones.backbone import (
    OUTPUT,
    Backbone,
    ChainOf,
    FeatureInfo,
    Stem,
    Transition,
    is_built_as,
)
from dr2dist.backbones.branch import BranchSpec, branches
from dr2dist.backbones.compute import match_buffer
from dr2dist.backbones.slicing import Given, Run, Slicing, Tokenwise
from dr2dist.reversible.calls.slices import Ranges, TokenSlice


def _attention(block: Any, x: Tensor) -> Tensor:
    x = block.norm1(x)
    match_buffer(block, "attn_mask", x)  # its values, 0 and -100, are exact in any
    return block.drop_path1(block._attn(x))


def _mlp(block: Any, x: Tensor) -> Tensor:
    return block.drop_path2(block.mlp(block.norm2(x)))


class Windows(Slicing):
    """Rows of windows. A shifted block's rows begin `shift` rows down, and the last wrap around."""

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
        band = copy.copy(part)
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


PARTS = {
    SwinTransformerBlock: (
        BranchSpec(("norm1", "attn", "drop_path1"), _attention, slicing=Windows()),
        BranchSpec(("norm2", "mlp", "drop_path2"), _mlp, slicing=Tokenwise()),
    )
}


class SwinBackbone(Backbone):
    """A chain for each stage; patch mergings are the transitions."""

    name = "swin"
    patterns = ("swin_*",)
    classes = (SwinTransformer,)
    tail = ("norm", "head")

    def matches(self, model: nn.Module) -> bool:
        """See Backbone."""
        return is_built_as(model, SwinTransformer)

    def layers(self, model: Any) -> list[ChainOf | Transition]:
        """See Backbone."""
        found: list[ChainOf | Transition] = []
        for index, layer in enumerate(model.layers):
            if not isinstance(layer.downsample, nn.Identity):
                found.append(Transition(f"layers.{index}.downsample", layer.downsample))
            name = f"layers.{index}.blocks"
            found.append(ChainOf(name, branches(layer.blocks, PARTS, name)))
        return found

    def features(self, model: Any) -> list[FeatureInfo]:
        """See Backbone: after each stage."""
        infos = [
            FeatureInfo(
                f"layers.{index}",
                index,
                2 * len(layer.blocks) - 1,
                info["num_chs"],
                info["reduction"],
                "BHWC",
            )
            for index, (layer, info) in enumerate(
                zip(model.layers, model.feature_info, strict=True)
            )
        ]
        return [*infos, infos[-1]._replace(name=OUTPUT)]

    def to_map(self, model: Any, tokens: Tensor) -> Tensor:
        """See Backbone."""
        return tokens.permute(0, 3, 1, 2)

    def stem(self, model: Any, images: Tensor, /, **options: Any) -> Stem:
        """No options."""
        return Stem(model.patch_embed(images))

    def intermediates(self, net: Any, images: Tensor, /, **options: Any) -> Any:
        """See Backbone."""
        return self._maps(net, images, **options)

    def _maps(
        self,
        net: Any,
        images: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps [B, C, H, W] after chosen stages. Raises ValueError for another output_fmt."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}, allowed is NCHW")
        taken, last = feature_take_indices(len(net.layers), indices)
        ends = [(n, len(i.functions) - 1) for n, i in enumerate(net.items) if i in net.chains]
        stop = ends[last] if stop_early else None
        flow = net.forward_taps(images, [ends[index] for index in taken], stop)
        maps = []
        for index in sorted(set(taken)):
            tokens = flow.taps[ends[index]]
            chosen = net.norm(tokens) if norm and index == len(ends) - 1 else tokens
            maps.append(chosen.permute(0, 3, 1, 2).contiguous())
        tokens, whole = flow.value, not stop_early or last == len(ends) - 1
        if intermediates_only:
            return maps
        return (net.norm(tokens) if whole else tokens), maps
