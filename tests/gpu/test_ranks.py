"""ZeRO 0 to 3 and stages over several devices: one curve."""

from __future__ import annotations

import pytest

from tests.pool import Pool

CASE = "tests.gpu.cases:losses"
FP32, BF16 = 1e-4, 5e-2
"""Of a loss after some steps: sums are made in another order; weights in bf16 round to 2^-9."""


def test_on_the_cpu_the_case_itself_runs(two_ranks: Pool) -> None:
    one, other = (
        two_ranks.run(CASE, 500, zero=zero, stages=stages, bf16=False, steps=2)[0]
        for zero, stages in ((1, 1), (0, 2))
    )
    assert one == pytest.approx(other, rel=FP32)


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("zero", "stages"), [(1, 1), (2, 1), (3, 1), (0, 2), (1, 2)])
def test_every_layout_has_the_curve_of_zero_0(
    two_gpus: None, two_ranks: Pool, zero: int, stages: int, bf16: bool
) -> None:
    wanted = two_ranks.run(CASE, zero=0, stages=1, bf16=bf16, steps=4)[0]
    found = two_ranks.run(CASE, zero=zero, stages=stages, bf16=bf16, steps=4)
    assert found[0] == found[1] == pytest.approx(wanted, rel=BF16 if bf16 else FP32)
