"""What the ranks of a pool run on GPUs, or on the CPU where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dr2dist.parallel.engine import ReversibleEngine, StepBatches
from dr2dist.parallel.verdict import Verdict, decide
from dr2dist.reversible.transfer import to_device
from tests import cases, stage_cases
from tests.models import build

ACCUMULATE = 2


def _work(engine: ReversibleEngine, step: int, begin: Any = lambda: None) -> StepBatches:
    """This replica's share of a step's global batch."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(cases.GLOBAL_BATCH, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 5, (cases.GLOBAL_BATCH,), generator=generator)

    def own(values: Tensor, number: int) -> Tensor:
        return values.chunk(ACCUMULATE)[number].chunk(engine.replicas)[engine.replica]

    def loss(number: int, output: Tensor) -> Tensor:
        wanted = to_device(own(labels, number), engine.device)
        return nn.functional.cross_entropy(output.float(), wanted)

    return StepBatches(begin, lambda number: {"image": own(images, number)}, loss)


def engine_step(zero: int, bf16: bool) -> int:
    """Applied steps after three."""
    engine = cases.make_engine("vit", zero, bf16=bf16, accumulate=ACCUMULATE)
    for step in range(3):
        assert engine.step(_work(engine, step), ACCUMULATE, [1e-3] * engine.num_groups).ok
    return engine.applied


@contextmanager
def _strict_until_the_verdict() -> Iterator[Any]:
    """Gives what a step's work calls at its beginning: from there on nothing may wait, until the
    verdict is asked for."""

    def ask(*arguments: Any) -> Verdict:
        torch.cuda.set_sync_debug_mode("default")
        return decide(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dr2dist.parallel.engine.decide", ask)
        try:
            yield lambda: torch.cuda.set_sync_debug_mode("error")
        finally:
            torch.cuda.set_sync_debug_mode("default")


def engine_waits(zero: int, bf16: bool) -> int:
    """Applied steps; raises where the host waits in one, after a first that compiles kernels."""
    engine = cases.make_engine("vit", zero, bf16=bf16, accumulate=ACCUMULATE)
    rates = [1e-3] * engine.num_groups
    engine.step(_work(engine, 0), ACCUMULATE, rates)
    for step in range(1, 3):
        with _strict_until_the_verdict() as begin:
            engine.step(_work(engine, step, begin), ACCUMULATE, rates)
    return engine.applied


def losses(zero: int, stages: int, bf16: bool, steps: int) -> list[float]:
    """Of a short run on the ranks of the pool: sharded, or cut into stages."""
    engine: ReversibleEngine
    if stages > 1:
        engine = stage_cases.make_engine("vit", stages, zero, ACCUMULATE, bf16)
    else:
        with pytest.MonkeyPatch.context() as patch:  # as deep as the one in stages
            patch.setattr(cases, "build", lambda kind, seed, depth: build(kind, seed, 4))
            engine = cases.make_engine("vit", zero, bf16=bf16, accumulate=ACCUMULATE, sgd=True)
    found = []
    for step in range(steps):
        verdict = engine.step(_work(engine, step), ACCUMULATE, [1e-2] * engine.num_groups)
        found.append(verdict.loss)
    return found
