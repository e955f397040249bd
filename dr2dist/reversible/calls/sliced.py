"""One residual function on one slice of the batch, perhaps in slices of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from dr2dist.reversible.calls.runner import Call, LiveFunction, run
from dr2dist.reversible.calls.slices import Slice, TokenSlice, joined

Tokens = Callable[[Slice], Tensor]
"""Gives the tokens that the function sees in a slice."""

Stream = Callable[[tuple[int, ...]], AbstractContextManager[Any]]
"""The context that a call is made in, by the key of its random numbers."""


class SlicedCall:
    """Runs a function on a slice of the batch, the same way in both directions.

    function: itself, for what needs no parameters. parts: the slice's slices of tokens. number:
    the slice's place in the batch. length: size of dim 1. sides: the slice's part of the sides.
    """

    def __init__(
        self, function: Any, parts: list[Slice], number: int, length: int, sides: dict[str, Any]
    ) -> None:
        self.function, self.parts, self.number = function, parts, number
        self.length, self.sides = length, sides
        self._context: tuple[Tensor, ...] = ()
        self._grads: dict[int, Tensor] = {}
        self._factor: Tensor | None = None

    def calls(
        self,
        live: LiveFunction,
        tokens: Tokens,
        stream: Stream,
        x_needs_grad: bool,
        contexts: list[Call] | None = None,
    ) -> Iterator[tuple[Slice, Call]]:
        """F on each part, in their order. No call is held here while the next is made.

        contexts: where the calls for the context go if their graphs are kept.
        """
        if self.parts[0].ranges is not None:
            with stream((self.number, -1)):
                self._factor = self.function.draw(tokens(self.parts[0]))
            if self.function.needs_context:
                self._gather(self.contexts(live, tokens, stream, x_needs_grad), contexts)
        for place, part in enumerate(self.parts):
            with stream((self.number, place)):
                call = [self._branch(live, tokens(part), part, x_needs_grad)]
            yield part, call.pop()

    def contexts(
        self, live: LiveFunction, tokens: Tokens, stream: Stream, x_needs_grad: bool
    ) -> Iterator[tuple[Slice, Call]]:
        """What each part gives for the context, in their order; nothing without one."""
        if self.parts[0].ranges is None or not self.function.needs_context:
            return
        for place, part in enumerate(self.parts):
            with stream((self.number, place, 1)):
                call = [self._run(live, tokens(part), part, None, x_needs_grad)]
            yield part, call.pop()

    def context_grads(self, part: Slice) -> list[Tensor | None]:
        """What the branches since the context was made want of a part's context."""
        return [
            joined(part.cut(self._grads[index])) if index in self._grads else None
            for index in range(len(self._context))
        ]

    def start_gradients(self) -> None:
        """Begins a backward pass over kept graphs."""
        self._grads = {}

    def forget(self) -> None:
        """Drops the context and its gradients."""
        self._context, self._grads = (), {}

    def _branch(self, live: LiveFunction, x: Tensor, part: Slice, x_needs_grad: bool) -> Call:
        if part.ranges is None:
            return run(live, x, self.sides, x_needs_grad)
        call = self._run(live, x, part, self._context, x_needs_grad)
        return call._replace(inputs=[*call.inputs, *self._context])

    def _run(
        self,
        live: LiveFunction,
        x: Tensor,
        part: Slice,
        context: tuple[Tensor, ...] | None,
        x_needs_grad: bool,
    ) -> Call:
        assert part.ranges is not None
        told = TokenSlice(part.ranges, self.length, context, self._factor)
        return run(live, x, self.sides, x_needs_grad, tokens=told)

    def _gather(self, calls: Iterator[tuple[Slice, Call]], keep: list[Call] | None) -> None:
        """Makes the context of what each part gives."""
        self.forget()
        for part, call in calls:
            if not self._context:
                self._context = tuple(map(self._room, call.outputs))
            for whole, output in zip(self._context, call.outputs, strict=True):
                for view, piece in zip(part.cut(whole), part.split(output), strict=True):
                    view.detach().copy_(piece.detach())
            wanted = [output.requires_grad for output in call.outputs]
            if keep is not None:
                keep.append(call.without_outputs())
            del call, output, piece
        for index, whole in enumerate(self._context):
            if wanted[index]:
                whole.requires_grad_().register_hook(self._collector(index))

    def _room(self, output: Tensor) -> Tensor:
        return output.new_empty(output.shape[0], self.length, *output.shape[2:])

    def _collector(self, index: int) -> Callable[[Tensor], Tensor]:
        """Sums gradients of the context as they come, so that no two of them live at once."""

        def collect(grad: Tensor) -> Tensor:
            if index not in self._grads:
                dtype = torch.promote_types(grad.dtype, torch.float32)
                self._grads[index] = torch.zeros_like(grad, dtype=dtype)
            self._grads[index] += grad
            return grad.new_zeros(()).expand_as(grad)

        return collect
