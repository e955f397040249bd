"""Loggers: what a run tells them, theirs and one's own, without a network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dr2dist.config import load_config
from dr2dist.errors import UserError
from dr2dist.loggers.tensorboard import TensorBoard
from dr2dist.training.plan import make_plan
from dr2dist.training.records import Records
from tests.commands import dr2dist
from tests.images import make_small_shards

CONFIG = """
plugins: [own_logger]
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 1}}
task: {num_classes: 2}
data: {train: SHARDS/train, val: SHARDS/val, num_workers: 0}
optim: {lr: 1.0e-3}
train:
  steps: 2
  micro_batch: 2
  log_every: 1
  validate_every: 2
  loggers: [lines, broken, wandb, mlflow]
parallel: {zero: 0}
output: OUTPUT
"""

PLUGIN = """
import json
import dr2dist

class Lines:
    def start(self, folder, settings, step):
        self.file = open(folder / "told.jsonl", "a")
        self.tell("start", step, settings["train"]["steps"])
    def tell(self, *what):
        self.file.write(json.dumps(what) + "\\n")
        self.file.flush()
    def log(self, step, values):
        self.tell("log", step, sorted(values))
    def show(self, step, picture):
        self.tell("show", step, len(picture.axes))
    def end(self, summary):
        self.tell("end", summary["status"])

class Broken(Lines):
    def start(self, folder, settings, step):
        pass
    def log(self, step, values):
        raise OSError("the server\\nis gone")

dr2dist.register_logger("lines", Lines)
dr2dist.register_logger("broken", Broken)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loggers")
    shards = make_small_shards(folder)
    text = CONFIG.replace("SHARDS", str(shards)).replace("OUTPUT", str(folder / "run"))
    (folder / "config.yaml").write_text(text)
    (folder / "own_logger.py").write_text(PLUGIN)
    return folder


def train(folder: Path, *overrides: str) -> str:
    """What the command says on stderr; it must end well."""
    offline = {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"file://{folder}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }
    done = dr2dist("train", str(folder / "config.yaml"), *overrides, variables=offline)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_run_tells_all_its_loggers_and_goes_on_as_the_same_one(folder: Path) -> None:
    said = train(folder)
    assert "logger Broken: OSError: the server" in said and said.count("told nothing more") == 1
    ids = {name: (folder / "run" / name).read_text() for name in ("wandb-id", "mlflow-id")}
    train(folder, "train.steps=4")
    assert ids == {name: (folder / "run" / name).read_text() for name in ids}
    told = [json.loads(line) for line in (folder / "run" / "told.jsonl").read_text().splitlines()]
    assert [line[:2] for line in told if line[0] != "log"] == [
        ["start", 0], ["show", 2], ["end", "finished"],
        ["start", 2], ["show", 4], ["end", "finished"],
    ]  # fmt: skip
    logged = [line for line in told if line[0] == "log" and "train/loss" in line[2]]
    assert [line[1] for line in logged] == [1, 2, 3, 4]
    assert {"coefficients/beta", "memory/peak_memory_bytes"} <= set(logged[0][2])
    assert len(list((folder / "run" / "wandb").glob("offline-run-*"))) == 2
    assert not (folder / "run" / "tensorboard").exists()
    found = mlflow_run(folder, ids["mlflow-id"].strip())
    assert found.data.params["model.name"] == "vit_tiny_patch16_224"
    assert found.info.status == "FINISHED" and "val/accuracy" in found.data.metrics


def mlflow_run(folder: Path, run_id: str) -> Any:
    """What MLflow has of a run, whose losses must be those of four steps."""
    from mlflow.tracking import MlflowClient

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = MlflowClient(f"file://{folder}/mlruns")
    steps = [point.step for point in client.get_metric_history(run_id, "train/loss")]
    assert steps == [1, 2, 3, 4]
    return client.get_run(run_id)


def test_a_logger_that_a_new_run_cannot_start_is_an_error(tmp_path: Path) -> None:
    class Closed(TensorBoard):
        def start(self, folder: Path, settings: Any, step: int) -> None:
            raise ConnectionError("no\nroute")

    with pytest.raises(UserError, match=r"train\.loggers: Closed: ConnectionError: no"):
        Records(tmp_path / "new", "train: {}", 0, [Closed()])
    Records(tmp_path / "old", "train: {}", 5, [Closed()]).log(6, loss=1.0)


@pytest.mark.parametrize(
    ("loggers", "line"),
    [
        ("[tensorbord]", "'tensorbord' is not known; did you mean 'tensorboard'?"),
        ("[lines, lines]", "'lines' is named twice"),
    ],
)
def test_wrong_loggers_are_refused_at_the_plan(folder: Path, loggers: str, line: str) -> None:
    config = load_config(folder / "config.yaml", [f"train.loggers={loggers}"])
    with pytest.raises(UserError, match=r"train\.loggers: ") as error:
        make_plan(config, 1)
    assert line in str(error.value)


def test_a_logger_that_is_not_installed_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = load_config(folder / "config.yaml", ["train.loggers=[wandb]"])
    with pytest.raises(
        UserError, match="wandb is not installed: pip install 'dr2dist\\[loggers\\]"
    ):
        make_plan(config, 1)
