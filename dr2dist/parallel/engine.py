"""A converted network on DeepSpeed's engine: ZeRO 0 to 3, one step at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from dr2dist.backbones.in_force import adjusted_names
from dr2dist.backbones.network import ReversibleNetwork
from dr2dist.parallel import adapter, traces
from dr2dist.parallel.buffers import Buffers
from dr2dist.parallel.clock import Clock
from dr2dist.parallel.deepspeed_json import Precision
from dr2dist.parallel.gathered import GatheredRunner
from dr2dist.parallel.master_weights import MasterWeights
from dr2dist.parallel.originals import originals
from dr2dist.parallel.processes import slowest
from dr2dist.parallel.scales import (
    Scales,
    find_scales,
    make_room,
    put_back,
    scales_of,
    settle,
    without_scales,
)
from dr2dist.parallel.sharded_ema import ShardedEMA
from dr2dist.parallel.sharding import shard
from dr2dist.parallel.verdict import GradientWatch, Report, Verdict, Wish, decide
from dr2dist.reversible import FunctionRunner, PlainRunner
from dr2dist.reversible.arithmetic.scales import GREW, WIDENINGS
from dr2dist.reversible.transfer import to_device

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

_LAYOUT = ("memory", "memory_budget", "chunk_size", "chunk_tokens", "chunk_budget")

NO_NORM = "the norm of the reduced gradient is not finite"

log = logging.getLogger(__name__)


class StepBatches(NamedTuple):
    """A step's micro-batches, asked for by number, in order, where they are needed.

    begin: called before each pass over them. inputs: by name, [B, ...]. loss: of an output, so that
    its mean over micro-batches and replicas is the step's. counted_next: what this rank adds to
    `Verdict.counted_next`. wishes: asked for at the step's end.
    """

    begin: Callable[[], None]
    inputs: Callable[[int], Mapping[str, Tensor]]
    loss: Callable[[int, Any], Tensor]
    counted_next: float = 0.0
    wishes: Callable[[], Wish] = lambda: Wish.NONE


class UnprovenStepError(RuntimeError):
    """A step that no rank applied, with what the verdict found."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__("; ".join(verdict.messages))
        self.verdict = verdict


class ReversibleEngine:
    """Runs optimiser steps of a network with reversible chains; applies only proven ones.

    net: a converted network, before any sharding. optimizer: over its parameters. config:
    DeepSpeed's configuration, complete. precision: what functions compute in, with fp32 master
    weights on every ZeRO stage. ema: decay of averaged weights, if they are wanted. weights:
    gives the values of parameters by name where the network's are on the meta device (ZeRO 3
    only), of which no rank then holds more than one whole at a time. groups: DeepSpeed's grid of
    process groups where ranks differ in their layers. The process group must exist.
    """

    def __init__(
        self,
        net: ReversibleNetwork,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        precision: Precision = "fp32",
        ema: float | None = None,
        weights: Callable[[str], Tensor] | None = None,
        groups: Any = None,
    ) -> None:
        self.chains = net.chains
        self.zero = int(config["zero_optimization"]["stage"])
        runner = _runner(net, self.zero)
        # Without ZeRO weights are in fp32 in bf16 runs too, and functions are run under autocast.
        self._autocast = precision == "bf16" and not config["bf16"]["enabled"]
        # What parameters are held in.
        self._held = torch.float32 if self._autocast else DTYPES[precision]
        self._group = adapter.same_stage(groups)
        if weights is None:
            given = originals(net, self._held, whole=self.zero < 3, group=self._group)
        else:
            given = shard(net, weights, config, self._held)
        parameters = [p for p in net.parameters() if p.requires_grad]
        traces.begin(self, groups)
        self._engine, *_ = deepspeed.initialize(
            model=net, optimizer=optimizer, config=config, mpu=groups
        )
        traces.end_with(self, self._engine)
        self.net: ReversibleNetwork = self._engine.module
        for chain in net.chains:
            chain.runner = runner
            chain.on_failure = "record"  # the verdict decides, on all ranks alike
        for piece in net.pieces:
            piece.runner = runner
        self.device = torch.device(self._engine.device)
        self.clock = Clock(self.device)
        self._watch = GradientWatch(parameters, self.device)
        self.masters = MasterWeights(self._engine, self.zero, given, self._group)
        self.average = None if ema is None else ShardedEMA(self.masters, ema, self._group)
        self._planner = net.planner
        self._planner.agree = slowest
        self._micro_batch = int(config["train_micro_batch_size_per_gpu"])
        self.gradient_norm: Any = None
        """2-norm of the last applied step's gradient before clipping."""
        self.applied = 0
        self._peaks: dict[str, Tensor | None] = {}
        self._begun: Scales = {}

    def step(self, work: StepBatches, count: int, learning_rates: list[float]) -> Verdict:
        """One optimiser step from `count` micro-batches.

        learning_rates: one for each parameter group.
        Raises UnprovenStepError, with nothing applied on any rank, buffers and scales as they were,
        if the verdict is not clean, or the gradient that ranks have summed has no finite norm. A
        mismatch is tried once more first, and a state of 16 bits out of range with larger scales,
        as long as that is what is wrong.
        """
        buffers, scales = Buffers(self.net), scales_of(self.chains)
        self._find_scales(work, buffers)
        self._begun = scales_of(self.chains)
        verdict = self._attempt(work, count)
        for _ in range(WIDENINGS):
            if "range" not in verdict.kinds or not self._make_room(verdict):
                break
            log.warning("step %d: %s; trying again", self.applied, "; ".join(verdict.messages))
            self._discard(buffers)
            verdict = self._attempt(work, count)
        if verdict.kinds == {"mismatch"}:
            log.warning("step %d: %s; trying again", self.applied, "; ".join(verdict.messages))
            self._discard(buffers)
            verdict = self._attempt(work, count)
        if verdict.ok and not self._apply(learning_rates):
            verdict = replace(verdict, kinds=frozenset({"finite"}), messages=(NO_NORM,))
        if not verdict.ok:
            self._discard(buffers)
            put_back(self.chains, scales)
            raise UnprovenStepError(verdict)
        self.applied += 1
        self._make_room(verdict)
        for name in settle(self.chains, self._begun):
            log.warning("step %d: %s: %s", self.applied, name, GREW)
        if self.average is not None:
            self.average.update()
        return verdict

    def _find_scales(self, work: StepBatches, buffers: Buffers) -> None:
        """Those of states of 16 bits, from the step's first micro-batch, where there are none."""
        chains = without_scales(self.chains)
        if not chains:
            return
        work.begin()
        with torch.no_grad():
            find_scales(chains, lambda: self.forward(work.inputs(0) if self.first else None))
        buffers.put_back()

    def _make_room(self, verdict: Verdict) -> bool:
        """Widens scales for the next attempt; whether any was. All ranks decide alike."""
        widened = make_room(self.chains, verdict.near, self._peaks, self._begun, self.device)
        if widened:
            log.info("step %d: room for larger states: %s", self.applied, ", ".join(widened))
        return bool(widened)

    def _apply(self, learning_rates: list[float]) -> bool:
        """The optimiser's step; False, on all ranks, if the gradient's norm is not finite.

        With masters of its own DeepSpeed looks at the norm over all ranks, and then skips the step
        by itself; without them it never does.
        """
        for group, rate in zip(self._engine.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        norm = self._whole_norm() if self.zero == 0 else None
        if norm is not None and not norm.isfinite():
            return False
        self._engine.step()
        if not self._engine.was_step_applied():
            return False
        self.gradient_norm = self._engine.get_global_grad_norm() if norm is None else norm
        return True

    def _attempt(self, work: StepBatches, count: int) -> Verdict:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        work.begin()
        with self.clock.step(count):
            for number in range(count):
                inputs = work.inputs(number)
                with self.clock.computing():
                    output = self.forward(inputs)
                loss = work.loss(number, output)
                del output
                self.backward(loss, last=number == count - 1)
                total += loss.detach().double() / count
            return self._decide(total, work)

    def _decide(self, total: Tensor, work: StepBatches) -> Verdict:
        """The verdict of all ranks. total: this rank's loss."""
        report = Report(total, self._watch.take(), self.chains, work.counted_next, work.wishes())
        verdict = decide(report, self.coefficients, self.applied)
        self._peaks = report.peaks
        return verdict

    def _whole_norm(self) -> Tensor:
        """Of gradients that every rank holds whole, where DeepSpeed keeps no norm."""
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).to(self.device)

    @property
    def coefficients(self) -> tuple[float, float]:
        """alpha and beta in force on this rank."""
        return self.net.coefficients

    @property
    def replicas(self) -> int:
        """Data-parallel ranks."""
        return dist.get_world_size(self._group)

    @property
    def replica(self) -> int:
        """This rank's number among them."""
        return dist.get_rank()

    @property
    def first(self) -> bool:
        """Whether samples enter here."""
        return True

    @property
    def last(self) -> bool:
        """Whether the network's output comes out here."""
        return True

    def seconds(self) -> dict[str, float]:
        """micro_batch_seconds, that this rank has computed for one since the last call: of its
        forward pass, in which with ZeRO 0 to 2 nobody waits for another. Empty before a step."""
        return {k: v for k, v in self.clock.take().items() if k == "micro_batch_seconds"}

    def by_stage(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each stage's largest values over its replicas, as stage_K/NAME; nothing where there are
        no stages. Every rank must call it."""
        return {}

    def from_last(self, value: Any) -> Any:
        """What the last stage of replica 0 gives here, on all ranks; every rank must call it."""
        return value

    @property
    def num_groups(self) -> int:
        """Parameter groups of the optimiser."""
        return len(self._engine.optimizer.param_groups)

    @property
    def remainder_bytes(self) -> int:
        """Bytes of remainders that the last pass of this rank held."""
        return sum(chain.ledger.remainder_bytes for chain in self.chains)

    def forward(self, inputs: Mapping[str, Tensor] | None) -> Any:
        """The network's output for inputs by name, [B, ...] of any float dtype and device."""
        assert inputs is not None
        with self.autocast():
            return self._engine(self.here(inputs))

    def here(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On this rank's device, floats in the dtype that weights are held in."""
        return {
            name: to_device(value, self.device, self._held if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def backward(self, loss: Tensor, last: bool) -> None:
        """DeepSpeed's backward pass of a micro-batch. last: of the step."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def autocast(self) -> torch.autocast:
        """What functions are run under."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, if there are any."""
        if self.average is None:
            yield
        else:
            with self.average.in_place():
                yield

    def _discard(self, buffers: Buffers) -> None:
        """Forgets the gradients of a step that is not applied, and what it did to buffers."""
        buffers.put_back()
        adapter.clear_gradients(self._engine)

    def state_bytes(self) -> dict[str, int]:
        """Bytes that this rank holds between steps, by kind.

        weights: what the network computes with. masters: fp32 copies beside them, of frozen weights
        too. moments: of the optimiser. average: of the weights.
        """
        fragments = self.masters.fragments
        moments = (m for f in fragments for m in self.masters.moments(f).values() if m.dim())
        return {
            "weights": sum(adapter.held(p).nbytes for p in self.net.parameters()),
            "masters": self.masters.nbytes,
            "moments": sum(moment.nbytes for moment in moments),
            "average": 0 if self.average is None else self.average.nbytes,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters by name."""
        return {name: adapter.whole_shape(p) for name, p in self.net.named_parameters()}

    def buffers(self) -> dict[str, Tensor]:
        """The model's persistent buffers by name, themselves; coefficients go by the step."""
        state = self.net.state_dict(keep_vars=True)
        others = {*dict(self.net.named_parameters()), *adjusted_names(state)}
        return {name: value for name, value in state.items() if name not in others}

    def layouts(self) -> dict[str, Any]:
        """What was measured and settled of slices and kept activations, and for what."""
        asked = {key: getattr(self.chains[0].setting, key) for key in _LAYOUT}
        return {
            "asked": {**asked, "micro_batch": self._micro_batch},
            "chains": self._planner.state(),
        }

    def take_layouts(self, saved: dict[str, Any]) -> None:
        """Takes what a checkpoint says was settled, unless it was for other settings."""
        if saved["asked"] == self.layouts()["asked"]:
            self._planner.load(saved["chains"])

    def go_on_from(self, step: int) -> None:
        """Takes `step` optimiser steps for applied, as after reading a checkpoint."""
        self.applied = step


def _runner(net: ReversibleNetwork, zero: int) -> FunctionRunner:
    if zero < 3:
        return PlainRunner(nested=True, compile=net.chains[0].compiles)
    functions = [function for chain in net.chains for function in chain.functions]
    return GatheredRunner([*functions, *(piece.module for piece in net.pieces)])
