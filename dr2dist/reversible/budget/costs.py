"""What a residual function costs, measured: time, bytes that its graph keeps, bytes at its peak."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dr2dist.reversible.calls.kernels import Kernels
from dr2dist.reversible.calls.replay import (
    Randomness,
    function_context,
    kept_statistics,
    kept_streams,
)
from dr2dist.reversible.calls.runner import Call, FunctionRunner, gradients
from dr2dist.reversible.calls.sliced import SlicedCall
from dr2dist.reversible.calls.slices import Layout, joined, slices_of
from dr2dist.reversible.tape import Sides
from dr2dist.reversible.trees import tree_iter

REPEATS = 3


class Cost(NamedTuple):
    """Of one function on a micro-batch.

    microseconds: of its first run, which is what keeping its graph saves. kept: bytes that the
    graph keeps. state: bytes of a state.
    """

    microseconds: int
    kept: int
    state: int


class Watermark(TorchDispatchMode):
    """Counts the bytes of tensors made inside: those alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_storage(value) for value in tree_iter((args, kwargs)) if _is_tensor(value)}
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if _is_tensor(value) and _storage(value) not in given:
                storage = value.untyped_storage()
                self._made[_storage(value)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.alive)
        return result

    @property
    def alive(self) -> int:
        """Bytes made inside that still live."""
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return sum(size for _, size in self._made.values())


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


class Meter:
    """Measures functions on tokens of a micro-batch [B, ...] with the sides that they take.

    held: what states are held in. One function stands for all of the same code and shapes. Nothing
    of a function changes: not its gradients, its statistics or the random stream.
    """

    def __init__(
        self,
        runner: FunctionRunner,
        x: Tensor,
        sides: Sides,
        x_needs_grad: bool,
        held: torch.dtype = torch.int32,
    ) -> None:
        self.runner, self.x, self.sides = runner, x.detach(), sides
        self.x_needs_grad, self.held = x_needs_grad, held
        self._known: dict[Any, Any] = {}

    def cost(self, function: nn.Module, layout: Layout) -> Cost:
        """Of the function in the layout's slices."""
        key = ("cost", layout, *_kind(function))
        if key not in self._known:
            self._known[key] = self._cost(function, layout)
        found: Cost = self._known[key]
        return found

    def working_set(self, function: nn.Module, layout: Layout) -> int:
        """Bytes at the peak of one slice's run and gradient, the first slice of the layout."""
        key = ("peak", layout, *_kind(function))
        if key not in self._known:
            work = next(self._work(function, layout))
            with Watermark() as mark:
                self._run(function, work, differentiate=True)
            self._known[key] = mark.peak
        return int(self._known[key])

    def _cost(self, function: nn.Module, layout: Layout) -> Cost:
        state = 2 * self.x.numel() * self.held.itemsize
        times = []
        for _ in range(REPEATS):
            start = self._now()
            for work in self._work(function, layout):
                self._run(function, work)
            times.append(self._now() - start)
        kept = 0
        for work in self._work(function, layout):
            with Watermark() as mark:
                graphs = self._run(function, work)
                kept += mark.alive
            del graphs
        return Cost(int(1e6 * sorted(times)[REPEATS // 2]), kept, state)

    def _now(self) -> float:
        if self.x.device.type == "cuda":
            torch.cuda.synchronize(self.x.device)
        return time.perf_counter()

    def _work(self, function: nn.Module, layout: Layout) -> Iterator[SlicedCall]:
        slices = slices_of(function, self.x.shape, layout, self.sides.of(function))
        return self.sides.work(function, slices, self.x.shape)

    def _run(
        self, function: nn.Module, work: SlicedCall, differentiate: bool = False
    ) -> list[Call]:
        """The function's calls, each dropped after its gradient or all returned."""
        kernels = Kernels.current(self.x.device)
        calls: list[Call] = []

        def stream(key: tuple[int, ...]) -> Any:
            return function_context(kernels, randomness, 0, key)

        def tokens(part: Any) -> Tensor:
            return joined(part.views(self.x)).clone()  # as states are decoded

        kept = kept_streams(self.x.device)
        with kept, kept_statistics(function), self.runner.open(function) as live:
            randomness = Randomness(self.x.device)
            for _, call in work.calls(live, tokens, stream, self.x_needs_grad, calls):
                if differentiate:
                    gradients(call, [torch.zeros_like(call.output)], keep_graph=False)
                else:
                    calls.append(call.without_outputs())
                del call
        return calls


def _kind(function: nn.Module) -> tuple[Any, ...]:
    """What functions of equal cost have in common."""
    shapes = tuple(tuple(getattr(p, "ds_shape", p.shape)) for p in function.parameters())
    modules = tuple((type(module), module.training) for module in function.modules())
    return getattr(function, "compute", None), shapes, modules
