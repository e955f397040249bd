"""What cannot be written, as where a disk is full: one line, nothing half, and no traceback.

A process's files have a largest size here, beyond which writing fails as it does on a full disk.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dr2dist.checkpoints.folders import checkpoints
from tests.commands import dr2dist
from tests.forked import errors_of, start
from tests.images import make_small_shards
from tests.pool import wait_for

LARGEST = 15_000
CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 1}}
task: {num_classes: 2}
data: {train: shards/train, val: shards/val, num_workers: 0}
optim: {lr: 1.0e-4}
train: {steps: 2, micro_batch: 4, log_every: 1}
output: run
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a run's configuration, the finished run and its exported model."""
    folder = tmp_path_factory.mktemp("disk")
    make_small_shards(folder)
    (folder / "run.yaml").write_text(CONFIG)
    for line in ("train run.yaml", "export run --output model.safetensors"):
        done = dr2dist(*line.split(), folder=folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_run_ends_with_a_line_and_goes_on(ranks: str, place: Path) -> None:
    name = f"long-{ranks}"
    line = ["train", "run.yaml", "--ranks", ranks, f"output={name}", "train.steps=150"]
    full = dr2dist(*line, folder=place, largest=LARGEST)
    assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
    assert "cannot be written: File too large" in full.stderr.splitlines()[-1]
    assert not checkpoints(place / name)
    again = dr2dist(*line, folder=place)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("line", "output"),
    [
        ("export run", "new.safetensors"),
        ("export run", "new.pt2"),
        ("predict model.safetensors images", "new.json"),
        ("evaluate model.safetensors shards/val", "new.json"),
        ("shards make --from imagefolder --source images", "new"),
        ("shards index shards/train/shard-000000.tar", "new/index.json"),
        ("configs finetune.yaml", "new.yaml"),
    ],
)
def test_a_command_leaves_nothing_half(line: str, output: str, place: Path, tmp_path: Path) -> None:
    goal = tmp_path / output
    done = dr2dist(*line.split(), "--output", str(goal), folder=place, largest=800)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "cannot be written: " in done.stderr.splitlines()[-1], done.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    assert goal.is_file() == ("evaluate" in line)  # the report is whole, its picture is not there


def test_a_run_whose_folder_is_another_one_ends_and_goes_on(place: Path, tmp_path: Path) -> None:
    """As where its storage is mounted no more."""
    run, elsewhere, said = place / "moved", place / "elsewhere", tmp_path / "said"
    line = ["train", "run.yaml", "output=moved", "checkpoint.steps=20", "train.steps=400"]
    process = start(line, place, said)
    wait_for(lambda: bool(checkpoints(run)), "a checkpoint")
    run.rename(elsewhere)
    run.mkdir()
    process.join(120)
    errors = errors_of(said).read_text()
    assert process.exitcode == 2 and "Traceback" not in errors, errors
    known = ("is not the folder any more", "No such file or directory")  # while it is moved
    assert any(text in errors.splitlines()[-1] for text in known), errors
    shutil.rmtree(run)
    elsewhere.rename(run)
    step = int(checkpoints(run)[-1].name.removeprefix("step-"))
    again = dr2dist(*line, folder=place)
    assert again.returncode == 0, again.stderr
    starts = (run / "starts.jsonl").read_text().splitlines()
    assert json.loads(starts[-1])["step"] == step
