"""From a model to a reversible network, by the family that knows it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import nn

from dr2dist.backbones.backbone import Backbone
from dr2dist.backbones.beit import BeitBackbone
from dr2dist.backbones.convnext import ConvNextBackbone
from dr2dist.backbones.eva import EvaBackbone
from dr2dist.backbones.in_force import COEFFICIENTS_NAME
from dr2dist.backbones.mvit import MvitBackbone
from dr2dist.backbones.network import ReversibleNetwork, blank
from dr2dist.backbones.refusal import check_is_model, unsupported
from dr2dist.backbones.relpos import RelPosBackbone
from dr2dist.backbones.swin import SwinBackbone
from dr2dist.backbones.swin3d import Swin3dBackbone
from dr2dist.backbones.swin_v2 import SwinV2Backbone
from dr2dist.backbones.torchvision_vit import TorchvisionVitBackbone
from dr2dist.backbones.videomae import VideoMaeBackbone
from dr2dist.backbones.vit import VitBackbone
from dr2dist.errors import UserError
from dr2dist.reversible import Setting
from dr2dist.reversible.arithmetic.setting import Arithmetic, Gain, HandOn, Memory, Place, StateBits
from dr2dist.reversible.failure import OnFailure

log = logging.getLogger(__name__)

_families: list[Backbone] = [
    VitBackbone(),
    EvaBackbone(),
    BeitBackbone(),
    SwinBackbone(),
    SwinV2Backbone(),
    ConvNextBackbone(),
    RelPosBackbone(),
    Swin3dBackbone(),
    MvitBackbone(),
    VideoMaeBackbone(),
    TorchvisionVitBackbone(),
]


def convert(
    model: nn.Module,
    alpha: float = 0.9,
    beta: float = 0.1,
    arithmetic: Arithmetic = "exact",
    memory: Memory = "reverse",
    chunk_size: int | Literal["auto"] | None = None,
    fraction_bits: int = 18,
    chunk_tokens: int | None = None,
    memory_budget: int | None = None,
    chunk_budget: int | None = None,
    on_failure: OnFailure = "raise",
    compile: bool = False,
    state_bits: StateBits = 32,
    remainders: Place = "device",
    hand_on: HandOn = "last",
    gain: Gain = "none",
) -> Any:
    """A reversible network from a supported model (Dr2Net, arXiv 2401.04105; docs/method.md).

    The result, a ReversibleNetwork of the model's own class, is called as the model is, gives
    outputs of the same structure and dtype and shares its parameters, buffers and modules by
    reference; the model itself stays usable.

    alpha, beta: coefficients of the two residuals, rounded to multiples of 2^-16; alpha from 0 to
    1, beta over 0 and up to 1, or 0 with alpha 1, float arithmetic and memory "store" or
    "checkpoint", which is conventional finetuning. arithmetic: "exact" reverses bit for bit,
    "float" with round-off. memory: "reverse" reconstructs activations, "store" keeps them,
    "checkpoint" keeps each function's input, "budget" keeps as many as memory_budget bytes hold.
    chunk_size: samples per slice of the batch; "auto" for the largest slices, of samples or
    tokens, whose working set stays within chunk_budget bytes.
    fraction_bits: resolution of exact states, 2^-fraction_bits. chunk_tokens: tokens per slice
    inside a sample, with a chunk_size of 1, for functions that can run so (see docs/memory.md).
    on_failure: what happens at a backward pass whose reversal is not proven: "raise" ReversalError,
    "warn", or "record" for `certificate()`; on a GPU at a later forward pass, so that the host
    never waits. compile: run residual functions in training by torch.compile, forth and back.
    state_bits: of exact states: 32, or 16 with a scale for each channel, which is found in the
    first pass and grows between passes where it must (docs/method.md). remainders: where the bits
    that beta discards wait for the backward pass: "host" is pinned memory (docs/memory.md).
    hand_on: what each chain gives: its "last" tokens, or the "mean" of its last two. gain:
    "consistent" multiplies the outputs of all functions but a chain's first by 1 + beta.

    Raises UserError for a model that is not supported and ValueError for a setting that is not.
    """
    setting = Setting(
        alpha,
        beta,
        arithmetic,
        memory,
        chunk_size,
        fraction_bits,
        chunk_tokens,
        memory_budget,
        chunk_budget,
        state_bits,
        remainders,
        hand_on,
        gain,
    )
    family = family_of(model)
    net = blank(type(model))
    net.__dict__.update({key: _own(value) for key, value in model.__dict__.items()})
    assert isinstance(net, ReversibleNetwork)
    net.family = family
    net.chains = ()
    net.cut_layers({**asdict(setting), "on_failure": on_failure, "compile": compile})
    values = torch.empty(2, dtype=torch.int64, device="cpu")
    net.register_buffer(COEFFICIENTS_NAME, values)
    net.note_coefficients()
    # Every rank sets its own; a broadcast of them would make the host wait at each pass.
    object.__setattr__(net, "_ddp_params_and_buffers_to_ignore", [COEFFICIENTS_NAME])
    return net


def _own(value: Any) -> Any:
    """Registries are copied, so that changing the network's leaves the model's as they were."""
    return copy.copy(value) if isinstance(value, dict | set) else value


def family_of(model: nn.Module) -> Backbone:
    """The family that knows a model. Raises UserError, with what is missing, if there is none."""
    check_is_model(model)
    if isinstance(model, ReversibleNetwork):
        raise UserError("the model is converted already")
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        raise UserError(
            "the model has gradient checkpointing switched on, which has no effect on a "
            "reversible network; switch it off, or convert with memory='checkpoint'"
        )
    for family in _families:
        if family.matches(model):
            return _with_functions(family, model)
    raise UserError(f"convert: {unsupported(model, _families)}")


def _with_functions(family: Backbone, model: nn.Module) -> Backbone:
    """The family. Raises UserError for a model that has nothing to reverse."""
    if not any(getattr(layer, "functions", ()) for layer in family.layers(model)):
        raise UserError(f"{type(model).__name__} has no block, so nothing can be reversed")
    return family


def register_backbone(family: Backbone) -> None:
    """Makes `convert` know a family of one's own; it is asked before the ones known so far.

    family: an object, not a class. One of the same name is replaced, which is logged: cells of a
    notebook are run again.
    """
    for known in [known for known in _families if known.name == family.name]:
        log.warning("the backbone family '%s' is replaced by %s", known.name, type(family).__name__)
        _families.remove(known)
    _families.insert(0, family)


def known_families() -> Sequence[Backbone]:
    """All that are registered, the latest first."""
    return tuple(_families)


def supported_backbones() -> dict[str, tuple[str, ...]]:
    """Names of the families that `convert` knows, each with patterns of model names (vit_*)."""
    return {family.name: family.patterns for family in _families}
