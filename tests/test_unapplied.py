"""Steps that are not applied, or only at the second attempt, leave nothing behind."""

from __future__ import annotations

import pytest

from tests.pool import Pool

OVERFLOW = "tests.step_cases:overflow"


def check(results: list[dict[str, object]]) -> None:
    for found in results:
        assert found["text"] == "the norm of the reduced gradient is not finite"
        assert found["kinds"] == {"finite"} and found["applied"] == 1


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_finite_gradients_that_overflow_in_their_sum_are_not_applied(
    zero: int, bf16: bool, two_ranks: Pool
) -> None:
    check(two_ranks.run(OVERFLOW, zero=zero, bf16=bf16))


@pytest.mark.parametrize("zero", [0, 1])
def test_they_are_not_applied_on_any_stage_either(zero: int, four_ranks: Pool) -> None:
    check(four_ranks.run(OVERFLOW, zero=zero, bf16=False, stages=2))


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize(("zero", "stages"), [(0, 1), (1, 1), (3, 1), (0, 2)])
def test_running_statistics_are_those_of_applied_steps(
    zero: int, stages: int, again: bool, two_ranks: Pool
) -> None:
    case = "tests.step_cases:statistics"
    moved = two_ranks.run(case, zero=zero, stages=stages, again=again)
    assert moved[0]
