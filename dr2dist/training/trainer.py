"""The loop: batches to steps, steps to records."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric
from tqdm import tqdm

from dr2dist.coefficients import Schedule
from dr2dist.data.stream import Batch
from dr2dist.parallel.engine import ReversibleEngine, UnprovenStepError
from dr2dist.parallel.verdict import Verdict
from dr2dist.tasks.classification import Classification
from dr2dist.training.keeper import Keeper, Progress
from dr2dist.training.records import Records, peak_memory

log = logging.getLogger(__name__)

LARGE_DRIFT = 1e-2
"""Relative error of a reconstruction above which gradients are not to be trusted."""


@dataclass(frozen=True)
class Pace:
    """When things happen, in optimiser steps; all pure functions of the applied step."""

    steps: int
    accumulate: int
    log_every: int
    validate_every: int
    checkpoint_every: int
    schedule: Schedule
    learning_rate: Callable[[int], float]


class Trainer:
    """Runs the steps of one rank.

    train: endless micro-batches. val: this rank's share, gone through at each validation.
    records: on rank 0, None elsewhere. keeper: of the run's checkpoints. progress: what an
    engine that goes on from a checkpoint has reached. seed: of dropout and the like, this
    rank's own; each step draws from a stream of its own, so a repeated step is the same.
    """

    def __init__(
        self,
        engine: ReversibleEngine,
        task: Classification,
        pace: Pace,
        train: Iterator[Batch],
        val: Iterable[Batch] | None,
        records: Records | None,
        keeper: Keeper,
        progress: Progress,
        seed: tuple[int, ...],
    ) -> None:
        self.engine, self.task, self.pace = engine, task, pace
        self.train, self.val = train, val
        self.records, self.keeper, self.progress = records, keeper, progress
        self.seed = seed
        self._seen, self._since = 0, time.monotonic()

    def run(self) -> None:
        """All steps. Raises UnprovenStepError, before applying it, at one that is not proven."""
        done, steps = self.engine.applied, self.pace.steps
        bar = tqdm(initial=done, total=steps, unit="step", disable=self.records is None)
        with bar:
            while self.engine.applied < steps:
                self._step(bar)
                better = False
                if self._due(self.pace.validate_every) and self.val is not None:
                    better = self._validate(self.val)
                if better or self._due(self.pace.checkpoint_every):
                    self.keeper.save(self.engine, self.progress)
                    self._since = time.monotonic()

    def _due(self, every: int) -> bool:
        done = self.engine.applied
        return done % every == 0 or done == self.pace.steps

    def _step(self, bar: Any) -> None:
        step = self.engine.applied
        alpha, beta = self.pace.schedule.at(step)
        for chain in self.engine.chains:
            chain.set_coefficients(alpha, beta)
        batches = list(islice(self.train, self.pace.accumulate))
        rate = self.pace.learning_rate(step)
        try:
            verdict = self.engine.step(
                lambda: self._losses(batches), len(batches), self._rates(rate)
            )
        except UnprovenStepError as failure:
            self._log(failure.verdict, rate)
            raise
        self.progress.loss = verdict.loss
        self._seen += sum(batch["count"] for batch in batches)
        self._note_drift(verdict)
        bar.update()
        bar.set_postfix(loss=f"{verdict.loss:.4f}", beta=f"{beta:.4f}")
        if self._due(self.pace.log_every):
            self._log(verdict, rate)

    def _rates(self, rate: float) -> list[float]:
        return [rate] * self.engine.num_groups

    def _losses(self, batches: list[Batch]) -> Iterator[Tensor]:
        torch.manual_seed(hash((*self.seed, self.engine.applied)) & (2**63 - 1))
        for batch in batches:
            output = self.engine.forward(batch["image"])
            yield self.task.loss(output, batch["label"].to(self.engine.device))

    def _note_drift(self, verdict: Verdict) -> None:
        if verdict.drift is None:
            return
        known = self.progress.worst_drift
        large = not verdict.drift < LARGE_DRIFT
        if large and (known is None or known < LARGE_DRIFT):
            log.warning(
                "step %d: the reversal has drifted by %.2g of its states, so gradients are "
                "wrong; use arithmetic: exact, or a larger beta",
                self.engine.applied,
                verdict.drift,
            )
        self.progress.worst_drift = verdict.drift if known is None else max(known, verdict.drift)

    def _log(self, verdict: Verdict, rate: float) -> None:
        alpha, beta = self.engine.coefficients
        now = time.monotonic()
        speed = self._seen * self.engine.replicas / (now - self._since)
        self._seen, self._since = 0, now
        if self.records is not None:
            self.records.log(
                self.engine.applied,
                loss=verdict.loss,
                lr=rate,
                alpha=alpha,
                beta=beta,
                certificate_failures=len(verdict.messages),
                drift=verdict.drift,
                remainder_bytes=self.engine.remainder_bytes,
                samples_per_second=speed,
                peak_memory_bytes=peak_memory(),
            )

    def _validate(self, batches: Iterable[Batch]) -> bool:
        """All held-out samples, each counted once over all ranks. True if none was better."""
        device = self.engine.device
        metrics = self.task.metrics().to(device)
        loss, count = MeanMetric().to(device), SumMetric().to(device)
        self.engine.net.eval()
        with torch.no_grad():
            for batch in batches:
                # Every rank runs every batch, since ZeRO-3 gathers weights as it goes.
                output = self.engine.forward(batch["image"])
                if batch["count"]:
                    labels = batch["label"].to(device)
                    metrics.update(output.float(), labels)
                    loss.update(self.task.loss(output, labels), weight=batch["count"])
                    count.update(batch["count"])
        self.engine.net.train()
        found = {"loss": loss.compute(), "samples": count.compute(), **metrics.compute()}
        self._since = time.monotonic()
        return self._note({name: float(value) for name, value in found.items()})

    def _note(self, found: dict[str, float]) -> bool:
        step, progress = self.engine.applied, self.progress
        progress.last = {"step": step, **found}
        if self.records is not None:
            self.records.log(step, **{f"val_{name}": value for name, value in found.items()})
        better = progress.best is None or found[self.task.best] > progress.best[self.task.best]
        if better:
            progress.best = progress.last
        return better
