"""One pass back through a segment, with or without gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dr2dist.reversible.arithmetic.checksum import OutputChecksum
from dr2dist.reversible.arithmetic.floating import FloatArithmetic
from dr2dist.reversible.arithmetic.gradient import couple
from dr2dist.reversible.arithmetic.state import Gradient, State
from dr2dist.reversible.calls.replay import kept_statistics
from dr2dist.reversible.calls.runner import (
    Call,
    FunctionRunner,
    GradAccumulator,
    LiveFunction,
    SideKey,
    differentiable,
    gradients,
)
from dr2dist.reversible.calls.sliced import SlicedCall
from dr2dist.reversible.calls.slices import Slice, joined
from dr2dist.reversible.certificate import Probe
from dr2dist.reversible.tape import Kept, Tape

START = -1
"""In the place of a function's number: tokens before the first one."""


class Backward(NamedTuple):
    """What reversing a segment gives: its first state if that was reached, that state's
    gradient if one was asked for, and the sides'."""

    state: State | None
    grad: Gradient | None
    sides: dict[SideKey, Tensor]


class Reversal:
    """Takes a segment's last state and gradient back to its first; both buffers are reused.

    state: None where the last function keeps its activations. grad: None to reverse only.
    taps: gradients of tapped tokens by function, or START. keep: the tape is left as it is.
    accumulator: has the gradients of parameters, unless the runner is nested.
    """

    def __init__(
        self,
        functions: Sequence[nn.Module],
        runner: FunctionRunner,
        tape: Tape,
        state: State | None,
        grad: Gradient | None,
        taps: Mapping[int, Tensor] | None = None,
        keep: bool = False,
    ) -> None:
        self.functions, self.runner, self.tape = functions, runner, tape
        self.state, self.grad, self.taps, self.keep = state, grad, dict(taps or {}), keep
        self.arithmetic = tape.arithmetic
        self.sides: dict[SideKey, Tensor] = {}
        self.accumulator = GradAccumulator(functions[tape.first :], runner.nested)
        self.left = len(functions)
        tape.used = tape.used or not keep

    def step(self) -> None:
        """Reverses the last function that is left."""
        self.left -= 1
        tap = self.taps.pop(self.left, None)
        if self.grad is not None and tap is not None:
            self.grad.x.add_(tap)
        with self.tape.kernels.restored():
            self._step(self.left)
        if self.keep:
            self.tape.remainders.return_(self.left)
        else:
            self.tape.free(self.left)

    def finish(self) -> Backward:
        """Reverses all functions that are left."""
        while self.left > self.tape.first:
            self.step()
        first = self.taps.pop(START, None)
        if self.grad is not None and first is not None:
            self.grad.x.add_(first)
        if self.tape.setting.memory in ("reverse", "budget"):
            self.tape.flags.note_done()
        if not self.keep:
            self.tape.close()
        return Backward(self.state, self.grad, self.sides)

    def _step(self, index: int) -> None:
        mode = self.tape.mode(index)
        seen = OutputChecksum(torch.zeros_like(self.tape.sums[index]))
        for wanted in (index, index - 1):  # its own are there by now, but for the first time
            self.tape.remainders.ahead(wanted)
        after = _after(self.grad)
        upcoming = self.functions[index - 1] if index > self.tape.first else None
        with self.runner.open(self.functions[index], upcoming) as live:
            step = _Step(self, index, live, after, seen)
            if mode == "store":
                for kept in self.tape.kept[index]:
                    step.from_graphs(kept)
            else:
                step.recompute()
            self.accumulator.finish(live.parameters)
        if mode == "checkpoint" or (mode == "reverse" and not self._floating):
            self.tape.flags.note_recompute(
                self.tape.begin + index, seen.bits != self.tape.sums[index]
            )
        self.grad = after
        if mode == "reverse":
            assert self.state is not None
            self.state = State(self.state.previous, self.state.current)
            if index in self.tape.starts:
                self._check_start(self.tape.starts[index])
        elif index in self.tape.states:
            saved = self.tape.states[index]
            self.state = saved.copy() if self.keep else saved

    @property
    def _floating(self) -> bool:
        return isinstance(self.arithmetic, FloatArithmetic)

    def _check_start(self, noted: Tensor | Probe) -> None:
        """Compares the start that was reached with what the forward pass noted of it."""
        assert self.state is not None
        if isinstance(self.arithmetic, FloatArithmetic):
            assert isinstance(noted, Probe)
            drift = noted.drift(self.state)
            known = self.tape.drift
            self.tape.drift = drift if known is None else torch.maximum(known, drift)
        else:
            assert isinstance(noted, Tensor)
            found = self.arithmetic.sums(self.state)[: len(noted)]
            self.tape.flags.note_start((found != noted).any())


def _after(grad: Gradient | None) -> Gradient | None:
    """Buffers for the gradient before a function: dx' becomes dy, and dx overwrites dy'."""
    if grad is None:
        return None
    return Gradient(torch.empty_like(grad.x) if grad.y is None else grad.y, grad.x)


class _Step:
    """One function of a reversal, with its parameters present."""

    def __init__(
        self,
        reversal: Reversal,
        index: int,
        live: LiveFunction,
        after: Gradient | None,
        seen: OutputChecksum,
    ) -> None:
        self.reversal, self.index, self.live = reversal, index, live
        self.after, self.seen, self.keep = after, seen, reversal.keep
        self.tape, self.arithmetic = reversal.tape, reversal.tape.arithmetic
        self.function = reversal.functions[index]
        self.factor = reversal.tape.factor(index)
        self.number = 0

    def from_graphs(self, kept: Kept) -> None:
        """Gradients of a function that kept its graphs."""
        kept.work.start_gradients()
        for part, call in zip(kept.work.parts, kept.calls, strict=True):
            self._differentiate(part, call)
        self._spread(kept.work, zip(kept.work.parts, kept.contexts, strict=False))

    def recompute(self) -> None:
        """Runs the function again, part by part: state and gradient go one function back."""
        index, tape = self.index, self.tape
        stream, needs = tape.stream(index), tape.needs_grad(index)
        shape = self._shape()
        with kept_statistics(self.function):
            for work in tape.work(index, self.function, shape):
                for part, call in work.calls(self.live, self._tokens, stream, needs):
                    self._retreat(part, call.output)
                    self._differentiate(part, call)
                    del call
                if self.after is not None:
                    self._spread(work, work.contexts(self.live, self._reached, stream, needs))
                work.forget()

    def _shape(self) -> torch.Size:
        if self.tape.mode(self.index) == "checkpoint":
            return self.tape.inputs[self.index].shape
        assert self.reversal.state is not None
        return self.reversal.state.current.shape

    def _tokens(self, part: Slice) -> Tensor:
        """x_i of a part that is not reversed yet."""
        if self.tape.mode(self.index) == "checkpoint":
            views = part.views(self.tape.inputs[self.index])
            tokens = [self.arithmetic.tokens(view, self.tape.dtype) for view in views]
        else:
            states = self._states(part)
            tokens = [self.arithmetic.source(state, self.tape.dtype) for state in states]
        return joined(tokens)

    def _reached(self, part: Slice) -> Tensor:
        """x_i of a part that is reversed."""
        if self.tape.mode(self.index) == "checkpoint":
            return self._tokens(part)
        states = self._states(part)
        return joined([self.arithmetic.reached(state, self.tape.dtype) for state in states])

    def _states(self, part: Slice) -> list[State]:
        assert self.reversal.state is not None
        return part.states(self.reversal.state)

    def _retreat(self, part: Slice, f: Tensor) -> None:
        """Turns a part of the state after the function into the one before it, in place."""
        if self.tape.mode(self.index) == "checkpoint":
            self.seen.again(f)
            return
        for state, piece in zip(self._states(part), part.split(f), strict=True):
            if isinstance(self.arithmetic, FloatArithmetic):
                self.arithmetic.retreat(state, piece, self.factor)
            elif not self.tape.starts_chain(self.index):
                remainders = self.tape.remainders.part(self.index, self.number)
                self.arithmetic.retreat(state, piece, remainders, self.seen, self.factor)
                if not self.keep:
                    self.tape.remainders.drop(self.index, self.number)
            else:
                deviation = self.arithmetic.deviation(state, piece, self.seen)
                self.tape.flags.note_start(deviation > 0)
            self.number += 1

    def _differentiate(self, part: Slice, call: Call) -> None:
        """dx = F'(x)^T g dx' + (alpha dx' + beta dy'), over the buffer of dy'."""
        if self.after is None or self.reversal.grad is None:
            return
        before, setting = self.reversal.grad, self.tape.setting
        beta = 0.0 if before.y is None else setting.beta
        views, targets = part.views(before.x), part.views(self.after.x)
        of_f = joined(views) if self.factor == 1 else joined(views) * self.factor
        (of_x, *others), of_leaves = gradients(call, [of_f], self.keep)
        pieces = [None] * len(views) if of_x is None else part.split(of_x)
        for target, dx, piece in zip(targets, views, pieces, strict=True):
            couple(target, dx, piece, setting.alpha, beta)
        self._add(part, [None, *others], of_leaves)

    def _spread(self, work: SlicedCall, calls: Iterable[tuple[Slice, Call]]) -> None:
        """Gradients of what a function gave for its context."""
        for part, call in calls:
            self._add(part, *gradients(call, work.context_grads(part), self.keep))
            del call

    def _add(
        self, part: Slice, of_inputs: list[Tensor | None], of_leaves: list[Tensor | None]
    ) -> None:
        """Adds a call's gradients to those of the tokens, the parameters and the sides."""
        assert self.after is not None
        of_x = of_inputs[0]
        if of_x is not None:
            for target, piece in zip(part.views(self.after.x), part.split(of_x), strict=True):
                target.add_(piece)
        self.reversal.accumulator.add(self.live.parameters, of_leaves)
        sides = differentiable(self.tape.sides.of(self.function))
        for (key, side), grad in zip(sides, of_inputs[1:], strict=False):
            if grad is not None:
                self._add_side(key, side, grad, part.samples)

    def _add_side(self, key: SideKey, side: Tensor, grad: Tensor, samples: slice) -> None:
        sides = self.reversal.sides
        if key not in sides:
            dtype = torch.promote_types(side.dtype, torch.float32)
            sides[key] = torch.zeros_like(side, dtype=dtype)
        target = sides[key]
        target = target[samples] if key[0] in self.tape.sides.batched else target
        target += grad
