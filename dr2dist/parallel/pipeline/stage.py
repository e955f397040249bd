"""One stage's layers on one micro-batch: forward to what crosses the cut, and back.

A stage keeps the remainders of its chains and, unless the next stage sends it back, its last
state. What it was given is overwritten on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import checkpoint

from dr2dist.backbones.network import ReversibleNetwork
from dr2dist.parallel.pipeline.layers import Layer
from dr2dist.reversible import Chain, Gradient, Layout, Segment, Sides, State, Tape
from dr2dist.reversible.calls.replay import kept_statistics

Shares = dict[str, Tensor]
"""What functions share beside the tokens, by name; or gradients of it, fp32."""


class Stage:
    """Consecutive layers of a network.

    layers: of the whole network. own: this stage's. returned: whether the next stage sends this
    one's last state back with its gradient.
    """

    def __init__(
        self, net: ReversibleNetwork, layers: Sequence[Layer], own: range, returned: bool
    ) -> None:
        self.net, self.returned = net, returned
        self.layers = layers[own.start : own.stop]
        before = layers[own.start - 1] if own.start else None
        self.takes_state = before is not None and before.hands_on_state
        self.gives_state = self.layers[-1].hands_on_state
        self.runs = _runs(self.layers)

    def forward(self, value: Tensor, shared: Mapping[str, Tensor] | None = None) -> Pass:
        """Images, tokens [B, ...], or a state [2, B, ...] in memory of its own, to an open pass.

        shared: what the stages before hand on; those that gradients are wanted of require them.
        """
        run = Pass(self, dict(shared or {}))
        given: Tensor | State = State(value[0], value[1]) if self.takes_state else value
        for layers in self.runs:
            given = run.extend(layers, given)
        run.given = given
        return run

    def infer(self, value: Tensor, shared: Mapping[str, Tensor] | None = None) -> tuple[Any, Any]:
        """The same without a pass: what crosses the cut or comes out, and what is shared."""
        given: Any = State(value[0], value[1]) if self.takes_state else value
        shares: Mapping[str, Tensor] = shared or {}
        with torch.no_grad():
            for layers in self.runs:
                if layers[0].kind == "stem":
                    stem = self.net.family.stem(self.net, given)
                    given, shares = stem.tokens, stem.sides
                elif layers[0].kind == "function":
                    given = self._infer_chain(layers, given, Sides(dict(shares)))
                else:
                    given = _call_of(self.net, layers[0])(given)
        return torch.stack(tuple(given)) if self.gives_state else given, shares

    def _infer_chain(
        self, layers: Sequence[Layer], given: Tensor | State, sides: Sides
    ) -> Tensor | State:
        chain, segment = self._segment(layers)
        dtype = _dtype(segment) if isinstance(given, State) else given.dtype
        layout = Layout.given(chain.setting)
        if layers[-1].last:
            return segment.infer(given, sides, chain.setting, layout, dtype=dtype)[0]
        return segment.infer_state(given, sides, chain.setting, layout, dtype)

    def _segment(self, layers: Sequence[Layer]) -> tuple[Chain, Segment]:
        """A chain, and the part of it that some layers are."""
        chain = self.net.chains[layers[0].chain]
        functions = list(chain.functions)[layers[0].index : layers[-1].index + 1]
        return chain, Segment(functions, chain.runner, layers[0].index)


def _dtype(segment: Segment) -> torch.dtype:
    """What tokens are handed on in, where only a state is known: what weights are held in."""
    return next(segment.functions[0].parameters()).dtype


def _runs(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Functions of one chain together, all else by itself."""
    runs: list[list[Layer]] = []
    for layer in layers:
        last = runs[-1][-1] if runs else None
        if last and last.kind == layer.kind == "function" and last.chain == layer.chain:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


class Pass:
    """A micro-batch between its forward and its backward pass.

    given: what the last layer gave: tokens, a state, or the network's output with its graph.
    shared: what functions share. shared_grads: of it, fp32, as far as the backward pass has come.
    """

    def __init__(self, stage: Stage, shared: Shares) -> None:
        self.stage, self.shared = stage, shared
        self.given: Any = None
        self.state_taken: State | None = None
        self.shared_grads: Shares = {}
        self._undo: list[_Graph | _Reversal] = []

    def extend(self, layers: Sequence[Layer], given: Tensor | State) -> Any:
        """Runs some layers on what the ones before them gave."""
        first, net = layers[0], self.stage.net
        if first.kind == "function":
            sides = Sides(self.shared)
            reversal = _Reversal(*self.stage._segment(layers), given, sides, layers[-1].last)
            self._undo.append(reversal)
            return reversal.state if reversal.ends_open else reversal.tokens()
        assert isinstance(given, Tensor)
        if first.kind == "stem":
            graph: _Graph = _StemGraph(net, given, self)
        else:
            graph = _Graph(_call_of(net, first), given)
        self._undo.append(graph)
        return graph.output if first.kind == "tail" else graph.drop_output()

    def message(self) -> Tensor:
        """What crosses the cut, in memory of its own: tokens, or the state stacked."""
        given, self.given = self.given, None
        if not self.stage.gives_state:
            tokens: Tensor = given
            return tokens
        message = torch.stack(tuple(given))
        # The pass goes on from the message: no state is held twice.
        reversal = self._undo[-1]
        assert isinstance(reversal, _Reversal)
        reversal.state = None if self.stage.returned else State(message[0], message[1])
        return message

    def end_with(self, loss: Tensor) -> None:
        """Takes the loss of the network's output for what the pass is differentiated from."""
        graph = self._undo[-1]
        assert isinstance(graph, _Graph)
        graph.drop_output(loss)
        self.given = None

    def backward(
        self,
        gradient: Tensor,
        returned: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> Tensor | None:
        """From the gradient of what was given to that of what was taken, which is returned.

        gradient: of a loss, of tokens [B, ...], or of both parts of a state [2, B, ...]; consumed.
        returned: the state that the next stage has reconstructed, stacked. shared: gradients of
        what is shared, from the stages behind. Where the stage took a state the result is
        [2, B, ...]; `state_taken` then holds that state again.
        """
        self._add(shared or {})
        found: Any = gradient
        if self.stage.gives_state:
            found = Gradient(gradient[0], gradient[1])
            if returned is not None:
                last = self._undo[-1]
                assert isinstance(last, _Reversal)
                last.state = State(returned[0], returned[1])
        while self._undo:
            step = self._undo.pop()
            found = step.backward(found)
            self._add(step.shared_grads)
        if self.stage.takes_state:
            assert isinstance(step, _Reversal)
            self.state_taken = step.state
            return torch.stack((found.x, found.y))
        return found if isinstance(found, Tensor) else None

    def _add(self, grads: Mapping[str, Tensor]) -> None:
        for name, grad in grads.items():
            known = self.shared_grads.get(name)
            self.shared_grads[name] = grad.float() if known is None else known + grad


def _call_of(net: Any, layer: Layer) -> Callable[[Tensor], Any]:
    if layer.kind == "transition":
        return lambda tokens: net._transitions[layer.chain](tokens, net._chunk_size)

    def tail(tokens: Tensor) -> Any:
        net._tail.module.renew(net)
        return net._tail(tokens, net._chunk_size)

    return tail


class _Graph:
    """A transition or the tail under ordinary autograd; they keep no more than their input."""

    shared_grads: Mapping[str, Tensor] = {}

    def __init__(self, call: Callable[[Tensor], Any], given: Tensor) -> None:
        self.input = given.detach().requires_grad_()
        with torch.enable_grad():
            self.output: Any = call(self.input)
        self._root: GradientEdge | None = None

    def drop_output(self, root: Tensor | None = None) -> Tensor:
        """The output without its graph, of which only the root stays here."""
        output: Tensor = self.output if root is None else root
        self._root = _edge(output)
        self.output = None
        return output.detach()

    def backward(self, gradient: Tensor) -> Tensor | None:
        if self._root is not None:
            torch.autograd.backward(self._root, gradient)
        found, self.input.grad = self.input.grad, None
        return found


class _StemGraph(_Graph):
    """The stem, whose outputs are tokens and what functions share; it keeps the images alone."""

    def __init__(self, net: Any, images: Tensor, run: Pass) -> None:
        with torch.enable_grad():
            stem = checkpoint(
                net.family.stem,
                net,
                images,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), kept_statistics(net)),
            )
        self.output, self._run = stem.tokens, run
        self._edges = {name: _edge(value) for name, value in stem.sides.items()}
        run.shared = {
            name: value.detach().requires_grad_(self._edges[name] is not None)
            for name, value in stem.sides.items()
        }

    def backward(self, gradient: Tensor) -> None:
        roots = [(self._root, gradient)]
        roots += [(self._edges[name], grad) for name, grad in self._run.shared_grads.items()]
        known = [(root, grad) for root, grad in roots if root is not None]
        if known:
            edges, grads = map(list, zip(*known, strict=True))
            torch.autograd.backward(edges, grads)


def _edge(value: Tensor) -> GradientEdge | None:
    return get_gradient_edge(value) if value.requires_grad else None


class _Reversal:
    """Functions of a chain, run and ready to be reversed."""

    def __init__(
        self, chain: Chain, segment: Segment, given: Tensor | State, sides: Sides, last: bool
    ) -> None:
        self.chain, self.segment, self.ends_open = chain, segment, not last
        setting, layout = chain.setting, Layout.given(chain.setting)
        self.began_with_state = isinstance(given, State)
        self.tape: Tape
        self.state: State | None
        self.shared_grads: Mapping[str, Tensor] = {}
        with torch.no_grad():
            if isinstance(given, State):
                self.dtype = _dtype(segment)
                self.state, self.tape = segment.go_on(given, self.dtype, sides, setting, layout)
            else:
                self.dtype = given.dtype
                self.state, self.tape, _ = segment.forward(given, sides, setting, layout)
        chain.open(self.tape)

    def tokens(self) -> Tensor:
        """The chain's output, a new tensor."""
        assert self.state is not None
        return self.tape.arithmetic.hand_out(self.state.current, self.tape.dtype)

    def backward(self, gradient: Any) -> Any:
        """From tokens' or a state's gradient to that of what it began with."""
        if isinstance(gradient, Tensor):
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            gradient = Gradient(gradient.to(dtype).contiguous(), None)
        held = self.tape.remainder_bytes
        state, self.state = self.state, None
        with torch.no_grad():
            result = self.segment.backward(self.tape, state, gradient)
        self.chain.enter(self.tape, held)
        self.state = result.state
        # Stages share plain tensors: one leaf a side.
        self.shared_grads = {name: grad for (name, _), grad in result.sides.items()}
        if self.began_with_state:
            return result.grad
        self.state = None
        assert result.grad is not None
        return result.grad.of_tokens(self.tape.setting.beta).to(self.dtype)
