"""timm models by name, with weights from a file or timm's hub."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dr2dist.backbones.convert import known_families
from dr2dist.backbones.deferred import deferred, make_buffers
from dr2dist.backbones.heads import TASK_HEAD
from dr2dist.errors import UserError, nearest, one_line

log = logging.getLogger(__name__)

FOREIGN = {*inspect.signature(timm.create_model).parameters, "in_chans", "features_only"}
"""Options that would change where weights come from, or what inputs and outputs are."""


def build_model(
    name: str,
    *,
    weights: str | None,
    image_size: tuple[int, int] | None,
    num_classes: int,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    options: Mapping[str, Any] | None = None,
    finish: Callable[[nn.Module], None] = lambda model: None,
) -> nn.Module:
    """A timm model in fp32.

    weights: None for random ones from torch's global stream, "hub" for timm's own, otherwise
    the path of a .safetensors file with timm's names; position embeddings and windows are
    resized to `image_size`, height and width in pixels, and a head of another number of classes
    starts anew. options: more arguments of timm's, such as depth. finish: called with the model
    before its weights are read, as to give it a head. Raises UserError for an unknown
    name, a bad file, or weights that do not fit.
    """
    given: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": drop_path}
    for key in options or {}:
        if key in FOREIGN:
            raise UserError(f"model.options: {key} is not one of a model's shape: leave it out")
    given |= options or {}
    if dropout:
        given["proj_drop_rate"] = dropout
    if image_size is not None:
        given["img_size"] = image_size
    try:
        model = _own_model(name, given) or _timm_model(name, weights == "hub", given)
    except (TypeError, AssertionError, ValueError, LookupError, ArithmeticError, RuntimeError) as e:
        found = one_line(f"{type(e).__name__} {e}")
        raise UserError(f"model: {name} cannot be built with {given}: {found}") from None
    finish(model)
    if weights not in (None, "hub"):
        model.load_state_dict(_read(model, Path(str(weights))), strict=False)
    return model


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
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **given)
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
        return state[key].clone() if key in state else maker.make(places[key])

    return model, read


def _read(model: Any, path: Path) -> dict[str, Tensor]:
    """What a file holds for the model; a head of another number of classes is left out."""
    try:
        with safe_open(path, "pt") as file:
            trained = file.metadata() or {}
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.weights: {path} cannot be read: {error}") from None
    if trained.get("beta", "0.0") != "0.0":
        log.warning(
            "%s was trained with alpha %s, beta %s: with others it starts as another network",
            path,
            trained["alpha"],
            trained["beta"],
        )
    state = _fitted(model, state)
    wanted = model.state_dict()
    head = {name for name in wanted if name.startswith(_head_names(model))}
    wrong = {n for n, v in state.items() if n in wanted and v.shape != wanted[n].shape}
    fresh = {name for name in head if name not in state or name in wrong}
    missing = sorted(wanted.keys() - state.keys() - fresh)
    strange = sorted((state.keys() - wanted.keys() - head) | (wrong - fresh))
    if missing or strange:
        raise UserError(
            f"model.weights: {path} does not fit {type(model).__name__}: "
            f"missing {missing[:3] or 'nothing'}, not fitting {strange[:3] or 'nothing'}"
        )
    for name in sorted(fresh):
        log.info("%s starts anew: %s does not hold it", name, path)
    return {name: value for name, value in state.items() if name not in fresh}


def _fitted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights at the model's image size, by the model's own family in timm."""
    module = __import__(type(model).__module__, fromlist=["checkpoint_filter_fn"])
    convert = getattr(module, "checkpoint_filter_fn", None)
    with torch.no_grad():
        return dict(convert(state, model)) if convert else state


def _head_names(model: Any) -> tuple[str, ...]:
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier", "head")
    own = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return (*own, f"{TASK_HEAD}.")
