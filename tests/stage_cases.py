"""What the ranks of a pool run with pipeline stages; all of them call every function here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dr2dist
from dr2dist.parallel.deepspeed_json import deepspeed_config
from dr2dist.parallel.engine import StepBatches, UnprovenStepError
from dr2dist.parallel.pipeline.engine import StagedEngine
from dr2dist.parallel.pipeline.grid import Grid
from dr2dist.parallel.pipeline.layers import keep_only, layers_of
from dr2dist.parallel.pipeline.partition import partition
from dr2dist.reversible.budget.costs import Watermark
from tests.cases import GLOBAL_BATCH, full_state
from tests.models import build, shape_of

SIZE = (32, 32)


def make_engine(
    kind: str,
    stages: int,
    zero: int = 0,
    accumulate: int = 4,
    bf16: bool = False,
    returned: bool = True,
    cuts: tuple[int, ...] | None = None,
    noisy: bool = False,
    **setting: Any,
) -> StagedEngine:
    """A tiny model of a kind, cut into stages.

    cuts: where, otherwise by FLOPs. noisy: with dropout and DropPath.
    """
    torch.manual_seed(0)
    grid = Grid.of(dist.get_world_size(), stages)
    options: dict[str, Any] = {"depth": 4}
    if noisy:
        options |= {"drop_path_rate": 0.3, "proj_drop_rate": 0.1}
    net = dr2dist.convert(build(kind, **options), **setting).train()
    layers = layers_of(net)
    parts = partition([layer.flops for layer in layers], stages)
    if cuts is not None:
        parts = tuple(range(a, b) for a, b in zip((0, *cuts), (*cuts, len(layers)), strict=True))
    own = parts[grid.place(dist.get_rank())[0]]
    keep_only(net, layers, own)
    precision = "bf16" if bf16 else "fp32"
    config = deepspeed_config(
        zero=zero,
        precision=precision,  # type: ignore[arg-type]
        micro_batch=GLOBAL_BATCH // grid.replicas // accumulate,
        accumulate=accumulate,
        replicas=grid.replicas,
        clip=1.0,
        extra={"steps_per_print": 10**6},
    )
    optimizer = torch.optim.SGD(net.parameters(), 1e-2, momentum=0.9)
    return StagedEngine(net, optimizer, config, grid, layers, own, precision, returned)  # type: ignore[arg-type]


def work(engine: StagedEngine, step: int, accumulate: int) -> StepBatches:
    """This replica's share of the step's global batch."""
    generator = torch.Generator().manual_seed(step)
    family = engine.net.family
    shape = shape_of(family.name)
    images = torch.randn(GLOBAL_BATCH, *shape, generator=generator)
    labels = torch.randint(0, 5, (GLOBAL_BATCH,), generator=generator)

    def own(values: Tensor, number: int) -> Tensor:
        return values.chunk(accumulate)[number].chunk(engine.grid.replicas)[engine.replica]

    def loss(number: int, output: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.float(), own(labels, number))

    return StepBatches(lambda: None, lambda number: {family.input: own(images, number)}, loss)


def curve(kind: str, stages: int, steps: int = 8, accumulate: int = 4, **options: Any) -> Any:
    """(losses, weights on rank 0, gradient norms, layers of each stage) of a short run."""
    engine = make_engine(kind, stages, accumulate=accumulate, **options)
    losses, norms = [], []
    for step in range(steps):
        torch.manual_seed(step)
        verdict = engine.step(work(engine, step, accumulate), accumulate, [1e-2])
        losses.append(verdict.loss)
        norms.append(float(engine.gradient_norm))
    return losses, full_state(engine), norms, [layer.kind for layer in engine.stage.layers]


def peaks(counts: tuple[int, ...]) -> list[int]:
    """The most bytes of tensors that are alive in a step, by its number of micro-batches."""
    engine, batch = make_engine("vit", 2, alpha=0.5, beta=0.5), GLOBAL_BATCH // 4
    labels = torch.zeros(batch, dtype=torch.int64)
    some = StepBatches(
        lambda: None,
        lambda number: {"image": torch.ones(batch, 3, *SIZE)},
        lambda number, output: nn.functional.cross_entropy(output.float(), labels),
    )
    found = []
    for count in (1, *counts):  # gradients and buffers are there after the first
        with Watermark() as mark:
            engine.step(some, count, [1e-2])
        found.append(mark.peak)
    return found[1:]


def fault(kind: str, who: int) -> str:
    """The error of a step in which one rank differs from the others."""
    engine = make_engine("vit", dist.get_world_size())
    before = [p.detach().clone() for p in engine.net.parameters()]
    if dist.get_rank() == who:
        if kind == "coefficients":
            for chain in engine.chains:
                chain.set_coefficients(0.8, 0.2)
        if kind == "bits":
            for chain in engine.chains:
                chain.setting = replace(chain.setting, fraction_bits=17)
        if kind == "step":
            engine.applied += 1
    with pytest.raises(UnprovenStepError) as error:
        engine.step(work(engine, 0, 4), 4, [1e-2])
    assert all(map(torch.equal, before, engine.net.parameters()))
    return str(error.value)
