"""The functions of a chain between two points: forward to a state and a tape, and back.

The mathematics is explicit here; autograd, pipeline stages and benchmarks are its drivers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dr2dist.reversible.certificate import Flags, Probe, bit_sum
from dr2dist.reversible.exact import ExactArithmetic, State
from dr2dist.reversible.floating import FloatArithmetic
from dr2dist.reversible.replay import Autocast, Randomness, function_context, kept_statistics
from dr2dist.reversible.runner import (
    Call,
    FunctionRunner,
    HandOver,
    LiveFunction,
    gradients,
    needs_grad,
    run,
    trainable,
)
from dr2dist.reversible.setting import Setting
from dr2dist.reversible.tape import Sides, Tape, arithmetic_of, part_of, slices, state_dtype

Arithmetic = ExactArithmetic | FloatArithmetic


class Gradient(NamedTuple):
    """The gradient of a state: of x_i and of y_i (None stands for zeros)."""

    x: Tensor
    y: Tensor | None


class Backward(NamedTuple):
    """What reversing a segment gives: its first state, that state's gradient, the sides'."""

    state: State
    grad: Gradient
    sides: dict[str, Tensor]


class Segment:
    """Functions F_a .. F_b of a chain, with the runner that calls them."""

    def __init__(self, functions: Sequence[nn.Module], runner: FunctionRunner) -> None:
        self.functions = functions
        self.runner = runner

    def first_trained(self, sides: Sides, x_needs_grad: bool) -> int:
        """Index of the first function that gradients concern; the number of functions if none."""
        if x_needs_grad:
            return 0
        for index, function in enumerate(self.functions):
            if trainable(function) or any(map(needs_grad, sides.of(function).values())):
                return index
        return len(self.functions)

    @torch.no_grad()
    def infer(
        self, h: Tensor, sides: Sides, setting: Setting, taps: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """The chain without any bookkeeping: (output, taps).

        No certificate speaks here, so a sample whose state leaves the range comes out as NaN.
        """
        arithmetic, dtype = _arithmetic(h, setting)
        state = arithmetic.start(h)
        outside = arithmetic.outside(state.current)
        handed: dict[int, Tensor] = {}
        for index in range(len(self.functions)):
            state = self._plain_step(index, state, sides, setting, arithmetic, dtype)
            outside = outside | arithmetic.outside(state.current)
            if index in taps:
                handed[index] = arithmetic.hand_out(state.current, dtype)
                handed[index].masked_fill_(outside, torch.nan)
        output = arithmetic.hand_out(state.current, dtype).masked_fill_(outside, torch.nan)
        return output, [handed[index] for index in taps]

    def forward(
        self,
        h: Tensor,
        sides: Sides,
        setting: Setting,
        x_needs_grad: bool = True,
        taps: Sequence[int] = (),
    ) -> tuple[State, Tape, dict[int, Tensor]]:
        """Runs the chain from its tokens h [B, ...] to (last state, tape, tapped tokens)."""
        arithmetic, dtype = _arithmetic(h, setting)
        tape = self._new_tape(h, sides, setting, dtype, x_needs_grad)
        state = arithmetic.start(h)
        exact = setting.arithmetic == "exact"
        if exact:
            tape.flags.note_state(0, state.current)
        handed = {}
        for index in range(len(self.functions)):
            if index < tape.first:
                state = self._plain_step(index, state, sides, setting, arithmetic, dtype)
                if exact:
                    tape.flags.note_state(index, state.current)
            else:
                if index == tape.first:
                    _note_start(tape, state)
                state = self._step(index, state, tape, arithmetic)
            if index in taps:
                handed[index] = arithmetic.hand_out(state.current, dtype)
        tape.randomness.close()
        return state, tape, handed

    def backward(
        self,
        tape: Tape,
        state: State,
        grad: Tensor,
        taps: Mapping[int, Tensor] | None = None,
        keep: bool = False,
    ) -> Backward:
        """Reverses the segment from its last state, which is consumed unless `keep`.

        grad: of the last tokens, any float dtype. taps: gradients of tapped tokens by function.
        Parameters get their gradients here, once each. Raises RuntimeError on a used tape.
        """
        if not tape.open:
            raise RuntimeError(
                "this reversible pass was already reversed and its remainders are freed; "
                "pass retain_graph=True to the first backward"
            )
        if keep and tape.setting.memory == "reverse":
            state = State(state.current.clone(), state.previous.clone())
        result = _Reversal(self, tape, state, grad, taps or {}, keep).run()
        if not keep:
            tape.close()
        return result

    def reverse(self, tape: Tape, state: State) -> State:
        """The first state of the segment, from its last one, without any gradient."""
        state = State(state.current.clone(), state.previous.clone())
        grad = torch.zeros(state.current.shape, dtype=tape.dtype, device=state.current.device)
        return _Reversal(self, tape, state, grad, {}, keep=True, differentiate=False).run().state

    def _new_tape(
        self, h: Tensor, sides: Sides, setting: Setting, dtype: torch.dtype, x_needs_grad: bool
    ) -> Tape:
        return Tape(
            setting=setting,
            autocast=Autocast.current(h.device),
            randomness=Randomness(h.device),
            sides=sides,
            dtype=dtype,
            first=self.first_trained(sides, x_needs_grad),
            sums=torch.zeros(len(self.functions), dtype=torch.int64, device=h.device),
            flags=Flags(h.device),
            x_needs_grad=x_needs_grad,
        )

    def _step(self, index: int, state: State, tape: Tape, arithmetic: Arithmetic) -> State:
        """One function forward, with everything noted that its reversal needs."""
        function, memory = self.functions[index], tape.setting.memory
        out = arithmetic.target(state, in_place=memory == "reverse")
        remainders: list[Tensor | None] = []
        calls: list[Call] = []
        if memory == "checkpoint":
            tape.inputs.append(state.current)
        with self.runner.open(function) as live:
            for number, part in enumerate(slices(len(state.current), tape.setting.chunk_size)):
                now = part_of(state, part)
                x = arithmetic.tokens(now.current).to(tape.dtype)
                call = run_slice(tape, live, function, x, index, number, part)
                f = call.output.detach().contiguous()
                if memory == "store":
                    calls.append(call)
                del call, x
                tape.sums[index] += bit_sum(f)
                tape.flags.note_output(index, f)
                # A chain's first state is its own previous one: nothing to keep.
                keep = memory == "reverse" and index > 0
                remainders.append(arithmetic.advance(now, f, part_of(out, part), keep))
        if tape.setting.arithmetic == "exact":
            tape.flags.note_state(index, out.current)
        if memory == "reverse":
            tape.remainders.append(remainders)
        elif memory == "store":
            tape.calls.append(calls)
        return out

    def _plain_step(
        self,
        index: int,
        state: State,
        sides: Sides,
        setting: Setting,
        arithmetic: Arithmetic,
        dtype: torch.dtype,
    ) -> State:
        """One function forward without a graph or a record."""
        function = self.functions[index]
        own = sides.of(function)
        out = arithmetic.target(state, in_place=True)
        with torch.no_grad(), self.runner.open(function) as live:
            for part in slices(len(state.current), setting.chunk_size):
                now = part_of(state, part)
                x = arithmetic.tokens(now.current).to(dtype)
                f = live.call(x, **sides.cut(own, part)).contiguous()
                arithmetic.advance(now, f, part_of(out, part), keep=False)
        return out


class _Reversal:
    """One pass back through a segment; the state's and gradient's buffers are reused."""

    def __init__(
        self,
        segment: Segment,
        tape: Tape,
        state: State,
        grad: Tensor,
        taps: Mapping[int, Tensor],
        keep: bool,
        differentiate: bool = True,
    ) -> None:
        self.segment, self.tape, self.state, self.taps, self.keep = segment, tape, state, taps, keep
        self.differentiate = differentiate
        self.setting = tape.setting
        dtype = state_dtype(grad)
        self.arithmetic = arithmetic_of(self.setting, dtype)
        self.grad = Gradient(grad.to(dtype, copy=True).contiguous(), None)
        self.sides: dict[str, Tensor] = {}
        self.hand_over = HandOver(segment.functions[tape.first :])

    def run(self) -> Backward:
        for index in reversed(range(self.tape.first, len(self.segment.functions))):
            if index in self.taps:
                self.grad.x.add_(self.taps[index])
            self._step(index)
        if self.setting.memory == "reverse":
            self._check_start()
        return Backward(self.state, self.grad, self.sides)

    def _step(self, index: int) -> None:
        function = self.segment.functions[index]
        place = index - self.tape.first
        memory = self.setting.memory
        after = Gradient(
            torch.empty_like(self.grad.x) if self.grad.y is None else self.grad.y, self.grad.x
        )
        total = torch.zeros((), dtype=torch.int64, device=self.grad.x.device)
        with self.segment.runner.open(function) as live:
            for number, part in enumerate(slices(len(self.grad.x), self.setting.chunk_size)):
                if memory == "store":
                    call = self.tape.calls[place][number]
                else:
                    call = self._recompute(function, live, index, number, part)
                    total += bit_sum(call.output.detach().contiguous())
                if memory == "reverse":
                    self._retreat(index, part, number, call.output.detach().contiguous())
                if self.differentiate:
                    self._differentiate(live, call, part, after, function)
                del call
            self.hand_over.finish(live.parameters)
        if memory == "checkpoint" or (memory == "reverse" and self.setting.arithmetic == "exact"):
            self.tape.flags.note_recompute(index, total != self.tape.sums[index])
        self.grad = after
        self._free(place)
        if memory == "reverse":
            self.state = State(self.state.previous, self.state.current)

    def _recompute(
        self, function: nn.Module, live: LiveFunction, index: int, number: int, part: slice
    ) -> Call:
        if self.setting.memory == "checkpoint":
            tokens = self.arithmetic.tokens(self.tape.inputs[index - self.tape.first][part])
        else:
            tokens = self.arithmetic.source(part_of(self.state, part))
        x = tokens.to(self.tape.dtype)
        with kept_statistics(function):
            return run_slice(self.tape, live, function, x, index, number, part)

    def _retreat(self, index: int, part: slice, number: int, f: Tensor) -> None:
        """Turns a slice of the state after a function into the one before it, in place."""
        now = part_of(self.state, part)
        if isinstance(self.arithmetic, FloatArithmetic):
            self.arithmetic.retreat(now, f, None)
        elif index > 0:
            remainders = self.tape.remainders[index - self.tape.first][number]
            assert remainders is not None
            self.arithmetic.retreat(now, f, remainders)
        else:
            self.tape.flags.note_start(self.arithmetic.deviation(now, f) > 0)

    def _differentiate(
        self, live: LiveFunction, call: Call, part: slice, after: Gradient, function: nn.Module
    ) -> None:
        """dx = F'(x)^T dx' + (alpha dx' + beta dy'), written to `after` for one slice."""
        dx = self.grad.x[part]
        of_inputs, of_leaves = gradients(call, dx, self.keep)
        through = dx * self.setting.alpha
        if self.grad.y is not None:
            through.add_(self.grad.y[part] * self.setting.beta)
        of_x = of_inputs[0]
        after.x[part] = through if of_x is None else through.add_(of_x)
        self.hand_over.add(live.parameters, of_leaves)
        own = self.tape.sides.of(function)
        names = [name for name, value in own.items() if needs_grad(value)]
        for name, grad in zip(names, of_inputs[1:], strict=True):
            if grad is not None:
                self._add_side(name, grad, part)

    def _add_side(self, name: str, grad: Tensor, part: slice) -> None:
        if name not in self.sides:
            side = self.tape.sides.values[name]
            dtype = torch.promote_types(side.dtype, torch.float32)
            self.sides[name] = torch.zeros_like(side, dtype=dtype)
        target = self.sides[name]
        target = target[part] if name in self.tape.sides.batched else target
        target += grad

    def _free(self, place: int) -> None:
        if self.keep:
            return
        for held in (self.tape.remainders, self.tape.inputs, self.tape.calls):
            if held:
                held.pop(place)

    def _check_start(self) -> None:
        """Compares the start that was reached with the one that the forward pass noted."""
        flags = self.tape.flags
        flags.note_done()
        if self.tape.start_sum is not None:
            sums = _state_sum(self.state, both=self.tape.first > 0)
            flags.note_start((sums != self.tape.start_sum).any())


def run_slice(
    tape: Tape,
    live: LiveFunction,
    function: nn.Module,
    x: Tensor,
    index: int,
    number: int,
    part: slice,
) -> Call:
    """F on one slice of the batch, the same way in both directions."""
    sides = tape.sides.cut(tape.sides.of(function), part)
    x_needs_grad = tape.x_needs_grad or index > tape.first
    with function_context(tape.autocast, tape.randomness, index, number):
        return run(live, x, sides, x_needs_grad)


def _arithmetic(h: Tensor, setting: Setting) -> tuple[Arithmetic, torch.dtype]:
    """(arithmetic, dtype that F is called with and tokens are handed out in)."""
    dtype = state_dtype(h)
    autocast = torch.is_autocast_enabled(h.device.type)
    return arithmetic_of(setting, dtype), dtype if autocast else h.dtype


def _note_start(tape: Tape, state: State) -> None:
    if tape.setting.memory != "reverse":
        return
    if tape.setting.arithmetic == "float":
        tape.probe = Probe(state)
    else:
        tape.start_sum = _state_sum(state, both=tape.first > 0)


def _state_sum(state: State, both: bool) -> Tensor:
    """int64 sums of the state's tensors; X_0 alone where it is its own previous state."""
    parts = state if both else state[:1]
    return torch.stack([part.sum(dtype=torch.int64) for part in parts])
