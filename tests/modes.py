"""What memory modes have in common: every bit of a run."""

from __future__ import annotations

from typing import Any

import torch

from tests.pool import Pool


def assert_modes_agree(pool: Pool, kind: str, zero: int, **options: Any) -> None:
    """Two steps of an engine have the same losses and weights in all memory modes."""
    found = [
        pool.run(
            "tests.cases:curve",
            kind=kind,
            zero=zero,
            steps=2,
            memory=memory,
            memory_budget=150_000 if memory == "budget" else None,
            **options,
        )[0]
        for memory in ("reverse", "store", "checkpoint", "budget")
    ]
    for losses, weights, _ in found[1:]:
        assert losses == found[0][0]
        for name, value in weights.items():
            assert torch.equal(value, found[0][1][name]), name
