"""What a plan says to people."""

from __future__ import annotations

import math
import re

from dr2dist.config import Config
from dr2dist.data.mixing import MixedOrder
from dr2dist.data.positions import open_at_most
from dr2dist.data.prefetch import least_cache
from dr2dist.parallel.pipeline.layers import Layer
from dr2dist.training.plan import Plan
from dr2dist.training.schedule import learning_rate


def describe(plan: Plan) -> str:
    """A few lines for people."""
    chains = ", ".join(f"{name}: {count} functions" for name, count in plan.lengths.items())
    given = ", each gives the mean of its last two" if plan.setting.hand_on == "mean" else ""
    first, last = plan.schedule.at(0), plan.schedule.at(plan.steps)
    held_out = "none" if plan.val is None else str(plan.val.num_samples)
    if plan.val is not None and plan.val.fingerprint() == plan.train.fingerprint():
        held_out = "the same ones"
    return "\n".join(
        [
            f"parameters    {plan.parameters:,}, {plan.trained:,} of them trained in "
            f"{plan.groups} group(s)",
            *_adapters(plan),
            f"chains        {chains}{given}",
            f"coefficients  ({first.alpha:.4f}, {first.beta:.4f}) to "
            f"({last.alpha:.4f}, {last.beta:.4f})"
            f"{', gain 1 + beta' if plan.setting.gain == 'consistent' else ''}",
            f"samples       {plan.train.num_samples} for training, {held_out} for validation",
            *_sources(plan),
            f"steps         {plan.steps} of {plan.global_batch} samples on "
            f"{plan.grid.stages * plan.grid.replicas} rank(s), {plan.steps_per_epoch} an epoch",
            *_order(plan),
            *_best(plan),
            *_states(plan),
            *([] if plan.footprint is None else [f"memory        {plan.footprint.describe()}"]),
            f"ZeRO          {plan.deepspeed['zero_optimization']['stage']}{_sums(plan)}",
            *_stages(plan),
        ]
    )


def _sums(plan: Plan) -> str:
    """Where sums over many micro-batches are less precise than their parts."""
    deepspeed = plan.deepspeed
    count, zero = deepspeed["gradient_accumulation_steps"], deepspeed["zero_optimization"]["stage"]
    if count == 1 or zero != 1 or not deepspeed["bf16"]["enabled"]:
        return ""
    return f", gradients of {count} micro-batches are summed in bf16 (ZeRO 0, 2 and 3: fp32)"


def describe_longer(plan: Plan, config: Config, done: int) -> str:
    """What the schedules do when a run that has ended after `done` steps goes on."""
    alpha, beta = plan.schedule.at(done)
    rate = learning_rate(config.optim, plan.steps)(done)
    return (
        f"{done} steps are done of {plan.steps}: the schedules are those of {plan.steps} "
        f"steps, and go on with lr {rate:.3g}, alpha {alpha:.4f}, beta {beta:.4f}"
    )


def _adapters(plan: Plan) -> list[str]:
    if plan.blueprint.lora is None:
        return []
    kinds = sorted({re.sub(r"\d+", "*", name) for name in plan.adapted})
    rank, count = plan.blueprint.lora.rank, len(plan.adapted)
    return [f"adapters      rank {rank} on {count} linear layers: {', '.join(kinds)}"]


def _sources(plan: Plan) -> list[str]:
    if not isinstance(plan.order, MixedOrder):
        return []
    return [
        f"  source      {part.base}: {part.num_samples} samples, {passes:g} pass(es) and "
        f"{length / plan.order.num_samples:.1%} of an epoch"
        for part, passes, length in zip(
            plan.train.sources, plan.order.passes, plan.order.lengths, strict=True
        )
    ]


def _order(plan: Plan) -> list[str]:
    if plan.order is None:
        return []
    shards, most = plan.train.shards, open_at_most(plan.order)
    alone = open_at_most(plan.order, nodes=plan.order.streams)
    size = int(plan.deepspeed["train_micro_batch_size_per_gpu"])
    lines = [
        f"order         {plan.order.describe()}: at most {most} shards are open at a time",
        f"mixes         a micro-batch is of up to {min(size, most)} shards where one node "
        f"reads all streams, {min(size, alone)} where each reads one",
    ]
    if all(shard.bytes for shard in shards):
        parts = zip(plan.train.sources, plan.order.lengths, strict=True)
        epoch = sum(part.bytes_of(length) for part, length in parts)
        step = epoch * plan.global_batch / plan.order.num_samples
        lines.append(f"reads         {step:,.0f} bytes a step")
    if any(map(plan.train.is_remote, shards)):
        least = least_cache(plan.train, plan.order)
        lines.append(f"cache         at least {least:,} bytes, if one node reads all streams")
    return lines


def _best(plan: Plan) -> list[str]:
    if plan.val is None:
        return []
    metric, wanted = plan.task.best
    which = "largest" if wanted == "max" else "least"
    return [f"best          the {which} {metric} of a validation, ties by its loss"]


def _stages(plan: Plan) -> list[str]:
    if plan.grid.stages == 1:
        return []
    total = sum(layer.flops for layer in plan.layers)
    bubble = plan.grid.bubble(plan.deepspeed["gradient_accumulation_steps"])
    lines = [
        f"stages        {plan.grid.stages} x {plan.grid.replicas} replica(s), "
        f"idle for {bubble:.0%} of a step"
    ]
    for number, part in enumerate(plan.parts):
        own = plan.layers[part.start : part.stop]
        share = sum(layer.flops for layer in own) / total
        ranks = [plan.grid.rank(number, replica) for replica in range(plan.grid.replicas)]
        lines += [
            f"  stage {number}     ranks {ranks[0]} to {ranks[-1]}: layers {part.start} to "
            f"{part.stop - 1} ({own[0].kind} to {own[-1].kind}), {share:.0%} of the FLOPs",
            f"              {_held(plan, number, own)}",
        ]
        if number < plan.grid.stages - 1:
            lines.append(f"              {_crossing(plan, own[-1])}")
    return lines


def _held(plan: Plan, number: int, own: list[Layer]) -> str:
    """What a stage holds: parameters, and remainders at their most."""
    text = f"{sum(layer.parameters for layer in own):,} parameters"
    bits = _kept_bits(plan)
    if not bits:
        return text
    flight = min(plan.grid.stages - number, plan.deepspeed["gradient_accumulation_steps"])
    inputs = sum(4 * _elements(plan, shape) for shape in _inputs_kept(plan, number))
    # The first function of a chain keeps none: it reverses by y = beta x.
    kept = [layer for layer in own if layer.kind == "function" and layer.place.function]
    size = sum(_elements(plan, layer.shape) for layer in kept) * bits // 8
    other = f" and {inputs:,} of inputs" if inputs else ""
    place = " in the host's memory" if plan.setting.remainders == "host" else ""
    return (
        f"{text}; {flight} micro-batch(es) in flight, {size:,} bytes of remainders{place}"
        f"{other} each"
    )


def _kept_bits(plan: Plan) -> int:
    """Bits of remainders for each element and function."""
    return plan.setting.remainder_bits if plan.setting.keeps_remainders else 0


def _states(plan: Plan) -> list[str]:
    setting = plan.setting
    if setting.arithmetic == "float":
        return []
    grid = f"in steps of 2^-{setting.fraction_bits}"
    if setting.by_channel:
        grid = "with a scale for each channel, found in the first step"
    bits = _kept_bits(plan)
    kept = f"; {bits} bit(s) of remainders, on the {setting.remainders}" if bits else ""
    return [f"states        {setting.state_bits} bits {grid}{kept}"]


def _inputs_kept(plan: Plan, number: int) -> list[tuple[int, ...]]:
    """Shapes of one sample's input to the stem, the transitions and the tail of a stage."""
    shapes = [(plan.inputs,), *(layer.shape for layer in plan.layers)]
    return [shapes[i] for i in plan.parts[number] if plan.layers[i].kind != "function"]


def _elements(plan: Plan, shape: tuple[int, ...]) -> int:
    """Of a micro-batch."""
    return math.prod(shape) * int(plan.deepspeed["train_micro_batch_size_per_gpu"])


def _crossing(plan: Plan, layer: Layer) -> str:
    """What crosses the cut behind a layer, as a text: bytes of a micro-batch, on and back."""
    narrow = any(plan.deepspeed.get(kind, {}).get("enabled") for kind in ("bf16", "fp16"))
    tokens = (2 if narrow else 4) * _elements(plan, layer.shape)
    on, back = tokens, tokens
    if layer.hands_on_state:
        bits = 32 if plan.setting.arithmetic == "float" else plan.setting.state_bits
        on = 2 * _elements(plan, layer.shape) * bits // 8
        back = 2 * tokens + (on if plan.setting.memory == "reverse" else 0)
    batch = int(plan.deepspeed["train_micro_batch_size_per_gpu"])
    beside = [(4 * math.prod(each.shape_of(batch)), each.trained) for each in layer.carried]
    on += sum(count for count, _ in beside)
    back += sum(count for count, trained in beside if trained)
    return f"{on:,} bytes on and {back:,} back a micro-batch"
