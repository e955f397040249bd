"""What the tasks compute, against closed forms, and that each trains, is measured and predicts."""

from __future__ import annotations

import json
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision import tv_tensors

import dr2dist
from dr2dist.cli import main
from dr2dist.config import load_config
from dr2dist.data.batch import Batch
from dr2dist.data.decoders import decode
from dr2dist.data.fields import Fields
from dr2dist.data.index import read_index
from dr2dist.data.labels import class_index
from dr2dist.data.randomness import seeded
from dr2dist.data.shards import make_shards
from dr2dist.data.sources import SOURCES
from dr2dist.errors import UserError
from dr2dist.inference.evaluate import draw
from dr2dist.inference.exported import export
from dr2dist.tasks.multilabel import Multilabel, MultilabelOptions
from dr2dist.tasks.registry import make_task
from dr2dist.tasks.regression import Regression, RegressionOptions
from dr2dist.tasks.transforms import (
    ImageData,
    RandAugment,
    eval_transform,
    to_channels,
    train_transform,
)
from tests.forked import CONTEXT
from tests.images import classification, labelled, on_image
from tests.pool import Pool
from tests.runs import assert_says_what_was_validated

CPU = torch.device("cpu")
CONFIG = """
model:
  name: vit_tiny_patch16_224
  weights: random
  image_size: 32
  options: {depth: 2, embed_dim: 48, num_heads: 2}
task: TASK
data: {train: SHARDS/train, val: SHARDS/val, hflip: false}
optim: {name: adamw, lr: 5.0e-3}
train: {steps: 3, micro_batch: 4, log_every: 1, validate_every: 3}
output: OUTPUT
"""


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def said(labels: Tensor, classes: int) -> Tensor:
    return functional.one_hot(labels, classes).float() * 5


@pytest.mark.parametrize("wrong", [0, 2, 3])
def test_a_class_without_samples_is_left_out_of_the_mean_and_named(wrong: int) -> None:
    labels = torch.tensor([0] * 4 + [1] * 4)
    found = torch.tensor([0] * 4 + [1, 1, 1, wrong])
    metrics = classification(4).report(CPU)
    for part in (slice(0, 3), slice(3, 8)):
        metrics.update(said(found[part], 4), labelled(labels[part]))
    report = metrics.compute()
    assert report["balanced_accuracy"] == pytest.approx((1 + 0.75) / 2)
    assert report["class_accuracy"] == {"0": 1.0, "1": 0.75, "2": None, "3": None}
    assert report["absent_classes"] == ["2", "3"] and report["accuracy"] == 7 / 8
    validated = classification(4).metrics(CPU)
    validated.update(said(found, 4), labelled(labels))
    assert validated.compute()["balanced_accuracy"] == report["balanced_accuracy"]


@pytest.mark.parametrize("batch", [1, 2, 600])
def test_calibration_is_of_probabilities_whatever_the_batch(batch: int) -> None:
    """Small logits lie between 0 and 1 in many a small batch."""
    torch.manual_seed(0)
    labels, logits = torch.randint(0, 2, (600,)), 0.3 * torch.randn(600, 2)
    metrics = classification(2).report(CPU)
    for one, two in zip(logits.split(batch), labels.split(batch), strict=True):
        metrics.update(one, labelled(two))
    confidence, best = logits.softmax(1).max(1)
    bins = functional.one_hot((confidence * 15).long(), 15).double()
    gaps = (((best == labels).double() - confidence)[:, None] * bins).sum(0).abs()
    found = metrics.compute()["calibration_error"]
    assert found == pytest.approx(gaps.sum().item() / 600, abs=1e-5)


def test_a_picture_of_a_thousand_classes_is_small(tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    process = CONTEXT.Process(target=draw_small_and_large, args=(small, large))  # by its peak
    process.start()
    process.join(300)
    assert process.exitcode == 0
    with Image.open(large) as picture:
        assert max(picture.size) < 4000


def draw_small_and_large(small: Path, large: Path) -> None:
    """Ends with an error if the large one needs 200 MiB more."""
    counts = torch.eye(1000, dtype=torch.int64) * 50
    counts[7, 900] = 30
    said = {"accuracy": 1.0, "balanced_accuracy": 1.0, "calibration_error": 0.0}
    draw({**said, "confusion": [[1, 0], [0, 1]], "classes": ["a", "b"]}, small)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = [f"n{number:08d}" for number in range(1000)]
    draw({**said, "confusion": counts.tolist(), "classes": names}, large)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_multilabel_losses_and_precisions() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.3], [0.5, 1.0, -2.0], [-1.0, 3.0, 0.0], [1.0, -2.0, 1.0]])
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0]])
    task = Multilabel(MultilabelOptions(num_classes=3))
    batch = Batch({}, {"labels": labels}, list("abcd"), 4)
    each = -(labels * logits.sigmoid().log() + (1 - labels) * (1 - logits.sigmoid()).log()).mean(1)
    torch.testing.assert_close(task.loss(logits, batch, 2.0).total, each.sum() / 2)
    metrics = task.report(CPU)
    metrics.update(logits, batch)
    report = metrics.compute()
    # Class 0, by falling score: right, right, wrong, right; class 1: both right ones first.
    wanted = {"0": (1 + 1 + 3 / 4) / 3, "1": 1.0, "2": None}
    for name, value in wanted.items():
        assert report["average_precision"][name] == pytest.approx(value)
    assert report["absent_classes"] == ["2"]
    assert report["mean_average_precision"] == pytest.approx((wanted["0"] + 1) / 2)
    assert [row["classes"] for row in task.rows(logits)] == ["0;2", "0;1", "1;2", "0;2"]
    assert task.loss(logits, Batch({}, {"labels": labels}, list("abcd"), 0), 1.0).total == 0


def test_regression_losses_and_units() -> None:
    options = RegressionOptions(targets=("a", "b"), mean=(1.0, -1.0), std=(2.0, 0.5), loss="l1")
    task = Regression(options)
    outputs, target = torch.randn(3, 2), torch.randn(3, 2)
    batch = Batch({}, {"target": target}, list("abc"), 3)
    mean, std = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5])
    wanted = (outputs - (target - mean) / std).abs().mean(1).sum() / 6
    torch.testing.assert_close(task.loss(outputs, batch, 6.0).total, wanted)
    found = task.predictions(outputs, batch)
    torch.testing.assert_close(found, outputs * std + mean)
    metrics = task.metrics(CPU)
    metrics.update(found, batch)
    report = metrics.compute()
    assert report["mae"] == pytest.approx(float((found - target).abs().mean()))
    assert report["rmse"] == pytest.approx(float((found - target).square().mean().sqrt()))
    shape = {"size": [8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}
    transform = Regression(options, (), shape).transform()
    image = Image.new("RGB", (8, 8))
    assert transform({"image": image, "target": "3; 4.5"})["target"].tolist() == [3.0, 4.5]
    for wrong in ([1.0], "1 x", [1.0, float("nan")]):
        with pytest.raises(ValueError, match="allowed are"):
            transform({"image": image, "target": wrong})


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of images with any number of classes, and with numbers, from tables."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    tables = {"labels": ["path,labels"], "target": ["path,target"]}
    for number in range(20):
        bright, red = number % 2, number % 3 == 0
        pixels = generator.integers(0, 90, (32, 32, 3)) + 150 * bright
        pixels[..., 1:] //= 1 + 2 * red
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number}.png")
        names = ";".join(name for name, there in (("bright", bright), ("red", red)) if there)
        tables["labels"].append(f"{number}.png,{names}")
        tables["target"].append(f"{number}.png,{pixels.mean():.3f};{number}")
    for name, lines in tables.items():
        (root / f"{name}.csv").write_text("\n".join(lines) + "\n")
        line = ["shards", "make", "--from", "csv", "--source", str(root / f"{name}.csv")]
        assert command(*line, "--output", str(root / name), "--val-fraction", "0.3") == 0
    return root


@pytest.mark.parametrize(
    ("kind", "task", "metrics", "column", "more"),
    [
        (
            "labels",
            "{name: multilabel, num_classes: 2}",
            {"mean_average_precision", "f1"},
            "p_bright",
            ["parallel.stages=2", "parallel.zero=0"],  # one of them has no predictions
        ),
        (
            "target",
            "{name: regression, targets: [mean, number], mean: [120, 10], std: [60, 5]}",
            {"mae", "rmse"},
            "number",
            ["data.num_workers=1"],
        ),
    ],
)
def test_it_trains_is_measured_and_predicts(
    kind: str,
    task: str,
    metrics: set[str],
    column: str,
    more: list[str],
    tmp_path: Path,
    photos: Path,
    two_ranks: Pool,
) -> None:
    path, file = tmp_path / "run.yaml", tmp_path / "file.safetensors"
    text = CONFIG.replace("TASK", task).replace("SHARDS", str(photos / kind))
    path.write_text(text.replace("OUTPUT", str(tmp_path / "run")))
    summary = two_ranks.run("tests.cases:run_config", path=str(path), overrides=more)[0]
    assert summary["status"] == "finished" and metrics < summary["best"].keys()
    assert summary["last"]["samples"] == 6
    export(tmp_path / "run", file)
    report = tmp_path / "report.json"
    line = ["evaluate", str(file), str(photos / kind / "val"), "--output", str(report)]
    assert command(*line) == 0
    found = json.loads(report.read_text())
    assert_says_what_was_validated(found, tmp_path / "run")
    rows = tmp_path / "rows.json"
    assert command("predict", str(file), str(photos), "--output", str(rows)) == 0
    assert len(json.loads(rows.read_text())) == 20 and column in json.loads(rows.read_text())[0]
    assert dr2dist.load(file).pretrained_cfg["input_size"] == (3, 32, 32)


def test_boxes_and_masks_go_along_with_an_image() -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:20, 5:25] = 255
    mask = torch.from_numpy(pixels[..., 0] > 0)
    box = tv_tensors.BoundingBoxes([[5, 10, 25, 20]], format="XYXY", canvas_size=(40, 60))
    sample = {"image": Image.fromarray(pixels), "box": box, "mask": tv_tensors.Mask(mask)}
    normal = [0.0] * 3, [1.0] * 3
    said = ImageData(train="", scale=(0.99, 1.0), vflip=True)
    for seed in range(5):
        torch.manual_seed(seed)
        found = train_transform((80, 120), *normal, said)(sample)
        left, top, right, bottom = (round(float(value)) for value in found["box"][0])
        inside = found["image"][:, top + 2 : bottom - 2, left + 2 : right - 2]
        assert inside.numel() and float(inside.min()) > 0.9
        assert float(found["image"].sum()) == pytest.approx(3 * 20 * 10 * 4, rel=0.1)
        assert found["mask"][top + 2 : bottom - 2, left + 2 : right - 2].all()


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_loader_processes_get_a_task_by_pickle(task: str, tmp_path: Path) -> None:
    section = {"name": task, **({} if task == "regression" else {"num_classes": 2})}
    if task == "classification":
        section["class_weights"] = [1.0, 2.0]
    text = CONFIG.replace("TASK", json.dumps(section)).replace("SHARDS", "s").replace("OUTPUT", "o")
    (tmp_path / "c.yaml").write_text(text)
    config = load_config(tmp_path / "c.yaml")
    shape = {"size": [8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}
    made = make_task(config.task, ("a", "b"), shape)
    collate, transform = pickle.loads(pickle.dumps((made.collate, made.transform(config.data))))
    assert collate.__self__.options == config.task
    image = Image.new("RGB", (8, 8))
    inputs, targets = collate([transform({"image": image})] * 2)
    assert inputs["image"].shape == (2, 3, 8, 8) and not targets


def test_labels_that_are_no_classes_are_told() -> None:
    assert [class_index(label, ("a", "b")) for label in (1, 0.0, "b", "0")] == [1, 0, 1, 0]
    for wrong in (0.7, True, 2, -1, "c", None, [1]):
        with pytest.raises(ValueError, match="allowed is 0 to 1 or one of a, b"):
            class_index(wrong, ("a", "b"))


def test_files_of_one_name_in_one_folder_are_a_sample(tmp_path: Path) -> None:
    for name in ("a/b-c.txt", "a-b/c.json", "a-b/c.cls", "v1.0/d.txt"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_text("1")
    records, classes = SOURCES["files"](tmp_path / "f")
    found = {record.key: sorted(record.files) for record in records}
    assert found == {"a-b-c": ["txt"], "a-b-c-1": ["cls", "json"], "v1_0-d": ["txt"]}
    assert classes == ["0", "1"]
    make_shards(records, classes, tmp_path / "s", progress=False)
    assert read_index(tmp_path / "s").num_samples == 3
    (tmp_path / "t.csv").write_text("path,labels\nx.png\n")
    with pytest.raises(UserError, match="row 2 has no value in the column 'labels'"):
        SOURCES["csv"](tmp_path / "t.csv")


def test_fields_are_webdatasets() -> None:
    members = {"png": b"", "json": b'{"a": {"b": 3}, "name": "cat"}', "txt": b" 7 "}
    usual = {"label": "cls;json#a.b"}
    assert Fields(usual).decode(members) == {"label": 3}
    assert Fields(usual, {"label": "cls;json#name"}).decode(members) == {"label": "cat"}
    assert Fields(usual, {"label": "txt"}).decode(members) == {"label": "7"}
    with pytest.raises(ValueError, match=r"\.json has no key 'a\.c'"):
        Fields(usual, {"label": "json#a.c"}).decode(members)
    with pytest.raises(ValueError, match=r"has no label \(cls\), only \.png, \.json, \.txt"):
        Fields(usual, {"label": "cls"}).decode(members)
    with pytest.raises(UserError, match=r"lable is not a field of .*, allowed are label; did"):
        Fields(usual, {"lable": "cls"})
    with pytest.raises(UserError, match="label is ';', allowed is such as jpg;png"):
        Fields(usual, {"label": ";"})


def test_arrays_are_read_without_pickles(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6).reshape(2, 3))
    assert decode("left.npy", (tmp_path / "a.npy").read_bytes()).tolist() == [[0, 1, 2], [3, 4, 5]]
    np.save(tmp_path / "b.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"\.npy: .*allow_pickle"):
        decode("npy", (tmp_path / "b.npy").read_bytes())
    with pytest.raises(ValueError, match=r"\.pkl: allowed types are apng"):
        decode("pkl", b"")


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_images_of_any_number_of_channels(channels: int) -> None:
    normal = [0.5] * channels, [0.25] * channels
    array = np.random.default_rng(0).integers(0, 255, (40, 30, channels)).astype(np.uint8)
    train = train_transform((16, 24), *normal, ImageData(train=""))
    for transform in (train, eval_transform((16, 24), *normal)):
        assert on_image(transform, array).shape == (channels, 16, 24)
    whole = on_image(eval_transform((40, 30), *normal), array)
    wanted = (torch.from_numpy(array).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(whole.as_subclass(Tensor), wanted)
    picture = Image.fromarray(array[..., :3]) if channels > 2 else Image.new("L", (30, 40))
    if channels == 5:
        with pytest.raises(ValueError, match=r"images are to be \.npy arrays \[H, W, 5\]"):
            to_channels(picture, channels)
    else:
        assert on_image(train, picture).shape == (channels, 16, 24)
    with pytest.raises(ValueError, match=rf"allowed is \[H, W, {channels}\]"):
        to_channels(np.zeros((4, 4, channels + 1), np.uint8), channels)


def test_arrays_of_8_bits_are_augmented_as_pictures_are() -> None:
    data = ImageData(train="", rand_augment=RandAugment(), erase=0.5)
    train = train_transform((16, 24), [0.5] * 3, [0.25] * 3, data)
    array = np.random.default_rng(0).integers(0, 255, (40, 30, 3)).astype(np.uint8)
    found = []
    for image in (array, Image.fromarray(array)):
        with seeded(0):
            found.append(on_image(train, image))
    assert torch.equal(*found)
    for kind in (np.uint16, np.float32):
        with pytest.raises(
            ValueError, match=f"8-bit images only, this is an array of {kind.__name__}"
        ):
            on_image(train, array.astype(kind))


@pytest.mark.parametrize("magnitude", [9, 10])
def test_augmentation_at_its_strongest_takes_every_image(magnitude: int) -> None:
    data = ImageData(train="", rand_augment=RandAugment(magnitude=magnitude, layers=8, noise=2.0))
    train = train_transform((8, 8), [0.5] * 3, [0.25] * 3, data)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8))
    for seed in range(60):
        with seeded(seed):
            assert on_image(train, image).isfinite().all()
