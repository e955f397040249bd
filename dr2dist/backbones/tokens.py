"""Transformers whose states are token sequences [B, N, C]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor

from dr2dist.backbones.backbone import OUTPUT, Backbone, FeatureInfo
from dr2dist.errors import UserError

TAIL = ("norm", "attn_pool", "fc_norm", "head_drop", "head", "head_dist")
"""What follows the blocks of such models, where it is there."""


class TokenBackbone(Backbone):
    """timm's models of one chain of blocks, on tokens of which those of no place come first."""

    tail = TAIL

    def features(self, model: Any) -> list[FeatureInfo]:
        """See Backbone: after each block."""
        return token_features(model, self.layers(model))

    def to_map(self, model: Any, tokens: Tensor) -> Tensor:
        """See Backbone."""
        return token_map(model, tokens)

    def intermediates(self, net: Any, images: Tensor, /, **options: Any) -> Any:
        """See Backbone."""
        return token_intermediates(net, images, **options)


def token_intermediates(
    net: Any,
    images: Tensor,
    indices: int | list[int] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
    output_dict: bool = False,
    **options: Any,
) -> Any:
    """The chain's states after chosen blocks, in the forms that timm gives them.

    indices: the last n blocks, or these. Other arguments and the output are timm's. Raises
    ValueError for another output_fmt than NCHW or NLC.
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt is {output_fmt!r}, allowed is NCHW or NLC")
    taken, last = feature_take_indices(len(net.blocks), indices)
    final, states = _run(net, images, taken, last if stop_early else None, options)
    if norm:
        states = [net.norm(state) for state in states]
    count = net.num_prefix_tokens
    prefixes = [state[:, :count] for state in states] if count else None
    spatial = [state[:, count:] for state in states]
    if output_fmt == "NCHW":
        spatial = [_as_image(net, state, images) for state in spatial]
    if output_dict:
        result: dict[str, Any] = {"image_intermediates": spatial}
        if prefixes and return_prefix_tokens:
            result["image_intermediates_prefix"] = prefixes
        if not intermediates_only:
            result["image_features"] = net.norm(final)
        return result
    features: list[Any] = spatial
    if return_prefix_tokens and prefixes:
        features = list(zip(spatial, prefixes, strict=True))
    return features if intermediates_only else (net.norm(final), features)


def _run(
    net: Any, images: Tensor, taken: list[int], last: int | None, options: dict[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    per_block = len(net.chains[0].functions) // len(net.blocks)
    ends = {block: (0, (block + 1) * per_block - 1) for block in range(len(net.blocks))}
    until = None if last is None else ends[last]
    flow = net.forward_taps(images, [ends[block] for block in taken], until, **options)
    # Blocks come in the network's order, whatever the order they were asked for in.
    return flow.value, [flow.taps[ends[block]] for block in sorted(set(taken))]


def token_features(model: Any, layers: Sequence[Any]) -> list[FeatureInfo]:
    """After each block of the one chain, and OUTPUT: tokens [B, N, C], those of no place first."""
    (chain,) = layers
    per_block = len(chain.functions) // len(model.blocks)
    embed = model.patch_embed
    # Of a hybrid stem the patch is one of its map.
    stride = embed.feat_ratio() if hasattr(embed, "feat_ratio") else embed.patch_size[0]
    width, stride = model.embed_dim, int(stride)
    infos = [
        FeatureInfo(f"blocks.{block}", 0, (block + 1) * per_block - 1, width, stride, "BNC")
        for block in range(len(model.blocks))
    ]
    return [*infos, infos[-1]._replace(name=OUTPUT)]


def token_map(model: Any, tokens: Tensor) -> Tensor:
    """Tokens [B, N, C] as a map [B, C, H, W] of the patches of images that the model is built for.

    Raises UserError for another number of tokens, as of images of other sizes.
    """
    height, width = model.patch_embed.grid_size
    patches = tokens[:, model.num_prefix_tokens :]
    if patches.shape[1] != height * width:
        raise UserError(
            f"{patches.shape[1]} tokens are no map of {height} x {width} patches, for which the "
            "model is built"
        )
    return patches.transpose(1, 2).unflatten(2, (height, width))


def _as_image(net: Any, tokens: Tensor, images: Tensor) -> Tensor:
    height, width = net.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    return tokens.reshape(len(tokens), height, width, -1).permute(0, 3, 1, 2).contiguous()


def per_sample(sides: dict[str, Any]) -> list[str]:
    """Names of the sides that differ from sample to sample.

    Those are masks [B, heads or 1, N, N] as attention adds them, and rotary embeddings
    [B, 1, N, C] of the tokens that patch dropping has kept; with a 1 in the place of B, or without
    it, they are the same for all samples.
    """
    return [
        name
        for name, value in sides.items()
        if isinstance(value, Tensor) and value.ndim == 4 and len(value) > 1
    ]
