"""torchvision's VisionTransformer: vit_b_16 and its like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import (
    Encoder,
    EncoderBlock,
    VisionTransformer,
)

from dr2dist.backbones.backbone import Backbone, ChainOf, Stem, Transition
from dr2dist.backbones.branch import BranchSpec, branches
from dr2dist.backbones.slicing import Tokenwise


def _attention(block: Any, x: Tensor) -> Tensor:
    x = block.ln_1(x)
    attended, _ = block.self_attention(x, x, x, need_weights=False)
    return block.dropout(attended)


def _mlp(block: Any, x: Tensor) -> Tensor:
    return block.mlp(block.ln_2(x))


PARTS = {
    EncoderBlock: (
        BranchSpec(("ln_1", "self_attention", "dropout"), _attention),
        BranchSpec(("ln_2", "mlp"), _mlp, slicing=Tokenwise()),
    )
}


class TorchvisionVitBackbone(Backbone):
    """One chain of all blocks. forward_features gives the encoder's output, [B, tokens, C].

    Norm and head run as they stand: modules of the encoder that follow its blocks cannot be named
    without the blocks.
    """

    name = "torchvision-vit"
    patterns = ("vit_b_*", "vit_l_*", "vit_h_*")
    classes = (VisionTransformer,)

    def matches(self, model: nn.Module) -> bool:
        """See Backbone."""
        if not isinstance(model, VisionTransformer) or not isinstance(model.encoder, Encoder):
            return False
        own: Any = type(model)
        encoder: Any = type(model.encoder)
        known = own.forward is VisionTransformer.forward
        return known and encoder.forward is Encoder.forward

    def layers(self, model: Any) -> list[ChainOf | Transition]:
        """See Backbone."""
        where = "encoder.layers"
        return [ChainOf(where, branches(list(model.encoder.layers), PARTS, where))]

    def stem(self, model: Any, images: Tensor, /, **options: Any) -> Stem:
        """No options."""
        tokens = model._process_input(images)
        tokens = torch.cat([model.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return Stem(model.encoder.dropout(tokens + model.encoder.pos_embedding))

    def example(self, model: Any) -> Tensor:
        """See Backbone."""
        size, weight = model.image_size, model.conv_proj.weight
        return weight.new_zeros(1, weight.shape[1], size, size)

    def norm(self, model: Any, tokens: Tensor) -> Tensor:
        """See Backbone."""
        result: Tensor = model.encoder.ln(tokens)
        return result

    def head(self, model: Any, features: Tensor) -> Any:
        """The class token's logits."""
        return model.heads(features[:, 0])
