"""What stands between chains or after them, in slices of the batch and without its activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dr2dist.reversible.calls.guard import without_saved
from dr2dist.reversible.calls.kernels import Kernels
from dr2dist.reversible.calls.replay import (
    Randomness,
    function_context,
    kept_statistics,
    stream_of,
    ungraphed,
)
from dr2dist.reversible.calls.runner import (
    Call,
    FunctionRunner,
    GradAccumulator,
    LiveFunction,
    PlainRunner,
    check_unchanged,
    gradients,
    run,
    trainable,
)
from dr2dist.reversible.calls.slices import mixes_samples, sample_slices


class Piece:
    """A module that is run again in the backward pass, slice by slice, from its input.

    module: maps a tensor [B * rows, ...] to tensors [B, ...] or [B * rows, ...] of any shape; what
    it takes at once are whole samples. Randomness is replayed. A module that mixes samples is run
    on whole batches. item: see Randomness.
    """

    def __init__(self, module: nn.Module, item: int = 0) -> None:
        self.module, self.item = module, item
        self.runner: FunctionRunner = PlainRunner()

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without an engine's runner."""
        return {"module": self.module, "item": self.item}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, x: Tensor, chunk_size: int | None = None) -> Any:
        """The module's output, a tensor or several, for x [B * rows, ...].

        chunk_size: rows per slice, of whole samples; None for all at once.
        """
        needed = x.requires_grad or bool(trainable(self.module))
        if torch.is_grad_enabled() and needed and not torch.compiler.is_exporting():
            outputs = self._train(x, self._slices(x, chunk_size))
        else:
            outputs = self._infer(x, self._slices(x, chunk_size))
        return outputs[0] if len(outputs) == 1 else outputs

    @torch.no_grad()
    def _infer(self, x: Tensor, slices: list[slice]) -> tuple[Tensor, ...]:
        """The outputs without a graph, with the same draws as with one."""
        randomness = ungraphed([self.module], x.device, self.item)
        stream = stream_of(randomness, 0)

        def outputs(live: LiveFunction) -> Iterator[tuple[Tensor, ...]]:
            for number, part in enumerate(slices):
                with stream((number,)):
                    found = run(live, x[part], {}, False).outputs
                yield found

        with self.runner.open(self.module, trained=False) as live:
            joined = _joined(outputs(live))
        if randomness is not None:
            randomness.close()
        return joined

    @torch.compiler.disable
    def _train(self, x: Tensor, slices: list[slice]) -> tuple[Tensor, ...]:
        """The outputs as a node of autograd's graph."""
        # Without an input that requires a gradient autograd would never come back here.
        anchor = x.new_empty(0, requires_grad=True)
        parameters = [] if self.runner.nested else trainable(self.module)
        outputs: tuple[Tensor, ...] = _PieceFunction.apply(self, slices, anchor, x, *parameters)
        return outputs

    def _slices(self, x: Tensor, chunk_size: int | None) -> list[slice]:
        if chunk_size is None or not len(x) or mixes_samples(self.module):
            return [slice(None)]
        return list(sample_slices(x.shape[0], chunk_size))


class _PieceFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        piece: Piece,
        slices: list[slice],
        anchor: Tensor,
        x: Tensor,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, ...]:
        ctx.parameters, ctx.versions = parameters, [p._version for p in parameters]
        ctx.piece, ctx.slices, ctx.x_needs_grad = piece, slices, x.requires_grad
        ctx.kernels, ctx.randomness = Kernels.current(x.device), Randomness(x.device, piece.item)
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        # As in a chain: what is compiled under hooks is other code than without them.
        whole = piece.runner.compile
        graphs = nullcontext() if whole else without_saved()
        with piece.runner.open(piece.module) as live, graphs:
            if whole:
                live.watch()
            calls = (_call(ctx, live, x, number) for number in range(len(slices)))
            outputs = _joined(tuple(out.detach() for out in call.outputs) for call in calls)
        ctx.randomness.close()
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            raise RuntimeError("double backward is not possible; call without create_graph")
        (x,) = ctx.saved_tensors
        piece: Piece = ctx.piece
        if not piece.runner.nested:
            check_unchanged(trainable(piece.module), ctx.parameters, ctx.versions)
        found = torch.empty_like(x) if ctx.x_needs_grad else None
        accumulator = GradAccumulator([piece.module], piece.runner.nested)
        kept = kept_statistics(piece.module)
        with ctx.kernels.restored(), piece.runner.open(piece.module) as live, kept:
            for number, part in enumerate(ctx.slices):
                call = _call(ctx, live, x, number)
                own = [_of_slice(grad, part, len(x)) for grad in grads]
                (of_x,), of_leaves = gradients(call, own, keep_graph=False)
                accumulator.add(live.parameters, of_leaves)
                if found is not None:
                    found[part] = 0 if of_x is None else of_x
                del call, of_x
            accumulator.finish(live.parameters)
        return None, None, None, found, *accumulator.take(ctx.parameters)


def _call(ctx: Any, live: LiveFunction, x: Tensor, number: int) -> Call:
    """The module on one slice, the same way in both directions."""
    with function_context(ctx.kernels, ctx.randomness, 0, (number,)):
        return run(live, x[ctx.slices[number]], {}, ctx.x_needs_grad)


def _of_slice(grad: Tensor | None, part: slice, rows: int) -> Tensor | None:
    """An output's gradient for a slice of the input's rows; an output may have a row for several,
    all of which lie in one slice."""
    if grad is None or part == slice(None):
        return grad
    several = rows // len(grad)
    return grad[part.start // several : part.stop // several]


def _joined(slices: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The outputs of all slices, each as one tensor."""
    outputs = list(slices)
    if len(outputs) == 1:
        return outputs[0]
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
