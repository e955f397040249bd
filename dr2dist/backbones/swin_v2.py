"""timm's SwinTransformerV2: norms after the branches, on maps [B, H, W, C]."""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn

from dr2dist.backbones.backbone import Stem, is_built_as
from dr2dist.backbones.branch import BranchSpec
from dr2dist.backbones.compute import match_buffer, mlp_post_norm
from dr2dist.backbones.maps import MapBackbone, Parts
from dr2dist.backbones.slicing import Tokenwise
from dr2dist.backbones.swin import Windows


def _attention(block: Any, x: Tensor) -> Tensor:
    match_buffer(block, "attn_mask", x)  # its values, 0 and -100, are exact in any
    return block.drop_path1(block.norm1(block._attn(x)))


PARTS: Parts = {
    SwinTransformerV2Block: (
        BranchSpec(("norm1", "attn", "drop_path1"), _attention, slicing=Windows()),
        BranchSpec(("norm2", "mlp", "drop_path2"), mlp_post_norm, slicing=Tokenwise()),
    )
}


class SwinV2Backbone(MapBackbone):
    """A chain for each stage; patch mergings are the transitions."""

    name = "swin-v2"
    patterns = ("swinv2_base_*", "swinv2_large_*", "swinv2_small_*", "swinv2_tiny_*")
    classes = (SwinTransformerV2,)
    tail = ("norm", "head")
    parts = PARTS

    def matches(self, model: nn.Module) -> bool:
        """See Backbone."""
        return is_built_as(model, SwinTransformerV2)

    def stem(self, model: Any, images: Tensor, /, **options: Any) -> Stem:
        """No options."""
        return Stem(model.patch_embed(images))
