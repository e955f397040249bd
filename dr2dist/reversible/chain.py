"""A reversible chain as a module: the driver of a segment by autograd."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dr2dist.reversible.certificate import ChainCertificate, Ledger, failure_messages
from dr2dist.reversible.costs import Meter
from dr2dist.reversible.planner import Planner
from dr2dist.reversible.runner import FunctionRunner, PlainRunner, needs_grad
from dr2dist.reversible.segment import Segment
from dr2dist.reversible.setting import Setting
from dr2dist.reversible.slices import Layout
from dr2dist.reversible.state import Gradient, State
from dr2dist.reversible.tape import Sides, Tape, state_dtype


class Recorded(NamedTuple):
    """A forward pass that `Chain.reverse` can undo.

    output: x_L, tokens [B, ...]. state: the last two states. tape: with the remainders.
    """

    output: Tensor
    state: State
    tape: Tape


class Chain(nn.Module):
    """A run of residual functions at one resolution, trained with the memory of its ends.

    x_{i+1} = F_i(x_i) + alpha * x_i + y_i and y_{i+1} = beta * x_i (Dr2Net, arXiv 2401.04105),
    from y_0 = beta * x_0.

    functions: modules that compute one branch each, [B, ...] to the same shape, without the
        addition; called as function(x, **sides). A function whose attribute `sides` names some
        sides gets only these.
    name: how the certificate calls the chain. setting: alpha, beta and the other fields of Setting.

    Parameters get their gradients by accumulation into `.grad` whenever the chain is
    differentiated: `torch.autograd.grad` cannot return them, and adds to them too.

    Randomness inside functions is replayed exactly. Raises ValueError for a setting that is not
    allowed or cannot hold the chain's length.
    """

    def __init__(
        self,
        functions: Iterable[nn.Module],
        *,
        name: str = "chain",
        **setting: Any,
    ) -> None:
        super().__init__()
        self.functions = nn.ModuleList(functions)
        self.name = name
        self.setting = Setting(**setting)
        self.planner = Planner([name])
        self.setting.check_range(len(self.functions))
        self._start_records()

    def _start_records(self) -> None:
        self.runner: FunctionRunner = PlainRunner()
        self.ledger = Ledger()
        self._tapes: weakref.WeakSet[Tape] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without open tapes, records or an engine's runner."""
        dropped = ("runner", "ledger", "_tapes")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_records()

    def _layout(self, segment: Segment, x: Tensor, sides: Sides) -> Layout:
        """What the setting comes to, measured on these tokens where that is asked for."""
        setting = self.setting
        if not setting.measured:
            return Layout.given(setting)
        meter = Meter(segment.runner, x, sides, x.requires_grad)
        return self.planner.layout(self.name, setting, segment.functions, meter)

    @property
    def segment(self) -> Segment:
        """The chain's functions with the runner in force."""
        return Segment(list(self.functions), self.runner)

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
        if setting != self.setting and any(tape.open for tape in self._tapes):
            raise RuntimeError(
                f"{self.name}: coefficients cannot change while a forward pass waits for its "
                "backward pass"
            )
        return setting

    def forward(
        self,
        x: Tensor,
        taps: Sequence[int] = (),
        batched: Collection[str] = (),
        until: int | None = None,
        **sides: Any,
    ) -> Any:
        """Runs the chain.

        x: tokens [B, ...], floating. taps: functions after which the tokens are handed out too.
        sides: shared inputs; tensors are differentiable, and those in `batched` have the batch
        in dim 0. until: run only that many functions. Returns x_L, or (x_L, [tapped tokens]) if
        taps are given, of x's shape and dtype (fp32 under autocast).
        """
        segment = Segment(list(self.functions)[:until], self.runner)
        self._check_inputs(x, taps, len(segment.functions), batched, sides)
        taps = [range(len(segment.functions))[tap] for tap in taps]
        shared = Sides(sides, batched)
        layout = self._layout(segment, x, shared)
        if not torch.is_grad_enabled() or not self._anything_to_train(segment, shared, x):
            output, tapped = segment.infer(x, shared, self.setting, layout, taps)
        else:
            tensors = [value for value in sides.values() if needs_grad(value)]
            # Without an input that requires a gradient autograd would never come back here.
            anchor = torch.empty(0, requires_grad=True)
            box: list[Tensor] = []
            ticket, *tapped = _ChainFunction.apply(
                self, segment, shared, layout, taps, box, anchor, x, *tensors
            )
            output = _HandOut.apply(box, ticket)
        return (output, list(tapped)) if taps else output

    def _check_inputs(
        self,
        x: Tensor,
        taps: Sequence[int],
        count: int,
        batched: Collection[str],
        sides: dict[str, Any],
    ) -> None:
        if not x.is_floating_point():
            raise ValueError(f"{self.name}: tokens are {x.dtype}, a floating dtype is needed")
        for tap in taps:
            if not -count <= tap < count:
                raise ValueError(f"{self.name}: tap {tap} is outside the {count} functions run")
        for name in batched:
            if name not in sides:
                raise ValueError(f"{self.name}: batched names {name!r}, which is not a side given")
        for name, value in sides.items():
            # Inside a container autograd would not find its way back to them.
            if isinstance(value, tuple | list) and any(map(needs_grad, value)):
                raise ValueError(
                    f"{self.name}: side {name!r} holds tensors that require gradients in a "
                    f"{type(value).__name__}: pass each as a side of its own"
                )

    @staticmethod
    def _anything_to_train(segment: Segment, sides: Sides, x: Tensor) -> bool:
        trains = segment.first_trained(sides, x.requires_grad) < len(segment.functions)
        return x.requires_grad or trains

    @torch.no_grad()
    def record(self, x: Tensor, batched: Collection[str] = (), **sides: Any) -> Recorded:
        """A forward pass in memory mode reverse whose state `reverse` takes. No gradients."""
        setting = replace(self.setting, memory="reverse", memory_budget=None)
        shared, segment = Sides(sides, batched), self.segment
        layout = self._layout(segment, x, shared)
        state, tape, _ = segment.forward(x, shared, setting, layout)
        return Recorded(tape.arithmetic.hand_out(state.current, tape.dtype), state, tape)

    @torch.no_grad()
    def reverse(self, recorded: Recorded) -> Tensor:
        """The tokens x_0 that a recorded pass began with, reconstructed from its end.

        In exact arithmetic they equal the input rounded to the grid, bit for bit. The
        certificate tells afterwards what was verified.
        """
        tape = recorded.tape
        first = self.segment.reverse(tape, recorded.state)
        self.enter(tape, tape.remainder_bytes)
        return tape.arithmetic.hand_out(first.current, recorded.output.dtype)

    def open(self, tape: Tape) -> None:
        """Takes note of a pass of the chain, or of a part of it: until it is reversed, the
        coefficients stay."""
        self._tapes.add(tape)

    def enter(self, tape: Tape, remainder_bytes: int) -> None:
        """Enters what a finished backward pass has verified into the records."""
        self.ledger.record(tape.flags.tensor.clone(), tape.drift, remainder_bytes)

    def certificate(self) -> ChainCertificate | None:
        """What the last backward pass verified, read to the host; None before the first."""
        if self.ledger.last is None:
            return None
        flags = self.ledger.last.tolist()
        drift = self.ledger.last_drift
        messages = failure_messages(self.name, flags)
        return ChainCertificate(
            name=self.name,
            failures=len(messages),
            messages=messages,
            verified=flags[-1] > 0,
            remainder_bytes=self.ledger.remainder_bytes,
            drift=None if drift is None else float(drift),
        )

    def extra_repr(self) -> str:
        """The setting, in the module's printed form."""
        return f"{self.setting}"


class _ChainFunction(torch.autograd.Function):
    """Ties a segment's explicit passes to autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        chain: Chain,
        segment: Segment,
        sides: Sides,
        layout: Layout,
        taps: Sequence[int],
        box: list[Tensor],
        anchor: Tensor,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        state, tape, handed = segment.forward(
            x, sides, chain.setting, layout, x.requires_grad, taps
        )
        chain.open(tape)
        ctx.chain, ctx.segment, ctx.tape = chain, segment, tape
        ctx.state = state if tape.mode(len(segment.functions) - 1) == "reverse" else None
        ctx.taps, ctx.box, ctx.x_dtype = taps, box, x.dtype
        ctx.set_materialize_grads(False)
        box.append(tape.arithmetic.hand_out(state.current, tape.dtype))
        return torch.zeros(()), *(handed[tap] for tap in taps)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor | None, *tap_grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{ctx.chain.name}: double backward through a reversible chain is not possible; "
                "call backward without create_graph"
            )
        tape: Tape = ctx.tape
        taps = _sum_taps(ctx.taps, tap_grads)
        if not ctx.box and not taps:
            return (None,) * len(ctx.needs_input_grad)
        if not ctx.box:
            tap = next(iter(taps.values()))
            ctx.box.append(torch.zeros_like(tap, dtype=state_dtype(tap)))
        remainder_bytes = tape.remainder_bytes
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        state, grad = ctx.state, ctx.box.pop()
        if not keep:
            ctx.state = None
        result = ctx.segment.backward(tape, state, Gradient(grad, None), taps, keep)
        del grad
        ctx.chain.enter(tape, remainder_bytes)
        sides = _side_grads(tape, result.sides)
        return (None,) * 7 + (_input_grad(ctx, result.grad), *sides)


class _HandOut(torch.autograd.Function):
    """Takes a chain's output out of the box, and brings its gradient there.

    What autograd hands to a node's backward stays alive until that has returned; a tensor in a
    box can be overwritten. The ticket stands for the output between the two nodes.
    """

    @staticmethod
    def forward(ctx: Any, box: list[Tensor], ticket: Tensor) -> Tensor:
        ctx.box = box
        ctx.set_materialize_grads(False)
        return box.pop()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, Tensor | None]:
        if grad is None:
            return None, None
        dtype = state_dtype(grad)
        ctx.box.append(grad.to(dtype, copy=True, memory_format=torch.contiguous_format))
        return None, torch.zeros(())


def _sum_taps(taps: Sequence[int], grads: Sequence[Tensor | None]) -> dict[int, Tensor]:
    sums: dict[int, Tensor] = {}
    for tap, grad in zip(taps, grads, strict=True):
        if grad is not None:
            sums[tap] = sums[tap] + grad if tap in sums else grad
    return sums


def _input_grad(ctx: Any, grad: Gradient) -> Tensor | None:
    if not ctx.tape.x_needs_grad:
        return None
    return grad.of_tokens(ctx.tape.setting.beta).to(ctx.x_dtype)


def _side_grads(tape: Tape, found: dict[str, Tensor]) -> list[Tensor | None]:
    values = {name: value for name, value in tape.sides.values.items() if needs_grad(value)}
    return [
        found[name].to(value.dtype) if name in found else None for name, value in values.items()
    ]
