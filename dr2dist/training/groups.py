"""How fast parameters train: groups of the optimiser.

Few groups, since each is a partition of its own under ZeRO: parameters with equal settings
share one, wherever they are in the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from dr2dist.backbones.convert import convert
from dr2dist.backbones.measure import parameters_of
from dr2dist.backbones.parameters import matching
from dr2dist.backbones.walk import Place
from dr2dist.config.optim import Group
from dr2dist.errors import UserError

EMBEDDINGS = (
    *("*relative_position_bias_table", "*rel_pos_[hwt]", "*pos_embed", "*pos_embedding"),
    *("*cls_token", "*class_token"),
)
"""Of models that do not say which of their parameters are embeddings, which do not decay."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a learning rate of lr_scale times the schedule's, and a weight decay."""

    parameters: tuple[nn.Parameter, ...]
    lr_scale: float
    weight_decay: float


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None, groups: Sequence[Group] = ()
) -> list[ParameterGroup]:
    """The trained parameters of a timm model, in few groups.

    weight_decay: none for vectors (biases, norms, scales) and what the model itself excludes.
    layer_decay: the learning rate of the layer k below the head is times layer_decay^k (BEiT,
    arXiv 2106.08254, as timm counts layers, or by block where a model does not say). groups:
    further settings by name, the first match counts. Raises UserError for a pattern that matches
    nothing, or nothing that is trained and left by the groups before.
    """
    settings = _settings(model, weight_decay, layer_decay)
    taken: set[nn.Parameter] = set()
    for number, group in enumerate(groups):
        place = f"optim.groups.{number}"
        trained = [p for p in matching(model, group.match, f"{place}.match") if p.requires_grad]
        left = [parameter for parameter in trained if parameter not in taken]
        if not left:
            why = (
                "groups before it have taken all of them" if trained else "none of them is trained"
            )
            raise UserError(f"{place}.match: {group.match} has no effect: {why}")
        for parameter in left:
            scale, decay = settings[parameter]
            own = decay if group.weight_decay is None else group.weight_decay
            settings[parameter] = scale * group.lr_scale, own
        taken.update(left)
    merged: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            merged.setdefault(settings[parameter], []).append(parameter)
    return [ParameterGroup(tuple(found), *key) for key, found in merged.items()]


def kept_groups(groups: Sequence[ParameterGroup], net: nn.Module) -> list[ParameterGroup]:
    """The groups with those parameters only that are left in a network; none is empty."""
    left = set(net.parameters())
    found = [replace(g, parameters=tuple(p for p in g.parameters if p in left)) for g in groups]
    return [group for group in found if group.parameters]


def _settings(
    model: nn.Module, weight_decay: float, layer_decay: float | None
) -> dict[nn.Parameter, tuple[float, float]]:
    """Learning-rate scale and weight decay of each parameter."""
    said: Any = getattr(model, "no_weight_decay", lambda: EMBEDDINGS)
    names = said()
    by_timm = layer_decay is not None and hasattr(model, "group_matcher")
    if by_timm:
        found = param_groups_layer_decay(
            model, weight_decay, no_weight_decay_list=names, layer_decay=layer_decay
        )
    else:
        found = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=names)
    scales = {} if by_timm or layer_decay is None else _scales(model, layer_decay)
    return {
        parameter: (scales.get(parameter, group.get("lr_scale", 1.0)), group["weight_decay"])
        for group in found
        for parameter in group["params"]
    }


def _scales(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Of models that do not say what their layers are: a block of a chain, a transition, the stem,
    and norm and head are one each."""
    net = convert(model)
    if not net.names_its_tail:
        raise UserError(f"optim.layer_decay: the family {net.family.name} does not name its tail")
    levels: dict[nn.Parameter, int] = {}
    level, before = 0, None
    for place in net.places:
        layer = _layer(net, place)
        level += before is not None and layer != before
        before = layer
        levels.update(dict.fromkeys(parameters_of(net, place), level))
    return {parameter: decay ** (level - own) for parameter, own in levels.items()}


def _layer(net: Any, place: Place) -> object:
    """What a place belongs to: several functions are of one block."""
    if place.kind == "function":
        function = net.items[place.item].functions[place.function]
        return id(getattr(function, "block", function))  # of a family of one's own it is a layer
    return place
