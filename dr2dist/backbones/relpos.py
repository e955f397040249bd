"""timm's VisionTransformerRelPos: relative position biases, each block's own or a shared one."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer_relpos import (
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from dr2dist.backbones.backbone import ChainOf, Stem, Transition, is_built_as
from dr2dist.backbones.branch import BranchSpec, branches
from dr2dist.backbones.compute import (
    ATTENTION_NAMES,
    MLP_NAMES,
    attention,
    attention_post_norm,
    match_buffer,
    mlp,
    mlp_post_norm,
)
from dr2dist.backbones.slicing import Queries, Tokenwise
from dr2dist.backbones.tokens import TokenBackbone

SHARED = "shared_rel_pos"


def _match_coordinates(bias: Any) -> None:
    """The coordinates that a bias is computed from, in its weights' dtype, whatever the tokens'."""
    weight = None if bias is None else next(bias.parameters(), None)
    if weight is not None:
        match_buffer(bias, "rel_coords_log", weight)


def _attention(block: Any, x: Tensor, **sides: Any) -> Tensor:
    _match_coordinates(block.attn.rel_pos)
    return attention(block, x, **sides)


def _attention_post_norm(block: Any, x: Tensor, **sides: Any) -> Tensor:
    _match_coordinates(block.attn.rel_pos)
    return attention_post_norm(block, x, **sides)


PARTS = {
    RelPosBlock: (
        BranchSpec(ATTENTION_NAMES, _attention, (SHARED,), Queries()),
        BranchSpec(MLP_NAMES, mlp, slicing=Tokenwise()),
    ),
    ResPostRelPosBlock: (
        BranchSpec(("norm1", "attn", "drop_path1"), _attention_post_norm, (SHARED,), Queries()),
        BranchSpec(("norm2", "mlp", "drop_path2"), mlp_post_norm, slicing=Tokenwise()),
    ),
}


class RelPosBackbone(TokenBackbone):
    """One chain of all blocks. A shared bias is a side; others are computed in their blocks, once
    for each slice."""

    name = "relpos"
    patterns = ("vit_relpos_*", "vit_srelpos_*")
    classes = (VisionTransformerRelPos,)

    def matches(self, model: nn.Module) -> bool:
        """See Backbone."""
        return is_built_as(model, VisionTransformerRelPos)

    def layers(self, model: Any) -> list[ChainOf | Transition]:
        """See Backbone."""
        return [ChainOf("blocks", branches(model.blocks, PARTS, "blocks"))]

    def stem(self, model: Any, images: Tensor, /, **options: Any) -> Stem:
        """No options."""
        tokens = model.patch_embed(images)
        if model.cls_token is not None:
            tokens = torch.cat((model.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
        if model.shared_rel_pos is None:
            return Stem(tokens)
        _match_coordinates(model.shared_rel_pos)
        # Called, as engines gather weights around calls: what it is added to is nothing.
        return Stem(tokens, {SHARED: model.shared_rel_pos(tokens.new_zeros(()))})
