"""The same run by every starter: the command itself, torchrun, deepspeed, srun, mpirun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from dr2dist.checkpoints.folders import checkpoints
from tests import slurm
from tests.images import make_small_shards
from tests.pool import wait_for
from tests.runs import losses, masters

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.slow
CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 1}}
task: {num_classes: 2}
data: {train: shards/train, num_workers: 0}
optim: {lr: 1e-3}
train: {steps: 3, micro_batch: 4, log_every: 1}
parallel: {zero: 2}
output: OUTPUT
"""
COMMAND = [sys.executable, "-m", "dr2dist.cli", "train"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starters")
    make_small_shards(folder)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if (reason := slurm.lacking()) is not None:
        pytest.skip(reason)
    with slurm.slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


def config(place: Path, name: str) -> str:
    (place / f"{name}.yaml").write_text(CONFIG.replace("OUTPUT", name))
    return f"{name}.yaml"


def start(place: Path, line: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        line,
        cwd=place,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def reached(place: Path, name: str) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    assert json.loads((place / name / "summary.json").read_text())["ranks"] == 2
    return losses(place / name), masters(place / name)


@pytest.fixture(scope="module")
def wanted(place: Path) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    start(place, [*COMMAND, config(place, "own"), "--ranks", "2"], dict(os.environ))
    return reached(place, "own")


def check(place: Path, name: str, wanted: tuple[dict[int, float], dict[str, torch.Tensor]]) -> None:
    losses, weights = reached(place, name)
    assert losses == wanted[0]
    assert all(torch.equal(value, wanted[1][key]) for key, value in weights.items())


STARTERS = {
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--no-python", *COMMAND],
    "openmpi": ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "-n", "2", *COMMAND],
    "mpich": ["mpirun.mpich", "-n", "2", *COMMAND],
}


@pytest.mark.parametrize("name", STARTERS)
def test_what_starts_the_command_several_times_starts_its_ranks(
    name: str, place: Path, wanted: tuple[dict[int, float], dict[str, torch.Tensor]]
) -> None:
    line = STARTERS[name]
    if shutil.which(line[0]) is None:
        pytest.skip(f"{line[0]} is not installed (Debian: {name})")
    start(place, [*line, config(place, name)], dict(os.environ))
    check(place, name, wanted)


def test_deepspeeds_launcher(
    place: Path, wanted: tuple[dict[int, float], dict[str, torch.Tensor]]
) -> None:
    where = ["--num_accelerators", "2", "--master_port", "29617", str(ROOT / "launch" / "train.py")]
    line = [sys.executable, "-m", "deepspeed.launcher.runner", *where]
    start(place, [*line, "--config", config(place, "deepspeed")], dict(os.environ))
    check(place, "deepspeed", wanted)


def test_srun_on_two_nodes(
    place: Path, wanted: tuple[dict[int, float], dict[str, torch.Tensor]], cluster: dict[str, str]
) -> None:
    here = {**cluster, "MASTER_ADDR": "127.0.0.1"}  # names of its nodes mean nothing here
    start(place, ["srun", "-N2", "-n2", *COMMAND, config(place, "srun")], here)
    check(place, "srun", wanted)


def test_a_batch_job_that_is_to_end_is_queued_again_where_it_goes_on(
    place: Path, cluster: dict[str, str]
) -> None:
    """launch/slurm.sbatch as it stands, for two tasks without GPUs."""
    slurms = partial(ask, place, cluster)
    more = ["--ntasks-per-node=1", config(place, "batch"), "train.steps=100000"]
    job = submit(place, cluster, *more)
    metrics = place / "batch" / "metrics.jsonl"
    try:
        wait_for(lambda: metrics.exists() and '"step": 5,' in metrics.read_text(), "a few steps")
        slurms("scancel", "--signal=USR1", job)  # as SLURM itself does before the time is over
        wait_for(lambda: "PENDING" in slurms("squeue", "-h", "-o", "%T"), "the job's return", 60)
        summary = json.loads((place / "batch" / "summary.json").read_text())
        assert (summary["status"], summary["reason"]) == ("interrupted", "SIGUSR1")
        assert checkpoints(place / "batch")
    finally:
        slurms("scancel", job)


def test_an_array_of_jobs_has_a_run_each(
    place: Path, wanted: tuple[dict[int, float], dict[str, torch.Tensor]], cluster: dict[str, str]
) -> None:
    more = ["--array=0-1", "--nodes=1", "--ntasks-per-node=2", config(place, "array")]
    submit(place, cluster, *more, "output=array-$ARRAY")
    wait_for(lambda: not ask(place, cluster, "squeue", "-h"), "the jobs' end", 300)
    for number in range(2):
        check(place, f"array-{number}", wanted)


def ask(place: Path, cluster: dict[str, str], *line: str) -> str:
    """What a command of SLURM says."""
    path = f"{BIN}{os.pathsep}{cluster['PATH']}"
    here = {**cluster, "MASTER_ADDR": "127.0.0.1", "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=place, env=here, capture_output=True, text=True, check=True)
    return done.stdout


def submit(place: Path, cluster: dict[str, str], *more: str) -> str:
    """The number of a job of launch/slurm.sbatch. more: options, then what the script is given."""
    options = [word for word in more if word.startswith("--")]
    script = [str(ROOT / "launch" / "slurm.sbatch"), *more[len(options) :]]
    common = ["--parsable", "--gpus-per-node=0", "--cpus-per-task=1"]
    return ask(place, cluster, "sbatch", *common, *options, *script).strip()
