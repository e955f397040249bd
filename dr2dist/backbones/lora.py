"""Low-rank adapters (LoRA, arXiv 2106.09685) in the residual functions of a model, by peft."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from dr2dist.backbones.build import head_names
from dr2dist.backbones.convert import convert
from dr2dist.backbones.measure import measure, on_meta
from dr2dist.errors import UserError, nearest

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
"""Parts of the names that peft gives the weights of an adapted layer and its adapter's."""


def targets_of(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the linear layers in residual functions that match a pattern and are called.

    model: on the meta device. Layers whose weights an attention takes without calling them, such as
    BEiT's qkv, are left out: their adapters would have no effect. Raises UserError for a pattern
    that matches no other.
    """
    net = on_meta(convert(model))
    inside = {id(part) for chain in net.chains for f in chain.functions for part in f.modules()}
    linear = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    called: set[int] = set()
    for layer in linear.values():
        layer.register_forward_hook(lambda layer, *_: called.add(id(layer)))
    measure(net)
    known = [name for name, layer in linear.items() if id(layer) in called & inside]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise UserError(f"model.lora.targets: '{pattern}' {_why_none(pattern, linear, known)}")
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _why_none(pattern: str, linear: Mapping[str, Any], known: Sequence[str]) -> str:
    passed = [name for name in linear if fnmatchcase(name, pattern)]
    if passed:
        return (
            f"matches {passed[0]}, which is outside of the residual functions or whose weights the "
            "model takes without calling it: an adapter would have no effect"
        )
    return f"matches no linear layer of the residual functions{nearest(pattern, known)}"


def add_adapters(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float
) -> None:
    """Puts an adapter beside each layer that is named: x W' + (alpha / rank) x A' B'.

    Only adapters and the head's parameters are trained afterwards. They have no values yet: see
    `values_of`. Raises UserError if peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("model.lora needs peft: pip install 'dr2dist[lora]'") from None
    heads = head_names(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
    )
    with torch.device(next(model.parameters()).device):
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((DOWN, UP)) or name.startswith(heads))


def adapted_layers(model: nn.Module) -> list[str]:
    """Names of the layers that have an adapter."""
    return [name.removesuffix(DOWN) for name, _ in model.named_parameters() if name.endswith(DOWN)]


def values_of(
    model: nn.Module, seed: int, base: Callable[[str], Tensor]
) -> Callable[[str], Tensor]:
    """What gives the values of a model's parameters by name, one at a time: those of an adapter are
    drawn (A) or zero (B), by seed and name alone, others are what `base` gives by the names that
    the model had before."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def read(name: str) -> Tensor:
        if name.endswith(UP):
            return torch.zeros(shapes[name])
        if name.endswith(DOWN):
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
            bound = shapes[name][1] ** -0.5  # as nn.Linear's own
            return torch.empty(shapes[name]).uniform_(-bound, bound, generator=generator)
        return base(name.replace(BASE, "."))

    return read


def set_values(model: nn.Module, seed: int) -> None:
    """Gives the adapters of a model with weights the values that `values_of` would."""
    named = dict(model.named_parameters())
    read = values_of(model, seed, named.__getitem__)
    with torch.no_grad():
        for name, parameter in named.items():
            if name.endswith((DOWN, UP)):
                parameter.copy_(read(name))


def merged(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights by the model's own names, with what adapters add to them. scale: alpha / rank."""
    found = {}
    for name, value in tensors.items():
        if name.endswith((DOWN, UP)):
            continue
        layer = name.removesuffix(f"{BASE}weight")
        if layer != name:
            up, down = tensors[f"{layer}{UP}"], tensors[f"{layer}{DOWN}"]
            value = (value.double() + scale * up.double() @ down.double()).to(value.dtype)
        found[name.replace(BASE, ".")] = value
    return found
