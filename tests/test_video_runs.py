"""Runs on clips, from films in shards to what an exported file says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dr2dist.data.film import Film
from dr2dist.errors import UserError
from dr2dist.inference.evaluate import evaluate
from dr2dist.inference.predict import predict
from tests.commands import ROOT, call
from tests.films import film, make_film_shards
from tests.pool import Pool
from tests.runs import assert_says_what_was_validated

CONFIG = """
model: {name: MODEL, weights: random, image_size: 16, options: OPTIONS}
coefficients: {kind: constant, alpha: 0.9, beta: 0.1}
task: {name: video_classification, num_classes: 2}
data: {train: SHARDS/train, val: SHARDS/val, stride: 2, views: 2, crops: 3}
optim: {name: adamw, lr: 3.0e-3}
train: {steps: 12, micro_batch: 4, log_every: 4}
parallel: {PARALLEL}
output: OUTPUT
"""
SWIN = (
    "swin3d_t",
    "{frames: 4, embed_dim: 24, depths: [2, 2], num_heads: [2, 2], window_size: [2, 2, 2]}",
)
VIDEOMAE = (
    "videomae_small_patch16",
    "{frames: 4, embed_dim: 48, num_heads: 2, depth: 3, patch_size: 8}",
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_film_shards(tmp_path_factory.mktemp("films"))


def folder_of_frames(folder: Path, path: Path) -> None:
    folder.mkdir(parents=True)
    found = Film(path.read_bytes())
    for number, frame in enumerate(found.read(found.times.tolist())):
        Image.fromarray(frame).save(folder / f"{number}.png")


def write(folder: Path, shards: Path, model: tuple[str, str], parallel: str) -> Path:
    said = {"MODEL": model[0], "OPTIONS": model[1], "SHARDS": str(shards), "PARALLEL": parallel}
    text = CONFIG.replace("OUTPUT", str(folder / "run"))
    for name, value in said.items():
        text = text.replace(name, value)
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("model", "parallel"),
    [(SWIN, "zero: 2"), (VIDEOMAE, "stages: 2, zero: 0")],
    ids=["zero", "stages"],
)
def test_an_exported_file_says_what_the_run_validated(
    model: tuple[str, str], parallel: str, tmp_path: Path, shards: Path, two_ranks: Pool, capfd: Any
) -> None:
    path = write(tmp_path, shards, model, parallel)
    results = two_ranks.run("tests.cases:run_config", path=str(path), overrides=[])
    assert all(found["status"] == "finished" for found in results)
    exported = tmp_path / "model.safetensors"
    status, _, err = call(capfd, "export", str(tmp_path / "run"), "--output", str(exported))
    assert status == 0, err
    found = evaluate(exported, shards / "val", batch=3, progress=False)
    assert found["samples"] > 0
    assert_says_what_was_validated(found, tmp_path / "run")
    (tmp_path / "new").mkdir()
    for name, backwards in (("up", False), ("down", True)):
        (tmp_path / "new" / f"{name}.mp4").write_bytes(film(30, backwards=backwards))
    rows = predict(exported, [tmp_path / "new"], progress=False)
    assert [Path(row["path"]).stem for row in rows] == ["down", "up"]
    # The same films as folders of their frames; a poster beside films is none.
    folder_of_frames(tmp_path / "frames" / "down", tmp_path / "new" / "down.mp4")
    folder_of_frames(tmp_path / "frames" / "up", tmp_path / "new" / "up.mp4")
    (tmp_path / "frames" / "up.mp4").write_bytes((tmp_path / "new" / "up.mp4").read_bytes())
    Image.new("RGB", (9, 9)).save(tmp_path / "frames" / "poster.png")
    joined = predict(exported, [tmp_path / "frames"], frame_rate=10, progress=False)
    assert [Path(row["path"]).name for row in joined] == ["down", "up", "up.mp4"]
    assert [row["class"] for row in joined] == [rows[0]["class"], *2 * [rows[1]["class"]]]
    with pytest.raises(UserError, match="no film is a folder of frames"):
        predict(exported, [tmp_path / "new"], frame_rate=10, progress=False)
    assert all(row["p_kind_0"] + row["p_kind_1"] == pytest.approx(1, abs=1e-4) for row in rows)


def test_what_does_not_go_together_is_said_by_the_plan(
    tmp_path: Path, shards: Path, capfd: Any
) -> None:
    path = write(tmp_path, shards, SWIN, "zero: 2")
    for overrides, reason in (
        (["model.name=vit_tiny_patch16_224", "model.options={}"], "the model takes no clips"),
        (["data.sampling=segments"], "stride has no effect with sampling segments"),
        (["model.in_channels=1"], "model.in_channels is 1, films have 3 channels"),
        (["task={name: classification, num_classes: 2}"], "data.stride"),
    ):
        status, _, err = call(capfd, "train", str(path), "--dry-run", *overrides)
        last = err.strip().splitlines()[-1]
        assert status == 2 and reason in last, (overrides, err)
    images = ROOT / "configs" / "finetune.yaml"
    wrong = ("model.name=swin3d_t", "model.weights=random", f"data.train={shards}/train")
    status, _, err = call(capfd, "train", str(images), "--dry-run", *wrong, "data.val=null")
    assert status == 2 and "Traceback" not in err
