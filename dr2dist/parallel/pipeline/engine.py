"""A network cut into stages: DeepSpeed's engine on each stage's layers, its 1F1B schedule between.

DeepSpeed's own pipeline engine steps inside its schedule, before any verdict, keeps what a stage
received until its gradient is sent, and sizes gradient messages by outputs. What is used of
DeepSpeed here are its schedule of instructions, its grid of process groups, and its engine with
ZeRO 0 or 1 on a stage's replicas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from torch import Tensor

from dr2dist.backbones.network import ReversibleNetwork
from dr2dist.errors import UserError
from dr2dist.parallel import adapter
from dr2dist.parallel.agreement import from_all
from dr2dist.parallel.deepspeed_json import Precision
from dr2dist.parallel.engine import ReversibleEngine, StepBatches
from dr2dist.parallel.pipeline.grid import Grid
from dr2dist.parallel.pipeline.layers import Layer
from dr2dist.parallel.pipeline.link import BackwardMessage, ForwardMessage, Link
from dr2dist.parallel.pipeline.stage import Pass, Stage
from dr2dist.parallel.verdict import Verdict


class StagedEngine(ReversibleEngine):
    """Runs the optimiser steps of one stage; every rank of the grid must run them together.

    net: the whole network with no parameters but this stage's (`layers.keep_only`). optimizer: over
    them. config: DeepSpeed's, ZeRO 0 or 1. layers, own: of the whole network, and which are this
    stage's. returned: the next stage sends a stage's last state back with its gradient, so that
    nothing but remainders is held for micro-batches in flight. Raises UserError for another ZeRO.
    """

    def __init__(
        self,
        net: ReversibleNetwork,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        grid: Grid,
        layers: list[Layer],
        own: range,
        precision: Precision = "fp32",
        ema: float | None = None,
        returned: bool = True,
    ) -> None:
        if config["zero_optimization"]["stage"] > 1:
            raise UserError(
                f"parallel.zero is {config['zero_optimization']['stage']}: stages hold whole "
                "layers, allowed with them is 0 or 1; use zero 2 or 3 with parallel.stages 1"
            )
        returned = returned and net.chains[0].setting.memory == "reverse"
        groups = adapter.stage_groups(grid.stages, grid.replicas)
        adapter.count_in_norm(net.parameters())
        super().__init__(net, optimizer, config, precision, ema, groups=groups)
        self.grid, self._groups = grid, groups
        if self.zero:
            adapter.exchange_one_norm(self._engine, adapter.same_replica(groups))
        self.number = grid.place(dist.get_rank())[0]
        self.stage = Stage(net, layers, own, returned)
        self._link = Link(
            self.stage,
            None if self.first else layers[own.start - 1],
            None if self.last else layers[own.stop - 1],
            (self._neighbour(-1), self._neighbour(1)),
            self._micro_batch,
            self._held,
            self.device,
        )

    def _attempt(self, work: StepBatches, count: int) -> Verdict:
        """All micro-batches forth and back, in DeepSpeed's order, and the verdict."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        work.begin()
        runner = _ScheduleRunner(self, work, count, total)
        with self.clock.step(count):
            for commands in schedule.TrainSchedule(count, self.grid.stages, self.number):
                for command in commands:
                    runner.do(command)
            self._link.finish()
            # Only the last stage has losses; the verdict averages over all ranks.
            return self._decide(total * self.grid.stages, work)

    def seconds(self) -> dict[str, float]:
        """See ReversibleEngine: of forward and backward passes, with idle, the share of steps
        without any."""
        return self.clock.take()

    def by_stage(self, values: Mapping[str, float]) -> dict[str, float]:
        """See ReversibleEngine."""
        result: dict[str, float] = {}
        for rank, own in enumerate(from_all(values)):
            stage, _ = self.grid.place(rank)
            for name, value in own.items():
                key = f"stage_{stage}/{name}"
                result[key] = max(value, result.get(key, value))
        return result

    def from_last(self, value: Any) -> Any:
        """See ReversibleEngine."""
        found = [value]
        dist.broadcast_object_list(found, self.grid.rank(self.grid.stages - 1, 0))
        return found[0]

    def _whole_norm(self) -> Tensor:
        squared = super()._whole_norm().square()
        dist.all_reduce(squared, group=adapter.same_replica(self._groups))
        return squared.sqrt()

    def forward(self, inputs: Mapping[str, Tensor] | None) -> Any:
        """The network's output on the last stage, None on others; no gradients.

        inputs: by name, [B, ...], on the first stage. Every stage must come here.
        """
        with self.autocast():
            given = (
                self._link.receive_any()
                if inputs is None
                else ForwardMessage(self.here(inputs), {})
            )
            found = ForwardMessage(*self.stage.infer(*given))
        if self.last:
            return found.value
        self._link.send_any(found)
        self._link.finish()
        return None

    def _neighbour(self, step: int) -> int | None:
        """The rank of the next (1) or the previous (-1) stage of the same replica, if there is."""
        stage = self.number + step
        return self.grid.rank(stage, self.replica) if 0 <= stage < self.grid.stages else None

    @property
    def replica(self) -> int:
        """See ReversibleEngine."""
        return self.grid.place(dist.get_rank())[1]

    @property
    def first(self) -> bool:
        """Whether samples enter here."""
        return self.number == 0

    @property
    def last(self) -> bool:
        """Whether the loss is computed here."""
        return self.number == self.grid.stages - 1


class _ScheduleRunner:
    """A step's micro-batches in flight on one stage; they come back in the order they went."""

    def __init__(self, engine: StagedEngine, work: StepBatches, count: int, total: Tensor) -> None:
        self.engine, self.work, self.count, self.total = engine, work, count, total
        self.passes: deque[Pass] = deque()
        self.losses: deque[Tensor] = deque()
        self.given: ForwardMessage | None = None
        self.returned: BackwardMessage | None = None
        self.back: tuple[Pass, Tensor | None] | None = None
        self.begun = self.ended = 0

    def do(self, command: Any) -> None:
        """One instruction of the schedule."""
        link = self.engine._link
        if isinstance(command, schedule.RecvActivation):
            self.given = link.receive_forward()
        elif isinstance(command, schedule.ForwardPass):
            self._forward()
        elif isinstance(command, schedule.SendActivation):
            run = self.passes[-1]
            carried = run.carried
            link.send_forward(ForwardMessage(run.message(), carried))
        elif isinstance(command, schedule.RecvGrad):
            self.returned = link.receive_backward()
        elif isinstance(command, schedule.BackwardPass):
            self._backward()
        elif isinstance(command, schedule.SendGrad):
            assert self.back is not None
            link.send_backward(*self.back)
            self.back = None

    def _forward(self) -> None:
        engine = self.engine
        if engine.first:
            self.given = ForwardMessage(engine.here(self.work.inputs(self.begun)), {})
        assert self.given is not None
        given, self.given = self.given, None
        with engine.clock.computing():
            with engine.autocast():
                run = engine.stage.forward(*given)
            if engine.last:
                loss = self.work.loss(self.begun, run.output)
                self.total += loss.detach().double() / self.count
                run.end_with(loss)
                self.losses.append(loss.detach())
        self.passes.append(run)
        self.begun += 1

    def _backward(self) -> None:
        engine, run = self.engine, self.passes.popleft()
        value = self.losses.popleft() if engine.last else torch.zeros((), device=engine.device)
        found: list[Tensor | None] = []
        given, self.returned = self.returned, None

        def back(gradient: Tensor) -> None:
            with engine.clock.computing():
                found.append(run.backward(*(given or (gradient,))))

        self.ended += 1
        anchor = torch.zeros((), device=engine.device, requires_grad=True)
        engine.backward(_Turn.apply(back, anchor, value), last=self.ended == self.count)
        self.back = run, found[0]


class _Turn(torch.autograd.Function):
    """A stage's backward pass as that of a scalar, so that it runs inside the engine's own.

    On the last stage its gradient is the loss's, already scaled; elsewhere scaling has come with
    the gradient that was received.
    """

    @staticmethod
    def forward(ctx: Any, back: Callable[[Tensor], None], anchor: Tensor, value: Tensor) -> Tensor:
        ctx.back = back
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.back(gradient)
        return None, None, None
