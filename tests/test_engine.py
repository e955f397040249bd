"""Real processes on gloo: ZeRO 0 to 3, DistributedDataParallel, and faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dr2dist
from tests.bounds import chain_bound, mean_bound
from tests.models import build
from tests.modes import assert_modes_agree
from tests.pool import Pool

STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def reference(one_rank: Pool) -> Any:
    """The curve of one rank with batch 8."""
    ((losses, weights, _),) = one_rank.run("tests.cases:curve", kind="vit", zero=0)
    return losses, weights


@pytest.mark.parametrize("zero", STAGES)
def test_curves_agree_over_stages_and_ranks(
    zero: int, reference: Any, one_rank: Pool, two_ranks: Pool
) -> None:
    wanted, _ = reference
    for pool in (one_rank, two_ranks) if zero else (two_ranks,):
        (losses, _, _), *rest = pool.run("tests.cases:curve", kind="vit", zero=zero)
        assert losses == pytest.approx(wanted, rel=1e-4)
        assert len(set(losses)) == len(losses)
        assert all(other[0] == losses for other in rest)


@pytest.mark.parametrize("zero", STAGES)
def test_slices_and_accumulation_under_sgd_give_the_same_weights(
    zero: int, two_ranks: Pool
) -> None:
    options: dict[str, Any] = {"kind": "swin", "zero": zero, "steps": 3, "sgd": True}
    (whole, weights, _), _ = two_ranks.run("tests.cases:curve", **options)
    (parts, other, _), _ = two_ranks.run("tests.cases:curve", **options, accumulate=2, chunk_size=1)
    assert parts == pytest.approx(whole, rel=1e-4)
    for name, value in weights.items():
        assert (value - other[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize(
    ("zero", "kind"),
    [
        (1, "eva-mixed-rope"),
        pytest.param(2, "vit-clip", marks=pytest.mark.slow),
        (3, "relpos-shared-bias"),
        (3, "swin"),
        pytest.param(0, "swin", marks=pytest.mark.slow),
        pytest.param(2, "relpos-post-norm", marks=pytest.mark.slow),
        pytest.param(3, "beit-shared-bias", marks=pytest.mark.slow),
        pytest.param(3, "relpos-shared", marks=pytest.mark.slow),
    ],
)
def test_memory_modes_agree_in_every_bit_of_the_weights(
    zero: int, kind: str, two_ranks: Pool
) -> None:
    # Slices of a rank's four samples and, in bf16, of tokens; the last one is shorter.
    in_tokens = {"chunk_size": 1, "chunk_tokens": 48 if kind == "swin" else 9}
    for bf16, slices in ((False, {"chunk_size": 3}), (True, in_tokens)):
        assert_modes_agree(two_ranks, kind, zero, bf16=bf16, **slices)


@pytest.mark.parametrize("zero", STAGES)
def test_conventional_finetuning_is_that_of_the_plain_model(zero: int, two_ranks: Pool) -> None:
    (losses, weights, _), _ = two_ranks.run(
        "tests.cases:curve",
        kind="eva-rope",
        zero=zero,
        steps=3,
        sgd=True,
        alpha=1.0,
        beta=0.0,
        arithmetic="float",
        memory="store",
    )
    torch.manual_seed(0)
    model = build("eva-rope", depth=3).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    for step, found in enumerate(losses):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(8, 3, 32, 32, generator=generator)
        labels = torch.randint(0, 5, (8,), generator=generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        assert found == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.named_parameters():
        assert (weights[name] - value).abs().max() < 1e-5, name


def test_bf16_on_every_stage_follows_fp32(reference: Any, two_ranks: Pool) -> None:
    # Six functions, stem and head. A model that is not trained is a tenth off and more.
    bound = mean_bound(8, torch.bfloat16)
    for zero in STAGES:
        (losses, weights, _), _ = two_ranks.run(
            "tests.cases:curve", kind="vit", zero=zero, bf16=True, steps=10
        )
        assert losses == pytest.approx(reference[0][:10], rel=bound)
        assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize(
    ("kind", "found", "named"),
    [
        ("function", "mismatch", "rank 0: blocks: the recompute of function 3 differs"),
        ("remainder", "mismatch", "rank 0: blocks: the recompute of function 2 differs"),
        ("weight", None, "blocks: the recompute of function 3 differs"),
        ("nan", "finite", "blocks: the output of function 3 is not finite"),
        ("coefficients", "disagreement", "rank 1: beta "),
    ],
)
def test_a_fault_is_named_and_nothing_is_applied(
    kind: str, found: str | None, named: str, zero: int, two_ranks: Pool
) -> None:
    results = two_ranks.run("tests.cases:fault", kind=kind, zero=zero)
    for result in results:
        assert named in result["text"]
        assert found is None or found in result["kinds"]
        assert result["applied"] == 1
        assert not result["changed"]


@pytest.mark.parametrize("zero", STAGES)
def test_a_deviation_that_passes_is_tried_again(zero: int, two_ranks: Pool) -> None:
    for accumulate in (1, 2):
        for clean, repeated in two_ranks.run(
            "tests.cases:passing_fault", zero=zero, accumulate=accumulate
        ):
            assert clean[0] == repeated[0]
            for name, value in (clean[1] or {}).items():
                assert torch.equal(value, repeated[1][name]), name


def test_drift_of_float_arithmetic_reaches_the_verdict(two_ranks: Pool) -> None:
    results = two_ranks.run(
        "tests.cases:curve",
        kind="vit-clip",
        zero=1,
        steps=1,
        arithmetic="float",
        alpha=0.9,
        beta=0.1,
    )
    assert all(result[2] > 1e-4 for result in results)
    exact = two_ranks.run("tests.cases:curve", kind="vit-clip", zero=1, steps=1)
    assert all(result[2] is None for result in exact)


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("vit", {}),
        ("vit", {"find_unused_parameters": True}),
        ("vit", {"static_graph": True}),
        ("vit", {"passes": 2}),
        ("eva-rope", {"find_unused_parameters": True, "passes": 2}),
        ("beit-shared-bias", {"find_unused_parameters": True, "passes": 2}),
        ("swin", {"find_unused_parameters": True, "passes": 2}),
    ],
)
def test_distributed_data_parallel_gives_the_gradients_of_one_process(
    two_ranks: Pool, kind: str, way: dict[str, Any]
) -> None:
    results = two_ranks.run("tests.cases:ddp_gradients", kind=kind, **way)
    net = dr2dist.convert(build(kind, depth=3), memory="store").train()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 5, (8,), generator=generator)
    nn.functional.cross_entropy(net(images), labels).backward()
    for name, parameter in net.named_parameters():
        for result in results:
            # Other shapes round otherwise, and so does the grid after them: chain_bound, forth and
            # back, times what a mean over 8 samples may cancel.
            off = (result[name] - parameter.grad).norm() / parameter.grad.norm()
            assert off < 2 * 8 * chain_bound(net.chains[0].setting, 6), (name, float(off))


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sums_over_many_micro_batches_in_bf16_lose_nothing(zero: int, two_ranks: Pool) -> None:
    """Of equal ones the mean is each one; a sum in bf16 would stay behind from the 256th on."""
    case = "tests.step_cases:norms_of_equal_micro_batches"
    for once, often in two_ranks.run(case, zero=zero, counts=[1, 320]):
        assert often == pytest.approx(once, rel=2.0**-7)
