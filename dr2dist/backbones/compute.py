"""Branches that blocks of several families have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def match_buffer(module: Any, name: str, x: Tensor) -> None:
    """Brings a buffer, where there is one, to the dtype of what it meets.

    Engines that hold parameters in bf16 leave buffers in fp32, which torch refuses beside them.
    """
    buffer = getattr(module, name, None)
    if buffer is not None and buffer.dtype != x.dtype:
        with torch.inference_mode(False):  # it stays, and training would refuse an inference tensor
            setattr(module, name, buffer.to(x.dtype))


def attention(block: Any, x: Tensor, **sides: Any) -> Tensor:
    """Attention after the norm, with LayerScale's module (ViT)."""
    result: Tensor = block.drop_path1(block.ls1(block.attn(block.norm1(x), **sides)))
    return result


def mlp(block: Any, x: Tensor) -> Tensor:
    """MLP after the norm, with LayerScale's module (ViT)."""
    result: Tensor = block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return result


def scaled_attention(block: Any, x: Tensor, **sides: Any) -> Tensor:
    """Attention after the norm, with a scale that may be missing (EVA, BEiT)."""
    x = block.norm1(x)
    match_buffer(block.attn, "k_bias", x)  # zeros
    branch = block.attn(x, **sides)
    return block.drop_path1(branch if block.gamma_1 is None else block.gamma_1 * branch)


def scaled_mlp(block: Any, x: Tensor) -> Tensor:
    """MLP after the norm, with a scale that may be missing (EVA, BEiT)."""
    branch = block.mlp(block.norm2(x))
    return block.drop_path2(branch if block.gamma_2 is None else block.gamma_2 * branch)


def attention_post_norm(block: Any, x: Tensor, **sides: Any) -> Tensor:
    """Attention before its norm."""
    match_buffer(block.attn, "k_bias", x)  # zeros
    return block.drop_path1(block.norm1(block.attn(x, **sides)))


def mlp_post_norm(block: Any, x: Tensor) -> Tensor:
    """MLP before its norm."""
    return block.drop_path2(block.norm2(block.mlp(x)))


ATTENTION_NAMES = ("norm1", "attn", "ls1", "drop_path1")
MLP_NAMES = ("norm2", "mlp", "ls2", "drop_path2")
SCALED_ATTENTION_NAMES = ("norm1", "attn", "gamma_1", "drop_path1")
SCALED_MLP_NAMES = ("norm2", "mlp", "gamma_2", "drop_path2")
