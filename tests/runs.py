"""What is read of a run's folder: its records, losses and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dr2dist.checkpoints.checkpoint import Checkpoint
from dr2dist.checkpoints.folders import checkpoints


def records(folder: Path) -> list[dict[str, Any]]:
    """What it logged, a step or a validation each."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """By step."""
    return {record["step"]: record["loss"] for record in records(folder) if "loss" in record}


def masters(folder: Path) -> dict[str, Tensor]:
    """Weights of the newest checkpoint, in fp32."""
    saved = Checkpoint(checkpoints(folder)[-1])
    return {name: saved.tensor("master", name) for name in saved.names("master")}


def metrics(run: Path) -> list[dict[str, Any]]:
    """What a run logged, without what depends on the clock and the machine."""
    volatile = {"samples_per_second", "peak_memory_bytes", "data_wait", "model_flops_per_second"}
    volatile |= {"checkpoint_pause"}
    apart = ("data_wait_", "micro_batch_seconds", "idle")  # of ranks and stages
    return [
        {
            k: v
            for k, v in line.items()
            if (name := k.rpartition("/")[2]) not in volatile and not name.startswith(apart)
        }
        for line in records(run)
    ]


def assert_says_what_was_validated(report: dict[str, Any], run: Path) -> None:
    """Every metric of the run's last validation is in the report, with the same value."""
    last = [record for record in records(run) if "val_loss" in record][-1]
    told = {k.removeprefix("val_"): v for k, v in last.items() if k.startswith("val_")}
    assert len(told) > 3 and told.keys() <= report.keys()
    for name, value in told.items():
        assert report[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    ours, theirs = masters(one), masters(other)
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
