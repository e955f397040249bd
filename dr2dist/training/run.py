"""One rank of a run: from a configuration to trained weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from dr2dist.assembly import assemble
from dr2dist.backbones.convert import convert
from dr2dist.checkpoints.folders import clear_unfinished
from dr2dist.config import Config, dump_config
from dr2dist.config.coefficients import Guarded
from dr2dist.errors import UserError
from dr2dist.loggers.registry import make_loggers
from dr2dist.parallel.agreement import AgreedError, agree, from_all, from_first
from dr2dist.parallel.compared import compare
from dr2dist.parallel.engine import ReversibleEngine, UnprovenStepError
from dr2dist.parallel.heartbeat import Heartbeat
from dr2dist.parallel.pipeline.engine import StagedEngine
from dr2dist.parallel.pipeline.grid import Grid
from dr2dist.parallel.pipeline.layers import keep_only
from dr2dist.parallel.processes import init_distributed, largest, share_cores
from dr2dist.reversible.arithmetic.setting import COMPUTED
from dr2dist.training.checkpoint_manager import CheckpointManager, Progress
from dr2dist.training.facts import (
    facts_of_config,
    facts_of_data,
    facts_of_output,
    facts_of_program,
)
from dr2dist.training.folder import Start, find_start
from dr2dist.training.groups import ParameterGroup, kept_groups, parameter_groups
from dr2dist.training.lock import RunLock
from dr2dist.training.logs import logged_to
from dr2dist.training.plan import Plan, make_plan
from dr2dist.training.profile import Profile
from dr2dist.training.records import Records, peak_memory
from dr2dist.training.run_files import LOGS
from dr2dist.training.schedule import learning_rate
from dr2dist.training.speed import Speed, device_peak
from dr2dist.training.streams import streams
from dr2dist.training.trainer import Pace, Trainer
from dr2dist.training.watchdog import LEAST, Watchdog
from dr2dist.version import __version__

log = logging.getLogger(__name__)


def run(config: Config, asked: Callable[[], str | None] = lambda: None) -> dict[str, Any]:
    """Trains in the launcher's process group and writes the run's folder; returns its summary.

    A folder that holds the run so far is gone on with, a finished one is left alone. asked: what
    has asked this rank to stop, if anything has; then the step is ended, a checkpoint written, and
    the summary's status is "interrupted". Raises UserError for what cannot work and
    UnprovenStepError for a step that cannot be proven. If another rank is lost, the process ends
    with a line that names it.
    """
    share_cores()
    init_distributed(config.launch.join_limit)
    ranks = dist.get_world_size()
    name = Grid.of(ranks, config.parallel.stages).name
    heartbeat = Heartbeat(name, agreed=(UnprovenStepError, AgreedError))
    with heartbeat, ExitStack() as stack:
        return _run(config, heartbeat, asked, stack)


def _run(
    config: Config, heartbeat: Heartbeat, asked: Callable[[], str | None], stack: ExitStack
) -> dict[str, Any]:
    rank, ranks = heartbeat.rank, heartbeat.ranks
    if rank:  # rank 0 speaks for all
        for handler in logging.getLogger().handlers:
            handler.setLevel(logging.WARNING)
    watchdog = Watchdog(heartbeat.name, config.train.step_limit, heartbeat.tell)
    stack.enter_context(watchdog)
    folder = Path(config.output)
    _compare_programs(config)
    with watchdog.other("the plan", LEAST):
        with agree():
            plan = make_plan(config, ranks)
        compare(lambda: facts_of_data(plan))

    def look() -> tuple[Start, dict[str, str]]:
        # Only rank 0 looks: file systems of several nodes show what is new to one before another.
        found = find_start(config, plan.global_batch, plan.steps, plan.train.digest())
        if found.finished is None:
            stack.enter_context(RunLock(folder))
            clear_unfinished(folder)
            plan.compare_shards(config)
        return found, facts_of_output(folder)

    # A run whose command was killed there may take its grace to end.
    with watchdog.other("looking at the output", LEAST + config.train.grace):
        start, output = from_first(look)
        if start.finished is None:
            compare(lambda: facts_of_output(folder, output))
    if start.finished is not None:
        log.info("%s is finished: nothing is left to do", config.output)
        return start.finished
    with agree():
        stack.enter_context(logged_to(folder / LOGS / f"rank-{rank}.log", heartbeat.name))
    if start.cut:
        log.warning("%s: the run before left no checkpoint: it starts anew", folder)
    engine, rates = _engine(config, plan)
    manager = CheckpointManager(folder, config.checkpoint.keep, _facts(config, plan))
    progress = Progress()
    if start.checkpoints:
        progress = manager.restore_newest(start.checkpoints, engine)
        log.info("going on after step %d", engine.applied)
    records = None
    with agree():
        if rank == 0:
            loggers = make_loggers(config.train.loggers)
            records = Records(folder, dump_config(config), engine.applied, loggers)
            stack.callback(records.close)
            done, batch = engine.applied, plan.global_batch
            records.note_start(step=done, steps=plan.steps, ranks=ranks, batch=batch)
    trainer = _trainer(config, plan, engine, rates, records, manager, progress, asked, watchdog)
    return _train(config, plan, trainer)


def _compare_programs(config: Config) -> None:
    """Raises AgreedError for ranks that would not compute the same."""
    compare(lambda: facts_of_config(config))
    hint = "; launch.allow names what may differ, see docs/cluster.md"
    compare(lambda: facts_of_program(config.launch.allow), hint)


def _train(config: Config, plan: Plan, trainer: Trainer) -> dict[str, Any]:
    start, before = time.monotonic(), trainer.engine.applied
    failure: UnprovenStepError | None = None
    try:
        trainer.run()
    except UnprovenStepError as error:
        failure = error
    except AgreedError:
        raise
    except UserError as error:  # of this rank alone: a sample that cannot be read
        raise UserError(f"rank {dist.get_rank()}: {error}") from None
    end = _end(trainer, failure)
    samples = (trainer.engine.applied - before) * plan.global_batch
    summary = _summary(config, plan, trainer, end, samples)
    summary["seconds"] = time.monotonic() - start
    if trainer.records is not None:
        trainer.records.write_summary(summary)
    dist.barrier()
    if failure is not None:
        raise failure
    return summary


class End(NamedTuple):
    """How a run ended, and why if it has not finished."""

    status: Literal["finished", "interrupted", "stopped"]
    reason: str | None = None
    failures: int = 0


def _end(trainer: Trainer, failure: UnprovenStepError | None) -> End:
    """Every rank must call it."""
    if failure is not None:
        return End("stopped", str(failure), len(failure.verdict.messages))
    if not trainer.stopping:
        return End("finished")
    reasons = from_all(trainer.asked())
    return End("interrupted", next((reason for reason in reasons if reason), None))


class Rates(NamedTuple):
    """scales: of the learning rate, of each of this rank's groups. range: the least and the largest
    of all stages' groups."""

    scales: tuple[float, ...]
    range: tuple[float, float]


def _engine(config: Config, plan: Plan) -> tuple[ReversibleEngine, Rates]:
    """The engine, and the learning rates of its groups."""
    in_parts = config.parallel.zero == 3 or plan.grid.stages > 1
    model, _, weights = assemble(plan.blueprint, "in parts" if in_parts else "whole")
    groups = parameter_groups(
        model, config.optim.weight_decay, config.optim.layer_decay, config.optim.groups
    )
    scales = [group.lr_scale for group in groups]
    setting, compiled = asdict(config.setting()), config.reversible.compile
    net = convert(model, **setting, on_failure="record", compile=compiled).train()
    precision, ema = config.train.precision, config.train.ema
    if plan.grid.stages == 1:
        optimizer = _optimizer(config, groups)
        engine = ReversibleEngine(net, optimizer, plan.deepspeed, precision, ema, weights)
    else:
        own = plan.parts[plan.grid.place(dist.get_rank())[0]]
        keep_only(net, plan.layers, own, weights)
        groups = kept_groups(groups, net)
        optimizer = _optimizer(config, groups)
        engine = StagedEngine(
            net, optimizer, plan.deepspeed, plan.grid, plan.layers, own, precision, ema
        )
    own_scales = tuple(group.lr_scale for group in groups)
    return engine, Rates(own_scales, (min(scales), max(scales)))


def _optimizer(config: Config, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    """Over groups; fused, one pass over memory, on GPUs and for what is offloaded from them."""
    optim = config.optim
    fused = True if torch.cuda.is_available() or config.parallel.offload_optimizer else None
    options = [
        {"params": list(group.parameters), "weight_decay": group.weight_decay} for group in groups
    ]
    if optim.name == "sgd":
        return torch.optim.SGD(options, optim.lr, momentum=optim.momentum, fused=fused)
    return torch.optim.AdamW(options, optim.lr, betas=optim.betas, fused=fused)


def _facts(config: Config, plan: Plan) -> dict[str, Any]:
    """What every checkpoint says of the run: all that the exported model needs."""
    return {
        **plan.blueprint.described(),
        "preprocessing": plan.task.preprocessing,
        "fields": config.data.fields,
        "plugins": list(config.plugins),
        **{name: getattr(config.setting(), name) for name in COMPUTED},
        "global_batch": plan.global_batch,
        "index": plan.train.digest(),
        "dr2dist": __version__,
    }


def _trainer(
    config: Config,
    plan: Plan,
    engine: ReversibleEngine,
    rates: Rates,
    records: Records | None,
    manager: CheckpointManager,
    progress: Progress,
    asked: Callable[[], str | None],
    watchdog: Watchdog,
) -> Trainer:
    pace = Pace(
        steps=plan.steps,
        accumulate=config.train.accumulate,
        batch=plan.global_batch,
        log_every=config.train.log_every,
        validate_every=config.train.validate_every or plan.steps_per_epoch,
        checkpoint_every=config.checkpoint.steps,
        checkpoint_minutes=config.checkpoint.minutes,
        bad_batches=config.train.bad_batches if config.train.on_bad_batch == "skip" else 0,
        patience=config.train.patience,
        schedule=plan.schedule,
        learning_rate=learning_rate(config.optim, plan.steps),
        lr_scales=rates.scales,
        lr_range=rates.range,
        limits=config.coefficients.limits() if isinstance(config.coefficients, Guarded) else None,
    )
    train, val = streams(config, plan, engine, progress.consumed)
    return Trainer(
        engine,
        plan.task,
        pace,
        train,
        val,
        records,
        manager,
        progress,
        Speed(plan.flops // plan.grid.stages, device_peak(config.train.precision), engine.replicas),
        Profile(Path(config.output) / "profile", config.train.profile),
        seed=(config.train.seed, engine.replica),
        asked=asked,
        watchdog=watchdog,
    )


def _summary(
    config: Config, plan: Plan, trainer: Trainer, end: End, samples: int
) -> dict[str, Any]:
    """What the run has reached. Every rank must call it: peak memory is the largest of all."""
    alpha, beta = trainer.engine.coefficients
    return {
        "status": end.status,
        "stopped_early": end.status == "finished" and trainer.engine.applied < plan.steps,
        "reason": end.reason,
        "model": config.model.name,
        "steps": trainer.engine.applied,
        "ranks": plan.grid.stages * plan.grid.replicas,
        "stages": plan.grid.stages,
        "alpha": alpha,
        "beta": beta,
        "arithmetic": config.reversible.arithmetic,
        "memory": config.reversible.memory,
        "certificate_failures": end.failures,
        "worst_drift": trainer.progress.worst_drift,
        "loss": trainer.progress.loss,
        "best": trainer.progress.best,
        "last": trainer.progress.last,
        "skipped": trainer.progress.skipped,
        "bad_batches": trainer.progress.bad_batches,
        "state_bytes": trainer.engine.state_bytes(),
        **{kind: int(largest(value)) for kind, value in peak_memory().items()},
        "samples": samples,
    }
