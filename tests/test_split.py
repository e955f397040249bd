"""Splits: shares of every class, groups that stay together, columns that say it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from dr2dist.cli import main
from dr2dist.data.decoders import decode


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """120 pictures of 24 patients in two classes, with columns for patient and part."""
    lines = ["path,label,patient,part"]
    for number in range(120):
        patient, label = number % 24, ("ill" if number % 3 == 0 else "well")
        name = f"p{patient:02}_{number:03}.png"
        Image.new("L", (8, 8), number).save(tmp_path / name)
        part = {0: "val", 1: "Test"}.get(patient % 6, "train ")
        lines.append(f"{name},{label},patient {patient},{part}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "table.csv"


def make(table: Path, *options: str) -> int:
    given = ["--from", "csv", "--source", str(table), "--output", str(table.parent / "shards")]
    with pytest.raises(SystemExit) as end:
        main(["shards", "make", *given, *options])
    return int(end.value.code or 0)


def samples(table: Path) -> dict[str, list[tuple[str, int | None]]]:
    """(key, label) of all samples by part."""
    return {
        folder.name: [
            (sample["__key__"], int(sample["cls"]))
            for path in sorted(folder.glob("*.tar"))
            for sample in webdataset.WebDataset(str(path), shardshuffle=False)
        ]
        for folder in (table.parent / "shards").iterdir()
    }


@pytest.mark.parametrize("group_by", ["patient", r"p(\d\d)_", r"p\d\d"])
def test_a_group_is_in_one_part_alone(table: Path, group_by: str) -> None:
    shares = ("--val-fraction", "0.25", "--test-fraction", "0.2")
    assert make(table, *shares, "--group-by", group_by) == 0
    found = samples(table)
    assert {part: len(own) for part, own in found.items()} == {"train": 65, "val": 30, "test": 25}
    patients = {part: {key[:3] for key, _ in own} for part, own in found.items()}
    assert sum(map(len, patients.values())) == 24 == len(set().union(*patients.values()))
    for own in found.values():  # a third is ill, as far as whole patients allow it
        assert 0.2 < Counter(label for _, label in own)[0] / len(own) < 0.5


def test_without_groups_each_part_has_its_share_of_every_class(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(table, "--val-fraction", "0.25", "--test-fraction", "0.1") == 0
    counts = {part: Counter(label for _, label in own) for part, own in samples(table).items()}
    assert counts == {"train": {0: 26, 1: 52}, "val": {0: 10, 1: 20}, "test": {0: 4, 1: 8}}
    assert "val: 30 samples: ill 10, well 20" in capsys.readouterr().out


def test_a_column_says_the_parts(table: Path) -> None:
    assert make(table, "--split-by", "part") == 0
    found = samples(table)
    assert {part: len(own) for part, own in found.items()} == {"train": 80, "val": 20, "test": 20}
    assert all(int(key[1:3]) % 6 == 0 for key, _ in found["val"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split-by", "parts"], "--split-by: there is no column 'parts'; did you mean 'part'?"),
        (["--split-by", "label"], "has 'ill' in the column 'label', allowed are train, val, test"),
        (["--split-by", "part", "--val-fraction", "0.1"], "says all parts: leave out fractions"),
        (["--group-by", "patient"], "has no effect without --val-fraction or --test-fraction"),
        (["--val-fraction", "0.1", "--group-by", "q(.*)x"], "'q(.*)x' finds nothing in"),
        (["--val-fraction", "0.1", "--group-by", "(("], "is no column and no regular expression"),
        (["--val-fraction", "0.1", "--group-by", "png"], "finds 1 group(s) for 2 parts"),
        (["--val-fraction", "0.001"], "val: no samples are left for this part, of 120"),
        (["--val-fraction", "0.6", "--test-fraction", "0.4"], "leave nothing for training"),
        (["--test-fraction", "1.5"], "test-fraction is 1.5, allowed is 0 and more, below 1"),
    ],
)
def test_splits_that_cannot_be_are_refused(
    table: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(table, *options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (table.parent / "shards").exists()


def test_a_share_is_kept_where_each_group_has_classes_of_its_own(tmp_path: Path) -> None:
    """Ten patients of four pictures, two of each of five classes: 0.2 are two patients."""
    lines = ["path,label,patient"]
    for number in range(40):
        patient = number // 4
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,class {patient % 5},{patient}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    assert make(tmp_path / "table.csv", "--val-fraction", "0.2", "--group-by", "patient") == 0
    assert {part: len(own) for part, own in samples(tmp_path / "table.csv").items()} == {
        "train": 32,
        "val": 8,
    }


def test_other_parts_are_not_gone_on_with(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))

    def breaks(extension: str, data: bytes) -> object:
        if next(calls) == 110:
            raise KeyboardInterrupt
        return decode(extension, data)

    monkeypatch.setattr("dr2dist.data.shards.decode", breaks)
    options = ("--split-by", "part", "--samples-per-shard", "10", "--workers", "1")
    assert make(table, *options) == 130
    assert (table.parent / "shards.part").exists()
    text = table.read_text()
    table.write_text(text.replace("Test", "val").replace("train ", "Test", 30))
    assert make(table, *options) == 0
    found = samples(table)
    keys = [key for own in found.values() for key, _ in own]
    assert len(keys) == len(set(keys)) == 120
    assert {part: len(own) for part, own in found.items()} == {"train": 50, "val": 40, "test": 30}
