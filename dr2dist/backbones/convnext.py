"""timm's ConvNeXt and ConvNeXt V2: one function a block, on maps [B, C, H, W]."""

from __future__ import annotations

from typing import Any

from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from dr2dist.backbones.backbone import Stem, is_built_as
from dr2dist.backbones.branch import BranchSpec
from dr2dist.backbones.maps import MapBackbone, Parts


def _block(block: Any, x: Tensor) -> Tensor:
    """What a block adds, in the memory format of states: kernels are chosen by it."""
    x = block.conv_dw(x)
    if block.use_conv_mlp:
        x = block.mlp(block.norm(x))
    else:
        x = block.mlp(block.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    if block.gamma is not None:
        x = x * block.gamma.reshape(1, -1, 1, 1)
    return block.drop_path(x).contiguous()


PARTS: Parts = {
    ConvNeXtBlock: (BranchSpec(("conv_dw", "norm", "mlp", "gamma", "drop_path"), _block),)
}


class ConvNextBackbone(MapBackbone):
    """A chain for each stage; downsamplings are the transitions."""

    name = "convnext"
    patterns = ("convnext_*", "convnextv2_*")
    classes = (ConvNeXt,)
    tail = ("norm_pre", "head")
    stages = "stages"
    channel_dim = 1
    parts = PARTS

    def matches(self, model: nn.Module) -> bool:
        """See Backbone."""
        return is_built_as(model, ConvNeXt)

    def stem(self, model: Any, images: Tensor, /, **options: Any) -> Stem:
        """No options."""
        return Stem(model.stem(images).contiguous())

    def norm(self, model: Any, tokens: Tensor) -> Tensor:
        """See Backbone."""
        result: Tensor = model.norm_pre(tokens)
        return result
