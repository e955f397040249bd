"""States of sixteen bits in real processes: ZeRO 0 to 3, stages, checkpoints, and states that
grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.modes import assert_modes_agree
from tests.pool import Pool

STAGES = "tests.stage_cases:curve"


@pytest.mark.parametrize(
    ("kind", "zero"),
    [
        ("vit", 0),
        ("vit", 3),
        *(pytest.param("vit", zero, marks=pytest.mark.slow) for zero in (1, 2)),
        *(pytest.param("swin", zero, marks=pytest.mark.slow) for zero in range(4)),
    ],
)
def test_memory_modes_agree_in_every_bit_in_bf16(kind: str, zero: int, two_ranks: Pool) -> None:
    slices = {"chunk_size": 1, "chunk_tokens": 48 if kind == "swin" else 9}
    assert_modes_agree(two_ranks, kind, zero, bf16=True, state_bits=16, **slices)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("cut", [1, 4, 9])
def test_a_cut_anywhere_gives_the_same_bits(cut: int, bf16: bool, two_ranks: Pool) -> None:
    options: dict[str, Any] = {"cuts": (cut,), "bf16": bf16, "noisy": True, "state_bits": 16}
    options |= {"kind": "vit", "stages": 2, "steps": 3}
    results = [
        two_ranks.run(STAGES, **options, **mode)[0]
        for mode in ({}, {"returned": False}, {"memory": "store"})
    ]
    for losses, weights, *_ in results[1:]:
        assert losses == results[0][0]
        for name, value in results[0][1].items():
            assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_four_stages_train_as_one_does(kind: str, one_rank: Pool, four_ranks: Pool) -> None:
    """The grid is found on all stages: losses differ by its roundings, here 2^-14 of a channel."""
    (wanted,) = one_rank.run(STAGES, kind=kind, stages=1, state_bits=16)
    found, *_ = four_ranks.run(STAGES, kind=kind, stages=4, state_bits=16)
    assert found[0] == pytest.approx(wanted[0], rel=1e-3)


MORE = [
    pytest.param(*layout, marks=pytest.mark.slow)
    for layout in ((1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (4, 0))
]


@pytest.mark.parametrize(("stages", "zero"), [(2, 1), *MORE])
def test_scales_follow_states_that_grow_on_all_ranks_alike(
    stages: int, zero: int, four_ranks: Pool
) -> None:
    results = four_ranks.run("tests.grown_cases:grown", stages=stages, zero=zero)
    (losses, wanted), scales = results[0][:2], [result[2] for result in results]
    assert losses == pytest.approx(wanted, rel=1e-2)
    assert all(other == scales[0] for other in scales)
    first, last = scales[0][0], scales[0][-1]
    assert sum(b > a for a, b in zip(first, last, strict=True)) > len(first) / 2
    assert all(b >= a for a, b in zip(first, last, strict=True))


@pytest.mark.parametrize(("stages", "zero"), [(1, 0), (1, 2), (1, 3), (2, 1)])
def test_a_jump_is_tried_again_with_larger_scales(stages: int, zero: int, four_ranks: Pool) -> None:
    for result in four_ranks.run("tests.grown_cases:jump", stages=stages, zero=zero):
        assert result["applied"] == 3
        assert result["attempts"] > 3
        assert result["clean"]
        assert result["wider"] > 0


@pytest.mark.parametrize(("stages", "zero"), [(1, 2), (2, 1)])
def test_scales_that_grew_far_are_found_again(stages: int, zero: int, four_ranks: Pool) -> None:
    results = four_ranks.run("tests.grown_cases:outlier", stages=stages, zero=zero)
    for found in results:
        assert found["scales"] == results[0]["scales"]  # the same on all ranks
        usual, wide, *after = found["scales"]
        assert max(b - a for a, b in zip(usual, wide, strict=True)) > 5
        assert found["stale"][0] and not found["stale"][1]
        for later in after:
            assert max(abs(b - a) for a, b in zip(usual, later, strict=True)) <= 2
        assert found["refused"] and found["kept"] and found["applied"] == 4


@pytest.mark.parametrize(
    ("before", "after"), [((1, 2), (1, 2)), ((1, 0), (1, 3)), ((2, 1), (4, 0))]
)
def test_a_checkpoint_has_the_scales_and_any_layout_takes_them(
    before: tuple[int, int], after: tuple[int, int], four_ranks: Pool, tmp_path: Any
) -> None:
    found = four_ranks.run(
        "tests.grown_cases:resumed", folder=str(tmp_path), before=before, after=after
    )
    for wanted, losses, scales, again in found:
        assert again == scales
        assert losses == (wanted if before == after else pytest.approx(wanted, rel=1e-3))
