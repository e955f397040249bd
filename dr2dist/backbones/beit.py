"""timm's Beit: BEiT and BEiT v2; a relative position bias shared by all blocks is a side."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Beit, Block
from torch import Tensor, nn

from dr2dist.backbones.backbone import ChainOf, Stem, Transition, is_built_as
from dr2dist.backbones.branch import BranchSpec, branches
from dr2dist.backbones.compute import (
    SCALED_ATTENTION_NAMES,
    SCALED_MLP_NAMES,
    scaled_attention,
    scaled_mlp,
)
from dr2dist.backbones.slicing import Queries, Tokenwise
from dr2dist.backbones.tokens import TokenBackbone

PARTS = {
    Block: (
        BranchSpec(SCALED_ATTENTION_NAMES, scaled_attention, ("shared_rel_pos_bias",), Queries()),
        BranchSpec(SCALED_MLP_NAMES, scaled_mlp, slicing=Tokenwise()),
    )
}


class BeitBackbone(TokenBackbone):
    """One chain of all blocks."""

    name = "beit"
    patterns = ("beit_*", "beitv2_*")
    classes = (Beit,)

    def matches(self, model: nn.Module) -> bool:
        """See Backbone."""
        return is_built_as(model, Beit)

    def layers(self, model: Any) -> list[ChainOf | Transition]:
        """See Backbone."""
        return [ChainOf("blocks", branches(model.blocks, PARTS, "blocks"))]

    def stem(self, model: Any, images: Tensor, /, **options: Any) -> Stem:
        """No options."""
        tokens = model.patch_embed(images)
        tokens = torch.cat((model.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        if model.pos_embed is not None:
            tokens = tokens + model.pos_embed
        shared = model.rel_pos_bias() if model.rel_pos_bias is not None else None
        sides = {} if shared is None else {"shared_rel_pos_bias": shared}
        return Stem(model.pos_drop(tokens), sides)
