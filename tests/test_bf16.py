"""bf16 on the ZeRO stages: one curve, whatever ran in the process before."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import dr2dist
from tests.cases import GLOBAL_BATCH
from tests.models import build
from tests.pool import Pool


@pytest.fixture(scope="module")
def curves(two_ranks: Pool) -> dict[int, Any]:
    """(losses, weights) of each stage, ZeRO-3 first; nothing is clipped, since a norm's order of
    sums is a stage's own."""
    found = {}
    for zero in (3, 0, 1, 2):
        (losses, weights, _), _ = two_ranks.run(
            "tests.cases:curve", kind="vit", zero=zero, bf16=True, steps=6, clip=1e6
        )
        found[zero] = losses, weights
    return found


@pytest.mark.parametrize("zero", [2, 3])
def test_sharded_stages_have_one_curve_in_every_bit(zero: int, curves: dict[int, Any]) -> None:
    assert curves[zero][0] == curves[1][0]
    for name, value in curves[1][1].items():
        assert torch.equal(curves[zero][1][name], value), name


def test_without_zero_only_roundings_differ(curves: dict[int, Any]) -> None:
    """Weights in fp32 under autocast, or in bf16: the first loss differs by roundings alone.

    They are independent, each at most 2^-9 of its result, and add in squares: on the way from an
    image to its logits there are 10 in a block (two norms, qkv, attention, projection, two scales,
    two layers and what is between them) and 4 outside, as many again of weights, and both runs
    have them. A loss moves by at most sqrt(2) times its logits, and 8 samples are averaged. Four
    standard deviations are allowed.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=generator)
    logits = dr2dist.convert(build("vit", depth=3))(images)
    roundings = 2 * 2 * (3 * 10 + 4)
    size = logits.square().sum(-1).mean().sqrt().item()
    deviation = 2.0**-9 * math.sqrt(roundings) * size * math.sqrt(2 / GLOBAL_BATCH)
    assert abs(curves[0][0][0] - curves[1][0][0]) < 4 * deviation
