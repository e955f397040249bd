"""timm models by name, with weights from a file or timm's hub."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dr2dist.backbones.channels import with_channels
from dr2dist.backbones.convert import known_families
from dr2dist.backbones.deferred import deferred, make_buffers
from dr2dist.backbones.heads import TASK_HEAD
from dr2dist.backbones.weights import read_weights
from dr2dist.errors import UserError, nearest, one_line

log = logging.getLogger(__name__)

FOREIGN = {*inspect.signature(timm.create_model).parameters, "features_only"}
"""Options that would change where weights come from, or what inputs and outputs are."""


def build_model(
    name: str,
    *,
    weights: str | None,
    image_size: tuple[int, int] | None,
    num_classes: int,
    in_channels: int = 3,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    options: Mapping[str, Any] | None = None,
    finish: Callable[[nn.Module], None] = lambda model: None,
) -> nn.Module:
    """A timm model in fp32.

    weights: None for random ones from torch's global stream, "hub" for timm's own, otherwise
    the path of a file that `read_weights` takes; position embeddings and windows are resized to
    `image_size`, height and width in pixels, the first convolution is adapted to in_channels, and
    a head of another number of classes starts anew. options: more arguments of timm's, such as
    depth. finish: called with the model before its weights are read, as to give it a head. Raises
    UserError for an unknown name, a bad file, or weights that do not fit.
    """
    given: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": drop_path}
    for key in options or {}:
        if key in FOREIGN:
            raise UserError(f"model.options: {key} is not one of a model's shape: leave it out")
    given |= options or {}
    if in_channels != 3:
        given["in_chans"] = in_channels
    if dropout:
        given["proj_drop_rate"] = dropout
    if image_size is not None:
        given["img_size"] = image_size
    own = None
    try:
        own = _own_model(name, given)
        model = own or _timm_model(name, weights == "hub", given)
    except UserError:
        raise
    except (TypeError, AssertionError, ValueError, LookupError, ArithmeticError, RuntimeError) as e:
        found = one_line(f"{type(e).__name__} {e}")
        raise UserError(f"model: {name} cannot be built with {given}: {found}") from None
    if own is not None and weights == "hub":
        raise UserError(
            f"model.weights: hub is timm's, which has no {name}: allowed are random, and a file"
        )
    _check_size(model, image_size)
    finish(model)
    if weights not in (None, "hub"):
        model.load_state_dict(_read(model, Path(str(weights))), strict=False)
    return model


def _check_size(model: Any, image_size: tuple[int, int] | None) -> None:
    """timm's patches would leave out the rows and columns that fill none, without a word."""
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    if image_size is None or patch is None or getattr(embed, "dynamic_img_pad", False):
        return
    height, width = (patch, patch) if isinstance(patch, int) else patch
    pairs = [(image_size[0], height), (image_size[1], width)]
    if any(size % side for size, side in pairs):
        below = [max(size // side, 1) * side for size, side in pairs]
        above = [(size // side + 1) * side for size, side in pairs]
        raise UserError(
            f"model.image_size: {list(image_size)} is no multiple of the model's patches of "
            f"{height} x {width}: allowed is, as the next ones, {below} or {above}"
        )


def _own_model(name: str, given: Mapping[str, Any]) -> nn.Module | None:
    """A registered family's own."""
    implied = ("num_classes", "drop_path_rate")
    said = {key: value for key, value in given.items() if value or key not in implied}
    for family in known_families():
        model = family.build(name, **said)
        if model is not None:
            return model
    return None


def _timm_model(name: str, pretrained: bool, given: Mapping[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        raise UserError(f"model.name: '{name}' is not a model of timm{hint}")
    if pretrained:
        return _of_hub(name, given)
    model: nn.Module = timm.create_model(name, **given)
    return model


def _of_hub(name: str, given: Mapping[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **given)
    except Exception as error:  # of whatever the hub's client is made with
        found = one_line(f"{type(error).__name__} {error}")[:300]
        raise UserError(
            f"model.weights: hub: timm's weights of {name} cannot be fetched: {found}"
        ) from None
    return model


def build_deferred(
    name: str, *, weights: str | None, **options: Any
) -> tuple[nn.Module, Callable[[str], Tensor]]:
    """build_model's model with parameters on the meta device, and what gives each one's values.

    The values have the same bits as build_model's, and come one parameter at a time: a file is
    mapped, not read. Arguments and errors as build_model's; "hub" is refused.
    """
    if weights == "hub":
        raise UserError("model.weights: hub builds the whole model, so nothing is deferred")
    with deferred() as maker:
        model = build_model(name, weights=None, **options)
    make_buffers(model, maker)
    places = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = {} if weights is None else _read(model, Path(weights))
    for key, buffer in model.named_buffers():
        if key in state:
            buffer.copy_(state[key])

    def read(key: str) -> Tensor:
        if key not in state:
            return maker.make(places[key])
        return state[key].to(places[key].dtype, copy=True, memory_format=torch.contiguous_format)

    return model, read


def _read(model: Any, path: Path) -> dict[str, Tensor]:
    """What a file holds for the model; a head of another number of classes is left out."""
    state = _fitted(model, read_weights(path), path)
    wanted = model.state_dict()
    head = {name for name in wanted if name.startswith(head_names(model))}
    wrong = {n for n, v in state.items() if n in wanted and v.shape != wanted[n].shape}
    fresh = {name for name in head if name not in state or name in wrong}
    missing = sorted(wanted.keys() - state.keys() - fresh)
    unknown = {n for n in state.keys() - wanted.keys() if not n.startswith(head_names(model))}
    strange = sorted(unknown | (wrong - fresh))
    if missing or strange:
        raise UserError(
            f"model.weights: {path} does not fit {type(model).__name__}: "
            f"missing {missing[:3] or 'nothing'}, not fitting {strange[:3] or 'nothing'}"
        )
    for name in sorted(fresh):
        log.info("%s starts anew: %s does not hold it", name, path)
    return {name: value for name, value in state.items() if name not in fresh}


def _fitted(model: Any, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights by timm's names, at the model's image size and channels, by the model's own
    family in timm."""
    module = importlib.import_module(type(model).__module__)
    convert = getattr(module, "checkpoint_filter_fn", lambda state, model: state)
    # Names that DeiT-3 was published with; no other model has any like them.
    published = "adapt_layer_scale" in inspect.signature(convert).parameters
    options = {"adapt_layer_scale": True} if published else {}
    try:
        with torch.no_grad():
            return with_channels(model, convert(state, model, **options))
    except (LookupError, AttributeError, TypeError, ValueError, AssertionError, RuntimeError) as e:
        found = one_line(f"{type(e).__name__} {e}")
        raise UserError(
            f"model.weights: {path} does not fit {type(model).__name__}: {found}"
        ) from None


def head_names(model: Any) -> tuple[str, ...]:
    """What the names of a model's classifier and of a task's head begin with."""
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier", "head")
    own = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return (*own, f"{TASK_HEAD}.")
