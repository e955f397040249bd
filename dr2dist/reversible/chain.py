"""A reversible chain as a module: the driver of a segment by autograd."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dr2dist.reversible.arithmetic.scales import WIDENINGS, ChannelMaxima, ChannelScales
from dr2dist.reversible.arithmetic.setting import Setting
from dr2dist.reversible.arithmetic.state import State
from dr2dist.reversible.budget.costs import Meter
from dr2dist.reversible.budget.planner import Planner
from dr2dist.reversible.calls.replay import Snapshot, kept_statistics, kept_streams
from dr2dist.reversible.calls.runner import FunctionRunner, PlainRunner
from dr2dist.reversible.calls.slices import Layout
from dr2dist.reversible.certificate import (
    NEVER,
    ChainCertificate,
    Flags,
    Ledger,
    failure_messages,
)
from dr2dist.reversible.failure import FailureWatch, OnFailure, check_on_failure
from dr2dist.reversible.given import check_inputs, refuse_compiling
from dr2dist.reversible.nodes import ChainPass, of_nothing
from dr2dist.reversible.segment import Segment
from dr2dist.reversible.tape import Sides, Tape


class Recorded(NamedTuple):
    """A forward pass that `Chain.reverse` can undo.

    output: x_L, or what `hand_on` says, tokens [B, ...] of the input's dtype. state: the last two
    states, int32 or int16 in exact arithmetic. tape: what the pass left, with the remainders.
    """

    output: Tensor
    state: State
    tape: Tape


class Chain(nn.Module):
    """A run of residual functions at one resolution, trained with the memory of its ends.

    `x_{i+1} = F_i(x_i) + alpha * x_i + y_i` and `y_{i+1} = beta * x_i` (Dr2Net, arXiv 2401.04105),
    from `y_0 = beta * x_0`; in exact arithmetic on a fixed-point grid (docs/method.md).

    functions: modules that compute one branch each, [B, ...] to the same shape, without the
        addition; called as function(x, **sides). A function whose attribute `sides` names some
        sides gets only these.
    name: how the certificate calls the chain. on_failure: what happens at a backward pass whose
        reversal is not proven: "raise" ReversalError (on the CPU from that pass, before the
        function that failed gives a gradient; on a GPU from a later forward pass, so that the host
        never waits), "warn", or "record" for `certificate`.
    compile: run the functions by torch.compile, the first time and in their recompute.
    channel_dim: of the tokens, which has a scale for each channel in states of 16 bits.
    setting: alpha, beta and the other fields of Setting.

    States of 16 bits have scales that are found, with headroom, in the first pass. They grow for
    the passes to come where a channel is near its limit, and for the same pass where it is beyond.
    Randomness inside functions is replayed exactly. Raises ValueError for a setting that is not
    allowed or cannot hold the chain's length.
    """

    def __init__(
        self,
        functions: Iterable[nn.Module],
        *,
        name: str = "chain",
        on_failure: OnFailure = "raise",
        compile: bool = False,
        channel_dim: int = -1,
        **setting: Any,
    ) -> None:
        super().__init__()
        self.functions = nn.ModuleList(functions)
        self.name = name
        self.channel_dim, self.item = channel_dim, 0
        self.scales: ChannelScales | None = None
        """Of states of 16 bits, once they are found."""
        self.on_failure = check_on_failure(on_failure)
        self.compiles = compile
        self.setting = Setting(**setting)
        self.planner = Planner([name])
        self.setting.check_range(len(self.functions))
        self._start_records()

    def _start_records(self) -> None:
        self.runner: FunctionRunner = PlainRunner(compile=self.compiles)
        self.ledger = Ledger()
        self._failures = FailureWatch(self._describe)
        self._tapes: weakref.WeakSet[Tape] = weakref.WeakSet()
        self.maxima: ChannelMaxima | None = None
        """Where it is set, passes without gradients measure states, for scales to be found."""

    def _describe(self, flags: list[int]) -> tuple[str, ...]:
        return failure_messages(self.name, self.setting, flags)

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without open tapes, records or an engine's runner."""
        dropped = ("runner", "ledger", "_failures", "_tapes", "maxima")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_records()

    def _layout(
        self, segment: Segment, x: Tensor, sides: Sides, trains: bool, rows: int = 1
    ) -> Layout:
        """What the setting comes to; where it is to be measured, a pass that trains does so."""
        setting = self.setting
        if not setting.measured:
            return Layout.given(setting, rows)
        if rows > 1:
            raise ValueError(
                f"{self.name}: {rows} rows of the batch are one sample: memory budget and "
                "chunk_size auto are measured row by row, allowed are the others"
            )
        if not trains:
            return self.planner.known(self.name, setting)
        meter = Meter(segment.runner, x, sides, x.requires_grad, self.state_held())
        return self.planner.layout(self.name, setting, segment.functions, meter)

    def part(self, begin: int = 0, end: int | None = None) -> Segment:
        """The chain's functions from `begin` up to `end`, with what is in force."""
        functions = list(self.functions)[begin:end]
        whole = end is None or end >= len(self.functions)
        hand_on = self.setting.hand_on if whole else "last"
        return Segment(functions, self.runner, begin, self.scales, self.maxima, hand_on, self.item)

    @property
    def segment(self) -> Segment:
        """All of the chain's functions."""
        return self.part()

    @property
    def options(self) -> dict[str, Any]:
        """What another chain is made with to be like this one, beside functions and name."""
        return {**asdict(self.setting), "on_failure": self.on_failure, "compile": self.compiles}

    def set_coefficients(self, alpha: float, beta: float) -> None:
        """Changes both coefficients for the passes to come.

        Raises ValueError for values that are not allowed, RuntimeError while a forward pass
        still waits for its backward pass.
        """
        self.setting = self.check_coefficients(alpha, beta)

    def check_coefficients(self, alpha: float, beta: float) -> Setting:
        """The setting that `set_coefficients` would make; raises as it does."""
        setting = replace(self.setting, alpha=alpha, beta=beta)
        setting.check_range(len(self.functions))
        if setting != self.setting and self._waiting:
            raise RuntimeError(
                f"{self.name}: coefficients cannot change while a forward pass waits for its "
                "backward pass"
            )
        return setting

    @property
    def _waiting(self) -> bool:
        """Whether a forward pass waits for its backward pass."""
        return any(tape.open for tape in self._tapes)

    def set_scales(self, scales: ChannelScales | None) -> None:
        """Takes scales for the passes to come; None: they are to be found in the next one.

        Raises ValueError for a chain of 32 bits, or for another number of channels than it has;
        RuntimeError while a forward pass still waits for its backward pass.
        """
        if scales is not None:
            scales.check(self.name, self.scales, self.setting.by_channel)
        if scales != self.scales and self._waiting:
            raise RuntimeError(
                f"{self.name}: scales cannot change while a forward pass waits for its backward "
                "pass"
            )
        self.scales = scales

    def state_held(self, inference: bool = False) -> torch.dtype:
        """The dtype of fp32 tokens' states, in passes with gradients or without."""
        if self.setting.arithmetic == "float" or self.maxima is not None:
            return torch.float32
        return torch.int16 if self.setting.by_channel and not inference else torch.int32

    @property
    def _sees_to_scales(self) -> bool:
        """Whether scales are the chain's own affair: an engine finds them for all ranks."""
        return self.setting.by_channel and self.maxima is None and not self.runner.nested

    @property
    def _lacks_scales(self) -> bool:
        stale = self.scales is None or (self.scales.stale and not torch.compiler.is_exporting())
        return self._sees_to_scales and stale

    @torch.compiler.disable
    @torch.no_grad()
    def _find_scales(self, x: Tensor, sides: Sides, layout: Layout) -> None:
        """Finds the scales of states of 16 bits, by a pass that leaves no other trace."""
        if x.is_meta:
            return
        if torch.compiler.is_exporting():
            raise RuntimeError(
                f"{self.name}: the scales of states of 16 bits are found in a first pass, which "
                "must come before torch.export: its tokens have no values"
            )
        self.maxima = ChannelMaxima(self.channel_dim)
        try:
            with kept_streams(x.device), kept_statistics(self):
                self.segment.infer(x, sides, self.setting, layout)
            self.scales = self.maxima.scales()  # passes that wait keep theirs
        finally:
            self.maxima = None

    def _recorded(
        self,
        segment: Segment,
        x: Tensor,
        sides: Sides,
        setting: Setting,
        layout: Layout,
        x_needs_grad: bool,
        taps: Sequence[int] = (),
    ) -> tuple[State, Tape, dict[int, Tensor]]:
        """A forward pass: (last state, tape, tapped tokens).

        Where the chain sees to its scales the host waits for what the pass has found: if a state
        left its range, it is run again with larger scales.
        """
        if not self._sees_to_scales or self.scales is None:
            return segment.forward(x, sides, setting, layout, x_needs_grad, taps)
        start, before = self.scales, Snapshot(self, x.device)
        for _ in range(WIDENINGS):
            found = segment.forward(x, sides, setting, layout, x_needs_grad, taps)
            first, strange, *_ = flags = found[1].flags.tensor.tolist()
            # Of states that are no numbers nothing is learnt.
            room = None if strange != NEVER else self.scales.with_room(flags[Flags.SIZE :], start)
            self.scales = room or start
            if room is None or first == NEVER:
                break
            before.restore()
            segment.scales = room
        self.scales = self.scales.settled(start, self.name)
        return found

    def forward(
        self,
        x: Tensor,
        taps: Sequence[int] = (),
        batched: Collection[str] = (),
        until: int | None = None,
        rows: int = 1,
        **sides: Any,
    ) -> Any:
        """Runs the chain.

        x: tokens [B, ...], floating. taps: functions after which the tokens are handed out too,
        counted from 0, or from the end by negative numbers.
        sides: shared inputs, tensors or pytrees of them; they are differentiable, and those in
        `batched` have the batch in dim 0. until: run only that many functions. rows: of the batch,
        that are one sample: slices of the batch keep them together.
        Returns x_L (or what `hand_on` says, also for a tap there), or (x_L, [tapped tokens]) if
        taps are given, of x's shape and dtype (fp32 under autocast). Raises ValueError for tokens
        that are not floating, for a tap or a name in `batched` that does not exist, ReversalError
        for an earlier backward pass on a GPU that failed, and RuntimeError where it is traced by
        torch.compile for training, unless memory is "store": a recompute could not use the same
        kernels.
        """
        segment = self.part(0, until)
        check_inputs(self.name, x, taps, len(segment.functions), batched, sides)
        taps = [range(len(segment.functions))[tap] for tap in taps]
        shared = Sides(sides, batched)
        trains = self._trains(segment, shared, x)
        if not x.numel():
            output, tapped = of_nothing(segment, shared, taps, x)
            return (output, tapped) if taps else output
        layout = self._layout(segment, x, shared, trains, rows)
        if self._lacks_scales:
            self._find_scales(x, shared, layout)
            segment.scales = self.scales
        if not trains:
            output, tapped = segment.infer(x, shared, self.setting, layout, taps)
        else:
            if torch.compiler.is_dynamo_compiling() and self.setting.memory != "store":
                refuse_compiling()
            output, tapped = self._train(segment, shared, layout, taps, x)
        return (output, list(tapped)) if taps else output

    @torch.compiler.disable
    def _train(
        self, segment: Segment, sides: Sides, layout: Layout, taps: Sequence[int], x: Tensor
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The pass as nodes of autograd's graph: (output, taps)."""
        self._failures.poll(self.on_failure)
        with torch.no_grad():
            state, tape, handed = self._recorded(
                segment, x, sides, self.setting, layout, x.requires_grad, taps
            )
            output = segment.handed_on(state, tape.arithmetic, tape.dtype)
        self.open(tape)
        last = state if tape.mode(len(segment.functions) - 1) == "reverse" else None
        path = ChainPass(self.name, segment, tape, last, taps, self._look, self.enter)
        return path.nodes(x, output, [handed[tap] for tap in taps])

    @staticmethod
    def _trains(segment: Segment, sides: Sides, x: Tensor) -> bool:
        """Whether a pass is to have gradients."""
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return False
        trains = segment.first_trained(sides, x.requires_grad) < len(segment.functions)
        return x.requires_grad or trains

    @torch.no_grad()
    def record(self, x: Tensor, batched: Collection[str] = (), **sides: Any) -> Recorded:
        """A forward pass in memory mode reverse whose state `reverse` takes. No gradients.

        x, batched, sides: as those of `forward`. Raises ValueError for tokens without an element.
        """
        if not x.numel():
            raise ValueError(f"{self.name}: tokens {list(x.shape)} have no element to record")
        setting = replace(self.setting, memory="reverse", memory_budget=None)
        shared = Sides(sides, batched)
        layout = self._layout(self.segment, x, shared, trains=False)
        if self._lacks_scales:
            self._find_scales(x, shared, layout)
        segment = self.segment
        # Whether or not anything of it is trained, all of it is to be undone.
        state, tape, _ = self._recorded(segment, x, shared, setting, layout, x_needs_grad=True)
        return Recorded(segment.handed_on(state, tape.arithmetic, tape.dtype), state, tape)

    @torch.no_grad()
    def reverse(self, recorded: Recorded) -> Tensor:
        """The tokens x_0 that a recorded pass began with, reconstructed from its end.

        In exact arithmetic they equal the input rounded to the grid, bit for bit; shape and dtype
        are the input's. The certificate tells afterwards what was verified. Raises ReversalError
        if it failed, as far as `on_failure` says so.
        """
        tape = recorded.tape
        first = self.segment.reverse(tape, recorded.state)
        self.enter(tape, tape.remainder_bytes)
        return tape.arithmetic.hand_out(first.current, recorded.output.dtype)

    def open(self, tape: Tape) -> None:
        """Takes note of a pass of the chain, or of a part of it: until it is reversed, the
        coefficients stay."""
        self._tapes.add(tape)

    def _look(self, tape: Tape, remainder_bytes: int) -> None:
        """Ends a backward pass where it is known to have failed: no more gradients shall leave."""
        if self.on_failure != "raise" or not tape.setting.proves:
            return
        flags = tape.flags.tensor
        if flags.device.type != "cuda" and self._describe(flags.tolist()):
            tape.open = False  # nothing waits for a pass that has failed
            self.enter(tape, remainder_bytes)

    def enter(self, tape: Tape, remainder_bytes: int) -> None:
        """Enters what a finished backward pass has verified into the records.

        Raises ReversalError if it failed, as far as `on_failure` says so.
        """
        flags = tape.flags.tensor.clone()
        self.ledger.record(flags, tape.drift, remainder_bytes)
        if tape.setting.proves and not self.runner.nested:
            self._failures.note(flags, self.on_failure)

    def certificate(self) -> ChainCertificate | None:
        """What the last backward pass verified, read to the host; None before the first.

        Raises ReversalError for an earlier one that failed, as far as `on_failure` says so.
        """
        self._failures.poll(self.on_failure)
        if self.ledger.last is None:
            return None
        flags = self.ledger.last.tolist()
        drift = self.ledger.last_drift
        messages = self._describe(flags)
        return ChainCertificate(
            name=self.name,
            failures=len(messages),
            messages=messages,
            verified=flags[Flags.SIZE - 1] > 0,
            remainder_bytes=self.ledger.remainder_bytes,
            drift=None if drift is None else float(drift),
        )

    def extra_repr(self) -> str:
        """The setting, in the module's printed form."""
        return f"{self.setting}"
