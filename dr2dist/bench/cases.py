"""The ways to train that are compared, on the same model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dr2dist.backbones.backbone import ChainOf
from dr2dist.backbones.build import build_model
from dr2dist.backbones.convert import convert, family_of
from dr2dist.backbones.forward import AutogradDriver
from dr2dist.backbones.walk import Flow, Place, walk
from dr2dist.bench.names import (
    BUDGET,
    COMPILED,
    CONVENTIONAL,
    CONVERTED,
    GROUPS,
    LIBRARIES,
    OFFLOADED,
    PER_BLOCK,
    WHOLE_BLOCK,
)
from dr2dist.errors import UserError


@dataclass(frozen=True)
class Spec:
    """A model in one case, as plain values.

    size: pixels of a side. options: of the model, as `model.options` of a run, such as frames of
    clips. depth: blocks, None for the model's own. slices: of `convert`, for
    cases that are sliced. memory_budget: bytes, for case budget. bf16: weights, images and tokens
    are held in it, as DeepSpeed's bf16 holds them.
    """

    case: str
    model: str
    size: int
    depth: int | None = None
    alpha: float = 0.9
    beta: float = 0.1
    slices: dict[str, int] = field(default_factory=dict)
    memory_budget: int | None = None
    bf16: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def build(spec: Spec) -> nn.Module:
    """The network of a case, with the same weights in all. Raises UserError if it cannot be."""
    torch.manual_seed(0)
    net = _network(_model(spec), spec)
    return net.bfloat16() if spec.bf16 else net


def example_shape(spec: Spec) -> tuple[int, ...]:
    """Of one input: an image, or a clip."""
    with torch.device("meta"):
        model = _model(spec)
        shape: tuple[int, ...] = tuple(family_of(model).example(model).shape[1:])
    return shape


def _network(model: nn.Module, spec: Spec) -> nn.Module:
    if spec.case == CONVENTIONAL:
        return model
    if spec.case in (PER_BLOCK, WHOLE_BLOCK, OFFLOADED, COMPILED):
        return _checkpointed(model, spec.case)
    if spec.case in GROUPS:
        return _grouped(model, GROUPS[spec.case])
    if spec.case in LIBRARIES:
        return _Foreign(model, spec)
    options = dict(CONVERTED[spec.case])
    if options.pop("sliced", False):
        options |= spec.slices
    if spec.case == BUDGET:
        options["memory_budget"] = spec.memory_budget
    net: nn.Module = convert(model, spec.alpha, spec.beta, **options)
    return net


def _checkpointed(model: nn.Module, case: str) -> nn.Module:
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    else:
        _checkpoint_blocks(model)
    if case == COMPILED:
        for block in model.blocks:  # type: ignore[union-attr]
            gpu = next(block.parameters()).is_cuda
            block.compile(backend="inductor" if gpu else "aot_eager")
    if case == OFFLOADED:
        return _Within(model, _on_host)
    # A checkpoint remembers what was said when it was made.
    return _Within(model, _to_the_end) if case == WHOLE_BLOCK else model


def _grouped(model: Any, size: int) -> nn.Module:
    """A model whose every `size` blocks are one checkpoint."""
    blocks = list(model.blocks)
    groups = [nn.Sequential(*blocks[n : n + size]) for n in range(0, len(blocks), size)]
    model.blocks = nn.Sequential(*map(_Checkpointed, groups))
    return model


def _checkpoint_blocks(model: nn.Module) -> None:
    """Makes each block of a model's chains a checkpoint, in place."""
    layers = family_of(model).layers(model)
    chains = [layer for layer in layers if isinstance(layer, ChainOf)]
    blocks = {id(function.block) for chain in chains for function in chain.functions}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if id(child) in blocks:
                setattr(module, name, _Checkpointed(child))


class _Checkpointed(nn.Module):
    """Blocks that are run again in the backward pass, from their input."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, tokens: Tensor) -> Any:
        """As the blocks'."""
        return checkpoint(self.blocks, tokens, use_reentrant=False)


def _to_the_end(images: Tensor) -> AbstractContextManager[Any]:
    found: AbstractContextManager[Any] = set_checkpoint_early_stop(False)
    return found


def _on_host(images: Tensor) -> AbstractContextManager[Any]:
    return torch.autograd.graph.save_on_cpu(pin_memory=images.is_cuda)


def _model(spec: Spec) -> nn.Module:
    options = {**spec.options, **({} if spec.depth is None else {"depth": spec.depth})}
    size = (spec.size, spec.size)
    return build_model(spec.model, weights=None, image_size=size, num_classes=10, options=options)


class _Within(nn.Module):
    """A model whose forward pass is run within a context, made for its images."""

    def __init__(
        self, model: nn.Module, context: Callable[[Tensor], AbstractContextManager[Any]]
    ) -> None:
        super().__init__()
        self.model, self.context = model, context

    def forward(self, images: Tensor) -> Any:
        """As the model's own."""
        with self.context(images):
            return self.model(images)


class _Foreign(nn.Module):
    """The same stem, functions and head, with the functions reversed by another library."""

    def __init__(self, model: nn.Module, spec: Spec) -> None:
        super().__init__()
        self.net = convert(model, spec.alpha, spec.beta)
        if len(self.net.chains) != 1:
            raise UserError(f"{spec.case} is compared on models with one chain, not {spec.model}")
        functions = list(self.net.chains[0].functions)
        self.run = _revlib(functions) if spec.case == "revlib" else _momentumnet(functions)

    def forward(self, images: Tensor) -> Tensor:
        """As the model's own."""
        output: Tensor = walk(self.net.places, images, _Other(self.net, self.run))
        return output


class _Other(AutogradDriver):
    """Runs a chain's functions by another library."""

    def __init__(self, net: Any, run: nn.Module) -> None:
        super().__init__(net, {}, ())
        self.run = run

    def functions(self, run: Sequence[Place], flow: Flow) -> Flow:
        """See Driver."""
        return Flow(self.run(flow.value))

    def tail(self, flow: Flow) -> Any:
        """See Driver: norm and head as they stand."""
        family = self.net.family
        return family.head(self.net, family.norm(self.net, flow.value))


class _revlib(nn.Module):  # noqa: N801 - named as the package
    def __init__(self, functions: list[nn.Module]) -> None:
        super().__init__()
        import revlib

        self.chain = revlib.ReversibleSequential(*functions)

    def forward(self, tokens: Tensor) -> Tensor:
        """Two streams of whole tokens, side by side in dim 1; their mean goes on."""
        one, other = self.chain(torch.cat([tokens, tokens], dim=1)).chunk(2, dim=1)
        return (one + other) / 2


def _momentumnet(functions: list[nn.Module]) -> nn.Module:
    from momentumnet import MomentumNet

    net: nn.Module = MomentumNet(functions, gamma=0.9, use_backprop=False)
    return net
