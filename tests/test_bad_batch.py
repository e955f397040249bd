"""A batch whose loss is not finite stops the run, or is skipped on all ranks alike."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dr2dist.checkpoints.checkpoint import Checkpoint
from dr2dist.checkpoints.folders import checkpoints
from dr2dist.data.index import read_index
from tests.images import make_small_shards, place_of, samples_of
from tests.pool import Pool
from tests.runs import masters, records

CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 2}}
task: {num_classes: 2}
data: {train: SHARDS/train, num_workers: 0}
optim: {lr: 1.0e-3}
train: {steps: 9, micro_batch: 3, accumulate: 2, log_every: 1}
checkpoint: {steps: 4}
parallel: {zero: ZERO}
output: OUTPUT
"""
SKIP = "train.on_bad_batch=skip"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def bad(shards: Path) -> str:
    """The key of a sample of the fifth step of 12."""
    index = read_index(shards / "train")
    return samples_of(index)[place_of(index, 50)].key


def _write(folder: Path, shards: Path, zero: int = 2) -> str:
    text = CONFIG.replace("SHARDS", str(shards)).replace("ZERO", str(zero))
    (folder / "config.yaml").write_text(text.replace("OUTPUT", str(folder / "run")))
    return str(folder / "config.yaml")


def _go(pool: Pool, path: str, bad: str, overrides: list[str], **options: Any) -> str:
    """How a run ends, on all ranks alike."""
    results = pool.run("tests.bad_cases:run", path=path, overrides=overrides, bad=[bad], **options)
    assert len(set(results)) == 1
    return str(results[0])


@pytest.mark.parametrize("zero", [3, *(pytest.param(z, marks=pytest.mark.slow) for z in (0, 2))])
def test_a_skipped_batch_is_named_and_the_run_goes_on_alike(
    zero: int, shards: Path, bad: str, tmp_path: Path, two_ranks: Pool
) -> None:
    found = {}
    for name in ("whole", "cut", "stopped"):
        (tmp_path / name).mkdir()
        go = partial(_go, two_ranks, _write(tmp_path / name, shards, zero), bad)
        if name == "cut":
            assert go([SKIP], until=6) == "broken off"
        if name == "stopped":
            told = go([])
            assert f"{bad}" in told and "is not finite" in told
            step = json.loads((tmp_path / name / "run" / "summary.json").read_text())["steps"]
            assert Checkpoint(checkpoints(tmp_path / name / "run")[-1]).state["step"] == step > 0
        assert int(go([SKIP])) >= 2
        assert Checkpoint(checkpoints(tmp_path / name / "run")[-1]).state["step"] == 9
        found[name] = masters(tmp_path / name / "run")
    told = [line for line in records(tmp_path / "whole" / "run") if "bad_batch" in line]
    assert told and all(bad in line["bad_batch"] for line in told)
    for name in ("cut", "stopped"):
        for key, value in found["whole"].items():
            assert torch.equal(value, found[name][key]), (name, key)


@pytest.mark.parametrize("place", [50, 80], ids=["middle", "last step"])
def test_stages_without_samples_skip_with_the_others(
    place: int, shards: Path, tmp_path: Path, three_ranks: Pool
) -> None:
    index = read_index(shards / "train")
    key = samples_of(index)[place_of(index, place)].key
    stages = ["parallel.zero=0", "parallel.stages=3", "train.step_limit=60", "train.steps=14"]
    path = _write(tmp_path, shards)
    assert int(_go(three_ranks, path, key, [SKIP, *stages])) >= 1
    assert Checkpoint(checkpoints(tmp_path / "run")[-1]).state["step"] == 14


def test_too_many_in_a_row_stop_the_run(shards: Path, tmp_path: Path, two_ranks: Pool) -> None:
    path, index = _write(tmp_path, shards), read_index(shards / "train")
    everything = [sample.key for sample in samples_of(index)]
    overrides = [SKIP, "train.bad_batches=3"]
    results = two_ranks.run("tests.bad_cases:run", path=path, overrides=overrides, bad=everything)
    assert all("is not finite" in told for told in results)
    assert [x["bad_batches"] for x in records(tmp_path / "run") if "bad_batches" in x] == [1, 2, 3]
