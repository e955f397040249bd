"""From a run's folder to an exported file, its evaluation and predictions."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

import dr2dist
from dr2dist.data.index import Index, read_index
from dr2dist.data.stream import ShardDataset
from dr2dist.inference.exported import export
from dr2dist.inference.predict import predict
from dr2dist.tasks.transforms import eval_transform
from tests import commands
from tests.commands import ROOT, call
from tests.forked import errors_of, start
from tests.images import FIELDS, make_small_shards, on_image, samples_of
from tests.pool import Pool, wait_for
from tests.servers import serve

CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32}
coefficients: COEFFICIENTS
task: {name: classification, num_classes: 2}
data: {train: SHARDS/train, val: SHARDS/val}
optim: {name: adamw, lr: 1.0e-4}
train: {steps: 4, micro_batch: 4, validate_every: 2}
output: OUTPUT
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_shards(tmp_path_factory.mktemp("data"))


def _run(folder: Path, shards: Path, pool: Pool, coefficients: str, *more: str) -> dict[str, Any]:
    path = folder / "config.yaml"
    text = CONFIG.replace("SHARDS", str(shards)).replace("OUTPUT", str(folder / "run"))
    path.write_text(text.replace("COEFFICIENTS", coefficients))
    summary: dict[str, Any] = pool.run(
        "tests.cases:run_config", path=str(path), overrides=list(more)
    )[0]
    return summary


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, shards: Path, two_ranks: Pool
) -> tuple[Path, dict[str, Any]]:
    """A run of two ranks under ZeRO-3: its folder and summary."""
    folder = tmp_path_factory.mktemp("finished")
    path = "{kind: conserve, beta: [0.1, 0.5], every: 1}"
    options = "model.options={depth: 4, init_values: 0.5}"
    summary = _run(folder, shards, two_ranks, path, "parallel.zero=3", options)
    return folder / "run", summary


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, finished: Any) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.safetensors"
    export(finished[0], path, "last")
    return path


def test_evaluate_gives_the_runs_own_validation(
    finished: tuple[Path, dict[str, Any]], shards: Path, tmp_path: Path, capfd: Any
) -> None:
    run, summary = finished
    for which in ("best", "last"):
        file, report = tmp_path / f"{which}.safetensors", tmp_path / f"{which}.json"
        status, out, _ = call(capfd, "export", str(run), "--output", str(file), "--which", which)
        assert status == 0 and f"after {summary[which]['step']} steps" in out
        again = call(capfd, "export", str(run), "--output", str(file))
        assert again[0] == 2 and "exists already" in again[2]
        held_out = str(shards / "val")
        status, out, _ = call(
            capfd, "evaluate", str(file), held_out, "--output", str(report), "--batch", "5"
        )
        assert status == 0
        found = json.loads(report.read_text())
        for name, value in summary[which].items():
            if name != "step":
                assert found[name] == pytest.approx(value, rel=1e-5), name
        assert report.with_suffix(".png").stat().st_size > 1000


def test_several_ranks_measure_and_predict_as_one(
    exported: Path, shards: Path, tmp_path: Path
) -> None:
    photos, reports, tables = shards.parent / "images", [], []
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for ranks in ("1", "3"):
        report, table = tmp_path / f"{ranks}.json", tmp_path / f"{ranks}.csv"
        line = ("evaluate", str(exported), str(shards / "val"), "--ranks", ranks, "--batch", "5")
        done = commands.dr2dist(*line, "--output", str(report))
        assert done.returncode == 0 and done.stdout.count("loss  ") == 1, done.stderr
        reports.append(json.loads(report.read_text()))
        line = ("predict", str(exported), str(photos), str(broken), f"--ranks={ranks}")
        skipping = ("--output", str(table), "--batch=4", "--skip-unreadable")
        done = commands.dr2dist(*line, *skipping)
        assert done.returncode == 0 and "1 of them with an error" in done.stdout, done.stderr
        tables.append(table.read_text())
    assert tables[0] == tables[1]
    for name in ("loss", "calibration_error"):
        assert reports[0].pop(name) == pytest.approx(reports[1].pop(name), abs=1e-6)
    assert reports[0] == reports[1] and reports[0]["samples"] == 18
    done = commands.dr2dist(*line[:-1], "--ranks=3", "--output", str(tmp_path / "none.csv"))
    told = [text for text in done.stderr.splitlines() if "dr2dist:" in text]
    assert done.returncode == 2 and len(told) == 1 and f"{broken}: cannot be read" in told[0]
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = commands.dr2dist(*line, "--output", str(tmp_path / "none.csv"), variables=place)
    assert done.returncode == 2 and "this process is one of 2 ranks already" in done.stderr
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_that_are_told_to_stop_write_nothing(
    exported: Path, shards: Path, tmp_path: Path, number: int
) -> None:
    output, report = tmp_path / "said", tmp_path / "report.json"
    line = ["evaluate", str(exported), str(shards / "val"), "--ranks", "2", "--batch", "1"]
    command = start([*line, "--output", str(report)], ROOT, output)
    try:
        wait_for(lambda: len(psutil.Process(command.pid).children()) == 2, "the ranks")
        os.kill(int(command.pid or 0), number)
        command.join(60)
    finally:
        command.kill()
    told = errors_of(output).read_text()
    assert command.exitcode == 75 and "dr2dist: stopped before the end\n" in told, told
    assert "checkpoint" not in told and not report.exists()


def test_evaluation_of_shards_that_are_elsewhere_is_that_of_these(
    exported: Path, shards: Path, tmp_path: Path, capfd: Any
) -> None:
    server, reports = serve(shards / "val"), []
    ways: dict[str, list[str]] = {"here": [], "there": ["--cache", str(tmp_path / "cache")]}
    for name, more in ways.items():
        source = str(shards / "val") if name == "here" else server.url
        report = tmp_path / f"{name}.json"
        status, _, err = call(
            capfd, "evaluate", str(exported), source, "--output", str(report), *more
        )
        assert status == 0, err
        reports.append(json.loads(report.read_text()))
    assert reports[0] == reports[1] and list((tmp_path / "cache").glob("dr2dist-*.tar"))
    status, _, err = call(capfd, "evaluate", str(exported), server.url)
    server.stop()
    assert status == 2 and "--cache" in err.splitlines()[-1]


def copied_shards(shards: Path, folder: Path) -> tuple[Path, Index]:
    """Held-out shards to be damaged, and their index."""
    copied = shutil.copytree(shards / "val", folder / "val")
    return copied, read_index(copied)


def test_evaluation_leaves_out_what_cannot_be_read_if_told_so(
    exported: Path, shards: Path, tmp_path: Path, capfd: Any
) -> None:
    copied, index = copied_shards(shards, tmp_path)
    sample = samples_of(index)[3]
    with index.path(index.shards[0]).open("r+b") as file:
        members = sample.members
        file.seek(members[(set(members) - {"cls"}).pop()][0])
        file.write(b"x" * 50)
    report = tmp_path / "report.json"
    line = ["evaluate", str(exported), str(copied), "--output", str(report)]
    status, _, err = call(capfd, *line)
    assert status == 2 and f"sample '{sample.key}' cannot be read" in err
    assert not report.exists()
    assert call(capfd, *line, "--skip-unreadable")[0] == 0
    found = json.loads(report.read_text())
    assert (found["samples"], found["skipped"]) == (17, 1)


def test_shards_that_are_not_those_of_their_index_are_not_measured(
    exported: Path, shards: Path, tmp_path: Path, capfd: Any
) -> None:
    copied, index = copied_shards(shards, tmp_path)
    shutil.copy(read_index(shards / "train").path(index.shards[0]), index.path(index.shards[0]))
    status, _, err = call(capfd, "evaluate", str(exported), str(copied))
    assert status == 2 and "bytes, index.json says" in err.splitlines()[-1]


def test_outputs_that_are_not_finite_are_no_results(
    exported: Path, shards: Path, tmp_path: Path, capfd: Any
) -> None:
    """Whatever the batch: one such sample makes the mean loss NaN, and its row names it."""
    path, report = tmp_path / "broken.safetensors", tmp_path / "report.json"
    tensors = load_file(exported)
    tensors["head.bias"][0] = float("nan")
    with safe_open(exported, "pt") as file:
        save_file(tensors, path, file.metadata())
    for batch in ("1", "8"):
        line = ["evaluate", str(path), str(shards / "val"), "--output", str(report)]
        assert call(capfd, *line, "--batch", batch)[0] == 0
        assert json.loads(report.read_text())["loss"] is None
    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    rows = predict(path, [tmp_path / "image.png"])
    assert [row["error"] for row in rows] == ["the outputs are not finite"]


def test_the_report_is_that_of_plain_counting(
    exported: Path, shards: Path, tmp_path: Path, capfd: Any
) -> None:
    report = tmp_path / "report.json"
    call(capfd, "evaluate", str(exported), str(shards / "val"), "--output", str(report))
    found = json.loads(report.read_text())
    net = dr2dist.load(exported)
    cfg = net.pretrained_cfg
    dataset = ShardDataset(
        shards / "val", FIELDS, eval_transform((32, 32), cfg["mean"], cfg["std"])
    )
    samples = [dataset[0, index].values for index in range(len(dataset))]
    labels = torch.tensor([sample["label"] for sample in samples])
    with torch.no_grad():
        output = net(torch.stack([sample["image"] for sample in samples]))
    chosen = output.argmax(1)
    confusion = [[int(((labels == i) & (chosen == j)).sum()) for j in (0, 1)] for i in (0, 1)]
    assert found["confusion"] == confusion
    assert found["samples"] == len(dataset) == sum(map(sum, confusion))
    assert found["loss"] == pytest.approx(cross_entropy(output, labels).item(), rel=1e-5)
    each = [confusion[k][k] / sum(confusion[k]) for k in (0, 1)]
    assert list(found["class_accuracy"].values()) == pytest.approx(each)
    assert found["balanced_accuracy"] == pytest.approx(sum(each) / 2)
    confidence, right = output.softmax(1).max(1).values, chosen == labels
    bins = (confidence * 15).ceil().long()
    gaps = [(confidence[bins == b] - right[bins == b].float()).sum().abs() for b in bins.unique()]
    assert found["calibration_error"] == pytest.approx(float(sum(gaps)) / len(labels), abs=1e-5)


def test_plain_timm_would_be_wrong_and_the_file_says_so(exported: Path) -> None:
    with safe_open(exported, "pt") as file:
        assert "OTHER OUTPUTS" in file.metadata()["WARNING"]
    size = {"img_size": 32, "depth": 4, "init_values": 0.5}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **size).eval()
    model.load_state_dict(load_file(exported), strict=True)
    images = torch.randn(2, 3, 32, 32)
    net = dr2dist.load(exported)
    assert not net.training
    with torch.no_grad():
        assert (model(images) - net(images)).abs().max() > 1e-2
        again = dr2dist.convert(model, *net.coefficients).eval()
        assert torch.equal(again(images), net(images))


def test_a_conventional_run_exports_plain_timm_weights(
    tmp_path: Path, shards: Path, one_rank: Pool
) -> None:
    more = ["reversible={arithmetic: float, memory: store}", "model.options={depth: 4}"]
    _run(tmp_path, shards, one_rank, "{kind: constant, alpha: 1, beta: 0}", *more)
    path = tmp_path / "plain.safetensors"
    export(tmp_path / "run", path)
    with safe_open(path, "pt") as file:
        assert "WARNING" not in file.metadata()
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=32, depth=4).eval()
    model.load_state_dict(load_file(path), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(dr2dist.load(path)(images), model(images))


def test_what_is_not_an_exported_file_is_refused(
    exported: Path, tmp_path: Path, shards: Path, capfd: Any
) -> None:
    plain, cut = tmp_path / "plain.safetensors", tmp_path / "cut.safetensors"
    save_file(load_file(exported), plain)
    cut.write_bytes(exported.read_bytes()[:1000])
    for path, message in (
        (plain, "does not say under which alpha and beta"),
        (cut, "cannot be read as safetensors"),
        (tmp_path / "none.safetensors", "cannot be read as safetensors"),
    ):
        with pytest.raises(dr2dist.UserError, match=message):
            dr2dist.load(path)
    status, _, err = call(capfd, "export", str(tmp_path), "--output", "x.safetensors")
    assert status == 2 and "holds no checkpoint" in err
    index = shards / "val" / "index.json"
    other = tmp_path / "shards"
    other.mkdir()
    (other / "index.json").write_text(index.read_text().replace('"bright"', '"light"'))
    status, _, err = call(capfd, "evaluate", str(exported), str(other))
    assert status == 2 and "has the classes light, dark" in err


def test_predictions_of_files_and_folders(
    exported: Path, shards: Path, tmp_path: Path, capfd: Any
) -> None:
    images = shards.parent / "images"
    gray = tmp_path / "gray.png"
    Image.new("I;16", (50, 37), 40000).save(gray)
    output = tmp_path / "predictions.csv"
    arguments = ("predict", str(exported), str(images), str(gray), "--output")
    status, out, _ = call(capfd, *arguments, str(output), "--batch", "7")
    assert status == 0 and "61 samples, 0 of them with an error" in out
    rows = list(csv.DictReader(output.open()))
    assert [row["path"] for row in rows] == [*map(str, sorted(images.rglob("*.*g"))), str(gray)]
    net = dr2dist.load(exported)
    cfg = net.pretrained_cfg
    transform = eval_transform((32, 32), cfg["mean"], cfg["std"])
    for row in rows[::20]:
        with torch.no_grad(), Image.open(row["path"]) as image:
            shares = net(on_image(transform, image)[None]).softmax(1)[0]
        assert float(row["p_dark"]) == pytest.approx(float(shares[1]), abs=1e-4)
        assert row["class"] == cfg["label_names"][int(shares.argmax())]
    assert call(capfd, *arguments, str(tmp_path / "p.txt"))[0] == 2


def test_an_unreadable_image_is_named_or_gets_a_row(
    exported: Path, shards: Path, tmp_path: Path, capfd: Any
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "broken.png").write_bytes(b"nothing")
    Image.new("RGB", (40, 40)).save(images / "whole.png")
    output = tmp_path / "predictions.json"
    arguments = ("predict", str(exported), str(images), "--output", str(output))
    status, _, err = call(capfd, *arguments)
    assert status == 2 and f"{images / 'broken.png'}: cannot be read" in err
    assert not output.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status, out, _ = call(capfd, *arguments, "--skip-unreadable")
    assert status == 0 and "2 samples, 1 of them with an error" in out
    broken, whole = json.loads(output.read_text())
    assert "error" in broken and "class" not in broken and whole["class"] in ("bright", "dark")
    status, _, err = call(capfd, "predict", str(exported), "nowhere", "--output", str(output))
    assert status == 2 and "nowhere: does not exist" in err


def test_the_readmes_way_from_a_folder_to_predictions_works(tmp_path: Path) -> None:
    """Its five lines as they stand; only the model is made small and random."""
    root = Path(__file__).parent.parent
    generator = np.random.default_rng(0)
    for label in range(5):
        for index in range(12):
            folder = tmp_path / "photos" / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 60, (40, 40, 3)) + 40 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.jpg")
    (tmp_path / "new_photos").symlink_to(tmp_path / "photos" / "class1")
    (tmp_path / "configs").symlink_to(root / "configs")
    (tmp_path / "ds_configs").symlink_to(root / "ds_configs")
    block = (root / "README.md").read_text().split("CSV of predictions")[1].split("```")[1]
    lines = [line.split() for line in block.strip().splitlines()]
    assert [line[1] for line in lines] == ["shards", "train", "export", "evaluate", "predict"]
    lines[1] += ["model.name=vit_tiny_patch16_224", "model.weights=random", "model.image_size=32"]
    lines[1] += ["train.micro_batch=4", "train.epochs=2"]
    for line in lines:
        done = commands.dr2dist(*line[1:], folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert len(rows) == 12 and {"path", "class", "p_class4"} <= rows[0].keys()


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_portable_files_compute_the_same_in_batches_of_any_size(
    ending: str, finished: tuple[Path, dict[str, Any]], exported: Path, tmp_path: Path, capfd: Any
) -> None:
    file, run = tmp_path / f"model.{ending}", str(finished[0])
    status, out, err = call(capfd, "export", run, "--output", str(file), "--which", "last")
    assert status == 0 and "of the module's outputs" in out, err
    net = dr2dist.load(exported)
    for batch in (1, 5):
        batch_of = torch.randn(batch, 3, *net.pretrained_cfg["input_size"][1:])
        with torch.inference_mode():
            wanted = net(batch_of)
            if ending == "pt2":
                assert torch.equal(torch.export.load(file).module()(batch_of), wanted)
                continue
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"images": batch_of.numpy()})
        assert torch.allclose(torch.from_numpy(found), wanted, rtol=1e-3, atol=1e-4)
        facts = session.get_modelmeta().custom_metadata_map
        assert json.loads(facts["beta"]) == net.coefficients[1] and "classes" in facts
    assert "exists already" in call(capfd, "export", run, "--output", str(file))[2]
    status, _, err = call(capfd, "export", run, "--output", "model.h5")
    assert status == 2 and "allowed endings are .safetensors, .onnx, .pt2" in err
