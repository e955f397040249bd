"""Everything about a run that can be known, and checked, before any process starts."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dr2dist.assembly import Blueprint, assemble
from dr2dist.backbones.convert import convert
from dr2dist.backbones.lora import adapted_layers
from dr2dist.backbones.measure import Measured, measure, on_meta, training_flops
from dr2dist.backbones.network import ReversibleNetwork
from dr2dist.backbones.weights import check_file
from dr2dist.coefficients import Schedule
from dr2dist.config import Config
from dr2dist.data.compared import check_fields, compare_with_index
from dr2dist.data.fields import Fields
from dr2dist.data.index import Index
from dr2dist.data.positions import AnyOrder
from dr2dist.errors import UserError
from dr2dist.loggers.registry import check_loggers
from dr2dist.parallel.deepspeed_json import deepspeed_config, read_deepspeed_json
from dr2dist.parallel.pipeline.grid import Grid
from dr2dist.parallel.pipeline.layers import Layer, layers_of
from dr2dist.parallel.pipeline.partition import partition
from dr2dist.reversible import Setting
from dr2dist.reversible.trees import tree_leaves
from dr2dist.tasks.task import Task
from dr2dist.training.datasets import datasets, fetching, indexes, order_of
from dr2dist.training.footprint import Footprint, elements_of, footprint
from dr2dist.training.groups import parameter_groups


@dataclass(frozen=True)
class Plan:
    """What a configuration comes to on a number of ranks.

    grid: stages and data-parallel replicas. layers: of the network if it is cut into stages;
    parts: which are each stage's.
    steps: optimiser steps. steps_per_epoch: until all samples have been seen. order: of training
    samples; None where they are dealt as versions before did. blueprint: of the
    network and its task; task: that has seen the training data. deepspeed: DeepSpeed's
    configuration. lengths: functions of each chain. adapted: layers with adapters. parameters,
    trained: of the model, in numbers.
    groups: of the optimiser. flops: of training on one sample. inputs: numbers of one sample's
    inputs. setting: of the chains, at the smallest beta. footprint: without stages.
    """

    grid: Grid
    layers: list[Layer]
    parts: tuple[range, ...]
    steps: int
    steps_per_epoch: int
    order: AnyOrder | None
    schedule: Schedule
    train: Index
    val: Index | None
    blueprint: Blueprint
    task: Task
    deepspeed: dict[str, Any]
    lengths: dict[str, int]
    adapted: tuple[str, ...]
    parameters: int
    trained: int
    groups: int
    flops: int
    inputs: int
    setting: Setting
    footprint: Footprint | None

    @property
    def global_batch(self) -> int:
        """Samples of an optimiser step, over all ranks."""
        return int(self.deepspeed["train_batch_size"])

    def try_out(self, config: Config, fetch: bool) -> None:
        """Raises UserError if shards are not those of their index, a file's weights are another
        model's (it is mapped, not read), or the first samples cannot become inputs.

        fetch: timm's own weights, and the first shards that are not here, are fetched now, before
        all ranks would at once.
        """
        self.compare_shards(config)
        for dataset in filter(None, datasets(config, self.task, self.train, self.val)):
            if fetch or fetching(config.data, dataset.index) is None:
                dataset[0, 0]
        if self.blueprint.weights == "hub":
            if fetch:
                assemble(self.blueprint)
        elif self.blueprint.weights is not None:
            assemble(self.blueprint, "in parts")

    def compare_shards(self, config: Config) -> None:
        """Raises UserError for shards that are not those of their index."""
        for index in (*self.train.sources, *(self.val.sources if self.val else ())):
            compare_with_index(index, config.data.unreadable == "skip")


def make_plan(config: Config, ranks: int) -> Plan:
    """Checks the whole configuration against files, model and number of ranks.

    Builds no weights. Raises UserError for the first thing that cannot work.
    """
    _check_precision(config.train.precision)
    check_loggers(config.train.loggers)
    train, val = indexes(config.data)
    grid = Grid.of(ranks, config.parallel.stages)
    order = None if config.data.order == "dealt" else order_of(config, train)
    steps, per_epoch = _length(config, train, order, grid.replicas)
    _check_effects(config, steps, train, val)
    schedule = config.coefficients.schedule(steps)
    blueprint = Blueprint.of(config, train.classes)
    _check_weights(config.model.given_weights)
    model, task, _ = assemble(blueprint, "meta")
    _check_data(config, task, train, val)
    optim = config.optim
    groups = parameter_groups(model, optim.weight_decay, optim.layer_decay, optim.groups)
    net = convert(model)
    with _as_user_error("coefficients"):
        setting = config.setting()
        lengths = {chain.name: len(chain.functions) for chain in net.chains}
        schedule.check(setting, list(lengths.values()))
    layers = layers_of(net) if grid.stages > 1 else []
    # Stages have measured them already, and take no setting that is measured row by row.
    measured: list[Any] = [*layers] or _measured(net, setting)
    smallest = _at_smallest_beta(setting, schedule)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or n) for n in (1, 0)]
    alone = None if layers else elements_of(measured)
    return Plan(
        grid=grid,
        layers=layers,
        parts=partition([layer.flops for layer in layers], grid.stages) if layers else (),
        steps=steps,
        steps_per_epoch=per_epoch,
        order=order,
        schedule=schedule,
        train=train,
        val=val,
        blueprint=blueprint,
        task=task,
        deepspeed=_deepspeed(config, grid.replicas),
        lengths=lengths,
        adapted=tuple(adapted_layers(model)),
        parameters=counts[0],
        trained=counts[1],
        groups=len(groups),
        flops=training_flops(measured),
        inputs=sum(leaf.numel() for leaf in tree_leaves(net.family.example(net))),
        setting=smallest,
        footprint=footprint(config, grid.replicas, counts, alone, smallest) if alone else None,
    )


def _check_effects(config: Config, steps: int, train: Index, val: Index | None) -> None:
    """Raises UserError for settings that do nothing in a run of so many steps on these data."""
    window = config.train.profile
    if window is not None and window[0] >= steps:
        raise UserError(f"train.profile is {list(window)}, and the run has {steps} step(s)")
    sources = filter(None, (train, val))
    if config.data.cache is not None and not any(fetching(config.data, each) for each in sources):
        raise UserError(
            "data.cache has no effect: all shards are here; with of: all they are copied too"
        )


def _length(config: Config, train: Index, order: AnyOrder | None, replicas: int) -> tuple[int, int]:
    """Optimiser steps of the run, and until all samples have been seen."""
    batch = config.train.micro_batch * config.train.accumulate * replicas
    samples = train.num_samples if order is None else order.num_samples
    if samples < batch:
        raise UserError(
            f"{train.base}: holds {samples} samples, fewer than a global batch "
            f"of {batch} (train.micro_batch x train.accumulate x {replicas} replicas)"
        )
    # Dealt batches end with an epoch; those of streams cross into the next one.
    per_epoch = samples // batch if order is None else -(-samples // batch)
    passes = config.train.epochs or 0
    of_epochs = passes * per_epoch if order is None else passes * samples / batch
    of_epochs = round(of_epochs, 6)  # 1.1 x 100 / 10 is a little more than 11
    steps = round(of_epochs) if order is None else math.ceil(of_epochs)
    return config.train.steps or max(1, steps), per_epoch


def _measured(net: ReversibleNetwork, setting: Setting) -> list[Measured]:
    found = measure(on_meta(net))
    rows = found[0].flow.together
    if setting.measured and rows > 1:
        raise UserError(
            "reversible: memory budget and chunk_size auto are measured row by row, and a sample "
            f"of this model is {rows} rows: allowed are the others"
        )
    return found


def _at_smallest_beta(setting: Setting, schedule: Schedule) -> Setting:
    pair = min(schedule.pairs(), key=lambda pair: pair.beta)
    return replace(setting, alpha=pair.alpha, beta=pair.beta)


def _check_precision(precision: str) -> None:
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError(
            "train.precision: fp16 needs a GPU: DeepSpeed does not support it on the CPU; "
            "use bf16 or fp32"
        )


def _check_data(config: Config, task: Task, train: Index, val: Index | None) -> None:
    """Raises UserError for data that are not what the task learns."""
    fields = Fields(task.fields, config.data.fields)
    task.check_index(train, "data.train")
    check_fields(train, fields, "data.train")
    task.transform(config.data)  # says what it cannot do
    if val is not None:
        if val.classes != train.classes:
            raise UserError("data.val: its classes differ from those of data.train")
        task.check_index(val, "data.val")
        check_fields(val, fields, "data.val")
    task.learn_from(train)


def _check_weights(weights: str | None) -> None:
    if weights not in (None, "hub"):
        check_file(Path(str(weights)))


def _deepspeed(config: Config, replicas: int) -> dict[str, Any]:
    path = config.parallel.deepspeed
    return deepspeed_config(
        zero=config.parallel.zero,
        precision=config.train.precision,
        micro_batch=config.train.micro_batch,
        accumulate=config.train.accumulate,
        replicas=replicas,
        clip=config.optim.clip,
        offload_optimizer=config.parallel.offload_optimizer,
        extra=None if path is None else read_deepspeed_json(path),
        source=path or "",
    )


@contextlib.contextmanager
def _as_user_error(section: str) -> Any:
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{section}: {error}") from None
