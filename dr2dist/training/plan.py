"""Everything about a run that can be known, and checked, before any process starts."""

from __future__ import annotations

import contextlib
import math
import re
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
from dr2dist.data.mixing import MixedOrder
from dr2dist.data.positions import AnyOrder, open_at_most
from dr2dist.data.prefetch import least_cache
from dr2dist.errors import UserError
from dr2dist.loggers.registry import check_loggers
from dr2dist.parallel.deepspeed_json import deepspeed_config, read_deepspeed_json
from dr2dist.parallel.pipeline.grid import Grid
from dr2dist.parallel.pipeline.layers import Layer, layers_of
from dr2dist.parallel.pipeline.partition import partition
from dr2dist.reversible import Setting
from dr2dist.reversible.trees import tree_leaves
from dr2dist.tasks.task import Task
from dr2dist.training.datasets import datasets, indexes, order_of
from dr2dist.training.footprint import Footprint, elements_of, footprint
from dr2dist.training.groups import parameter_groups
from dr2dist.training.schedule import learning_rate


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

        fetch: timm's own weights are fetched now, before all ranks would at once.
        """
        self.compare_shards(config)
        for dataset in filter(None, datasets(config, self.task, self.train, self.val)):
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

    def describe_longer(self, config: Config, done: int) -> str:
        """What the schedules do when a run that has ended after `done` steps goes on."""
        alpha, beta = self.schedule.at(done)
        rate = learning_rate(config.optim, self.steps)(done)
        return (
            f"{done} steps are done of {self.steps}: the schedules are those of {self.steps} "
            f"steps, and go on with lr {rate:.3g}, alpha {alpha:.4f}, beta {beta:.4f}"
        )

    def describe(self) -> str:
        """A few lines for people."""
        chains = ", ".join(f"{name}: {count} functions" for name, count in self.lengths.items())
        first, last = self.schedule.at(0), self.schedule.at(self.steps)
        held_out = "none" if self.val is None else str(self.val.num_samples)
        return "\n".join(
            [
                f"parameters    {self.parameters:,}, {self.trained:,} of them trained in "
                f"{self.groups} group(s)",
                *self._describe_adapters(),
                f"chains        {chains}",
                f"coefficients  ({first.alpha:.4f}, {first.beta:.4f}) to "
                f"({last.alpha:.4f}, {last.beta:.4f})",
                f"samples       {self.train.num_samples} for training, {held_out} for validation",
                *self._describe_sources(),
                f"steps         {self.steps} of {self.global_batch} samples on "
                f"{self.grid.stages * self.grid.replicas} rank(s), {self.steps_per_epoch} an epoch",
                *self._describe_order(),
                *self._describe_best(),
                *self._describe_states(),
                *([] if self.footprint is None else [f"memory        {self.footprint.describe()}"]),
                f"ZeRO          {self.deepspeed['zero_optimization']['stage']}",
                *self._describe_stages(),
            ]
        )

    def _describe_adapters(self) -> list[str]:
        if self.blueprint.lora is None:
            return []
        kinds = sorted({re.sub(r"\d+", "*", name) for name in self.adapted})
        rank, count = self.blueprint.lora.rank, len(self.adapted)
        return [f"adapters      rank {rank} on {count} linear layers: {', '.join(kinds)}"]

    def _describe_sources(self) -> list[str]:
        if not isinstance(self.order, MixedOrder):
            return []
        return [
            f"  source      {part.base}: {part.num_samples} samples, {passes:g} pass(es) and "
            f"{length / self.order.num_samples:.1%} of an epoch"
            for part, passes, length in zip(
                self.train.sources, self.order.passes, self.order.lengths, strict=True
            )
        ]

    def _describe_order(self) -> list[str]:
        if self.order is None:
            return []
        shards, most = self.train.shards, open_at_most(self.order)
        alone = open_at_most(self.order, nodes=self.order.streams)
        size = int(self.deepspeed["train_micro_batch_size_per_gpu"])
        lines = [
            f"order         {self.order.describe()}: at most {most} shards are open at a time",
            f"mixes         a micro-batch is of up to {min(size, most)} shards where one node "
            f"reads all streams, {min(size, alone)} where each reads one",
        ]
        if all(shard.bytes for shard in shards):
            parts = zip(self.train.sources, self.order.lengths, strict=True)
            epoch = sum(part.bytes_of(length) for part, length in parts)
            step = epoch * self.global_batch / self.order.num_samples
            lines.append(f"reads         {step:,.0f} bytes a step")
        if any(map(self.train.is_remote, shards)):
            least = least_cache(self.train, self.order)
            lines.append(f"cache         at least {least:,} bytes, if one node reads all streams")
        return lines

    def _describe_best(self) -> list[str]:
        if self.val is None:
            return []
        metric, wanted = self.task.best
        which = "largest" if wanted == "max" else "least"
        return [f"best          the {which} {metric} of a validation, ties by its loss"]

    def _describe_stages(self) -> list[str]:
        if self.grid.stages == 1:
            return []
        total = sum(layer.flops for layer in self.layers)
        bubble = self.grid.bubble(self.deepspeed["gradient_accumulation_steps"])
        lines = [
            f"stages        {self.grid.stages} x {self.grid.replicas} replica(s), "
            f"idle for {bubble:.0%} of a step"
        ]
        for number, part in enumerate(self.parts):
            own = self.layers[part.start : part.stop]
            share = sum(layer.flops for layer in own) / total
            ranks = [self.grid.rank(number, replica) for replica in range(self.grid.replicas)]
            lines += [
                f"  stage {number}     ranks {ranks[0]} to {ranks[-1]}: layers {part.start} to "
                f"{part.stop - 1} ({own[0].kind} to {own[-1].kind}), {share:.0%} of the FLOPs",
                f"              {self._held(number, own)}",
            ]
            if number < self.grid.stages - 1:
                lines.append(f"              {self._crossing(own[-1])}")
        return lines

    def _held(self, number: int, own: list[Layer]) -> str:
        """What a stage holds: parameters, and remainders at their most."""
        text = f"{sum(layer.parameters for layer in own):,} parameters"
        bits = self._kept_bits
        if not bits:
            return text
        flight = min(self.grid.stages - number, self.deepspeed["gradient_accumulation_steps"])
        inputs = sum(4 * self._elements(shape) for shape in self._inputs_kept(number))
        # The first function of a chain keeps none: it reverses by y = beta x.
        kept = [layer for layer in own if layer.kind == "function" and layer.place.function]
        size = sum(self._elements(layer.shape) for layer in kept) * bits // 8
        other = f" and {inputs:,} of inputs" if inputs else ""
        place = " in the host's memory" if self.setting.remainders == "host" else ""
        return (
            f"{text}; {flight} micro-batch(es) in flight, {size:,} bytes of remainders{place}"
            f"{other} each"
        )

    @property
    def _kept_bits(self) -> int:
        """Bits of remainders for each element and function."""
        return self.setting.remainder_bits if self.setting.keeps_remainders else 0

    def _describe_states(self) -> list[str]:
        setting = self.setting
        if setting.arithmetic == "float":
            return []
        grid = f"in steps of 2^-{setting.fraction_bits}"
        if setting.by_channel:
            grid = "with a scale for each channel, found in the first step"
        bits = self._kept_bits
        kept = f"; {bits} bit(s) of remainders, on the {setting.remainders}" if bits else ""
        return [f"states        {setting.state_bits} bits {grid}{kept}"]

    def _inputs_kept(self, number: int) -> list[tuple[int, ...]]:
        """Shapes of one sample's input to the stem, the transitions and the tail of a stage."""
        shapes = [(self.inputs,), *(layer.shape for layer in self.layers)]
        return [shapes[i] for i in self.parts[number] if self.layers[i].kind != "function"]

    def _elements(self, shape: tuple[int, ...]) -> int:
        """Of a micro-batch."""
        return math.prod(shape) * int(self.deepspeed["train_micro_batch_size_per_gpu"])

    def _crossing(self, layer: Layer) -> str:
        """What crosses the cut behind a layer, as a text: bytes of a micro-batch, on and back."""
        narrow = any(self.deepspeed.get(kind, {}).get("enabled") for kind in ("bf16", "fp16"))
        tokens = (2 if narrow else 4) * self._elements(layer.shape)
        on, back = tokens, tokens
        if layer.hands_on_state:
            bits = 32 if self.setting.arithmetic == "float" else self.setting.state_bits
            on = 2 * self._elements(layer.shape) * bits // 8
            back = 2 * tokens + (on if self.setting.memory == "reverse" else 0)
        batch = int(self.deepspeed["train_micro_batch_size_per_gpu"])
        beside = [(4 * math.prod(each.shape_of(batch)), each.trained) for each in layer.carried]
        on += sum(count for count, _ in beside)
        back += sum(count for count, trained in beside if trained)
        return f"{on:,} bytes on and {back:,} back a micro-batch"


def make_plan(config: Config, ranks: int) -> Plan:
    """Checks the whole configuration against files, model and number of ranks.

    Builds no weights. Raises UserError for the first thing that cannot work.
    """
    _check_precision(config.train.precision)
    check_loggers(config.train.loggers)
    train, val = indexes(config.data)
    grid = Grid.of(ranks, config.parallel.stages)
    batch = config.train.micro_batch * config.train.accumulate * grid.replicas
    order = None if config.data.order == "dealt" else order_of(config, train)
    samples = train.num_samples if order is None else order.num_samples
    if samples < batch:
        raise UserError(
            f"{train.base}: holds {samples} samples, fewer than a global batch "
            f"of {batch} (train.micro_batch x train.accumulate x {grid.replicas} replicas)"
        )
    # Dealt batches end with an epoch; those of streams cross into the next one.
    per_epoch = samples // batch if order is None else -(-samples // batch)
    passes = config.train.epochs or 0
    of_epochs = passes * per_epoch if order is None else passes * samples / batch
    steps = config.train.steps or max(
        1, round(of_epochs) if order is None else math.ceil(of_epochs)
    )
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
