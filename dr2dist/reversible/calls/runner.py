"""How one residual function is run and differentiated: the seam between mathematics and engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils import parametrize

from dr2dist.reversible.calls.compiled import CompiledFunctions
from dr2dist.reversible.calls.guard import Guard
from dr2dist.reversible.trees import modules_of, tree_leaves, tree_map

SideKey = tuple[str, int]
"""A tensor in the sides: a side's name, and the place among the leaves of its pytree."""


class Root(NamedTuple):
    """Where the graph of an output begins, and what dtype its gradient has."""

    edge: GradientEdge | Tensor
    dtype: torch.dtype


class Call(NamedTuple):
    """A run of F on one slice whose graph is still there.

    inputs: the tokens and the differentiable sides, detached. leaves: what stands for the
    function's trainable parameters. originals: those themselves, which a function may have at hand
    in other ways than as a module's. outputs: F's raw output, or what it gives for a context.
    guard: of inputs and leaves. roots: where the outputs' graph begins, once they were dropped.
    """

    inputs: list[Tensor]
    leaves: list[Tensor]
    originals: list[nn.Parameter]
    outputs: tuple[Tensor, ...]
    guard: Guard
    roots: tuple[Root | None, ...] = ()

    def without_outputs(self) -> Call:
        """The graph alone: the outputs' values are not needed to go back through it."""
        return self._replace(outputs=(), roots=tuple(map(_root, self.outputs)))

    @property
    def output(self) -> Tensor:
        """The only output, detached and contiguous."""
        (output,) = self.outputs
        return output.detach().contiguous()


class LiveFunction(NamedTuple):
    """A residual function whose parameters are present.

    call: runs it. leaves: the tensors that it is differentiated by, one for each of parameters,
    the trainable parameters that receive the gradients. guard: of what stands for others.
    """

    call: Callable[..., Tensor]
    leaves: list[Tensor]
    parameters: list[nn.Parameter]
    guard: Guard = Guard()

    def watch(self) -> None:
        """Has the guard watch the leaves too, for runs whose graphs keep their tensors: without
        these no gradient comes so far."""
        for leaf in self.leaves:
            self.guard.watch(leaf)


class FunctionRunner(Protocol):
    """Makes a function's parameters present, once per function and pass.

    nested: whether parameters are handed their gradients inside the backward pass, as engines
    need that reduce them in hooks; otherwise gradients leave through the graph, as any input's do.
    compile: whether functions are compiled.
    """

    nested: bool
    compile: bool

    def open(
        self, function: nn.Module, upcoming: nn.Module | None = None, trained: bool = True
    ) -> AbstractContextManager[LiveFunction]:
        """Parameters are present, and may be handed gradients, inside the context.

        upcoming: the function that is opened next, whose parameters may be fetched meanwhile.
        trained: whether what is called may be differentiated.
        """
        ...


class PlainRunner:
    """Parameters are where they always are: one process, DistributedDataParallel, ZeRO 0 to 2."""

    def __init__(self, nested: bool = False, compile: bool = False) -> None:
        self.nested, self.compile = nested, compile
        self._compiled = CompiledFunctions()

    @contextmanager
    def open(
        self, function: nn.Module, upcoming: nn.Module | None = None, trained: bool = True
    ) -> Iterator[LiveFunction]:
        """See FunctionRunner. Leaves of their own stand for the parameters meanwhile: the hooks of
        a parameter must see its gradient once, when it is whole."""
        places = _places(function) if trained else []
        parameters = list(dict.fromkeys(parameter for *_, parameter in places))
        leaves = {parameter: parameter.detach().requires_grad_() for parameter in parameters}
        for held, name, parameter in places:
            held[name] = leaves[parameter]
        compiled = self.compile and trained
        call = partial(self._compiled.call, function) if compiled else function
        try:
            with _without_cache():
                yield LiveFunction(call, list(leaves.values()), parameters, Guard())
        finally:
            for held, name, parameter in places:
                held[name] = parameter


@contextmanager
def _without_cache() -> Iterator[None]:
    """Parametrisations are computed anew: a cached one would hang on the leaves of another run."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled


def trainable(function: nn.Module) -> list[nn.Parameter]:
    """The function's parameters that require gradients, each once."""
    return list(dict.fromkeys(parameter for *_, parameter in _places(function)))


def _places(function: nn.Module) -> list[tuple[dict[str, Any], str, nn.Parameter]]:
    """Where a function's modules hold those parameters: (what holds it, its name, itself)."""
    return [
        (module._parameters, name, parameter)
        for module in modules_of(function)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]


def run(
    live: LiveFunction, x: Tensor, sides: dict[str, Any], x_needs_grad: bool, **told: Any
) -> Call:
    """Runs F on detached inputs, with a graph where gradients are enabled."""
    x = live.guard.watch(x.detach().requires_grad_(x_needs_grad))
    sides = tree_map(partial(_leaf, live.guard), sides)
    output = live.call(x, **sides, **told)
    inputs = [x, *(leaf for _, leaf in differentiable(sides))]
    outputs = output if isinstance(output, tuple) else (output,)
    return Call(inputs, live.leaves, live.parameters, outputs, live.guard)


def gradients(
    call: Call, grads: Sequence[Tensor | None], keep_graph: bool
) -> tuple[list[Tensor | None], ...]:
    """(gradients of the inputs, gradients of the leaves) given those of the outputs."""
    tensors = (*call.inputs, *call.leaves, *call.originals)
    wanted = [leaf for leaf in tensors if leaf.requires_grad]
    roots = call.roots or [Root(o, o.dtype) if o.requires_grad else None for o in call.outputs]
    known = [
        (root.edge, grad.to(root.dtype))
        for root, grad in zip(roots, grads, strict=True)
        if grad is not None and root is not None
    ]
    found: dict[int, Tensor | None] = {}
    if known and wanted:
        outputs, given = zip(*known, strict=True)
        with call.guard.opened():
            results = torch.autograd.grad(
                outputs, wanted, given, allow_unused=True, retain_graph=keep_graph
            )
        found = {id(leaf): result for leaf, result in zip(wanted, results, strict=True)}
    of_leaves = [
        _sum(found.get(id(leaf)), found.get(id(original)))
        for leaf, original in zip(call.leaves, call.originals, strict=True)
    ]
    return [found.get(id(x)) for x in call.inputs], of_leaves


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other


def _root(output: Tensor) -> Root | None:
    return Root(get_gradient_edge(output), output.dtype) if output.requires_grad else None


def check_unchanged(
    now: Sequence[Tensor], then: Sequence[Tensor], versions: Sequence[int] | None = None
) -> None:
    """Raises RuntimeError if trained parameters are others than in the forward pass, or, where
    their versions are given, were written to."""
    if list(map(id, now)) != list(map(id, then)):
        raise RuntimeError(
            "the trained parameters are other tensors than in the forward pass "
            "(torch.func.functional_call ends too early, or requires_grad was changed): "
            "differentiate before they are exchanged"
        )
    if versions is not None and [tensor._version for tensor in now] != list(versions):
        raise RuntimeError(
            "a trained parameter was changed by an in-place operation between the forward and the "
            "backward pass"
        )


def needs_grad(value: Any) -> bool:
    """Whether a value is a tensor that gradients flow to."""
    return isinstance(value, Tensor) and value.requires_grad


def differentiable(sides: dict[str, Any]) -> list[tuple[SideKey, Tensor]]:
    """The tensors in sides that gradients flow to, in the order of the sides' own leaves."""
    return [
        ((name, place), leaf)
        for name, value in sides.items()
        for place, leaf in enumerate(tree_leaves(value))
        if needs_grad(leaf)
    ]


def _leaf(guard: Guard, value: Any) -> Any:
    return guard.watch(value.detach().requires_grad_()) if needs_grad(value) else value


class GradAccumulator:
    """Sums each parameter's gradients over slices and functions, so that it gets one per pass.

    Slices are summed in fp32 where a parameter is held in fewer bits. Engines count on one
    gradient per parameter and pass: their hooks reduce and shard at once.
    nested: as a FunctionRunner says it.
    """

    def __init__(self, functions: Iterable[nn.Module], nested: bool) -> None:
        self._uses = Counter(p for function in functions for p in trainable(function))
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._own: set[nn.Parameter] = set()
        self._nested = nested

    def add(self, parameters: list[nn.Parameter], grads: list[Tensor | None]) -> None:
        """Adds one slice's gradients."""
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is None:
                continue
            grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
            known = self._sums.get(parameter)
            if known is None:
                self._sums[parameter] = grad
            elif parameter in self._own:
                known.add_(grad)
            else:
                # Autograd may have given the first tensor to several parameters.
                self._sums[parameter] = known + grad
                self._own.add(parameter)

    def finish(self, parameters: list[nn.Parameter]) -> None:
        """Called after a function's last slice: hands over what no earlier function will add to."""
        self._uses.subtract(parameters)
        ready = [p for p in parameters if not self._uses[p] and p in self._sums]
        grads = [self._sums.pop(p).to(p.dtype) for p in ready]
        if ready and self._nested:
            torch.autograd.backward(ready, grads)
        elif ready:
            self._sums.update(zip(ready, grads, strict=True))

    def take(self, parameters: Iterable[nn.Parameter]) -> list[Tensor | None]:
        """What is left for these parameters: all of their gradients, unless nested."""
        return [self._sums.pop(parameter, None) for parameter in parameters]
