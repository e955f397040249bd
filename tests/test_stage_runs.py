"""Whole runs with pipeline stages: the same as without, gone on with on any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dr2dist.config import load_config
from dr2dist.errors import UserError
from dr2dist.training.described_plan import describe
from dr2dist.training.plan import make_plan
from tests.images import make_small_shards
from tests.pool import Pool
from tests.runs import masters, metrics

CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 4}}
coefficients: {kind: conserve, beta: [0.1, 0.5], every: 2}
task: {name: classification, num_classes: 2}
data: {train: SHARDS/train, val: SHARDS/val, num_workers: 0}
optim: {name: sgd, lr: 1.0e-2, layer_decay: 0.9, clip: 1.0}
train: {steps: 8, micro_batch: 4, accumulate: 3, ema: 0.9, log_every: 1, validate_every: 4}
checkpoint: {steps: 3}
parallel: {zero: 0}
output: OUTPUT
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def train(pool: Pool, folder: Path, shards: Path, name: str, *overrides: str, **more: Any) -> Any:
    """A run, whole or until a step; its summary."""
    path = folder / f"{name}.yaml"
    path.write_text(CONFIG.replace("SHARDS", str(shards)).replace("OUTPUT", str(folder / name)))
    case = "run_until" if more else "run_config"
    return pool.run(f"tests.cases:{case}", path=str(path), overrides=list(overrides), **more)[0]


@pytest.fixture(scope="module")
def whole(folder: Path, shards: Path, one_rank: Pool) -> Path:
    """The run of one rank."""
    train(one_rank, folder, shards, "whole")
    return folder / "whole"


def assert_same_curve(run: Path, whole: Path) -> None:
    lines, wanted = metrics(run), metrics(whole)
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for line, other in zip(lines, wanted, strict=True):
        for key in ("loss", "gradient_norm", "val_loss", "val_samples", "val_accuracy", "beta"):
            if key in other:
                assert line[key] == pytest.approx(other[key], rel=1e-4), (key, line["step"])
    ours, theirs = masters(run), masters(whole)
    assert ours.keys() == theirs.keys()
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    assert apart < 1e-5


def test_two_stages_run_as_one_rank_does(
    whole: Path, folder: Path, shards: Path, two_ranks: Pool
) -> None:
    summary = train(two_ranks, folder, shards, "two", "parallel.stages=2")
    assert (summary["stages"], summary["ranks"], summary["certificate_failures"]) == (2, 2, 0)
    assert_same_curve(folder / "two", whole)
    shown = describe(make_plan(load_config(folder / "two.yaml", ["parallel.stages=2"]), 2))
    held = metrics(folder / "two")[0]["remainder_bytes"]  # of the first stage, at the least beta
    images = 4 * 3 * 32 * 32 * 4
    assert f"2 micro-batch(es) in flight, {held:,} bytes of remainders and {images:,} of" in shown
    board = EventAccumulator(str(folder / "two" / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    # Images come from the first stage, predictions from the last.
    assert [image.step for image in board.Images("held_out")] == [4, 8]
    for stage in (0, 1):
        for name in ("micro_batch_seconds", "idle", "peak_memory_bytes", "remainder_bytes"):
            values = [event.value for event in board.Scalars(f"stage_{stage}/{name}")]
            assert len(values) == 8 and all(value > 0 for value in values)
            assert name != "idle" or all(value < 1 for value in values)


def test_a_finished_run_whose_summary_is_lost_says_again_where_it_ended(
    whole: Path, folder: Path, shards: Path, one_rank: Pool
) -> None:
    (whole / "summary.json").unlink()
    summary = train(one_rank, folder, shards, "whole")
    assert (summary["steps"], summary["beta"]) == (8, metrics(whole)[-2]["beta"])


def test_a_run_in_stages_goes_on_on_other_layouts_and_back(
    whole: Path, folder: Path, shards: Path, one_rank: Pool, two_ranks: Pool, four_ranks: Pool
) -> None:
    grid = ("parallel.stages=2", "parallel.zero=1", "train.micro_batch=2")
    train(one_rank, folder, shards, "moved", step=4)
    train(four_ranks, folder, shards, "moved", *grid, step=7)
    train(two_ranks, folder, shards, "moved", "parallel.stages=2")
    assert_same_curve(folder / "moved", whole)


def test_a_run_in_stages_that_breaks_off_goes_on_to_the_same_bits(
    folder: Path, shards: Path, two_ranks: Pool
) -> None:
    noisy = ("parallel.stages=2", "model.drop_path=0.2", "model.dropout=0.1", "task.mixup=0.2")
    train(two_ranks, folder, shards, "quiet", *noisy)
    train(two_ranks, folder, shards, "broken", *noisy, step=5)
    train(two_ranks, folder, shards, "broken", *noisy)
    assert metrics(folder / "broken") == metrics(folder / "quiet")
    ours, theirs = masters(folder / "broken"), masters(folder / "quiet")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_the_plan_shows_the_grid_and_refuses_what_cannot_be(folder: Path, shards: Path) -> None:
    path = folder / "plan.yaml"
    path.write_text(CONFIG.replace("SHARDS", str(shards)).replace("OUTPUT", str(folder / "plan")))

    def text(ranks: int, *overrides: str) -> str:
        return describe(make_plan(load_config(path, list(overrides)), ranks))

    shown = text(4, "parallel.stages=2")
    assert "stages        2 x 2 replica(s), idle for 25% of a step" in shown
    # Two fp32 numbers for each of 5 tokens of width 192, micro-batch 4.
    assert f"{2 * 4 * 5 * 192 * 4:,} bytes on" in shown
    for ranks, overrides, message in [
        (2, ["model.options={num_heads: 0}"], "model: vit_tiny_patch16_224 cannot be built with"),
        (2, ["parallel.stages=2", "model.options={patch_drop_rate: 0.5}"], r"tokens \[3, 192\] in"),
        (2, ["model.options={dephh: 4}"], "model: vit_tiny_patch16_224 cannot be built .* 'dephh'"),
        (3, ["parallel.stages=2"], "parallel.stages is 2, which does not divide the 3 rank"),
        (2, ["parallel.stages=2", "parallel.zero=3"], "allowed with stages is 0 or 1"),
        (2, ["parallel.stages=2", "reversible.memory=budget", "reversible.memory_budget=1"],
         "allowed with stages 1 only"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            text(ranks, *overrides)
