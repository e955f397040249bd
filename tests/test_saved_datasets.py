"""Shards of Parquet files and of what the package datasets saves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from dr2dist.data.fields import Fields
from dr2dist.data.index import read_index
from dr2dist.data.saved_datasets import saved_datasets
from dr2dist.data.shards import make_shards, verify_shards
from dr2dist.data.stream import ShardDataset
from dr2dist.errors import UserError
from tests.commands import call
from tests.images import samples_of

NAMES = ["emu", "cat", "dog"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def picture(value: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((6, 6, 3), value, np.uint8)).save(file, kind)
    return file.getvalue()


def table(rows: int = 30, **columns: Any) -> Any:
    """Pictures of their row's number; a class that is never used and names that are not sorted."""
    images = [
        {"bytes": picture(n, ("PNG", "JPEG")[n % 2]), "path": f"a/{n}.png" if n % 2 == 0 else None}
        for n in range(rows)
    ]
    features: dict[str, Any] = {"image": datasets.Image(), "film": datasets.Value("string")}
    values: dict[str, Any] = {"image": images, "film": [f"film {n // 5}" for n in range(rows)]}
    for name, (kind, value) in columns.items() or {"label": LABEL}.items():
        features[name], values[name] = kind, [value(n) for n in range(rows)]
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


LABEL = (datasets.ClassLabel(names=NAMES), lambda n: n % 2)


def saved(found: Any, folder: Path, way: str) -> Path:
    if way == "file":
        found.to_parquet(str(folder / "train.parquet"))
        return folder / "train.parquet"
    if way == "saved":
        found.save_to_disk(str(folder / "saved"))
        return folder / "saved"
    parts = {"train": found.select(range(24)), "validation": found.select(range(24, 30))}
    if way == "saved splits":
        datasets.DatasetDict(parts).save_to_disk(str(folder / "splits"))
        return folder / "splits"
    (folder / "hub" / "data").mkdir(parents=True)
    for name, part in parts.items():
        part.to_parquet(str(folder / "hub" / "data" / f"{name}-00000-of-00001.parquet"))
    return folder / "hub"


@pytest.mark.parametrize("way", ["file", "saved", "saved splits", "hub"])
def test_every_way_of_keeping_them_makes_the_same_samples(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records, classes = saved_datasets(saved(table(), tmp_path, way))
    assert classes == NAMES and len({record.key for record in records}) == 30
    make_shards(records, classes, tmp_path / "shards", samples_per_shard=8, progress=False)
    index = verify_shards(tmp_path / "shards", progress=False)
    assert index.class_counts() == [15, 15, 0]
    found = ShardDataset(index, Fields({"image": "png;jpg", "label": "cls"}), lambda each: each)
    seen = set()
    for number in range(30):
        values = found[0, number].values
        pixel = int(np.asarray(values["image"])[0, 0, 0])
        assert int(values["label"]) == pixel % 2
        seen.add(pixel)
    assert seen == set(range(30))
    assert ("--split-by split" in caplog.text) == (way in ("saved splits", "hub"))


def test_the_command_keeps_splits_and_groups_apart(tmp_path: Path, capfd: Any) -> None:
    hub = saved(table(), tmp_path, "hub")
    line = ("shards", "make", "--from", "datasets", "--source", str(hub), "--output")
    status, out, err = call(capfd, *line, str(tmp_path / "one"), "--split-by", "split")
    assert status == 0, err
    sizes = [read_index(tmp_path / "one" / part).num_samples for part in ("train", "val")]
    assert sizes == [24, 6] and "30 samples of 3 classes" in out
    more = ("--group-by", "film", "--val-fraction", "0.4")
    status, _, err = call(capfd, *line, str(tmp_path / "two"), *more)
    assert status == 0, err
    for part in ("train", "val"):
        assert read_index(tmp_path / "two" / part).num_samples % 5 == 0


def text_of(path: Path, extension: str) -> set[bytes]:
    index = read_index(path)
    found = set()
    for shard in index.shards:
        data = index.path(shard).read_bytes()
        for sample in samples_of(index):
            offset, size = sample.members[extension]
            found.add(data[offset : offset + size])
    return found


OTHERS: list[tuple[dict[str, Any], list[str], str, set[bytes]]] = [
    (
        {
            "labels": (
                datasets.List(datasets.ClassLabel(names=NAMES)),
                lambda n: [0, n % 2][: n % 3],
            )
        },
        NAMES,
        "json",
        {b'{"labels": []}', b'{"labels": [0]}', b'{"labels": [0, 1]}'},
    ),
    (
        {"label": (datasets.Value("string"), lambda n: ("b", "a")[n % 2])},
        ["a", "b"],
        "cls",
        {b"0", b"1"},
    ),
    ({"labels": LABEL}, NAMES, "cls", {b"0", b"1"}),
    (
        {"target": (datasets.List(datasets.Value("float64")), lambda n: [n % 2, 0.5])},
        [],
        "json",
        {b'{"target": [0.0, 0.5]}', b'{"target": [1.0, 0.5]}'},
    ),
]


@pytest.mark.parametrize(("columns", "classes", "extension", "wanted"), OTHERS)
def test_what_is_said_of_images(
    columns: Any, classes: list[str], extension: str, wanted: set[bytes], tmp_path: Path
) -> None:
    records, names = saved_datasets(saved(table(**columns), tmp_path, "saved"))
    assert names == classes
    make_shards(records, names, tmp_path / "shards", progress=False)
    assert text_of(tmp_path / "shards", extension) == wanted


def bad(columns: dict[str, Any], rows: dict[str, Any]) -> Any:
    return datasets.Dataset.from_dict(rows, features=datasets.Features(columns))


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    image, word = datasets.Image(), datasets.Value("string")
    one = {"bytes": picture(1), "path": None}
    faults = {
        "has no column of images, nor one of their path; found label": (
            {"label": word},
            {"label": ["a"]},
        ),
        "has no column label, labels, target; found image": ({"image": image}, {"image": [one]}),
        "has images in image, mask; allowed is one column": (
            {"image": image, "mask": image, "label": word},
            {"image": [one], "mask": [one], "label": ["a"]},
        ),
        "row 1: label is empty": (
            {"image": image, "label": word},
            {"image": [one, one], "label": ["a", None]},
        ),
        "row 1: label is None, allowed is 0 to 2": (
            {"image": image, "label": LABEL[0]},
            {"image": [one, one], "label": [0, None]},
        ),
    }
    for number, (message, (columns, rows)) in enumerate(faults.items()):
        folder = tmp_path / str(number)
        bad(columns, rows).save_to_disk(str(folder))
        with pytest.raises(UserError) as caught:
            saved_datasets(folder)
        assert message in str(caught.value) and str(folder) in str(caught.value)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing else")
    for path in (tmp_path / "x.parquet", tmp_path / "cache", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"{path}: cannot be read: ") as caught:
            saved_datasets(path)
        assert "\n" not in str(caught.value)


def test_a_table_may_name_files(tmp_path: Path) -> None:
    for name in ("one.png", "two.PNG"):
        (tmp_path / name).write_bytes(picture(len(name)))
    columns = {"path": datasets.Value("string"), "label": datasets.Value("string")}
    rows = {"path": ["one.png", str(tmp_path / "two.PNG")], "label": ["a", "b"]}
    source = saved(bad(columns, rows), tmp_path, "file")
    records, classes = saved_datasets(source)
    made = make_shards(records, classes, tmp_path / "out", progress=False)
    assert made.samples == 2 and classes == ["a", "b"]
    (tmp_path / "one.png").unlink()
    with pytest.raises(UserError, match=r"train\.parquet: row 0: path: 'one\.png' is no file"):
        saved_datasets(source)
    (tmp_path / "one.png").symlink_to(tmp_path / "two.PNG")
    with pytest.raises(UserError, match=r"row 0 and row 1 both name .*two\.PNG; allowed is once"):
        saved_datasets(source)


def test_an_image_that_cannot_be_read_is_named_by_its_row(tmp_path: Path) -> None:
    found = bad(
        {"image": datasets.Image(), "label": datasets.Value("string")},
        {
            "image": [{"bytes": picture(1), "path": None}, {"bytes": b"x", "path": None}],
            "label": ["a", "a"],
        },
    )
    records, classes = saved_datasets(saved(found, tmp_path, "saved"))
    with pytest.raises(UserError, match=r"saved: row 1: cannot be read"):
        make_shards(records, classes, tmp_path / "out", progress=False)
    made = make_shards(records, classes, tmp_path / "out", progress=False, skip_unreadable=True)
    assert made.samples == 1 and "row 1" in made.left[0]
