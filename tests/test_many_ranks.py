"""Sixty-four ranks of one small run: they meet, compare themselves, train, and save as four do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dr2dist.checkpoints.checkpoint import Checkpoint
from dr2dist.checkpoints.folders import checkpoints
from tests.images import make_small_shards
from tests.pool import Pool

RANKS = 64
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32,
        options: {depth: 1, embed_dim: 48, num_heads: 2}}
task: {num_classes: 2}
data: {train: shards/train, num_workers: 0}
optim: {name: sgd, lr: 0.1}
train: {steps: 2, micro_batch: 1, accumulate: ACCUMULATE, log_every: 1}
parallel: {zero: 2}
output: OUTPUT
"""


@pytest.fixture(scope="module")
def many() -> Iterator[Pool]:
    pool = Pool(RANKS)
    yield pool
    pool.close()


def write(folder: Path, name: str, accumulate: int) -> Path:
    path = folder / f"{name}.yaml"
    text = CONFIG.replace("ACCUMULATE", str(accumulate))
    path.write_text(text.replace("OUTPUT", str(folder / name)))
    return path


def run(pool: Pool, folder: Path, path: Path, ranks: int, last: list[str]) -> list[str | None]:
    folders, overrides = [str(folder)] * ranks, [[]] * (ranks - 1) + [last]
    arguments = {"path": str(path), "folders": folders, "overrides": overrides}
    return pool.run("tests.host_cases:run_apart", timeout=900, **arguments)


def test_sixty_four_ranks_train_as_four(many: Pool, four_ranks: Pool, tmp_path: Path) -> None:
    make_small_shards(tmp_path, count=256)
    assert run(many, tmp_path, write(tmp_path, "many", 1), RANKS, []) == [None] * RANKS
    assert run(four_ranks, tmp_path, write(tmp_path, "four", 16), 4, []) == [None] * 4
    weights = []
    for name in ("many", "four"):
        saved = Checkpoint(checkpoints(tmp_path / name)[-1])
        weights.append(torch.cat([saved.tensor("master", key).flatten() for key in saved.shapes]))
    assert (weights[0] - weights[1]).abs().max() < 1e-5
    summary = json.loads((tmp_path / "many" / "summary.json").read_text())
    assert summary["ranks"] == RANKS and summary["certificate_failures"] == 0


def test_one_of_sixty_four_that_differs_is_named(many: Pool, tmp_path: Path) -> None:
    make_small_shards(tmp_path)
    path = write(tmp_path, "other", 1)
    said = run(many, tmp_path, path, RANKS, ["optim.lr=0.2"])
    message = f"(rank {RANKS - 1}) optim.lr is '0.2', not '0.1'"
    assert all(each is not None and message in each for each in said)
    assert not (tmp_path / "other").exists()
