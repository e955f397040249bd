"""timm's VisionTransformer: ViT, DeiT, DeiT-3, DINOv2, SigLIP, CLIP towers, parallel blocks."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from dr2dist.backbones.backbone import ChainOf, Stem, Transition, is_built_as
from dr2dist.backbones.branch import BranchSpec, branches
from dr2dist.backbones.compute import (
    ATTENTION_NAMES,
    MLP_NAMES,
    attention,
    attention_post_norm,
    mlp,
    mlp_post_norm,
)
from dr2dist.backbones.slicing import Queries, Tokenwise
from dr2dist.backbones.tokens import TokenBackbone, per_sample

MASK = ("attn_mask", "is_causal")


def _whole_branch(block: Any, x: Tensor, **sides: Any) -> Tensor:
    """The one branch of a block: what its last module gives, before x is added."""
    given: list[Tensor] = []
    hook = block.drop_path.register_forward_hook(lambda module, args, output: given.append(output))
    try:
        type(block).forward(block, x, **sides)
    finally:
        hook.remove()
    return given[0]


def _parallel_attentions(block: Any, x: Tensor, **sides: Any) -> Tensor:
    outputs = [part.drop_path(part.ls(part.attn(part.norm(x), **sides))) for part in block.attns]
    return torch.stack(outputs).sum(dim=0)


def _parallel_mlps(block: Any, x: Tensor) -> Tensor:
    return torch.stack([part(x) for part in block.ffns]).sum(dim=0)


PARTS = {
    Block: (
        BranchSpec(ATTENTION_NAMES, attention, MASK, Queries()),
        BranchSpec(MLP_NAMES, mlp, slicing=Tokenwise()),
    ),
    ResPostBlock: (
        BranchSpec(ATTENTION_NAMES, attention_post_norm, MASK, Queries()),
        BranchSpec(MLP_NAMES, mlp_post_norm, slicing=Tokenwise()),
    ),
    ParallelScalingBlock: (BranchSpec(None, _whole_branch, MASK),),
    DiffParallelScalingBlock: (BranchSpec(None, _whole_branch, MASK),),
    ParallelThingsBlock: (
        BranchSpec(("attns",), _parallel_attentions, MASK),
        BranchSpec(("ffns",), _parallel_mlps),
    ),
}


class VitBackbone(TokenBackbone):
    """One chain of all blocks; masks are sides."""

    name = "vit"
    patterns = (
        "vit_*",
        "deit*",
        "flexivit_*",
        "beit3_*",
        "aimv2_*",
        "eva_large_*",
        "vitamin_*",
    )
    classes = (VisionTransformer, VisionTransformerDistilled)

    def matches(self, model: nn.Module) -> bool:
        """See Backbone."""
        return is_built_as(model, *self.classes)

    def layers(self, model: Any) -> list[ChainOf | Transition]:
        """See Backbone."""
        return [ChainOf("blocks", branches(model.blocks, PARTS, "blocks"))]

    def stem(self, model: Any, images: Tensor, /, **options: Any) -> Stem:
        """Options: attn_mask and is_causal, as timm's blocks take them."""
        tokens = model._pos_embed(model.patch_embed(images))
        tokens = model.norm_pre(model.patch_drop(tokens))
        sides = {name: options.get(name) for name in MASK if options.get(name) is not None}
        return Stem(tokens, sides, per_sample(sides))
