"""The loop: batches to steps, steps to records."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

from torch import Tensor

from dr2dist.coefficients import Guard, Limits, Schedule
from dr2dist.data.batch import Batch
from dr2dist.data.randomness import seed_device, seeded
from dr2dist.parallel.agreement import from_all
from dr2dist.parallel.engine import ReversibleEngine, StepBatches, UnprovenStepError
from dr2dist.parallel.processes import averages, spread, total
from dr2dist.parallel.verdict import Kind, Verdict, Wish
from dr2dist.reversible.certificate import worst_drift
from dr2dist.tasks.task import Task
from dr2dist.training.checkpoint_manager import CheckpointManager, Progress
from dr2dist.training.profile import Profile
from dr2dist.training.progress import ProgressLine
from dr2dist.training.records import Records, peak_memory
from dr2dist.training.speed import Speed
from dr2dist.training.validation import validate
from dr2dist.training.watchdog import Watchdog

log = logging.getLogger(__name__)

LARGE_DRIFT = 1e-2
"""Relative error of a reconstruction above which gradients are not to be trusted."""
PHRASES = {"hold": "stay", "back": "go back"}
BAD: frozenset[Kind] = frozenset({"finite", "range"})
"""What a batch alone can do."""
UNHARMED: frozenset[Kind] = BAD | {"mismatch"}
"""What leaves all ranks with the state of the step before."""
NAMED = 8
"""Samples that a message names at most."""


@dataclass(frozen=True)
class Pace:
    """When things happen, in optimiser steps; all pure functions of the applied step.

    batch: samples of a step, over all ranks.
    checkpoint_every, checkpoint_minutes: None: never for that. bad_batches: in a row that are
    skipped at most. lr_scales: of each parameter group of this rank. lr_range: the least and the
    largest of all stages. patience: validations without a better one
    after which the run ends; None: never. limits: of coefficients that are guarded.
    """

    steps: int
    accumulate: int
    batch: int
    log_every: int
    validate_every: int
    checkpoint_every: int | None
    checkpoint_minutes: float | None
    bad_batches: int
    patience: int | None
    schedule: Schedule
    learning_rate: Callable[[int], float]
    lr_scales: tuple[float, ...]
    lr_range: tuple[float, float]
    limits: Limits | None


class Trainer:
    """Runs the steps of one rank.

    train: endless micro-batches, none on stages that need no samples: those of a step are there
    before the step before is applied, so that what its losses are divided by is known in time.
    val: this replica's share, gone through at each validation.
    records: on rank 0, None elsewhere. manager: of the run's checkpoints. progress: what an
    engine that goes on from a checkpoint has reached. seed: of mixing, dropout and the like, this
    rank's own; each step draws from a stream of its own, so a repeated step is the same. asked:
    what has asked this rank to stop. watchdog: of steps, validations and checkpoints.
    """

    def __init__(
        self,
        engine: ReversibleEngine,
        task: Task,
        pace: Pace,
        train: Iterator[Batch],
        val: Iterable[Batch] | None,
        records: Records | None,
        manager: CheckpointManager,
        progress: Progress,
        speed: Speed,
        profile: Profile,
        seed: tuple[int, ...],
        asked: Callable[[], str | None],
        watchdog: Watchdog,
    ) -> None:
        self.engine, self.task, self.pace = engine, task, pace
        self.train, self.val = train, val
        self.records, self.manager, self.progress = records, manager, progress
        self.speed, self.profile, self.seed = speed, profile, seed
        self.stopping = False
        """Whether all ranks end, since one was asked to."""
        self.watchdog = watchdog
        self.asked, self._saved_at, self._paused = asked, time.monotonic(), 0.0
        self._bad_in_row = 0
        schedule = pace.schedule
        self.guard = (
            None
            if pace.limits is None
            else Guard(pace.limits, schedule.every, schedule.end, progress.guard)
        )
        self._skipped = 0
        self._checked: list[tuple[Batch, Tensor]] = []
        self._parts: dict[str, Any] = {}
        self._next: list[Batch] | None = None
        self._counted = 0.0

    def run(self) -> None:
        """All steps, or until a rank is asked to stop: the step that was begun is ended and saved.

        Raises UnprovenStepError, before applying it, at one that is not proven.
        """
        progress = ProgressLine(self.engine.applied, self.pace.steps, self.records is not None)
        with progress, self.profile:
            self._agree_to_stop()
            if self._owes_validation and not self.stopping:
                self._look_and_save(saving=False)
            self.speed.restart()
            while self.engine.applied < self.pace.steps and not self._stale and not self.stopping:
                self.profile.before(self.engine.applied)
                with self.watchdog.step(self.engine.applied + 1):
                    verdict = self._step(progress)
                self.stopping = Wish.STOP in verdict.wishes
                if Wish.WAIT not in verdict.wishes:
                    self._finish_checkpoint()
                if verdict.ok or self.stopping:
                    wanted = bool(verdict.wishes & (Wish.SAVE | Wish.STOP))
                    self._look_and_save(self._due(self.pace.checkpoint_every) or wanted)

    @property
    def _stale(self) -> bool:
        """Whether the run ends early."""
        return self.pace.patience is not None and self.progress.stale >= self.pace.patience

    def _due(self, every: int | None) -> bool:
        done = self.engine.applied
        return done == self.pace.steps or (every is not None and done % every == 0)

    @property
    def _owes_validation(self) -> bool:
        """Whether the run was stopped after a step whose validation it did not do."""
        done, last = self.engine.applied, self.progress.last
        due = done > 0 and self.val is not None and self._due(self.pace.validate_every)
        return due and (last is None or last["step"] != done)

    def _look_and_save(self, saving: bool) -> None:
        """After a step: the validation, if it is due, and a checkpoint, if it is wanted."""
        better = False
        if self.val is not None and self._due(self.pace.validate_every) and not self.stopping:
            better = self._validate(self.val)
        ends = self._stale or self.stopping
        if better or saving or ends:
            self._save(behind=not (ends or self.engine.applied == self.pace.steps))

    def _save(self, behind: bool = False) -> None:
        """behind: while the steps after it run."""
        begin = time.monotonic()
        self._count_skipped()
        with self.watchdog.other(f"the checkpoint after step {self.engine.applied}"):
            self.manager.save(self.engine, self.progress, behind)
        self._saved_at = time.monotonic()
        self._paused += self._saved_at - begin
        self.speed.restart()

    def _finish_checkpoint(self) -> None:
        """Once all ranks have written theirs; every rank must call it."""
        begin = time.monotonic()
        with self.watchdog.other("the checkpoint that is being written"):
            self.manager.finish()
        self._paused += time.monotonic() - begin

    def _agree_to_stop(self) -> bool:
        """Whether any rank was asked; every rank must call it."""
        self.stopping = self.stopping or total(self.asked() is not None) > 0
        return self.stopping

    def _wishes(self) -> Wish:
        """By time checkpoints are due where rank 0's clock says so."""
        wishes, minutes = Wish.NONE, self.pace.checkpoint_minutes
        if self.asked() is not None:
            wishes |= Wish.STOP
        if minutes is not None and self.records is not None:
            late = time.monotonic() - self._saved_at >= 60 * minutes
            wishes |= Wish.SAVE if late else Wish.NONE
        return wishes | (Wish.WAIT if self.manager.busy else Wish.NONE)

    def _step(self, progress: ProgressLine) -> Verdict:
        step = self.engine.applied
        alpha, beta = self.pace.schedule.at(step if self.guard is None else self.guard.memory.place)
        self.engine.net.set_coefficients(alpha, beta)
        batches = self._batches()
        rate = self.pace.learning_rate(step)
        rates = [rate * scale for scale in self.pace.lr_scales]
        try:
            verdict = self.engine.step(self._work(batches), self.pace.accumulate, rates)
        except UnprovenStepError as failure:
            named = self._name_samples(failure.verdict)
            self._log(named, rate)
            self._skip(named)
            return named
        self._bad_in_row = 0
        self.progress.consumed += self.pace.batch
        self.progress.loss = verdict.loss
        if self.engine.last:  # stages see the same samples
            self._skipped += sum(batch.skipped for batch in batches)
        self._counted = verdict.counted_next
        self.speed.count(sum(batch.count for batch in batches))
        self._note_drift(verdict)
        self._let_guard_decide(verdict)
        progress.update(loss=f"{verdict.loss:.4f}", beta=f"{beta:.4f}")
        if self._due(self.pace.log_every):
            self._log(verdict, rate)
        return verdict

    def _skip(self, verdict: Verdict) -> None:
        """Goes on without the batches of a step whose numbers were bad, where that is allowed; all
        ranks decide alike. Raises UnprovenStepError where not, with the last good step saved."""
        kinds, most = verdict.kinds, self.pace.bad_batches
        if not kinds <= BAD or self._bad_in_row >= most:
            self._finish_checkpoint()
            if kinds <= UNHARMED and self.engine.applied:
                self._save()
            raise UnprovenStepError(verdict) from None
        self._bad_in_row += 1
        self.progress.bad_batches += 1
        self.progress.consumed += self.pace.batch
        self._counted = verdict.counted_next
        if self._ends_with_this_step:
            self._next = None  # it is tried with other samples, which have not been fetched
        reason, step = "; ".join(verdict.messages), self.engine.applied
        if self.records is not None:
            log.warning("%s: skipped, %d of at most %d in a row", reason, self._bad_in_row, most)
            self.records.log(step, bad_batches=self.progress.bad_batches, bad_batch=reason)

    def _batches(self) -> list[Batch]:
        """The step's micro-batches, and behind the scenes those of the step after it.

        Every rank must call it: at the first step ranks add up what their samples count.
        """
        if self._next is None:
            self._next = self._fetch()
            self._counted = total(self._counts(self._next))
        batches = self._next
        self._next = [] if self._ends_with_this_step else self._fetch()
        return batches

    @property
    def _ends_with_this_step(self) -> bool:
        return self.engine.applied + 1 >= self.pace.steps

    def _fetch(self) -> list[Batch]:
        with self.speed.waiting():
            return list(islice(self.train, self.pace.accumulate))

    def _counts(self, batches: list[Batch]) -> float:
        """What the losses of micro-batches are sums over: each is counted where its loss is."""
        return sum(map(self.task.counts, batches)) if self.engine.last else 0.0

    def _work(self, batches: list[Batch]) -> StepBatches:
        """The step on its micro-batches, which stages without inputs or targets do not have."""
        step = self.engine.applied
        # Engines take the mean over micro-batches and replicas: of sums, divided by a mean.
        normaliser = self._counted / (self.pace.accumulate * self.engine.replicas) or 1.0

        def begin() -> None:
            self._checked, self._parts = [], {}
            seed_device(self.engine.device, *self.seed, step)

        @lru_cache(maxsize=1)  # one rank's inputs and loss want the same
        def augmented(number: int) -> Batch:
            with seeded(*self.seed, step, number):
                return self.task.augment(batches[number])

        def loss(number: int, output: Any) -> Tensor:
            found = self.task.loss(output, augmented(number), normaliser)
            self._checked.append((batches[number], found.finite))
            for name, part in found.parts.items():
                share = part.detach() / self.pace.accumulate
                self._parts[name] = self._parts.get(name, 0) + share
            return found.total

        counted = self._counts(self._next or [])
        return StepBatches(
            begin, lambda number: augmented(number).inputs, loss, counted, self._wishes
        )

    def _name_samples(self, verdict: Verdict) -> Verdict:
        """Adds the samples of a step that was not finite; every rank must call it."""
        if "finite" not in verdict.kinds:
            return verdict
        whole = [key for batch, _ in self._checked for key in batch.keys]
        bad = [
            key
            for batch, fine in self._checked
            for key, good in zip(batch.keys, fine.tolist(), strict=True)
            if not good
        ]
        texts = list(verdict.messages)
        for rank, keys in enumerate(from_all(bad or whole)):
            if keys and any(text.startswith(f"rank {rank}: ") for text in verdict.messages):
                more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
                step = self.engine.applied + 1
                texts.append(f"rank {rank}: step {step}: samples {', '.join(keys[:NAMED])}{more}")
        return replace(verdict, messages=tuple(texts))

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
        self.progress.worst_drift = worst_drift((known, verdict.drift))

    def _let_guard_decide(self, verdict: Verdict) -> None:
        """For the steps to come. Every rank has the same verdict, and so decides alike."""
        if self.guard is None:
            return
        decision = self.guard.note(self.engine.applied, verdict.loss, verdict.drift)
        if decision is None:
            return
        step, (action, place, reason) = self.engine.applied, decision
        if action != "move":
            log.info("step %d: the coefficients %s: %s", step, PHRASES[action], reason)
        if self.records is not None:
            self.records.log(step, guard=action, guard_place=place, guard_reason=reason)

    def _count_skipped(self) -> None:
        """Adds up what all ranks have left out; every rank must call it."""
        self.progress.skipped += int(total(self._skipped))
        self._skipped = 0

    def _log(self, verdict: Verdict, rate: float) -> None:
        """Every rank must call it."""
        self._count_skipped()
        alpha, beta = self.engine.coefficients
        speed, memory, seconds = self.speed.read(), peak_memory(), self.engine.seconds()
        ranks = spread({"data_wait": speed["data_wait"], **seconds})
        paused, self._paused = self._paused, 0.0
        held = {"remainder_bytes": self.engine.remainder_bytes, **memory}
        stages = self.engine.by_stage({**held, **seconds})
        by_channel = self.engine.chains[0].setting.by_channel
        near = {"channels_near_limit": sum(verdict.near.values())} if by_channel else {}
        parts = averages({f"loss_{name}": float(part) for name, part in self._parts.items()})
        if self.records is not None:
            self.records.log(
                self.engine.applied,
                loss=verdict.loss,
                lr=rate,
                lr_lowest=rate * self.pace.lr_range[0],
                lr_highest=rate * self.pace.lr_range[1],
                alpha=alpha,
                beta=beta,
                gradient_norm=self.engine.gradient_norm,
                certificate_failures=len(verdict.messages),
                drift=verdict.drift,
                skipped=self.progress.skipped,
                checkpoint_pause=paused,
                **ranks,
                **near,
                **parts,
                **speed,
                **held,
                **stages,
            )

    def _validate(self, batches: Iterable[Batch]) -> bool:
        """True if none was better; False too if the run was asked to stop meanwhile."""
        with self.watchdog.other(f"the validation after step {self.engine.applied}"):
            done = validate(self.engine, self.task, batches, self._agree_to_stop)
        if done is None:
            return False
        (found, look), step = done, self.engine.applied
        if self.records is not None:
            self.records.log(step, **{f"val_{name}": value for name, value in found.items()})
            if look is not None:
                self.records.show(step, look)
        self.speed.restart()
        return self.progress.note_validation({"step": step, **found}, *self.task.best)
