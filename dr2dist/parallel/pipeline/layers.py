"""A converted network as a list of layers that stages can be cut from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dr2dist.backbones.channels import input_channels
from dr2dist.backbones.network import ReversibleNetwork
from dr2dist.errors import UserError
from dr2dist.reversible import Sides

Kind = Literal["stem", "transition", "function", "tail"]


@dataclass(frozen=True)
class Shared:
    """An input that functions share. trained: whether the stem gets a gradient for it."""

    name: str
    shape: tuple[int, ...]
    trained: bool


@dataclass(frozen=True)
class Layer:
    """One layer: the stem, what stands before a chain, a residual function, or norm and head.

    chain: which one, of transitions and functions. index: of a function in its chain. flops: of
    one sample's forward pass. shape: of one sample's output, without the batch. last: whether it
    ends its chain. shared: what functions behind it take of the stem beside tokens. parameters:
    how many numbers they are.
    """

    kind: Kind
    chain: int
    index: int
    flops: int
    shape: tuple[int, ...]
    last: bool = False
    shared: tuple[Shared, ...] = ()
    parameters: int = 0

    @property
    def hands_on_state(self) -> bool:
        """Whether a chain goes on behind it, so that both parts of its state must."""
        return self.kind == "function" and not self.last


def layers_of(net: ReversibleNetwork, size: tuple[int, int]) -> list[Layer]:
    """The network's layers in order, measured on the meta device for images of a size.

    Raises UserError for a network that cannot be cut: one that drops tokens in training, whose
    functions share what differs from sample to sample, or whose family does not say what its head
    uses.
    """
    if net._tail is None:
        raise UserError(f"parallel.stages: the family {net.family.name} does not name its tail")
    meta: Any = copy.deepcopy(net).to("meta")
    meta._cut()  # functions still hold a block's own parameters as they were
    images = torch.empty(1, input_channels(net), *size, device="meta")
    stem = meta.family.stem(meta.train(), images)  # with its graph, which tells what is trained
    with torch.no_grad():
        layers = list(_walk(meta.eval(), images))
    _check_shape(tuple(stem.tokens.shape[1:]), layers[0].shape)
    shared = [_shared(name, value, stem.batched) for name, value in stem.sides.items()]
    return _completed(layers, meta, shared)


def _check_shape(training: tuple[int, ...], evaluation: tuple[int, ...]) -> None:
    if training != evaluation:
        raise UserError(
            f"parallel.stages: the stem gives tokens {list(training)} in training and "
            f"{list(evaluation)} otherwise (patch_drop_rate), stages need the same"
        )


def _shared(name: str, value: Any, batched: Sequence[str]) -> Shared:
    if name in batched or not isinstance(value, Tensor):
        raise UserError(
            f"parallel.stages: functions share the input {name}, which stages do not hand on: it "
            "must be a tensor that is the same for all samples"
        )
    return Shared(name, tuple(value.shape), value.requires_grad)


def _completed(layers: list[Layer], net: Any, shared: Sequence[Shared]) -> list[Layer]:
    """The layers, each with its parameters and with what the ones behind it take."""
    sides = Sides({each.name: each for each in shared})
    needed: set[str] = set()
    found = []
    for layer in reversed(layers):
        behind = tuple(each for each in shared if each.name in needed)
        count = sum(parameter.numel() for parameter in parameters_of(net, layer))
        found.append(replace(layer, shared=behind, parameters=count))
        if layer.kind == "function":
            needed |= sides.of(net.chains[layer.chain].functions[layer.index]).keys()
    return found[::-1]


def _walk(net: Any, images: Tensor) -> Iterator[Layer]:
    counted = _Counted()
    stem = counted(net.family.stem, net, images)
    tokens, sides = stem.tokens, Sides(stem.sides)
    yield Layer("stem", 0, 0, counted.flops, tuple(tokens.shape[1:]))
    for chain, found in enumerate(net.chains):
        transition = net._transitions.get(chain)
        if transition is not None:
            tokens = counted(transition.module, tokens)
            yield Layer("transition", chain, 0, counted.flops, tuple(tokens.shape[1:]))
        for index, function in enumerate(found.functions):
            counted(function, tokens, **sides.of(function))
            last = index == len(found.functions) - 1
            yield Layer("function", chain, index, counted.flops, tuple(tokens.shape[1:]), last)
    output = counted(net._tail.module, tokens)
    yield Layer("tail", 0, 0, counted.flops, tuple(output.shape[1:]))


class _Counted:
    """Calls what it is given and counts its FLOPs."""

    flops = 0

    def __call__(self, function: Any, *args: Any, **options: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = function(*args, **options)
        self.flops = int(counter.get_total_flops())
        return result


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
    kept = {id(p) for layer in layers[own.start : own.stop] for p in parameters_of(net, layer)}
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in kept:
                module._parameters[name] = None
    if weights is not None:
        for name, parameter in net.named_parameters():
            real = nn.Parameter(weights(name), requires_grad=parameter.requires_grad)
            torch.utils.swap_tensors(parameter, real)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise UserError(
            f"parallel.stages: nothing of layers {own.start} to {own.stop - 1} is trained; use "
            "fewer stages or freeze less"
        )


def parameters_of(net: Any, layer: Layer) -> list[nn.Parameter]:
    """A layer's parameters."""
    if layer.kind == "function":
        return list(net.chains[layer.chain].functions[layer.index].parameters())
    if layer.kind == "transition":
        return list(net._transitions[layer.chain].module.parameters())
    if layer.kind == "tail":
        return list(net._tail.module.parameters())
    functions = [function for chain in net.chains for function in chain.functions]
    others = {id(p) for module in (*functions, *map(_module, net.pieces)) for p in _all(module)}
    return [parameter for parameter in net.parameters() if id(parameter) not in others]


def _module(piece: Any) -> nn.Module:
    module: nn.Module = piece.module
    return module


def _all(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters())
