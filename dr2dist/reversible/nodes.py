"""Ties a segment's explicit passes to autograd: a node for each function.

Gradients of parameters leave the graph function by function, as those of any network do: they are
added to those that are there, or reduced, while the functions before are still to come.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dr2dist.reversible.arithmetic.state import State
from dr2dist.reversible.calls.runner import differentiable
from dr2dist.reversible.reversal import Backward, Reversal
from dr2dist.reversible.segment import Segment
from dr2dist.reversible.tape import Sides, Tape, token_dtype


class ChainPass:
    """One forward pass in autograd's graph: what its nodes share.

    name: of the chain, for messages. state: the last one, None where the last function keeps its
    activations. taps: functions whose tokens were handed out. look, done: called with the tape and
    its bytes of remainders after each function, and when the pass is reversed.
    """

    def __init__(
        self,
        name: str,
        segment: Segment,
        tape: Tape,
        state: State | None,
        taps: Sequence[int],
        look: Callable[[Tape, int], None],
        done: Callable[[Tape, int], None],
    ) -> None:
        self.name, self.segment, self.tape, self.state = name, segment, tape, state
        self.taps, self.look, self.done = taps, look, done
        self.reversal: Reversal | None = None
        self.remainder_bytes = 0

    def nodes(
        self, x: Tensor, output: Tensor, tapped: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The pass's results as outputs of its nodes: (output, taps).

        A ticket stands for the tokens between the nodes: states and gradients pass from one to the
        next beside autograd, which would keep alive what it hands over.
        """
        # Without an input that requires a gradient autograd would never come back here.
        anchor = x.new_empty(0, requires_grad=True)
        sides = [value for _, value in differentiable(self.tape.sides.values)]
        ticket = _Start.apply(self, anchor, x, *sides)
        for parameters in self.tape.owned:
            ticket = _Function.apply(self, ticket, *parameters)
        box = [output, *tapped]
        del output, tapped
        output, *tapped = _End.apply(self, box, ticket)
        return output, tapped

    def begin(self, grad: Tensor | None, tap_grads: Sequence[Tensor | None]) -> Tensor | None:
        """Begins to reverse, given gradients of the results; returns the ticket's, if there is one.

        Raises RuntimeError where the gradients themselves are to be differentiated.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.name}: double backward through a reversible chain is not possible; "
                "call backward without create_graph"
            )
        self.reversal = None
        taps = _sum_taps(self.taps, tap_grads)
        if grad is None and not taps:
            return None
        layout = torch.contiguous_format
        if grad is None:
            tap = next(iter(taps.values()))
            grad = torch.zeros_like(tap, dtype=self.tape.dtype, memory_format=layout)
        else:  # the reversal writes into it
            grad = grad.to(self.tape.dtype, copy=True, memory_format=layout)
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        self.remainder_bytes = self.tape.remainder_bytes
        self.look(self.tape, self.remainder_bytes)
        state = self.state
        if not keep:
            self.state = None
        of_state, taps = self.segment.gradient(grad, taps)
        self.reversal = self.segment.reversal(self.tape, state, of_state, taps, keep)
        return grad.new_zeros(())

    def step(self) -> None:
        """Reverses the last function that is left."""
        assert self.reversal is not None
        self.reversal.step()
        self.look(self.tape, self.remainder_bytes)

    def finish(self) -> Backward:
        """Reverses what is left, and has the certificate written."""
        assert self.reversal is not None
        reversal, self.reversal = self.reversal, None
        result = reversal.finish()
        self.done(self.tape, self.remainder_bytes)
        return result


@torch.compiler.disable
def of_nothing(
    segment: Segment, sides: Sides, taps: Sequence[int], x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """(output, taps) of tokens without an element, in autograd's graph: as in any network what
    trains gets zeros. There is nothing to reverse."""
    parameters = [] if segment.runner.nested else itertools.chain(*segment.owned(0))
    shared = (side for _, side in differentiable(sides.values))
    output: Tensor = _Nothing.apply(token_dtype(x), x, *shared, *parameters)
    return output, [output.clone() for _ in taps]


class _Nothing(torch.autograd.Function):
    """From tokens without an element, and what else trains, to tokens without an element."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, x: Tensor, *others: Tensor) -> Tensor:
        ctx.dtype, ctx.others = x.dtype, others
        return x.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, grad.to(ctx.dtype), *map(torch.zeros_like, ctx.others)


class _Start(torch.autograd.Function):
    """Where the tokens and the sides come in."""

    @staticmethod
    def forward(ctx: Any, path: ChainPass, anchor: Tensor, x: Tensor, *sides: Tensor) -> Tensor:
        ctx.path, ctx.x_dtype = path, x.dtype
        ctx.set_materialize_grads(False)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, ticket: Tensor | None) -> tuple[Any, ...]:
        if ticket is None:
            return (None,) * len(ctx.needs_input_grad)
        tape, result = ctx.path.tape, ctx.path.finish()
        of_x = None
        if tape.x_needs_grad:
            of_x = result.grad.of_tokens(tape.setting.beta).to(ctx.x_dtype)
        return None, None, of_x, *_side_grads(tape, result)


class _Function(torch.autograd.Function):
    """One residual function: its parameters come in, but for those that an earlier one uses too."""

    @staticmethod
    def forward(ctx: Any, path: ChainPass, ticket: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.path, ctx.parameters = path, parameters
        ctx.set_materialize_grads(False)
        return ticket.new_zeros(())

    @staticmethod
    def backward(ctx: Any, ticket: Tensor | None) -> tuple[Any, ...]:
        if ticket is None:
            return (None,) * len(ctx.needs_input_grad)
        reversal = ctx.path.reversal
        ctx.path.step()
        before, _ = ctx.next_functions[0]
        if not torch._C._will_engine_execute_node(before):
            # No more gradients are asked for (torch.autograd.grad), but what was is to be proven.
            ctx.path.finish()
        return None, ticket, *reversal.accumulator.take(ctx.parameters)


class _End(torch.autograd.Function):
    """Where output and taps go out, and the reversal begins with their gradients."""

    @staticmethod
    def forward(ctx: Any, path: ChainPass, box: list[Tensor], ticket: Tensor) -> tuple[Tensor, ...]:
        ctx.path = path
        ctx.set_materialize_grads(False)
        outputs = tuple(box)
        box.clear()
        return outputs

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, *tap_grads: Tensor | None
    ) -> tuple[None, None, Tensor | None]:
        return None, None, ctx.path.begin(grad, tap_grads)


def _sum_taps(taps: Sequence[int], grads: Sequence[Tensor | None]) -> dict[int, Tensor]:
    sums: dict[int, Tensor] = {}
    for tap, grad in zip(taps, grads, strict=True):
        if grad is not None:
            sums[tap] = sums[tap] + grad if tap in sums else grad
    return sums


def _side_grads(tape: Tape, result: Backward) -> list[Tensor | None]:
    found = result.sides
    return [
        found[key].to(value.dtype) if key in found else None
        for key, value in differentiable(tape.sides.values)
    ]
