"""What a command imports before it has to, and what a rank does without a launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images import make_small_shards

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "timm", "torchvision", "deepspeed", "torchmetrics", "matplotlib", "webdataset")
CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 1}}
task: {num_classes: 2}
data: {train: SHARDS/train, num_workers: 0}
optim: {lr: 1e-3}
train: {steps: 2, micro_batch: 4}
output: OUTPUT
"""
CALL = """
import json, sys
from dr2dist.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("startup")
    text = CONFIG.replace("SHARDS", str(make_small_shards(folder)))
    path = folder / "config.yaml"
    path.write_text(text.replace("OUTPUT", str(folder / "run")))
    return path


def _imported(*arguments: str) -> set[str]:
    line = [sys.executable, "-c", CALL, *arguments]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True, timeout=240)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "--version",
        "train --help",
        "bench --help",
        "train",
        "train a.yaml --ranks 0",
        "x",
        "train none.yaml",
    ],
)
def test_help_and_errors_of_parsing_import_nothing_heavy(arguments: str) -> None:
    assert not _imported(*arguments.split()) & set(HEAVY)


def test_a_dry_run_needs_no_engine_metrics_or_pictures(config: Path) -> None:
    unasked = {"deepspeed", "torchmetrics", "matplotlib", "wandb"}
    assert not unasked & _imported("train", str(config), "--dry-run")


def _rank(config: Path, line: list[str], **places: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")}
    return subprocess.run(
        [sys.executable, *line, "--config", str(config)],
        cwd=ROOT,
        env={**kept, "OMP_NUM_THREADS": "1", **places},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_what_is_printed_to_a_full_disk_is_missed_and_to_nobody_is_not(config: Path) -> None:
    line = [sys.executable, "-m", "dr2dist.cli"]
    for more in (["configs"], ["status", str(config.parent)]):
        with open("/dev/full", "w") as full:
            done = subprocess.run([*line, *more], cwd=ROOT, stdout=full, stderr=-1, timeout=240)
        assert done.returncode == 2
        assert done.stderr == b"dr2dist: stdout cannot be written: No space left on device\n"
    for more in (["configs"], ["status", str(config.parent)], ["train", str(config), "--dry-run"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([*line, *more], cwd=ROOT, stdout=write, stderr=-1, timeout=240)
        os.close(write)
        assert done.returncode == 0 and not done.stderr


def test_without_a_launcher_there_is_one_rank_or_one_line(config: Path, tmp_path: Path) -> None:
    done = _rank(config, ["launch/train.py"])
    assert done.returncode == 0, done.stderr
    assert json.loads((config.parent / "run" / "summary.json").read_text())["ranks"] == 1
    assert "dr2dist export" in done.stdout and "every step proved its reversal" in done.stdout
    done = _rank(config, ["-m", "dr2dist.training.main"], OMPI_COMM_WORLD_SIZE="2")
    assert done.returncode == 2
    (line,) = [each for each in done.stderr.splitlines() if "dr2dist" in each]
    assert line.startswith("dr2dist: found OMPI_COMM_WORLD_SIZE 2, and no rank: start with")
    assert "Traceback" not in done.stderr and "mpi4py" not in done.stderr
