"""Whole runs: through the loop, and through the command line and the launcher."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dr2dist.config import load_config
from dr2dist.data.index import read_index
from dr2dist.training.plan import make_plan
from dr2dist.training.progress import ProgressLine
from tests.commands import ROOT, call, dr2dist
from tests.films import make_action_shards, make_film_shards
from tests.images import make_small_shards, place_of
from tests.pool import Pool
from tests.runs import losses, records

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
SMALLER = {
    "swin_tiny_patch4_window7_224": [
        "model.image_size=112",
        "model.options={depths: [1, 1, 1, 1]}",
    ],
    "vit_giant_patch14_224": ["model.options={embed_dim: 128, num_heads: 4, depth: 8}"],
    "vit_small_patch14_dinov2": ["model.options={depth: 4}"],
    "swin3d_t": [],
    "videomae_large_patch16": [
        "model.image_size=32",
        "model.options={frames: 4, embed_dim: 64, num_heads: 2, depth: 4}",
        "task.num_classes=8",
    ],
    "videomae_small_patch16": [
        "model.image_size=32",
        "model.options={frames: 4, chunks: 4, embed_dim: 64, num_heads: 2, depth: 4}",
    ],
}
TINY = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32}
reversible: {chunk_size: 3}
coefficients: {kind: conserve, beta: [0.1, 0.5], every: 2}
task: {name: classification, num_classes: 2}
data: {train: SHARDS/train, val: SHARDS/val, num_workers: 1}
optim: {name: adamw, lr: 1.0e-3}
train: {steps: 12, micro_batch: 4, log_every: 1, validate_every: 5}
parallel: {zero: 2}
output: OUTPUT
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def shards_of(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By what a task takes."""
    root = tmp_path_factory.mktemp("films")
    (root / "actions").mkdir()
    return {
        "classification": shards,
        "video_classification": make_film_shards(root, 4, classes=8),
        "temporal_action_detection": make_action_shards(root / "actions"),
    }


def write_config(tmp_path: Path, shards: Path, name: str = "run") -> Path:
    path = tmp_path / f"{name}.yaml"
    text = TINY.replace("SHARDS", str(shards)).replace("OUTPUT", str(tmp_path / name))
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, shards: Path, two_ranks: Pool
) -> tuple[Path, dict[str, Any]]:
    """A run of two ranks: its folder and summary."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_config(folder, shards)
    results = two_ranks.run("tests.cases:run_config", path=str(path), overrides=[])
    return folder / "run", results[0]


@pytest.mark.parametrize(
    ("zero", "precision"), [(0, "fp32"), (3, "fp32"), (2, "bf16"), (0, "bf16")]
)
def test_the_plan_foretells_what_a_rank_holds(
    zero: int, precision: str, tmp_path: Path, shards: Path, two_ranks: Pool
) -> None:
    path = write_config(tmp_path, shards)
    overrides = ["train.steps=2", f"parallel.zero={zero}", f"train.precision={precision}"]
    overrides += ["data.val=null", "train.validate_every=null"]
    summary = two_ranks.run("tests.cases:run_config", path=str(path), overrides=overrides)[0]
    plan = make_plan(load_config(path, overrides), 2)
    held, foretold = summary["state_bytes"], plan.footprint
    assert foretold is not None
    assert foretold.weights == pytest.approx(held["weights"], rel=0.02)
    assert foretold.optimiser == pytest.approx(held["masters"] + held["moments"], rel=0.02)
    # Without ZeRO weights and tokens stay in fp32, under autocast.
    width, whole_here = (4 if precision == "fp32" or not zero else 2), zero < 3
    parameters = foretold.weights * (1 if whole_here else 2) / width
    # Summed in fp32, by their owner from ZeRO-2 on.
    assert foretold.gradients == 4 * parameters // (1 if zero < 2 else 2)
    tokens = 4 * 5 * 192  # of a micro-batch
    state = 4 if precision == "fp32" else 2
    assert foretold.states == tokens * 2 * (state + width)  # with their gradients
    per_function = tokens * plan.setting.remainder_bits / 8
    assert foretold.remainders == 23 * per_function


def test_a_run_leaves_what_it_promises(finished: tuple[Path, dict[str, Any]], shards: Path) -> None:
    folder, summary = finished
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["status"] == "finished" and summary["steps"] == 12 and summary["ranks"] == 2
    assert summary["certificate_failures"] == 0 and summary["peak_memory_bytes"] > 0
    logged = [line for line in records(folder) if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, 13))
    assert all(line["alpha"] + line["beta"] == 1 for line in logged)
    assert logged[0]["beta"] < 0.11 and logged[-1]["beta"] > 0.4
    for line in logged:
        assert line["gradient_norm"] > 0 and 0 <= line["data_wait"] <= 1
        least, most = (line[f"micro_batch_seconds_{end}"] for end in ("least", "most"))
        assert 0 < least <= line["micro_batch_seconds_median"] <= most
        assert line["micro_batch_seconds_rank"] in range(2)
        # 1.1 G multiply-adds an image at 224 pixels, 5 of 197 tokens here; thrice for training.
        flops = line["model_flops_per_second"] / (line["samples_per_second"] / 2)
        assert flops == pytest.approx(3 * 2 * 5 * 5.4e6, rel=0.1)
    assert summary["state_bytes"]["moments"] == pytest.approx(4 * 5.5e6, rel=0.02)
    keys = {"lr", "certificate_failures", "samples_per_second", "remainder_bytes"}
    assert all(keys <= line.keys() for line in logged)
    held_out = [line for line in records(folder) if "val_loss" in line]
    assert [line["step"] for line in held_out] == [5, 10, 12]
    num_samples = read_index(shards / "val").num_samples
    assert all(line["val_samples"] == num_samples for line in held_out)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert len(events.Scalars("train/loss")) == 12
    assert [image.step for image in events.Images("held_out")] == [5, 10, 12]
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 12


@pytest.mark.parametrize("config", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_starts(
    config: Path, tmp_path: Path, shards_of: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    said = yaml.safe_load(config.read_text())
    stages = said["parallel"].get("stages", 2)
    shards = shards_of[said["task"]["name"]]
    pool: Pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[stages])
    overrides = [
        "model.weights=random",
        f"data.train={shards}/train",
        f"data.val={shards}/val",
        f"output={tmp_path}/run",
        "train.epochs=null",
        "train.steps=2",
        "train.micro_batch=2",
        *SMALLER.get(said["model"]["name"], []),
        *(["task.num_classes=2"] if "detection" in said["task"]["name"] else []),
        f"parallel.deepspeed={ROOT / said['parallel']['deepspeed']}",
    ]
    results = pool.run("tests.cases:run_config", path=str(config), overrides=overrides)
    for summary in results:
        assert summary["status"] == "finished" and summary["steps"] == 2
    if results[0]["arithmetic"] == "float" and results[0]["memory"] == "reverse":
        assert results[0]["worst_drift"] > 1e-2


def test_a_finished_run_can_be_made_longer(
    tmp_path: Path, shards: Path, two_ranks: Pool, capfd: Any
) -> None:
    path = write_config(tmp_path, shards)
    for steps, more in ((4, []), (7, ["train.patience=9"])):
        overrides = [f"train.steps={steps}", *more]
        line = ("train", str(path), "--ranks", "2", "--dry-run", *overrides)
        status, out, err = call(capfd, *line)
        assert status == 0, err
        assert ("longer        4 steps are done of 7: the schedules" in out) == (steps == 7)
        results = two_ranks.run("tests.cases:run_config", path=str(path), overrides=overrides)
        assert results[0]["steps"] == steps
        assert "nothing is left to do" in call(capfd, *line)[1]
    assert len(losses(tmp_path / "run")) == 7
    status, _, err = call(capfd, "train", str(path), "--ranks", "2", "--dry-run", "train.steps=5")
    assert status == 2 and "holds a run with train.steps: 7, now it is 5" in err


def test_without_a_terminal_a_line_tells_how_far_a_run_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dr2dist.training.progress.PERIOD", 0.0)
    caplog.set_level("INFO")
    with ProgressLine(2, 5, True) as line:
        line.update(loss="0.5")
    with ProgressLine(2, 5, False) as line:
        line.update(loss="0.7")
    (told,) = caplog.messages
    assert told.startswith("step 3 of 5, loss 0.5, ") and told.endswith(" left")


def test_configurations_are_listed_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = call(capfd, "configs")
    assert status == 0 and all(path.stem in out for path in SHIPPED)
    assert call(capfd, "configs", "finetune", "--output", "mine.yaml")[0] == 0
    assert (tmp_path / "mine.yaml").read_text() == (ROOT / "configs/finetune.yaml").read_text()
    assert json.loads((tmp_path / "ds_configs" / "zero2.json").read_text())
    status, _, err = call(capfd, "configs", "finetune", "--output", "mine.yaml")
    assert status == 2 and "mine.yaml: exists already" in err
    status, _, err = call(capfd, "configs", "--output", "mine.yaml")
    assert status == 2 and "--output has no effect without the name of a conf" in err
    status, _, err = call(capfd, "configs", "fintune")
    assert status == 2 and "did you mean 'finetune'" in err


def test_train_starts_its_ranks_and_leaves_a_finished_run_alone(
    tmp_path: Path, shards: Path, capfd: Any
) -> None:
    path = write_config(tmp_path, shards)
    line = ("train", str(path), "--ranks", "2")
    done = dr2dist(*line, "train.steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launch        2 rank(s) on this machine" in done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ranks"] == 2
    status, out, _ = call(capfd, *line, "train.steps=2")
    assert status == 0 and "is finished: nothing is left to do" in out
    status, _, err = call(capfd, *line, "--dry-run", "train.seed=5")
    assert status == 2
    assert "holds a run with train.seed: 0, now it is 5" in err.splitlines()[-1]


def test_the_launchers_own_entry_reports_a_users_error_once(tmp_path: Path, shards: Path) -> None:
    path = write_config(tmp_path, shards)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"),
            *("--master_port", "29731", "launch/train.py", "--config", str(path)),
            "task.num_classes=3",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("dr2dist: ")]
    assert told == ["dr2dist: task.num_classes is 3, the shards have 2 classes: bright, dark"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'"),
        (["model.name=resnet18", "model.image_size=null"], "ResNet of timm.models.resnet is"),
        (["model.weights=none.safetensors"], "none.safetensors does not exist"),
        (["train.micro_batch=64"], "fewer than a global batch of 64"),
        (["data.train=nowhere"], "no index.json in nowhere"),
        (["task={name: regression}"], "regression learns numbers, and data.train says of its sam"),
        (["train.profile=[7, 9]", "train.steps=7"], "train.profile is [7, 9], and the run has 7"),
        (["data.cache={folder: c, limit: 1GB}"], "data.cache has no effect: all shards are here"),
        (["parallel.deepspeed=nowhere.json"], "nowhere.json: cannot be read"),
        (
            ["coefficients={kind: constant, alpha: 1, beta: 1}"],
            "coefficients: alpha 1 and beta 1 make states grow",
        ),
    ],
)
def test_a_dry_run_finds_what_cannot_work(
    overrides: list[str], message: str, tmp_path: Path, shards: Path, capfd: Any
) -> None:
    path = write_config(tmp_path, shards)
    status, _, err = call(capfd, "train", str(path), "--dry-run", *overrides)
    assert status == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("dr2dist: ") and message in last
    assert not (tmp_path / "run").exists()


def test_a_dry_run_describes_the_run(tmp_path: Path, shards: Path, capfd: Any) -> None:
    path = write_config(tmp_path, shards)
    status, text, _ = call(capfd, "train", str(path), "--dry-run", "--ranks", "2", "train.steps=7")
    assert status == 0
    assert "7 of 8 samples on 2 rank(s)" in text
    assert "blocks: 24 functions" in text
    assert "2 rank(s) on this machine" in text


def test_other_commands(tmp_path: Path, shards: Path, capfd: Any) -> None:
    images = str(shards.parent / "images")
    source = ("--source", images, "--output", str(tmp_path / "made"))
    status, out, _ = call(capfd, "shards", "make", "--from", "imagefolder", *source)
    assert status == 0 and "60 samples of 2 classes" in out
    assert call(capfd, "shards", "verify", str(tmp_path / "made"))[0] == 0
    status, _, err = call(capfd, "shards", "make", "--from", "imagefolder", *source)
    assert status == 2 and "exists already" in err
    status, out, _ = call(capfd, "doctor", "--model", "vit_tiny_patch16_224", "--image-size", "32")
    assert status == 0 and "24 functions on" in out and "bit for bit" in out
    status, out, _ = call(capfd, "train", "--settings")
    assert status == 0 and "optim.lr" in out
    for arguments in ((), ("train",), ("shards",), ("shards", "make"), ("doctor",)):
        status, out, _ = call(capfd, *arguments, "--help")
        assert status == 0 and (not arguments or "example: dr2dist" in out)


def test_sizes_skipping_profiler_and_a_batch_that_is_not_finite(
    tmp_path: Path, shards: Path, two_ranks: Pool
) -> None:
    copied = tmp_path / "shards"
    shutil.copytree(shards, copied)
    index = read_index(copied / "train")
    first = place_of(index, 0)
    number, place = next(
        (number, first - before)
        for number, before in enumerate(accumulate((s.samples for s in index.shards), initial=0))
        if before <= first < before + index.shards[number].samples
    )
    shard = index.shards[number]
    with (copied / "train" / shard.name).open("r+b") as file:
        members = index.members(shard)[place].members
        file.seek(next(place for kind, (place, _) in members.items() if kind != "cls"))
        file.write(b"x" * 50)
    path = write_config(tmp_path, copied)
    more = ["data.unreadable=skip", "data.num_workers=0", "train.profile=[1, 2]"]
    more += ["model.image_size=[32, 48]", "train.epochs=2", "train.steps=null"]
    results = two_ranks.run("tests.cases:run_config", path=str(path), overrides=more)
    assert results[0]["skipped"] == results[1]["skipped"] == 2  # once an epoch
    assert results[0]["last"]["samples"] == 18 and results[0]["last"]["skipped"] == 0
    for rank in range(2):
        trace = json.loads((tmp_path / "run" / "profile" / f"rank-{rank}.json").read_text())
        assert any("layer_norm" in event.get("name", "") for event in trace["traceEvents"])
    with pytest.raises(AssertionError) as caught:
        overrides = ["optim.lr=1e30", "data.num_workers=0", f"output={tmp_path}/wild"]
        two_ranks.run("tests.cases:run_config", path=str(path), overrides=overrides)
    assert "UserError: rank" in str(caught.value)  # the unreadable image, which is not skipped
    path = write_config(tmp_path, shards, "diverged")
    overrides = ["optim.lr=1e30", "optim.clip=null", "reversible.chunk_size=null"]
    with pytest.raises(AssertionError) as caught:
        two_ranks.run("tests.cases:run_config", path=str(path), overrides=overrides)
    stopped = json.loads((tmp_path / "diverged" / "summary.json").read_text())
    assert stopped["status"] == "stopped"
    named = re.search(r"rank 1: step 2: samples (bright|dark)-cell_\d+, ", stopped["reason"])
    assert named is not None and "is not finite" in stopped["reason"]
