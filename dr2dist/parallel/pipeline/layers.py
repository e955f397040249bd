"""A converted network as a list of layers that stages can be cut from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dr2dist.backbones.forward import AutogradDriver
from dr2dist.backbones.measure import Measured, measure, on_meta, parameters_of
from dr2dist.backbones.network import ReversibleNetwork
from dr2dist.backbones.walk import Flow, Kind, Place
from dr2dist.errors import UserError
from dr2dist.parallel.pipeline.carried import Carried, Skeleton, tensors_of
from dr2dist.reversible import Sides
from dr2dist.reversible.trees import tree_map


@dataclass(frozen=True)
class Layer:
    """One layer: the stem, a transition, a residual function, or norm and head.

    flops: of one sample's forward pass. shape: of one sample's tokens behind it, rows among them.
    carried: what crosses a cut behind it beside tokens. skeleton: the sides there. parameters: how
    many numbers they are.
    """

    place: Place
    flops: int
    shape: tuple[int, ...]
    carried: tuple[Carried, ...]
    skeleton: Skeleton
    parameters: int

    @property
    def kind(self) -> Kind:
        """See Place."""
        return self.place.kind

    @property
    def hands_on_state(self) -> bool:
        """Whether a chain goes on behind it, so that both parts of its state must."""
        return self.kind == "function" and not self.place.last

    @property
    def rows(self) -> int:
        """Rows of tokens that a sample has."""
        return self.shape[0]


def layers_of(net: ReversibleNetwork) -> list[Layer]:
    """The network's layers in order, measured on the meta device for inputs of one sample.

    Raises UserError for a network that cannot be cut: one that drops tokens in training, or whose
    family does not say what its head uses.
    """
    if not net.names_its_tail:
        raise UserError(f"parallel.stages: the family {net.family.name} does not name its tail")
    meta = on_meta(net)
    found = measure(meta)
    _check_stem(_training_stem(meta), found[0].flow)
    return _completed(found, meta)


def _training_stem(meta: ReversibleNetwork) -> Flow:
    """What the stem gives in training, for two samples."""
    meta.train()
    two = tree_map(lambda value: torch.cat([value, value]), meta.family.example(meta))
    with torch.no_grad():
        flow = AutogradDriver(meta, {}, ()).stem(two)
    meta.eval()
    return flow


def _check_stem(training: Flow, evaluation: Flow) -> None:
    one, other = (tuple(flow.value.shape[1:]) for flow in (training, evaluation))
    if one != other:
        raise UserError(
            f"parallel.stages: the stem gives tokens {list(one)} in training and {list(other)} "
            "otherwise (patch_drop_rate), stages need the same"
        )
    if Skeleton(training).plain != Skeleton(evaluation).plain:
        raise UserError(
            "parallel.stages: the stem gives sides with plain values that differ between training "
            "and evaluation, or from batch to batch; stages know one: give tensors"
        )


def _completed(found: Sequence[Measured], net: ReversibleNetwork) -> list[Layer]:
    """The layers, each with what the ones behind it take beside tokens."""
    needed: set[object] = set()
    layers = []
    for number, measured in reversed(list(enumerate(found))):
        place, flow = measured.place, measured.flow
        before = found[number - 1].flow if number else flow
        tail = place.kind == "tail"
        layers.append(
            Layer(
                place,
                measured.flops,
                () if tail else tuple(flow.value.shape),
                () if tail else _carried(flow, needed),
                Skeleton(flow),
                measured.parameters,
            )
        )
        needed |= _taken(place, before, net)
    return layers[::-1]


def _taken(place: Place, flow: Flow, net: ReversibleNetwork) -> set[object]:
    """Names of sides, and taps, that a layer takes of the flow that comes to it."""
    if place.kind == "tail":
        return set(net.head_taps)
    if place.kind == "transition" and hasattr(net.items[place.item], "sides"):
        return set(flow.sides)
    if place.kind == "function":
        function = net.items[place.item].functions[place.function]
        return set(Sides(flow.sides).of(function))
    return set()


def _carried(flow: Flow, needed: set[object]) -> tuple[Carried, ...]:
    """What of a flow the layers behind need."""
    found = []
    for key, tensor in tensors_of(flow).items():
        tap = not isinstance(key[0], str)
        if (key if tap else key[0]) in needed:
            rows = len(tensor) if tap or key[0] in flow.batched else None
            trained = tap or tensor.requires_grad
            found.append(Carried(key, tuple(tensor.shape), rows, trained))
    return tuple(found)


def keep_only(
    net: ReversibleNetwork,
    layers: Sequence[Layer],
    own: range,
    weights: Callable[[str], Tensor] | None = None,
) -> None:
    """Takes the parameters of all layers but a stage's own out of the network.

    weights: gives the values of parameters by name where the network's are on the meta device;
    only its own are asked for, and stay the same objects.
    Raises UserError if none of its own is trained: DeepSpeed needs something to step.
    """
    mine = layers[own.start : own.stop]
    kept = {id(p) for layer in mine for p in parameters_of(net, layer.place)}
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in kept:
                setattr(module, name, None)
    if weights is not None:
        for name, parameter in net.named_parameters():
            real = nn.Parameter(weights(name), requires_grad=parameter.requires_grad)
            torch.utils.swap_tensors(parameter, real)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise UserError(
            f"parallel.stages: nothing of layers {own.start} to {own.stop - 1} is trained; use "
            "fewer stages or freeze less"
        )
