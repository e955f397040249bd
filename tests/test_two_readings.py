"""What can be read in two ways, or would be there twice, is refused or named, not guessed."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from PIL import Image

from dr2dist.data.batch import Batch
from dr2dist.data.compared import check_fields
from dr2dist.data.fields import Fields
from dr2dist.data.index import read_index
from dr2dist.data.indexing import index_shards
from dr2dist.data.shards import make_shards
from dr2dist.data.sources import SOURCES
from dr2dist.data.split import split
from dr2dist.data.stream import ShardDataset
from dr2dist.errors import UserError
from dr2dist.tasks.classification import Classification, ClassificationOptions
from dr2dist.tasks.multilabel import Multilabel, MultilabelOptions
from dr2dist.tasks.regression import RegressionOptions

CPU = torch.device("cpu")
SHAPE = {"size": [8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}


def picture(path: Path, value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 10, 10)).save(path)
    return path


def tar(path: Path, **members: str) -> Path:
    """A shard of two samples with the same members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as made:
        for key in "ab":
            for extension, text in members.items():
                info = tarfile.TarInfo(f"{path.stem}{key}.{extension}")
                info.size = len(text)
                made.addfile(info, io.BytesIO(text.encode()))
    return path


def index(*sources: Path) -> Any:
    output = sources[0].parent / "all.json"
    named = list(map(str, sources))
    return index_shards(named, output, workers=1, progress=False, overwrite=True)


# Labels


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [1.0, 0.0, 0.0, 0.0], "0 1 0 1", ["b", 1]])
def test_labels_that_name_a_class_twice_are_refused(labels: Any) -> None:
    transform = Multilabel(MultilabelOptions(num_classes=4), "abcd", SHAPE).transform()
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match=r"name class . twice: a list of classes is w"):
        transform({"image": image, "labels": labels})
    for fine, wanted in (([0, "c"], [1, 0, 1, 0]), ([], [0] * 4), ("b;d", [0, 1, 0, 1])):
        assert transform({"image": image, "labels": fine})["labels"].tolist() == wanted


def test_a_table_whose_labels_are_0_or_1_for_each_class_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("path,labels\na.png,0;0;1;1\n")
    with pytest.raises(UserError, match=r"t\.csv: row 2: labels '0;0;1;1' name class 0 twice"):
        SOURCES["csv"](tmp_path / "t.csv")


# Rows


def test_a_file_in_two_rows_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "in" / "a.png")
    for other in ("in/a.png", "in/../in/a.png", "b.png"):
        (tmp_path / "t.csv").write_text(f"path,label\nin/a.png,x\n\n{other},y\n")
        with pytest.raises(UserError, match=r"t\.csv: row 2 and row 4 both name .*; allowed is on"):
            SOURCES["csv"](tmp_path / "t.csv")


def spans(folder: Path, *rows: str) -> Path:
    for number in range(4):
        (folder / f"{number}.mp4").write_bytes(b"a film")
    path = folder / "t.csv"
    path.write_text("\n".join(["path,label,start,stop,part of it", *rows]) + "\n")
    return path


def test_spans_of_a_film_stay_in_one_part(tmp_path: Path) -> None:
    rows = [f"{k % 4}.mp4,{'xy'[k % 2]},{k},{k + 1},{k // 20}" for k in range(40)]
    records, _ = SOURCES["csv"](spans(tmp_path, *rows))

    def films(**options: Any) -> list[set[str]]:
        parts = split(records, {"val": 0.5, "test": 0.0}, 0, **options)
        assert sum(map(len, parts.values())) == 40
        return [{record.place for record in own} for own in parts.values()]

    train, val = films()
    assert len(train) == len(val) == 2 and not train & val
    assert films(group_by="part of it") == [{f"{k}.mp4" for k in range(4)}] * 2
    alone, _ = SOURCES["csv"](spans(tmp_path, "0.mp4,x,0,1,0", "0.mp4,y,1,2,0"))
    with pytest.raises(UserError, match=r"of 1 film\(s\), each of which is in one part alone, for"):
        split(alone, {"val": 0.5}, 0)


def test_a_span_in_two_rows_is_refused(tmp_path: Path) -> None:
    table = spans(tmp_path, "0.mp4,x,0,1,0", "0.mp4,x,,,0", "0.mp4,y,0,1.0,0")
    with pytest.raises(UserError, match=r"row 2 and row 4 both name .*0\.mp4 from 0 to 1 seconds;"):
        SOURCES["csv"](table)


def test_a_film_of_two_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v_a.mp4").write_bytes(b"a film")
    (tmp_path / "t.json").write_text(json.dumps({"database": {"a": {}, "v_a": {}}}))
    with pytest.raises(
        UserError, match=r"t\.json: a and v_a both name .*v_a\.mp4; allowed is once"
    ):
        SOURCES["activitynet"](tmp_path / "t.json")


# Members


def test_two_images_in_a_sample_are_refused_and_named(tmp_path: Path) -> None:
    tar(tmp_path / "s.tar", tif="photograph", png="mask", cls="1", json='{"label": 0}')
    found = index(tmp_path / "s.tar")
    (note,) = [note for note in found.notes if "may be" in note]
    told = ".png and .tif, each of which may be the image: data.fields says which is, such as"
    assert note == f"a sample has {told} {{image: png}}"
    for reads in (
        lambda fields: check_fields(found.index, fields, "data.train"),
        lambda fields: ShardDataset(found.index, fields, lambda values: values),
    ):
        with pytest.raises(UserError, match=f"first sample of s.tar has {told}"):
            reads(Fields(Classification.fields))
        for said in ("tif", "tif;png"):
            reads(Fields(Classification.fields, {"image": said}))


def test_a_label_that_no_index_decides_is_refused(tmp_path: Path) -> None:
    tar(tmp_path / "s.tar", png="x", txt="a caption", json='{"labels": [0]}')
    found = index(tmp_path / "s.tar")
    assert not [note for note in found.notes if "may be" in note]
    with pytest.raises(UserError, match=r"\.json and \.txt, each of which may be the labels"):
        check_fields(found.index, Fields(Multilabel.fields), "data.val")
    check_fields(found.index, Fields(Multilabel.fields, {"labels": "json#labels"}), "data.val")


# Files


def test_entries_of_a_folder_that_are_no_shards_are_errors_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "shards"
    for name in ("a.tar", "B.TAR", "more/deeper/c.tar", ".hidden.tar"):
        tar(folder / name, png="x", cls="1")
    (folder / "d.TGZ").write_bytes(b"packed")
    (folder / "plain").mkdir()
    found = index(folder)
    assert [shard.name for shard in found.index.shards] == ["shards/B.TAR", "shards/a.tar"]
    assert read_index(tmp_path / "all.json").num_samples == 4
    lines = sorted(record.getMessage() for record in caplog.records)
    assert [line.partition(":")[0] for line in lines] == [
        "left out, compressed (unpack them)",
        "left out, hidden",
        "left out, in a folder of their own (name it)",
    ]
    assert lines[2].endswith("more") and "plain" not in caplog.text
    other = folder / "e.tar"
    other.mkdir()
    for source in (folder, folder / "*.tar"):
        with pytest.raises(UserError, match=r"e\.tar: is no file"):
            index(source)
    other.rmdir()
    other.symlink_to("/nowhere/annex/e.tar")
    for source in (folder, folder / "*.tar", other):
        with pytest.raises(UserError, match=r"e\.tar: is a link that leads nowhere"):
            index(source)


def test_members_of_one_ending_are_refused(tmp_path: Path) -> None:
    for name in ("x.PNG", "x.png"):
        picture(tmp_path / "f" / name)
    with pytest.raises(UserError, match=r"f/x\.png: is \.png of its sample as .*f/x\.PNG is"):
        SOURCES["files"](tmp_path / "f")
    os.rename(tmp_path / "f" / "x.PNG", tmp_path / "f" / "x.__key__")
    with pytest.raises(UserError, match="allowed are endings that do not begin with __"):
        SOURCES["files"](tmp_path / "f")


def test_members_whose_endings_begin_with_a_line_are_kept(tmp_path: Path) -> None:
    for name in ("y.png", "y._mask.png"):
        picture(tmp_path / "f" / name)
    (tmp_path / "f" / "y.cls").write_text("0")
    make_shards(*SOURCES["files"](tmp_path / "f"), tmp_path / "s", progress=False)
    (sample,) = webdataset.WebDataset(str(tmp_path / "s/shard-000000.tar"), shardshuffle=False)
    assert {"png", "_mask.png", "cls"} < sample.keys()
    assert set(read_index(tmp_path / "s").shards[0].extensions) == {"png", "_mask.png", "cls"}


# Columns


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["path", "error"], "'path' is a column of predict's own"),
        (["x", "error"], "'error' is a column of predict's own"),
        (["x", "y", "x"], "'x' is there twice"),
    ],
)
def test_targets_that_are_no_columns_are_refused(targets: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegressionOptions(targets=tuple(targets))


def test_classes_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="2 classes are called 'a', allowed is a name for each"):
        Classification(ClassificationOptions(num_classes=3), ("a", "b", "a"))


def test_an_output_that_is_no_number_changes_no_other_samples_share() -> None:
    logits = torch.tensor([[-0.2, 3.0], [0.3, -2.0], [-0.4, 1.0], [0.1, -1.0]])
    labels = torch.tensor([[0.0, 1], [1, 0], [0, 1], [1, 0]])

    def measured(more: float) -> dict[str, Any]:
        metrics = Multilabel(MultilabelOptions(num_classes=2)).metrics(CPU)
        one, none = torch.full((1, 2), more), torch.zeros(1, 2)
        found, wanted = torch.cat([logits, one]), torch.cat([labels, none])
        metrics.update(found, Batch({}, {"labels": wanted}, list("abcde"), 5))
        return metrics.compute()

    assert measured(float("nan")) == measured(-50.0) == {"mean_average_precision": 1.0, "f1": 1.0}
