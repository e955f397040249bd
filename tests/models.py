"""Tiny models of every supported kind, with branches that matter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import nn
from torchvision.models.video.mvit import MSBlockConfig
from torchvision.models.video.swin_transformer import SwinTransformer3d

from dr2dist.backbones.mvit import V1, V2, Mvit
from dr2dist.backbones.videomae import VideoMae

DEPTH = 6
_size: dict[str, Any] = {"img_size": 32, "num_classes": 5}
_plain: dict[str, Any] = {**_size, "patch_size": 8, "embed_dim": 48, "num_heads": 3}

_vit = partial(VisionTransformer, **_plain, init_values=0.5)
_eva = partial(Eva, **_plain, init_values=0.5)
_beit = partial(Beit, **_plain, init_values=0.5)
_swin = partial(
    SwinTransformer,
    **_size,
    patch_size=4,
    window_size=4,
    embed_dim=24,
    num_heads=(2, 4, 8),
    drop_path_rate=0.0,
)


def _convnext(proj_drop_rate: float = 0.0, **options: Any) -> nn.Module:
    """timm's has no dropout in its blocks."""
    return ConvNeXt(num_classes=5, dims=(24, 32, 48, 64), **options)


def _relpos(**options: Any) -> nn.Module:
    """Without the dropout in the MLPs of biases, which no option of timm's switches off: a model
    in training would not equal itself."""
    model = VisionTransformerRelPos(**{**_plain, "init_values": 0.5, **options})
    for name, module in model.named_modules():
        if "rel_pos" in name and isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit": _vit,
    "vit-registers-avg": partial(
        _vit, reg_tokens=4, global_pool="avg", fc_norm=True, dynamic_img_size=True
    ),
    "vit-map-pool": partial(_vit, class_token=False, global_pool="map"),
    "vit-clip": partial(_vit, pre_norm=True, init_values=None, qk_norm=True),
    "vit-post-norm": partial(_vit, block_fn=ResPostBlock, init_values=0.9),
    "vit-parallel-scaling": partial(_vit, block_fn=ParallelScalingBlock),
    "vit-diff-parallel": partial(_vit, block_fn=DiffParallelScalingBlock, num_heads=2),
    "vit-parallel-things": partial(_vit, block_fn=ParallelThingsBlock),
    "deit-distilled": partial(VisionTransformerDistilled, **_plain, init_values=0.5),
    "eva-rope": partial(_eva, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True),
    "eva-post-norm": partial(_eva, use_post_norm=True),
    "eva-mixed-rope": partial(
        _eva, use_rot_pos_emb=True, rope_type="mixed", rope_grid_indexing="xy", qkv_fused=True
    ),
    "beit": partial(_beit, use_rel_pos_bias=True, use_abs_pos_emb=False),
    "beit-shared-bias": partial(_beit, use_shared_rel_pos_bias=True),
    "relpos": partial(_relpos, rel_pos_type="bias", class_token=True, global_pool="token"),
    "relpos-shared": partial(_relpos, class_token=True, shared_rel_pos=True),
    "relpos-shared-bias": partial(
        _relpos, rel_pos_type="bias", class_token=True, shared_rel_pos=True
    ),
    "relpos-post-norm": partial(
        _relpos, class_token=True, block_fn=ResPostRelPosBlock, init_values=0.9, fc_norm=True
    ),
    "swin": partial(_swin, depths=(2, 2, 2)),
    "swin-v2": partial(
        SwinTransformerV2,
        **_size,
        patch_size=2,
        window_size=4,
        embed_dim=24,
        num_heads=(2, 4, 8),
        depths=(2, 2, 2),
        drop_path_rate=0.0,
    ),
    "convnext": partial(_convnext, ls_init_value=0.5),
    "convnext-v2": partial(_convnext, ls_init_value=None, use_grn=True, conv_mlp=True),
}


CLIP = (3, 8, 32, 32)


def _swin3d(
    depths: tuple[int, ...] = (2, 2), drop_path_rate: float = 0.0, proj_drop_rate: float = 0.0
) -> nn.Module:
    model: Any = SwinTransformer3d(
        [2, 4, 4],
        12,
        list(depths),
        num_heads=[2, 4],
        window_size=[2, 3, 3],
        num_classes=5,
        stochastic_depth_prob=drop_path_rate,
        dropout=proj_drop_rate,
    )
    model.clip_size = CLIP[1:]
    return model


def _mvit(
    depth: int = 4, v2: bool = True, drop_path_rate: float = 0.0, proj_drop_rate: float = 0.0
) -> nn.Module:
    """A block of one stage, and a second stage, whose first block pools (v1's last one widens)."""
    blocks = []
    for number in range(depth):
        pools, keys = number == 1, [1, 4, 4] if number == 0 else [1, 2, 2]
        width = 12 if number == 0 or (pools and v2) else 24
        widens = number == (1 if v2 else 0)
        blocks.append(
            MSBlockConfig(
                num_heads=2,
                input_channels=width,
                output_channels=24 if widens else width,
                kernel_q=[3, 3, 3] if v2 or pools else [],
                kernel_kv=[3, 3, 3],
                stride_q=[1, 2, 2] if pools else [1, 1, 1] if v2 else [],
                stride_kv=keys,
            )
        )
    rates = {"stochastic_depth_prob": drop_path_rate, "attention_dropout": proj_drop_rate}
    how = V2 if v2 else V1
    return Mvit(how, CLIP[1], CLIP[2:], blocks=blocks, num_classes=5, dropout=0.0, **rates)


VIDEO: dict[str, Callable[..., Any]] = {
    "swin3d": _swin3d,
    "mvit": _mvit,
    "videomae": partial(
        VideoMae,
        embed_dim=48,
        depth=3,
        num_heads=3,
        img_size=(32, 32),
        frames=4,
        chunks=2,
        patch_size=8,
        num_classes=5,
        init_values=0.5,
    ),
}
"""Those that take clips of the shape CLIP."""


MAPS = ("swin", "swin-v2", "convnext", "convnext-v2")
"""Those of stages of maps."""


def shape_of(kind: str) -> tuple[int, ...]:
    """Of one input."""
    return CLIP if kind in VIDEO else (3, 32, 32)


def build(kind: str, seed: int = 0, depth: int = DEPTH, **options: Any) -> nn.Module:
    """A model whose layer scales lie in 0.1 to 1 and whose biases are not zero.

    depth: number of blocks; Swin's stages have two each at least.
    """
    torch.manual_seed(seed)
    stages: dict[str, tuple[int, ...]] = dict.fromkeys(MAPS, (2, 2, max(2, depth - 4)))
    stages["swin3d"] = (2, max(2, depth - 2))
    stages |= dict.fromkeys(("convnext", "convnext-v2"), (1, 1, 2, max(2, depth - 4)))
    options |= {"depths": stages[kind]} if kind in stages else {"depth": depth}
    model = {**MODELS, **VIDEO}[kind](**options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name or ".ls" in name:
                parameter.uniform_(0.1, 1)
            elif parameter.ndim == 1 and "norm" not in name:
                parameter.normal_(0, 0.3)
            elif parameter.ndim == 2 and "relative" not in name:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(batch: int = 5, seed: int = 1) -> torch.Tensor:
    """Random images [batch, 3, 32, 32]."""
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def inputs(kind: str, batch: int = 3, seed: int = 1) -> torch.Tensor:
    """Random images or clips."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *shape_of(kind), generator=generator)
