"""One stage's layers on one micro-batch: forward to what crosses the cut, and back.

A stage keeps the remainders of its chains and, unless the next stage sends it back, its last
state. What it was given is overwritten on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import checkpoint

from dr2dist.backbones.backbone import Transition
from dr2dist.backbones.forward import AutogradDriver
from dr2dist.backbones.network import ReversibleNetwork
from dr2dist.backbones.walk import Flow, Place, walk
from dr2dist.parallel.pipeline.carried import Key, Skeleton, tensors_of
from dr2dist.parallel.pipeline.layers import Layer
from dr2dist.reversible import Chain, Gradient, Layout, Segment, Sides, State, Tape
from dr2dist.reversible.calls.replay import kept_statistics
from dr2dist.reversible.trees import tree_map

Tensors = dict[Key, Tensor]
"""What goes beside the tokens; or gradients of it, fp32."""


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
        self.places = [layer.place for layer in self.layers]
        self.before = layers[own.start - 1] if own.start else None
        self.takes_state = self.before is not None and self.before.hands_on_state
        self.gives_state = self.layers[-1].hands_on_state

    def forward(self, value: Any, carried: Mapping[Key, Tensor] | None = None) -> Pass:
        """Inputs, tokens [B, ...], or a state [2, B, ...] in memory of its own, to an open pass.

        carried: what the stages before hand on; those that gradients are wanted of require them.
        """
        run = Pass(self)
        run.flow = walk(self.places, self._given(value, carried), run)
        return run

    def infer(self, value: Any, carried: Mapping[Key, Tensor] | None = None) -> tuple[Any, Any]:
        """The same without a pass: what crosses the cut or comes out, and what goes beside it."""
        with torch.no_grad():
            found = walk(self.places, self._given(value, carried), _Inference(self))
        if not isinstance(found, Flow):
            return found, {}
        value = torch.stack(tuple(found.value)) if self.gives_state else found.value
        return value, tensors_of(found)

    def _given(self, value: Any, carried: Mapping[Key, Tensor] | None) -> Any:
        if self.before is None:
            return value
        given = State(value[0], value[1]) if self.takes_state else value
        return self.before.skeleton.fill(given, carried or {})

    def segment(self, run: Sequence[Place]) -> tuple[Chain, Segment]:
        """A chain, and the part of it that some layers are."""
        chain = self.net.items[run[0].item]
        return chain, chain.part(run[0].function, run[-1].function + 1)

    def taps(self, run: Sequence[Place]) -> list[int]:
        """Functions of a segment, by their numbers in it, behind which a head takes tokens."""
        wanted = self.net.head_taps
        return [n for n, place in enumerate(run) if place.tap in wanted]


class _Inference(AutogradDriver):
    """Runs a stage's layers without gradients."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.net, {}, stage.net.head_taps)
        self.stage = stage

    def functions(self, run: Sequence[Place], flow: Flow) -> Flow:
        """See Driver."""
        chain, segment = self.stage.segment(run)
        sides, taps = Sides(flow.sides, flow.batched), self.stage.taps(run)
        given, flow.value = flow.value, None
        dtype = _dtype(segment) if isinstance(given, State) else given.dtype
        layout = Layout.given(chain.setting, flow.together)
        infer = segment.infer if run[-1].last else segment.infer_state
        flow.value, tapped = infer(given, sides, chain.setting, layout, taps, dtype)
        flow.taps |= {run[n].tap: tokens for n, tokens in zip(taps, tapped, strict=True)}
        return flow


def _dtype(segment: Segment) -> torch.dtype:
    """What tokens are handed on in, where only a state is known: what weights are held in."""
    return next(segment.functions[0].parameters()).dtype


class Pass(AutogradDriver):
    """A micro-batch between its forward and its backward pass.

    flow: what the last layer gave: tokens or a state, and what goes beside them; behind the tail
    the network's output with its graph. grads: of what goes beside tokens, fp32, as far as the
    backward pass has come.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.net, {}, stage.net.head_taps)
        self.stage = stage
        self.flow: Any = None
        self.state_taken: State | None = None
        self.grads: Tensors = {}
        self._undo: list[_Graph | _Reversal] = []

    @property
    def output(self) -> Any:
        """The network's output, on the last stage."""
        return self.flow

    def stem(self, inputs: Any) -> Flow:
        """See Driver: under a checkpoint, for which the inputs alone are kept."""
        net, stem = self.net, super().stem

        def run(_: Any) -> Flow:
            return checkpoint(
                stem,
                inputs,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), kept_statistics(net)),
            )

        return self._extend(_Graph(run, None, {}))

    def transition(self, place: Place, flow: Flow) -> Flow:
        """See Driver."""
        if not isinstance(self.net.items[place.item], Transition):
            # Of tokens alone: gradients of what goes beside pass it by.
            graph = _Graph(
                lambda tokens, _: self._pass_on(place, Flow(tokens, rows=flow.rows)), flow.value, {}
            )
            return replace(flow, value=self._extend(graph).value)
        sides = tensors_of(replace(flow, taps={}))
        skeleton = Skeleton(flow)
        found = self._extend(
            _Graph(
                lambda tokens, beside: self._pass_on(place, skeleton.fill(tokens, beside)),
                flow.value,
                sides,
            )
        )
        return replace(found, taps=flow.taps)

    def _pass_on(self, place: Place, flow: Flow) -> Flow:
        return self.net.run_transition(place, flow)

    def functions(self, run: Sequence[Place], flow: Flow) -> Flow:
        """See Driver."""
        given, flow.value = flow.value, None
        sides = Sides(flow.sides, flow.batched)
        layout = Layout.given(self.net.items[run[0].item].setting, flow.together)
        taps = self.stage.taps(run)
        reversal = _Reversal(*self.stage.segment(run), given, sides, layout, run, taps)
        self._undo.append(reversal)
        for key, tokens in reversal.tapped.items():
            flow.taps[key] = tokens.requires_grad_()
        reversal.tapped = {}
        flow.value = reversal.tokens() if run[-1].last else reversal.state
        return flow

    def tail(self, flow: Flow) -> Any:
        """See Driver."""
        graph = _Graph(
            lambda tokens, taps: Flow(self.net.run_tail(replace(flow, value=tokens, taps=taps))),
            flow.value,
            flow.taps,
        )
        self._undo.append(graph)
        return graph.take_output()

    def _extend(self, graph: _Graph) -> Flow:
        self._undo.append(graph)
        return graph.drop_outputs()

    def message(self) -> Tensor:
        """What crosses the cut, in memory of its own: tokens, or the state stacked.

        What goes beside it, `carried`, is to be taken before: it is not held from here on.
        """
        value, self.flow = self.flow.value, None
        if not self.stage.gives_state:
            tokens: Tensor = value
            return tokens
        message = torch.stack(tuple(value))
        # The pass goes on from the message: no state is held twice.
        reversal = self._undo[-1]
        assert isinstance(reversal, _Reversal)
        reversal.state = None if self.stage.returned else State(message[0], message[1])
        return message

    @property
    def carried(self) -> Tensors:
        """What goes beside it."""
        return tensors_of(self.flow)

    def end_with(self, loss: Tensor) -> None:
        """Takes the loss of the network's output for what the pass is differentiated from."""
        graph = self._undo[-1]
        assert isinstance(graph, _Graph)
        graph.root = _edge(loss)
        self.flow = None

    def backward(
        self,
        gradient: Tensor,
        returned: Tensor | None = None,
        carried: Mapping[Key, Tensor] | None = None,
    ) -> Tensor | None:
        """From the gradient of what was given to that of what was taken, which is returned.

        gradient: of a loss, of tokens [B, ...], or of both parts of a state [2, B, ...]; consumed.
        returned: the state that the next stage has reconstructed, stacked. carried: gradients of
        what goes beside, from the stages behind. Where the stage took a state the result is
        [2, B, ...]; `state_taken` then holds that state again.
        """
        self.add(carried or {})
        found: Any = gradient
        if self.stage.gives_state:
            found = Gradient(gradient[0], gradient[1])
            if returned is not None:
                last = self._undo[-1]
                assert isinstance(last, _Reversal)
                last.state = State(returned[0], returned[1])
        while self._undo:
            step = self._undo.pop()
            found = step.backward(found, self)
        if self.stage.takes_state:
            assert isinstance(step, _Reversal)
            self.state_taken = step.state
            return torch.stack((found.x, found.y))
        return found if isinstance(found, Tensor) else None

    def add(self, grads: Mapping[Any, Tensor]) -> None:
        """Adds gradients of what goes beside tokens."""
        for key, grad in grads.items():
            known = self.grads.get(key)
            self.grads[key] = grad.float() if known is None else known + grad


class _Graph:
    """A stem, a transition or the tail under ordinary autograd.

    call: called as call(tokens, beside), or call(None) for the stem, and gives a Flow; it keeps no
    more than its inputs. beside: what goes beside tokens and gradients go to.
    """

    def __init__(
        self, call: Callable[..., Flow], tokens: Tensor | None, beside: Mapping[Any, Tensor]
    ) -> None:
        self.tokens = None if tokens is None else _leaf(tokens)
        self.beside = {key: _leaf(value) for key, value in beside.items() if value.requires_grad}
        with torch.enable_grad():
            given = (None,) if tokens is None else (self.tokens, {**beside, **self.beside})
            self.output: Any = call(*given)
        self.root: GradientEdge | None = None
        self.edges: dict[Key, GradientEdge] = {}

    def take_output(self) -> Any:
        """The network's output, with its graph, which is not held here."""
        output, self.output = self.output.value, None
        return output

    def drop_outputs(self) -> Flow:
        """What it gave, without its graph, of which only the roots stay here."""
        flow, self.output = self.output, None
        self.root = _edge(flow.value)
        found = {key: _edge(value) for key, value in tensors_of(flow).items()}
        self.edges = {key: edge for key, edge in found.items() if edge is not None}

        def cut(value: Any) -> Any:
            return _leaf(value) if isinstance(value, Tensor) and value.requires_grad else value

        sides = tree_map(cut, flow.sides)
        return replace(flow, value=flow.value.detach(), sides=sides, taps=dict(flow.taps))

    def backward(self, gradient: Tensor, run: Pass) -> Tensor | None:
        """From the tokens' or the loss's gradient to that of the tokens that went in."""
        roots = [] if self.root is None else [(self.root, gradient)]
        for key, edge in self.edges.items():
            if key in run.grads:
                roots.append((edge, run.grads.pop(key)))
        if roots:
            edges, grads = map(list, zip(*roots, strict=True))
            torch.autograd.backward(edges, grads)
        for key, leaf in self.beside.items():
            if leaf.grad is not None:
                run.add({key: leaf.grad})
        if self.tokens is None:
            return None
        found, self.tokens.grad = self.tokens.grad, None
        return torch.zeros_like(self.tokens) if found is None else found


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def _edge(value: Tensor) -> GradientEdge | None:
    return get_gradient_edge(value) if value.requires_grad else None


class _Reversal:
    """Functions of a chain, run and ready to be reversed."""

    def __init__(
        self,
        chain: Chain,
        segment: Segment,
        given: Tensor | State,
        sides: Sides,
        layout: Layout,
        run: Sequence[Place],
        taps: list[int],
    ) -> None:
        self.chain, self.segment, self._run, self._taps = chain, segment, run, taps
        setting = chain.setting
        self.began_with_state = isinstance(given, State)
        self.tape: Tape
        self.state: State | None
        with torch.no_grad():
            if isinstance(given, State):
                self.dtype = _dtype(segment)
                found = segment.go_on(given, self.dtype, sides, setting, layout, taps)
            else:
                self.dtype = given.dtype
                found = segment.forward(given, sides, setting, layout, taps=taps)
        self.state, self.tape, handed = found
        self.tapped = {run[tap].tap: tokens for tap, tokens in handed.items()}
        chain.open(self.tape)

    def tokens(self) -> Tensor:
        """The chain's output, a new tensor."""
        assert self.state is not None
        return self.segment.handed_on(self.state, self.tape.arithmetic, self.tape.dtype)

    def backward(self, gradient: Any, run: Pass) -> Any:
        """From tokens' or a state's gradient to that of what it began with."""
        held = self.tape.remainder_bytes
        state, self.state = self.state, None
        keys = {tap: self._run[tap].tap for tap in self._taps}
        taps = {tap: run.grads.pop(key) for tap, key in keys.items() if key in run.grads}
        if isinstance(gradient, Tensor):
            tokens = gradient.to(self.tape.dtype).contiguous()
            gradient, taps = self.segment.gradient(tokens, taps)
        with torch.no_grad():
            result = self.segment.reversal(self.tape, state, gradient, taps).finish()
        self.chain.enter(self.tape, held)
        self.state = result.state
        run.add(result.sides)
        if self.began_with_state:
            return result.grad
        self.state = None
        assert result.grad is not None
        return result.grad.of_tokens(self.tape.setting.beta).to(self.dtype)
