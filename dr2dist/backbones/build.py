"""timm models by name, with weights from a file or timm's hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dr2dist.errors import UserError, nearest

log = logging.getLogger(__name__)


def build_model(
    name: str,
    *,
    weights: str | None,
    image_size: tuple[int, int] | None,
    num_classes: int,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> nn.Module:
    """A timm model in fp32.

    weights: None for random ones from torch's global stream, "hub" for timm's own, otherwise
    the path of a .safetensors file with timm's names; position embeddings and windows are
    resized to `image_size`, height and width in pixels, and a head of another number of classes
    starts anew. Raises UserError for an unknown name, a bad file, or weights that do not fit.
    """
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        raise UserError(f"model.name: '{name}' is not a model of timm{hint}")
    options: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": drop_path}
    if dropout:
        options["proj_drop_rate"] = dropout
    if image_size is not None:
        options["img_size"] = image_size
    try:
        model = timm.create_model(name, pretrained=weights == "hub", **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"model: {name} cannot be built with {options}: {error}") from None
    if weights not in (None, "hub"):
        _load(model, Path(str(weights)))
    return model


def _load(model: Any, path: Path) -> None:
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
    model.load_state_dict({n: v for n, v in state.items() if n not in fresh}, strict=False)


def _fitted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights at the model's image size, by the model's own family in timm."""
    module = __import__(type(model).__module__, fromlist=["checkpoint_filter_fn"])
    convert = getattr(module, "checkpoint_filter_fn", None)
    with torch.no_grad():
        return dict(convert(state, model)) if convert else state


def _head_names(model: Any) -> tuple[str, ...]:
    classifier = model.pretrained_cfg.get("classifier", "head")
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)
