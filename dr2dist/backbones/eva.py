"""timm's Eva: EVA-02, DINOv3, perception encoders; rotary embeddings are sides."""

from __future__ import annotations

from typing import Any

from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from dr2dist.backbones.backbone import ChainOf, Stem, Transition, is_built_as
from dr2dist.backbones.branch import BranchSpec, branches
from dr2dist.backbones.compute import (
    SCALED_ATTENTION_NAMES,
    SCALED_MLP_NAMES,
    attention_post_norm,
    mlp_post_norm,
    scaled_attention,
    scaled_mlp,
)
from dr2dist.backbones.slicing import Queries, Tokenwise
from dr2dist.backbones.tokens import TokenBackbone, per_sample

SIDES = ("rope", "attn_mask", "is_causal")


PARTS = {
    EvaBlock: (
        BranchSpec(SCALED_ATTENTION_NAMES, scaled_attention, SIDES, Queries()),
        BranchSpec(SCALED_MLP_NAMES, scaled_mlp, slicing=Tokenwise()),
    ),
    EvaBlockPostNorm: (
        BranchSpec(SCALED_ATTENTION_NAMES, attention_post_norm, SIDES, Queries()),
        BranchSpec(SCALED_MLP_NAMES, mlp_post_norm, slicing=Tokenwise()),
    ),
}


class EvaBackbone(TokenBackbone):
    """One chain of all blocks. Learned mixed rotary embeddings are one side for each depth."""

    name = "eva"
    patterns = (
        "eva02_*",
        "eva_giant_*",
        "vit_*_dinov3*",
        "vit_*_sapiens2",
        "vit_*_lingbot",
        "vit_*_rope_*",
        "vit_pe_*",
    )
    classes = (Eva,)

    def matches(self, model: nn.Module) -> bool:
        """See Backbone."""
        return is_built_as(model, Eva)

    def layers(self, model: Any) -> list[ChainOf | Transition]:
        """See Backbone."""

        def rename(side: str, depth: int) -> str:
            return f"rope_{depth}" if side == "rope" and _is_mixed(model) else side

        return [ChainOf("blocks", branches(model.blocks, PARTS, "blocks", rename))]

    def stem(self, model: Any, images: Tensor, /, **options: Any) -> Stem:
        """Options: attn_mask and is_causal, as timm's blocks take them."""
        tokens, rope = model._pos_embed(model.patch_embed(images))
        tokens = model.norm_pre(tokens)
        sides = {name: value for name, value in options.items() if value is not None}
        if rope is not None and _is_mixed(model):
            sides |= {f"rope_{depth}": part for depth, part in enumerate(rope.unbind(0))}
        elif rope is not None:
            sides["rope"] = rope
        return Stem(tokens, sides, per_sample(sides))


def _is_mixed(model: Any) -> bool:
    return bool(getattr(model, "rope_mixed", False))
