"""A converted network on DeepSpeed's engine: ZeRO 0 to 3, one step at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from dr2dist.parallel.gathered import GatheredRunner
from dr2dist.parallel.masters import Masters
from dr2dist.parallel.verdict import GradientWatch, Report, Verdict, decide
from dr2dist.reversible import Chain, FunctionRunner, PlainRunner

log = logging.getLogger(__name__)


class UnprovenStepError(RuntimeError):
    """A step that no rank applied, with what the verdict found."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__("; ".join(verdict.messages))
        self.verdict = verdict


class ReversibleEngine:
    """Runs optimiser steps of a network with reversible chains; applies only proven ones.

    net: a converted network, before any sharding. chains: its chains. optimizer: over its
    parameters. config: DeepSpeed's configuration, complete. bf16: functions compute in bf16,
    with fp32 master weights on every ZeRO stage. The process group must exist.
    """

    def __init__(
        self,
        net: nn.Module,
        chains: tuple[Chain, ...],
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        bf16: bool = False,
    ) -> None:
        self.chains = chains
        self.zero = int(config["zero_optimization"]["stage"])
        runner = _runner(chains, self.zero)
        parameters = [p for p in net.parameters() if p.requires_grad]
        self._engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
        self.net: nn.Module = self._engine.module
        for chain in chains:
            chain.runner = runner
        self.device = torch.device(self._engine.device)
        self._autocast = bf16 and not self._engine.bfloat16_enabled()
        self._watch = GradientWatch(parameters, self.device)
        self.masters = Masters(self._engine, self.zero)
        self.applied = 0

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype that parameters are held in."""
        return torch.bfloat16 if self._engine.bfloat16_enabled() else torch.float32

    def step(
        self, losses: Callable[[], Iterable[Tensor]], count: int, learning_rates: list[float]
    ) -> Verdict:
        """One optimiser step from `count` micro-batches.

        losses: called for a pass over the step's micro-batches, computes each one's mean loss
            when asked for it. learning_rates: one for each parameter group.
        Raises UnprovenStepError, with nothing applied on any rank, if the verdict is not clean. A
        mismatch is tried once more first.
        """
        verdict = self._attempt(losses, count)
        if verdict.kinds == {"mismatch"}:
            log.warning("step %d: %s; trying again", self.applied, "; ".join(verdict.messages))
            self._discard()
            verdict = self._attempt(losses, count)
        if not verdict.ok:
            self._discard()
            raise UnprovenStepError(verdict)
        for group, rate in zip(self._engine.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        self._engine.step()
        self.applied += 1
        return verdict

    def _attempt(self, losses: Callable[[], Iterable[Tensor]], count: int) -> Verdict:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, loss in enumerate(losses()):
            self._engine.set_gradient_accumulation_boundary(number == count - 1)
            self._engine.backward(loss)
            total += loss.detach().double() / count
        report = Report(total, self._watch.take(), self.chains)
        return decide(report, self.coefficients, self.applied)

    @property
    def coefficients(self) -> tuple[float, float]:
        """alpha and beta in force on this rank."""
        setting = self.chains[0].setting
        return setting.alpha, setting.beta

    @property
    def replicas(self) -> int:
        """Data-parallel ranks."""
        return int(self._engine.dp_world_size)

    @property
    def num_groups(self) -> int:
        """Parameter groups of the optimiser."""
        return len(self._engine.optimizer.param_groups)

    @property
    def remainder_bytes(self) -> int:
        """Bytes of remainders that the last pass of this rank held."""
        return sum(chain.ledger.remainder_bytes for chain in self.chains)

    def forward(self, images: Tensor) -> Any:
        """The network's output for images [B, C, H, W] of any float dtype and device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self._engine(images.to(self.device, self._dtype))

    def _discard(self) -> None:
        """Forgets the gradients of a step that is not applied."""
        if hasattr(self._engine.optimizer, "zero_grad"):
            self._engine.optimizer.zero_grad()
        self._engine.zero_grad()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters by name."""
        named = self.net.named_parameters()
        return {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in named}

    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers by name, themselves."""
        parameters = dict(self.net.named_parameters())
        state = self.net.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if name not in parameters}

    def go_on_from(self, step: int) -> None:
        """Takes `step` optimiser steps for applied, as after reading a checkpoint."""
        self.applied = step


def _runner(chains: tuple[Chain, ...], zero: int) -> FunctionRunner:
    if zero < 3:
        return PlainRunner()
    return GatheredRunner(function for chain in chains for function in chain.functions)
