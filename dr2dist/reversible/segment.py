"""The functions of a chain between two points: forward to a state and a tape, and back.

The mathematics is explicit here; autograd, pipeline stages and benchmarks are its drivers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from dr2dist.reversible.advance import Advance, note_state, tokens_of
from dr2dist.reversible.arithmetic.checksum import OutputChecksum
from dr2dist.reversible.arithmetic.exact import ExactArithmetic
from dr2dist.reversible.arithmetic.floating import FloatArithmetic
from dr2dist.reversible.arithmetic.scales import ChannelMaxima, ChannelScales
from dr2dist.reversible.arithmetic.setting import HandOn, Setting
from dr2dist.reversible.arithmetic.state import Gradient, State
from dr2dist.reversible.calls.guard import without_saved
from dr2dist.reversible.calls.kernels import Kernels
from dr2dist.reversible.calls.replay import Randomness, stream_of, ungraphed
from dr2dist.reversible.calls.runner import (
    FunctionRunner,
    check_unchanged,
    differentiable,
    trainable,
)
from dr2dist.reversible.calls.sliced import Stream
from dr2dist.reversible.calls.slices import Layout, slices_of
from dr2dist.reversible.certificate import Flags
from dr2dist.reversible.remainders import Remainders
from dr2dist.reversible.reversal import START, Backward, Reversal
from dr2dist.reversible.tape import (
    Arithmetic,
    Kept,
    Sides,
    Tape,
    arithmetic_of,
    factor_of,
    state_dtype,
    token_dtype,
)


class Segment:
    """Functions F_a .. F_b of a chain, with the runner that calls them.

    begin: a, the number of functions before it in its chain. scales: of its states, if these have
    16 bits. maxima: takes note of all states, which are then in floating point; `infer` only.
    hand_on: which tokens it gives, see Setting. item: of its chain, see Randomness.
    """

    def __init__(
        self,
        functions: Sequence[nn.Module],
        runner: FunctionRunner,
        begin: int = 0,
        scales: ChannelScales | None = None,
        maxima: ChannelMaxima | None = None,
        hand_on: HandOn = "last",
        item: int = 0,
    ) -> None:
        self.functions, self.runner = functions, runner
        self.begin, self.item = begin, item
        self.scales, self.maxima, self.hand_on = scales, maxima, hand_on

    def first_trained(self, sides: Sides, x_needs_grad: bool) -> int:
        """Index of the first function that gradients concern; the number of functions if none."""
        if x_needs_grad:
            return 0
        for index, function in enumerate(self.functions):
            if trainable(function) or differentiable(sides.of(function)):
                return index
        return len(self.functions)

    def owned(self, first: int) -> list[list[nn.Parameter]]:
        """By function from `first` on: its trained parameters that none before it uses."""
        known: set[nn.Parameter] = set()
        owned = []
        for function in self.functions[first:]:
            owned.append([p for p in trainable(function) if p not in known])
            known.update(owned[-1])
        return owned

    @torch.no_grad()
    def infer(
        self,
        given: Tensor | State,
        sides: Sides,
        setting: Setting,
        layout: Layout,
        taps: Sequence[int] = (),
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The chain to its end without any bookkeeping: (output, taps).

        given: its tokens h [B, ...], or the state that the functions before have reached (consumed,
        with the dtype of the tokens that the chain began with). No certificate speaks here, so a
        sample whose state leaves the range comes out as NaN. States of 16 bits are held in 32,
        which makes no other numbers of them.
        """
        state, outside, arithmetic, dtype, handed = self._infer(
            given, sides, setting, layout, taps, dtype
        )
        output = self.handed_on(state, arithmetic, dtype).masked_fill_(outside, torch.nan)
        return output, [handed[index] for index in taps]

    @torch.no_grad()
    def infer_state(
        self,
        given: Tensor | State,
        sides: Sides,
        setting: Setting,
        layout: Layout,
        taps: Sequence[int] = (),
        dtype: torch.dtype | None = None,
    ) -> tuple[State, list[Tensor]]:
        """The same to the state after its last function, which the chain's next part takes.

        A sample whose state leaves the range stays outside of it.
        """
        state, outside, arithmetic, _, handed = self._infer(
            given, sides, setting, layout, taps, dtype
        )
        if isinstance(arithmetic, ExactArithmetic):
            state.current.masked_fill_(outside, torch.iinfo(torch.int32).max)
        return state, [handed[index] for index in taps]

    def _infer(
        self,
        given: Tensor | State,
        sides: Sides,
        setting: Setting,
        layout: Layout,
        taps: Sequence[int],
        dtype: torch.dtype | None,
    ) -> tuple[State, Tensor, Arithmetic, torch.dtype, dict[int, Tensor]]:
        """(last state, which samples left the range, arithmetic, tokens' dtype, taps)."""
        like = given.current.new_empty(0, dtype=dtype) if isinstance(given, State) else given
        arithmetic, dtype = self._arithmetic(like, setting, inference=True)
        state = given if isinstance(given, State) else arithmetic.start(given)
        self._note_maxima(state)
        outside = arithmetic.outside(state.current)
        handed: dict[int, Tensor] = {}
        randomness = ungraphed(self.functions, state.current.device, self.item)
        for index in range(len(self.functions)):
            stream = stream_of(randomness, self.begin + index)
            state = self._plain_step(index, state, sides, layout, arithmetic, dtype, None, stream)
            self._note_maxima(state)
            outside = outside | arithmetic.outside(state.current)
            if index in taps:
                handed[index] = self._tapped(index, state, arithmetic, dtype)
                handed[index].masked_fill_(outside, torch.nan)
        if randomness is not None:
            randomness.close()
        return state, outside, arithmetic, dtype, handed

    def handed_on(self, state: State, arithmetic: Arithmetic, dtype: torch.dtype) -> Tensor:
        """The tokens that the segment gives, from its last state: a new tensor."""
        tokens = arithmetic.hand_out(state.current, dtype)
        if self.hand_on == "mean":
            tokens.mul_(0.5).add_(arithmetic.source(state, dtype), alpha=0.5)
        return tokens

    def _tapped(
        self, index: int, state: State, arithmetic: Arithmetic, dtype: torch.dtype
    ) -> Tensor:
        """Tokens after a function: after the last one those that are handed on."""
        if index == len(self.functions) - 1:
            return self.handed_on(state, arithmetic, dtype)
        return arithmetic.hand_out(state.current, dtype)

    def gradient(
        self, grad: Tensor, taps: Mapping[int, Tensor]
    ) -> tuple[Gradient, dict[int, Tensor]]:
        """What `reversal` takes: (gradient of the last state, those of taps).

        grad: of the tokens that were handed on; consumed. taps: of tapped tokens by function.
        """
        taps, count = dict(taps), len(self.functions)
        if self.hand_on == "mean":
            if count - 1 in taps:
                grad.add_(taps.pop(count - 1))
            grad.mul_(0.5)
            before = max(count - 2, START)
            # Its own half may be the other one's buffer: until a tap is added nothing writes to it.
            taps[before] = taps[before] + grad if before in taps else grad
        return Gradient(grad, None), taps

    def _note_maxima(self, state: State) -> None:
        if self.maxima is not None:
            self.maxima.note(state.current)

    def forward(
        self,
        h: Tensor,
        sides: Sides,
        setting: Setting,
        layout: Layout,
        x_needs_grad: bool = True,
        taps: Sequence[int] = (),
    ) -> tuple[State, Tape, dict[int, Tensor]]:
        """Runs the chain from its tokens h [B, ...] to (last state, tape, tapped tokens)."""
        arithmetic, dtype = self._arithmetic(h, setting)
        tape = self._new_tape(arithmetic, dtype, sides, setting, layout, x_needs_grad, h.device)
        tape.flags.note_input(h.detach())
        return self._run(arithmetic.start(h), tape, taps)

    def go_on(
        self,
        state: State,
        dtype: torch.dtype,
        sides: Sides,
        setting: Setting,
        layout: Layout,
        taps: Sequence[int] = (),
    ) -> tuple[State, Tape, dict[int, Tensor]]:
        """Runs a chain's middle or end, from the state that the functions before it reached.

        state: consumed. dtype: of the tokens that the chain began with. Returns (last state, tape,
        tapped tokens); `reversal` leads to the state given here, and to the gradient of both its
        parts.
        """
        device = state.current.device
        like = torch.empty(0, dtype=dtype, device=device)
        arithmetic, dtype = self._arithmetic(like, setting)
        tape = self._new_tape(arithmetic, dtype, sides, setting, layout, True, device)
        return self._run(state, tape, taps)

    def _run(
        self, state: State, tape: Tape, taps: Sequence[int]
    ) -> tuple[State, Tape, dict[int, Tensor]]:
        arithmetic, sides, layout = tape.arithmetic, tape.sides, tape.layout
        if isinstance(arithmetic, ExactArithmetic):
            outside, peaks = arithmetic.outside(state.current), arithmetic.peaks(state.current)
            tape.flags.note_state(self.begin, outside, peaks)
        handed = {}
        largest = torch.zeros_like(tape.sums, dtype=torch.float64)
        for index in range(len(self.functions)):
            seen = OutputChecksum(tape.sums[index], largest[index], tape.flags.peaks)
            if index < tape.first:
                stream = stream_of(tape.randomness, self.begin + index)
                state = self._plain_step(
                    index, state, sides, layout, arithmetic, tape.dtype, seen, stream
                )
            else:
                state = self._step(index, state, tape, seen)
            if index in taps:
                handed[index] = self._tapped(index, state, arithmetic, tape.dtype)
        tape.flags.note_functions(self.begin, largest, arithmetic.limit)
        tape.randomness.close()
        tape.remainders.settle()
        return state, tape, handed

    def backward(self, tape: Tape, state: State | None, grad: Gradient) -> Backward:
        """Reverses the segment from its last state at once; see `reversal`."""
        return self.reversal(tape, state, grad).finish()

    def reversal(
        self,
        tape: Tape,
        state: State | None,
        grad: Gradient,
        taps: Mapping[int, Tensor] | None = None,
        keep: bool = False,
    ) -> Reversal:
        """The way back from the segment's last state, which is consumed unless `keep`.

        state: None where the last function keeps its activations. grad: of the last state, in
        the tokens' dtype and contiguous; consumed. taps: gradients of tapped tokens by function,
        and by START of those that the segment began with.
        Raises RuntimeError on a used tape.
        """
        if tape.used:
            raise RuntimeError(
                "this reversible pass was already reversed and its remainders are freed; "
                "pass retain_graph=True to the first backward"
            )
        if not self.runner.nested:
            now, then = self.owned(tape.first), tape.owned
            check_unchanged(list(chain.from_iterable(now)), list(chain.from_iterable(then)))
        if keep and state is not None:
            state = state.copy()
        return Reversal(self.functions, self.runner, tape, state, grad, taps, keep)

    def reverse(self, tape: Tape, state: State) -> State:
        """The first state of the segment, from its last one, without any gradient."""
        found = Reversal(self.functions, self.runner, tape, state.copy(), None, keep=True).finish()
        assert found.state is not None
        return found.state

    def _new_tape(
        self,
        arithmetic: Arithmetic,
        dtype: torch.dtype,
        sides: Sides,
        setting: Setting,
        layout: Layout,
        x_needs_grad: bool,
        device: torch.device,
    ) -> Tape:
        first = self.first_trained(sides, x_needs_grad)
        return Tape(
            setting=setting,
            layout=layout,
            arithmetic=arithmetic,
            kernels=Kernels.current(device),
            randomness=Randomness(device, self.item),
            sides=sides,
            dtype=dtype,
            begin=self.begin,
            first=first,
            owned=[] if self.runner.nested else self.owned(first),
            sums=torch.zeros(len(self.functions), dtype=torch.int64, device=device),
            flags=Flags(device, 0 if self.scales is None else len(self.scales.exponents)),
            remainders=Remainders(device, setting.remainders == "host"),
            x_needs_grad=x_needs_grad,
        )

    def _arithmetic(
        self, h: Tensor, setting: Setting, inference: bool = False
    ) -> tuple[Arithmetic, torch.dtype]:
        """(arithmetic, `token_dtype`)."""
        dtype = state_dtype(h)
        arithmetic: Arithmetic = FloatArithmetic(setting, dtype)
        if self.maxima is None:
            arithmetic = arithmetic_of(setting, dtype, h.device, self.scales, wide=inference)
        return arithmetic, token_dtype(h)

    def _step(self, index: int, state: State, tape: Tape, seen: OutputChecksum) -> State:
        """One function forward, with everything noted that its reversal needs."""
        function, mode = self.functions[index], tape.mode(index)
        tape.parts[index] = slices_of(
            function, state.current.shape, tape.layout, tape.sides.of(function)
        )
        note_state(tape, index, state)
        out = tape.arithmetic.target(state, tape.may_overwrite(index))
        keep = mode == "reverse" and not tape.starts_chain(index)
        advance = Advance(tape.arithmetic, state, out, keep, seen, tape.factor(index))
        tokens = partial(tokens_of, tape.arithmetic, state, tape.dtype)
        kept = []
        # Code that is compiled under hooks is other code: its graphs are made whole, and dropped.
        whole = mode == "store" or self.runner.compile
        graphs = nullcontext() if whole else without_saved()
        with self.runner.open(function, self._next(index)) as live, graphs:
            if whole:
                live.watch()
            for work in tape.work(index, function, state.current.shape):
                held = Kept(work, [], []) if mode == "store" else None
                calls = work.calls(
                    live, tokens, tape.stream(index), tape.needs_grad(index), held and held.contexts
                )
                for part, call in calls:
                    advance(part, call.output)
                    if held:
                        held.calls.append(call.without_outputs())
                    del call
                if held:
                    kept.append(held)
                else:
                    work.forget()
        if mode == "reverse":
            tape.remainders.put(index, advance.remainders)
        elif mode == "store":
            tape.kept[index] = kept
        return out

    def _next(self, index: int) -> nn.Module | None:
        return self.functions[index + 1] if index + 1 < len(self.functions) else None

    def _plain_step(
        self,
        index: int,
        state: State,
        sides: Sides,
        layout: Layout,
        arithmetic: Arithmetic,
        dtype: torch.dtype,
        seen: OutputChecksum | None,
        stream: Stream,
    ) -> State:
        """One function forward without a graph or a record."""
        function = self.functions[index]
        out = arithmetic.target(state, in_place=True)
        factor = factor_of(arithmetic, self.begin + index)
        advance = Advance(arithmetic, state, out, keep=False, seen=seen, factor=factor)
        tokens = partial(tokens_of, arithmetic, state, dtype)
        with torch.no_grad(), self.runner.open(function, self._next(index), False) as live:
            shape = state.current.shape
            slices = slices_of(function, shape, layout, sides.of(function))
            for work in sides.work(function, slices, shape):
                for part, call in work.calls(live, tokens, stream, x_needs_grad=False):
                    advance(part, call.output)
                    del call
        return out
