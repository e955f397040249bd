"""Runs that find actions in films, from their files to what an exported file says of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dr2dist.inference.evaluate import evaluate
from dr2dist.inference.predict import predict
from tests.commands import call, dr2dist
from tests.films import make_action_shards
from tests.pool import Pool
from tests.runs import assert_says_what_was_validated, losses, masters, records

CONFIG = """
model: {MODEL}
coefficients: {kind: constant, alpha: 0.9, beta: 0.1}
task: {name: temporal_action_detection, num_classes: 2, width: 32, levels: 3, window: 5}
data: {train: SHARDS/train, val: SHARDS/val, stride: 2, hflip: false, scale: [1.0, 1.0]}
optim: {name: adamw, lr: 2.0e-3, clip: null}
train: {steps: 8, micro_batch: 4, log_every: 1}
parallel: {PARALLEL}
checkpoint: {keep: 1}
output: OUTPUT
"""
SWIN = (
    "name: swin3d_t, weights: random, image_size: 16, options: {frames: 16, embed_dim: 24, "
    "depths: [2, 2], num_heads: [2, 2], window_size: [2, 2, 2]}"
)
VIDEOMAE = (
    "name: videomae_small_patch16, weights: random, image_size: 16, options: {frames: 4, "
    "chunks: 4, embed_dim: 48, num_heads: 2, depth: 3, patch_size: 8}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_action_shards(tmp_path_factory.mktemp("films"))


def write(folder: Path, made: Path, model: str, parallel: str) -> Path:
    text = CONFIG.replace("OUTPUT", str(folder / "run")).replace("SHARDS", str(made))
    path = folder / "run.yaml"
    path.write_text(text.replace("MODEL", model).replace("PARALLEL", parallel))
    return path


@pytest.mark.parametrize(
    ("model", "parallel"),
    [(SWIN, "zero: 2"), (VIDEOMAE, "stages: 2, zero: 0")],
    ids=["zero", "stages"],
)
def test_an_exported_file_finds_what_the_run_found(
    model: str, parallel: str, tmp_path: Path, made: Path, two_ranks: Pool, capfd: Any
) -> None:
    path = write(tmp_path, made, model, parallel)
    less = ["train.micro_batch=2", "train.steps=2"]  # within an epoch: one validation
    results = two_ranks.run("tests.cases:run_config", path=str(path), overrides=less)
    assert all(found["status"] == "finished" for found in results)
    logged = records(tmp_path / "run")
    steps = [record for record in logged if "loss_classes" in record]
    assert all(r["loss_classes"] + r["loss_ends"] == pytest.approx(r["loss"]) for r in steps)
    exported = tmp_path / "model.safetensors"
    status, _, err = call(capfd, "export", str(tmp_path / "run"), "--output", str(exported))
    assert status == 0, err
    found = evaluate(exported, made / "val", batch=3, progress=False)
    assert found["samples"] == 4
    assert_says_what_was_validated(found, tmp_path / "run")
    assert set(found["class_map"]) == {"kind 0", "kind 1"}
    one = evaluate(exported, made / "val", batch=1, progress=False)
    assert one["loss"] == pytest.approx(found["loss"], rel=1e-5)
    shared = str(tmp_path / "shared.json")
    line = ("evaluate", str(exported), str(made / "val"), "--ranks", "2", "--output", shared)
    assert dr2dist(*line).returncode == 0
    several = json.loads(Path(shared).read_text())
    assert several["samples"] == 4 and several["class_map"] == pytest.approx(found["class_map"])
    assert several["loss"] == pytest.approx(found["loss"], rel=1e-5)
    film = str(made.parent / "film_3.mp4")
    line = ("predict", str(exported), film, "--output", str(tmp_path / "found"))
    for ending in (".csv", ".json"):
        assert call(capfd, *line[:-1], line[-1] + ending)[0] == 0
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    (row,) = predict(exported, [film], progress=False)
    assert [row] == json.loads((tmp_path / "found.json").read_text())
    (cells,) = csv.DictReader((tmp_path / "found.csv").open())
    assert json.loads(cells["annotations"]) == row["annotations"] and row["seconds"] >= 2
    for each in row["annotations"]:
        start, stop = each["segment"]
        assert 0 <= start < stop <= 4.8 and 0 < each["score"] < 1
        assert each["label"] in found["classes"]
    scores = [each["score"] for each in row["annotations"]]
    assert scores == sorted(scores, reverse=True) and scores
    tensors = load_file(exported)
    next(value for name, value in tensors.items() if "task_head" in name).fill_(float("nan"))
    with safe_open(exported, "pt") as file:
        save_file(tensors, tmp_path / "broken.safetensors", file.metadata())
    rows = predict(tmp_path / "broken.safetensors", [film, film], progress=False)
    assert rows == [{"path": film, "error": "the outputs are not finite"}] * 2


LAYOUTS = {
    "one": (1, ["train.micro_batch=4"]),
    "two": (2, ["train.micro_batch=2", "parallel.zero=2"]),
    "micro": (1, ["train.micro_batch=1", "train.accumulate=4"]),
}


def test_a_loss_and_its_gradient_do_not_depend_on_how_films_are_cut(
    tmp_path: Path, made: Path, one_rank: Pool, two_ranks: Pool
) -> None:
    """A step of SGD of one: what the masters changed by is the gradient."""
    pools, found = {1: one_rank, 2: two_ranks}, {}
    sgd = ["optim={name: sgd, momentum: 0.0, lr: 1.0, clip: null, warmup: 0}"]
    for name, (ranks, overrides) in LAYOUTS.items():
        (tmp_path / name).mkdir()
        path = write(tmp_path / name, made, VIDEOMAE, "zero: 0")
        more = [*overrides, *sgd, "train.steps=3", "data.val=null"]
        pools[ranks].run("tests.cases:run_config", path=str(path), overrides=more)
        folder = tmp_path / name / "run"
        found[name] = list(losses(folder).values()), masters(folder)
    wanted, weights = found.pop("one")
    for others, values in found.values():
        assert others == pytest.approx(wanted, rel=1e-6)
        for name, value in values.items():
            scale = float(weights[name].abs().max())
            assert float((value - weights[name]).abs().max()) <= 2e-5 * scale + 1e-7, name


def test_what_does_not_fit_is_said(tmp_path: Path, made: Path, capfd: Any) -> None:
    path = write(tmp_path, made, VIDEOMAE, "zero: 0")
    for overrides, reason in (
        (["model={name: vit_tiny_patch16_224, weights: random}"], "says nothing of time"),
        (["task.heads=3"], "task.heads is 3, allowed are divisors of 32"),
        (["task.window=4"], "task.window is 4, allowed are odd numbers"),
        (["task.num_classes=3"], "num_classes is 3"),
        (["data.views=2"], "data.views"),
        (["data.sampling=segments", "data.overlap=0.1"], "no effect with sampling segments"),
    ):
        status, _, err = call(capfd, "train", str(path), "--dry-run", *overrides)
        assert status == 2 and reason in err.strip().splitlines()[-1], (overrides, err)


def test_annotations_after_a_films_end_are_told(
    tmp_path: Path, made: Path, capfd: Any, caplog: Any
) -> None:
    """As where a folder of frames is taken for faster than it is. Spaces around names say
    nothing, nor does a byte order mark."""
    segments = {"film_1": [0.5, 1.0], "film_2": [99, 100]}
    films = {
        name: {"annotations": [{"label": f"kind{' ' * number}", "segment": segment}]}
        for number, (name, segment) in enumerate(segments.items())
    }
    table = made.parent / "late.json"
    table.write_text(json.dumps({"database": films}), "utf-8-sig")
    line = ("shards", "make", "--from", "activitynet", "--source", str(table))
    status, out, err = call(capfd, *line, "--output", str(tmp_path / "made"))
    assert status == 0 and "2 samples of 1 classes" in out, err
    assert "1 film(s) have annotations that begin after their end" in caplog.text
    assert "film_2.mp4, 1 after " in caplog.text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ("[]", 'has no "database"'),
        ('{"database": {"film_1": 3}}', "film_1: is 3"),
        ('{"database": {"other": {}}}', "none of its 1 films"),
        ('{"database": {"film_1": {"annotations": [{"label": "a", "segment": [2, 1]}]}}}', "segm"),
        ('{"database": {"film_1": {"annotations": [{"segment": [1, 2]}]}}}', "film_1: has the"),
    ],
)
def test_annotations_that_are_none_are_refused(
    text: str, reason: str, made: Path, tmp_path: Path, capfd: Any
) -> None:
    table = made.parent / "wrong.json"
    table.write_text(text)
    line = ("shards", "make", "--from", "activitynet", "--source", str(table))
    status, _, err = call(capfd, *line, "--output", str(tmp_path / "made"))
    assert status == 2 and reason in err.strip().splitlines()[-1], err
    assert not (tmp_path / "made").exists()
