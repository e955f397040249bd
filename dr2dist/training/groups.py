"""How fast parameters train: groups of the optimiser.

Few groups, since each is a partition of its own under ZeRO: parameters with equal settings
share one, wherever they are in the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from dr2dist.backbones.parameters import matching
from dr2dist.config.optim import Group


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
    arXiv 2106.08254, as timm counts layers). groups: further settings by name, the first match
    counts. Raises UserError for a pattern that matches nothing.
    """
    settings = _by_timm(model, weight_decay, layer_decay)
    taken: set[nn.Parameter] = set()
    for number, group in enumerate(groups):
        for parameter in matching(model, group.match, f"optim.groups.{number}.match"):
            if parameter.requires_grad and parameter not in taken:
                scale, decay = settings[parameter]
                own = decay if group.weight_decay is None else group.weight_decay
                settings[parameter] = scale * group.lr_scale, own
                taken.add(parameter)
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


def _by_timm(
    model: nn.Module, weight_decay: float, layer_decay: float | None
) -> dict[nn.Parameter, tuple[float, float]]:
    names: set[str] = getattr(model, "no_weight_decay", set)()
    if layer_decay is None:
        found = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=names)
    else:
        found = param_groups_layer_decay(
            model, weight_decay, no_weight_decay_list=names, layer_decay=layer_decay
        )
    return {
        parameter: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in found
        for parameter in group["params"]
    }
