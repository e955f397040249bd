"""Modules that treat each token by itself, so that tokens may be cut between slices."""

from __future__ import annotations

from collections.abc import Collection

import timm.layers.activations as timms
from timm.layers import (
    DropPath,
    GluMlp,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    Mlp,
    RmsNorm,
    RmsNormFp32,
    SimpleNorm,
    SimpleNormFp32,
    SwiGLU,
)
from timm.layers.pos_embed_rel import RelPosBias, RelPosMlp
from timm.models.vitamin import GeGluMlp
from torch import nn
from torchvision.models.vision_transformer import MLPBlock
from torchvision.ops import MLP, StochasticDepth

from dr2dist.reversible.trees import FORWARD_HOOKS, has_hooks, modules_of

NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    LayerNorm,
    LayerNormFp32,
    RmsNorm,
    RmsNormFp32,
    SimpleNorm,
    SimpleNormFp32,
)
MLPS = (Mlp, GluMlp, SwiGLU, GeGluMlp, MLP, MLPBlock)
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU),
    *(nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardswish),
    *(timms.GELU, timms.GELUTanh, timms.QuickGELU, timms.Sigmoid, timms.Tanh, timms.HardMish),
)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterDict)
BIASES = (RelPosBias, RelPosMlp)
"""Of relative positions, which see no token."""
OTHERS = (nn.Linear, nn.Identity, nn.Dropout, LayerScale, DropPath, StochasticDepth)
KINDS = frozenset({*NORMS, *MLPS, *ACTIVATIONS, *CONTAINERS, *BIASES, *OTHERS})

ADAPTERS = "peft.tuners.lora."
"""Where the classes of adapted linear layers are, which need not be installed."""


def is_tokenwise(module: nn.Module) -> bool:
    """Whether a module is of a class that is known to treat tokens apart; its parts are asked for
    themselves."""
    kind = type(module)
    over = getattr(module, "normalized_shape", (0,))
    return (kind in KINDS and len(over) == 1) or kind.__module__.startswith(ADAPTERS)


def is_cuttable(part: nn.Module, across: Collection[str], hooked: bool) -> bool:
    """Whether a branch's tokens may be cut: nothing in it is known to look at others but the
    modules named in `across`, and nothing does what only its author knows: a replaced forward, and
    hooks where they are called (`hooked`)."""
    for name, child in part._modules.items():
        for module in modules_of(child) if child is not None else ():
            if "forward" in module.__dict__ or (hooked and has_hooks(module, FORWARD_HOOKS)):
                return False
            if name not in across and not is_tokenwise(module):
                return False
    return True
