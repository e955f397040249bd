"""Residual functions under ZeRO-3: parameters are gathered once per function and pass.

The engine's own hooks gather for each call of a module, which would be once a slice. Here the
function's parameters are gathered around all its slices, and a copy of the function without
hooks or weights is called with them. While it runs, those of the function that comes next are on
their way already, forth and back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dr2dist.parallel import adapter
from dr2dist.reversible.calls.runner import LiveFunction


class GatheredRunner:
    """A FunctionRunner for parameters that ZeRO-3 has sharded.

    functions: all residual functions; the runner must be made before `deepspeed.initialize`,
    while they carry neither hooks nor shards.
    """

    nested, compile = True, False

    def __init__(self, functions: Iterable[nn.Module]) -> None:
        self._copies = {function: copy.deepcopy(function).to("meta") for function in functions}
        self._started: dict[nn.Module, Any] = {}

    @contextmanager
    def open(
        self, function: nn.Module, upcoming: nn.Module | None = None, trained: bool = True
    ) -> Iterator[LiveFunction]:
        """Gathers the function's parameters; every rank must come here in the same order."""
        named = dict(function.named_parameters())
        self._start(function)
        handle = self._started.pop(function, None)
        if handle is not None:
            handle.wait()
        # Gathers what another function has given back meanwhile, and gives back all at the end.
        with deepspeed.zero.GatheredParameters(list(named.values())):
            if upcoming is not None:
                self._start(upcoming)
            leaves = {
                name: parameter.detach().requires_grad_(parameter.requires_grad)
                for name, parameter in named.items()
            }
            wanted = [name for name, parameter in named.items() if parameter.requires_grad]
            call = partial(self._call, function, leaves)
            yield LiveFunction(call, [leaves[n] for n in wanted], [named[n] for n in wanted])

    def _start(self, function: nn.Module) -> None:
        """Begins to gather what is not there and not on its way."""
        handle = adapter.start_gathering(function.parameters())
        if handle is not None:
            self._started[function] = handle

    def _call(
        self, function: nn.Module, leaves: dict[str, Tensor], x: Tensor, **sides: Any
    ) -> Tensor:
        twin = self._copies[function]
        for module, original in zip(twin.modules(), function.modules(), strict=True):
            module.training = original.training
        values = {**leaves, **dict(function.named_buffers())}
        with saved_tensors_hooks(*_weightless(function, leaves)):
            result: Tensor = torch.func.functional_call(twin, values, (x,), sides)
        return result


def _weightless(
    function: nn.Module, leaves: dict[str, Tensor]
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Hooks by which a kept graph refers to a weight by its name instead of holding it.

    Memory mode store keeps graphs until the backward pass; the gathered weights in them are
    replaced by those that are gathered again by then.
    """
    parameters = dict(function.named_parameters())
    storages = {leaf.untyped_storage().data_ptr(): name for name, leaf in leaves.items()}

    def pack(tensor: Tensor) -> Any:
        name = storages.get(tensor.untyped_storage().data_ptr())
        if name is None or tensor.numel() == 0:
            # Not itself: a function's own output would keep the graph that keeps it.
            return tensor.detach()
        offset = tensor.storage_offset() - leaves[name].storage_offset()
        return name, tensor.size(), tensor.stride(), offset

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        name, size, stride, offset = packed
        weight = parameters[name].detach()
        return weight.as_strided(size, stride, weight.storage_offset() + offset)

    return pack, unpack
