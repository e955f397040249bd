"""What a network's layers cost and give, found on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dr2dist.backbones.backbone import Transition
from dr2dist.backbones.forward import AutogradDriver
from dr2dist.backbones.network import ReversibleNetwork
from dr2dist.backbones.walk import Flow, Place, walk
from dr2dist.reversible import Sides


@dataclass(frozen=True)
class Measured:
    """One layer for inputs of one sample.

    flops: of its forward pass. parameters: how many numbers they are. flow: what it gives, on the
    meta device; for the tail the network's output is its value.
    """

    place: Place
    flops: int
    parameters: int
    flow: Flow


def on_meta(net: ReversibleNetwork) -> Any:
    """A copy of a network in evaluation mode, whose parameters have no values."""
    meta: Any = copy.deepcopy(net).to("meta").eval()  # cuts its layers, too
    meta.cut_layers()  # functions still hold a block's own parameters as they were
    return meta


def measure(meta: Any) -> list[Measured]:
    """The layers in order. meta: what `on_meta` gives."""
    driver = _Measuring(meta)
    walk(meta.places, meta.family.example(meta), driver)
    return driver.found


def training_flops(layers: Sequence[Any]) -> int:
    """Of a forward and backward pass for one sample, without any recomputation: the backward pass
    counts as two forward passes. layers: each with its flops."""
    return 3 * sum(layer.flops for layer in layers)


class _Measuring(AutogradDriver):
    """Runs layer by layer; stem and transitions with their graphs, which tell what is trained."""

    def __init__(self, net: Any) -> None:
        super().__init__(net, {}, net.head_taps)
        self.found: list[Measured] = []

    def _counted(self, place: Place, call: Any, flow: Flow | None = None) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = call()
        parameters = sum(p.numel() for p in parameters_of(self.net, place))
        given = result if flow is None else replace(flow, value=result)
        kept = replace(given, sides=dict(given.sides), taps=dict(given.taps))
        self.found.append(Measured(place, int(counter.get_total_flops()), parameters, kept))
        return result

    def stem(self, inputs: Any) -> Flow:
        """See Driver."""
        found: Flow = self._counted(Place("stem"), lambda: super(_Measuring, self).stem(inputs))
        return found

    def transition(self, place: Place, flow: Flow) -> Flow:
        """See Driver."""
        item = self.net.items[place.item]
        if isinstance(item, Transition):
            found: Flow = self._counted(place, lambda: self.net.run_transition(place, flow))
            return found
        value = self._counted(place, lambda: item.module(flow.value), flow)
        return replace(flow, value=value)

    @torch.no_grad()
    def functions(self, run: Sequence[Place], flow: Flow) -> Flow:
        """See Driver."""
        sides, functions = Sides(flow.sides, flow.batched), self.net.items[run[0].item].functions
        for place in run:
            if place.tap in self.taps:
                flow.taps[place.tap] = flow.value
            call = _call(functions[place.function], flow.value, sides)
            self._counted(place, call, flow)
        return flow

    @torch.no_grad()
    def tail(self, flow: Flow) -> Any:
        """See Driver."""
        taps = {tap: tokens.detach() for tap, tokens in flow.taps.items()}
        # Without a graph, of which views that are made here would be half a part.
        bare = replace(flow, value=flow.value.detach(), taps=taps)
        return self._counted(Place("tail"), lambda: self.net.run_tail(bare), flow)


def _call(function: nn.Module, tokens: Tensor, sides: Sides) -> Any:
    return lambda: function(tokens, **sides.of(function))


def parameters_of(net: Any, place: Place) -> list[nn.Parameter]:
    """A layer's parameters; the stem has what no other layer has."""
    if place.kind == "stem":
        others = {id(p) for other in net.places[1:] for p in parameters_of(net, other)}
        return [parameter for parameter in net.parameters() if id(parameter) not in others]
    return list(_parameters(net, place))


def _parameters(net: Any, place: Place) -> Iterator[nn.Parameter]:
    if place.kind == "function":
        yield from net.items[place.item].functions[place.function].parameters()
    elif place.kind == "transition":
        yield from net.items[place.item].module.parameters()
    else:
        yield from net.tail_parameters()
