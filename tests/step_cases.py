"""What the ranks of a pool run of steps that are not applied, or tried again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dr2dist.parallel.engine import ReversibleEngine, StepBatches, UnprovenStepError
from dr2dist.parallel.sharded_ema import ShardedEMA
from tests import cases, stage_cases
from tests.models import build

Step = Callable[[int], Any]
MICRO_BATCHES = 2
"""Of a step in stages."""
STATISTICS = "blocks.1.norm2.running_mean"


def with_norms(kind: str, seed: int = 0, **options: Any) -> nn.Module:
    """A tiny ViT with running statistics in its stem and in a function."""
    model: Any = build(kind, seed, **options)
    model.patch_embed.norm = nn.BatchNorm1d(16)
    model.blocks[1].norm2 = nn.BatchNorm1d(17)
    return model


def make(
    stages: int, zero: int, bf16: bool = False, kind: Callable[..., nn.Module] = build
) -> tuple[ReversibleEngine, Step]:
    """An engine with averaged weights, and what takes its step of a number."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (cases, stage_cases):
            patch.setattr(module, "build", kind)
        if stages == 1:
            # ZeRO-3 divides before it adds up what ranks have, so there micro-batches overflow.
            count = 2 if zero == 3 else 1
            engine = cases.make_engine("vit", zero, bf16, count)
            engine.average = ShardedEMA(engine.masters, 0.9)
            return engine, lambda number: cases.take_step(engine, number, count)
        staged = stage_cases.make_engine("vit", stages, zero, MICRO_BATCHES, bf16)
    staged.average = ShardedEMA(staged.masters, 0.9, staged._groups.get_data_parallel_group())

    def step(number: int) -> Any:
        work = stage_cases.work(staged, number, MICRO_BATCHES)
        return staged.step(work, MICRO_BATCHES, [1e-3])

    return staged, step


def state(engine: ReversibleEngine) -> dict[str, Tensor]:
    """All that a step moves on this rank: masters, moments, averages, buffers."""
    found = {name: value.clone() for name, value in engine.net.named_buffers()}
    for fragment in engine.masters.fragments:
        key = f"{fragment.name}/{fragment.start}"
        found[key] = fragment.values.clone()
        for kind, value in engine.masters.moments(fragment).items():
            found[f"{kind}/{key}"] = value.clone()
    assert engine.average is not None
    for (name, start), values in engine.average.shares():
        found[f"average/{name}/{start}"] = values.clone()
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """In every bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def overflow(zero: int, bf16: bool, stages: int = 1) -> dict[str, Any]:
    """A step whose gradients are finite on each rank and not in their sum, between two others.

    Checks that it leaves nothing behind; returns the error's text and kinds, and applied steps.
    """
    quiet, step = make(stages, zero, bf16)
    for number in range(2):
        step(number)
    wanted = state(quiet)
    engine, step = make(stages, zero, bf16)
    step(0)
    before, norm = state(engine), float(engine.gradient_norm)
    name, parameter = next(p for p in engine.net.named_parameters() if p[0].endswith("fc2.bias"))
    handle = parameter.register_hook(
        partial(_huge, 3.2e38 if stages == 1 else 3.2e38 / MICRO_BATCHES)
    )
    with pytest.raises(UnprovenStepError) as error:
        step(1)
    handle.remove()
    assert_same(before, state(engine))
    assert all(p.grad is None for p in engine.net.parameters()), name
    assert float(engine.gradient_norm) == norm
    applied = engine.applied
    step(1)
    assert_same(wanted, state(engine))
    return {"text": str(error.value), "kinds": set(error.value.verdict.kinds), "applied": applied}


def _huge(value: float, gradient: Tensor) -> Tensor:
    """A gradient with one element that is large, and others zero."""
    large = torch.zeros_like(gradient)
    large.view(-1)[0] = value
    assert large.isfinite().all()
    return large


def _backs(zero: int, stages: int) -> list[int]:
    """Which calls of a function are recomputes, in two attempts at a step."""
    if stages > 1:  # all micro-batches of the first stage go before any comes back
        return [2, 3, 6, 7]
    return [1, 3, 5, 7] if zero == 3 else [1, 3]


def statistics(zero: int, stages: int, again: bool) -> bool:
    """Whether a step with a deviation leaves buffers as it should.

    again: the deviation passes, so that the second attempt is applied; otherwise none is.
    """
    quiet, step = make(stages, zero, kind=with_norms)
    before = state(quiet)
    step(0)
    wanted = state(quiet)
    engine, step = make(stages, zero, kind=with_norms)
    if dist.get_rank() == 0:
        backs = _backs(zero, stages)
        cases._change_function(engine.chains[0], backs[:1] if again else backs)  # type: ignore[arg-type]
    if again:
        step(0)
    else:
        with pytest.raises(UnprovenStepError):
            step(0)
    assert_same(wanted if again else before, state(engine))
    return not torch.equal(before[STATISTICS], wanted[STATISTICS])


def norms_of_equal_micro_batches(zero: int, counts: list[int]) -> list[float]:
    """The norms of bf16 gradients of steps of so many micro-batches, all of one sample."""
    norms = []
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for count in counts:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cases, "GLOBAL_BATCH", count * dist.get_world_size())
            engine = cases.make_engine("vit", zero, True, count, sgd=True, memory="store")

        def loss(number: int, output: Any) -> Tensor:
            return nn.functional.cross_entropy(output.float(), torch.tensor([1]))

        given = {engine.net.family.input: images}
        work = StepBatches(lambda: None, partial(lambda given, number: given, given), loss)
        engine.step(work, count, [1e-3])
        assert engine.gradient_norm is not None
        norms.append(engine.gradient_norm)
    return norms
