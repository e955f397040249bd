"""The files that people have: each is read rightly, or named with the reason."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dr2dist.cli import main
from dr2dist.data.compared import compare_with_index
from dr2dist.data.decoders import decode
from dr2dist.data.index import read_index
from dr2dist.data.shards import make_shards, verify_shards
from dr2dist.data.sources import SOURCES
from dr2dist.data.stream import ShardDataset
from dr2dist.errors import UserError
from dr2dist.tasks.transforms import eval_transform
from tests.images import FIELDS, batches, make_folder, samples_of

PLAIN = eval_transform((8, 8), (0.0,) * 3, (1.0,) * 3)


def run(*arguments: str) -> int:
    """A command's exit status."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


def make(source: Path, output: Path, *more: str, kind: str = "imagefolder") -> int:
    given = ("--from", kind, "--source", str(source), "--output", str(output))
    return run("shards", "make", *given, *more)


def picture(path: Path, value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value, 10, 10)).save(path)
    return path


def keys(folder: Path) -> list[str]:
    return sorted(sample.key for sample in samples_of(read_index(folder)))


def odd_folder(root: Path) -> tuple[int, dict[str, int]]:
    """40 files, most of them odd; how many are samples, and how many are left out by reason."""
    photos = root / "photos"
    for number in range(6):
        picture(photos / "cat" / f"{number}.png")
        picture(photos / "dog" / f"{number}.jpg")
    taken = ["a.jfif", "b.JPE", "c.avif", "d.webp", "e.tif", "f.bmp", "g.JPG", "h.ppm", "i.jp2"]
    for name in taken:
        picture(photos / "cat" / "more" / name)
    picture(photos / "dog" / "x.png" / "inside.png")  # a folder named like a picture
    picture(root / "disk" / "linked" / "far.png")
    (photos / "dog" / "linked").symlink_to(root / "disk" / "linked")
    (photos / "bird").symlink_to(root / "disk")  # a class that is a link
    picture(root / "one.png")
    (photos / "cat" / "one.png").symlink_to(root / "one.png")
    for hidden in (".ipynb_checkpoints/0.png", "cat/._0.png", "dog/.thumbs/t.jpg"):
        picture(photos / hidden)
    (photos / "cat" / ".hidden").touch()
    for name in ("Thumbs.db", "notes.txt", "read.me.md", "clip.mp4", "scan.pdf"):
        (photos / "dog" / name).write_text("no picture")
    (photos / "dog" / "README").write_text("no picture")
    (photos / "empty").mkdir()
    (photos / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    (photos / "cat" / "round").symlink_to(photos / "cat")
    (photos / "cat" / "itself.png").symlink_to(photos / "cat" / "itself.png")
    picture(photos / "beside.png")
    os.mkfifo(photos / "dog" / "pipe.png")
    # 6 + 6, the endings, the folder named so, through two links, a linked file.
    return 12 + len(taken) + 1 + 2 + 1, {
        "hidden": 4,
        "no images by their ending": 5,
        "without an ending": 1,
        "links that lead nowhere": 1,
        "links that lead in a circle": 2,
        "not in the folder of a class": 1,
        "neither files nor folders": 1,
        "folders without images, which are no classes": 1,
    }


def counted(lines: list[str]) -> dict[str, int]:
    """Left out by reason, from what is said."""
    found: dict[str, int] = {}
    for line in lines:
        reason, count = re.fullmatch(r"left out, (.*?): (\d+): .*", line).groups()  # type: ignore[union-attr]
        reason = reason.partition(" .")[0]
        found[reason] = found.get(reason, 0) + int(count)
    return found


def test_a_folder_of_odd_files_is_taken_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples, left = odd_folder(tmp_path)
    assert make(tmp_path / "photos", tmp_path / "shards") == 0
    index = verify_shards(tmp_path / "shards", progress=False)
    assert index.num_samples == samples and index.classes == ("bird", "cat", "dog")
    assert counted([record.getMessage() for record in caplog.records]) == left
    dataset = ShardDataset(tmp_path / "shards", FIELDS, PLAIN)
    assert len(dataset) == samples
    for place in range(samples):  # all that was made is read again
        assert dataset[0, place].values["image"].shape == (3, 8, 8)


def test_a_folder_without_class_folders_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "photos" / "a.png")
    assert make(tmp_path / "photos", tmp_path / "shards") == 2
    assert "holds images but no folders of them; allowed is" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()


TABLE: dict[str, tuple[bytes, str | None]] = {
    "a byte order mark": (b"\xef\xbb\xbfpath,label\na.png,cat\nb.png,dog\n", None),
    "spaces around labels and columns": (
        b"path, label \na.png, cat\nb.png,dog \nc.png,cat\n",
        None,
    ),
    "line ends of Windows": (b"path,label\r\na.png,cat\r\nb.png,dog\r\n", None),
    "an empty line": (b"path,label\n\na.png,cat\n\nb.png,dog\n", None),
    "more columns": (b"id,path,label\n1,a.png,cat\n2,b.png,dog\n", None),
    "quotes": (b'path,label\n"a.png","cat"\nb.png,dog\n', None),
    "a home folder": (b"path,label\n~/a.png,cat\nb.png,dog\n", None),
    "no label": (b"path,label\na.png,cat\nb.png\n", "row 3 has no value in the column 'label'"),
    "no path": (b"path,label\na.png,cat\n,dog\n", "row 3: path: '' is no file"),
    "an empty label": (b"path,label\na.png,cat\n\nb.png, \n", "row 4: label is empty"),
    "Latin-1": (b"path,label\na.png,caf\xe9\n", "row 2: label: 'caf\xe9' (read as Latin-1) is not"),
    "no ending": (
        b"path,label\nnoext,cat\n",
        "row 2: path: 'noext' has no ending of an image or film",
    ),
    "a file of a class": (b"path,label\nx.cls,cat\n", "'x.cls' has the ending .cls, which is none"),
    "no such file": (b"path,label\na.png,cat\nz.png,cat\n", "row 3: path: 'z.png' is no file"),
    "a folder": (b"path,label\nfolder.png,cat\n", "row 2: path: 'folder.png' is no file"),
    "semicolons": (b"path;label\na.png;cat\n", "columns are separated by commas"),
    "too many values": (b"path,label\na.png,cat,and,dog\n", "row 2 has 2 more value(s)"),
    "a column twice": (b"path,label,label\na.png,cat,dog\n", "has the column 'label' 2 times"),
    "nothing": (b"", "is empty; allowed is a table with a header"),
    "no number": (b"path,target\na.png,nan\n", "row 2: target is 'nan', allowed are finite"),
    "more numbers": (b"path,target\na.png,1\nb.png,1;2\n", "row 3: target has 2 number(s), the"),
    "two answers": (b"path,label,target\na.png,cat,1\n", "has the columns label and target"),
    "no class at all": (b"path,labels\na.png,\nb.png,;\n", "labels is empty in every row"),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_table_is_read_or_refused_by_its_row(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, refused = TABLE[name]
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in ("a.png", "b.png", "c.png"):
        picture(tmp_path / file)
    (tmp_path / "folder.png").mkdir()
    shutil.copy(tmp_path / "a.png", tmp_path / "noext")
    (tmp_path / "x.cls").write_text("0")
    (tmp_path / "t.csv").write_bytes(text)
    status = make(tmp_path / "t.csv", tmp_path / "shards", kind="csv")
    error = capsys.readouterr().err
    if refused is None:
        assert status == 0
        assert read_index(tmp_path / "shards").classes == ("cat", "dog")
        assert len(keys(tmp_path / "shards")) == text.count(b".png")
    else:
        assert status == 2 and refused in error, error
        assert error.strip().splitlines()[-1].startswith("dr2dist: ")
        assert not (tmp_path / "shards").exists() and not list(tmp_path.glob("*.part"))


def bomb() -> bytes:
    """A picture of 8 x 8 whose header promises 65,535 x 65,535."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "BMP")
    data = bytearray(stream.getvalue())
    data[18:26] = (65535).to_bytes(4, "little") * 2
    return bytes(data)


def test_a_header_that_promises_gigapixels_is_unreadable_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_folder(tmp_path / "photos", 9)
    (source / "dark" / "huge.bmp").write_bytes(bomb())
    (source / "dark" / "cut.png").write_bytes(picture(tmp_path / "x.png").read_bytes()[:40])
    assert make(source, tmp_path / "s") == 2
    assert len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1
    assert make(source, tmp_path / "s", "--skip-unreadable") == 0
    said = capsys.readouterr()
    assert "9 samples of 2 classes, 2 left out as unreadable" in said.out
    assert "huge.bmp" in said.err and "cut.png" in said.err and "Traceback" not in said.err
    assert read_index(tmp_path / "s").num_samples == 9


class BreaksOff:
    """Decodes as ever, but for the picture of a number, at which somebody stops the work."""

    def __init__(self, at: int) -> None:
        self.at, self.decoded = at, 0

    def __call__(self, extension: str, data: bytes) -> Any:
        self.decoded += 1
        if self.decoded == self.at:
            raise KeyboardInterrupt
        return decode(extension, data)


BY_FOUR: dict[str, Any] = {"samples_per_shard": 4, "workers": 1, "progress": False}


def test_work_that_breaks_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, classes = SOURCES["imagefolder"](make_folder(tmp_path / "photos", 23))
    whole, made = tmp_path / "whole", tmp_path / "made"
    make_shards(records, classes, whole, **BY_FOUR)
    breaks = BreaksOff(10)
    monkeypatch.setattr("dr2dist.data.shards.decode", breaks)
    with pytest.raises(KeyboardInterrupt):
        make_shards(records, classes, made, **BY_FOUR)
    assert (tmp_path / "made.part").is_dir() and not made.exists()
    make_shards(records, classes, made, **BY_FOUR)
    assert breaks.decoded == 10 + 23 - 8  # two shards of four were there
    assert not (tmp_path / "made.part").exists()
    assert {file.name: file.read_bytes() for file in whole.iterdir() if file.is_file()} == {
        file.name: file.read_bytes() for file in made.iterdir() if file.is_file()
    }


def test_what_was_begun_with_other_files_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = make_folder(tmp_path / "photos", 12), tmp_path / "made"
    with monkeypatch.context() as patch:
        patch.setattr("dr2dist.data.shards.decode", BreaksOff(10))
        with pytest.raises(KeyboardInterrupt):
            make_shards(*SOURCES["imagefolder"](source), made, **BY_FOUR)
    for file in (source / "dark").iterdir():
        picture(file, 200)
    make_shards(*SOURCES["imagefolder"](source), made, **BY_FOUR)
    verify_shards(made, progress=False)
    dataset = ShardDataset(made, FIELDS, PLAIN)
    seen = [dataset[0, place].values for place in range(12)]
    red = [value["image"][0].mean() - value["image"][1].mean() > 0.5 for value in seen]
    assert sum(red) == 4


def test_a_folder_in_the_way_is_left_alone(tmp_path: Path) -> None:
    source, part = make_folder(tmp_path / "photos", 6), tmp_path / "made.part"
    part.mkdir()
    (part / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is in the way: it holds something else"):
        make_shards(*SOURCES["imagefolder"](source), tmp_path / "made", progress=False)
    assert (part / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("language", ["C", "C.UTF-8"])
def test_names_that_are_no_utf_8_are_kept(language: str, tmp_path: Path) -> None:
    """By processes of their own: how Python takes names is fixed when it starts."""
    for name in (b"photos/cat/caf\xe9.png", b"photos/cat/new\nline.png", b"photos/d\xf6g/a.png"):
        picture(tmp_path / os.fsdecode(name))
    line = [sys.executable, "-m", "dr2dist.cli", "shards", "make", "--from", "imagefolder"]
    done = subprocess.run(
        [*line, "--source", str(tmp_path / "photos"), "--output", str(tmp_path / "shards")],
        env={**os.environ, "LC_ALL": language, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    index = verify_shards(tmp_path / "shards", progress=False)
    assert index.classes == ("cat", "d\\xf6g")
    assert keys(tmp_path / "shards") == ["cat-caf\\xe9", "cat-new\\nline", "d\\xf6g-a"]
    dataset = ShardDataset(tmp_path / "shards", FIELDS, PLAIN)
    assert all(torch.isfinite(dataset[0, place].values["image"]).all() for place in range(3))
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "shards"}


def of_grey(root: Path, name: str, seed: int) -> Path:
    """Shards of pictures that all have one size."""
    for number in range(12):
        path = root / "photos" / ("light" if number % 2 else "dark") / f"{number:02}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (255 * (number % 2),) * 3).save(path)
    records, classes = SOURCES["imagefolder"](root / "photos")
    make_shards(records, classes, root / name, samples_per_shard=4, seed=seed, progress=False)
    return root / name


FAULTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "gone": (lambda one, other: (one / "shard-000001.tar").unlink(), "shard-000001.tar is missing"),
    "many gone": (
        lambda one, other: [path.unlink() for path in sorted(one.glob("*.tar"))[:2]],
        "shard-000000.tar and 1 more of 3 is missing",
    ),
    "shorter": (
        lambda one, other: os.truncate(one / "shard-000002.tar", 2048),
        "shard-000002.tar: has 2048 bytes, index.json says",
    ),
    "of another making": (
        lambda one, other: shutil.copy(other / "shard-000000.tar", one),
        "it is a shard of another making",
    ),
    "overwritten": (
        lambda one, other: (one / "shard-000000.tar").write_bytes(
            bytes((one / "shard-000000.tar").stat().st_size)
        ),
        "holds no file of 0 bytes where index.json says",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_shards_that_are_not_those_of_the_index_are_refused(name: str, tmp_path: Path) -> None:
    one, other = of_grey(tmp_path, "one", 1), of_grey(tmp_path, "other", 2)
    compare_with_index(read_index(one))
    fault, message = FAULTS[name]
    fault(one, other)
    with pytest.raises(UserError, match=re.escape(message)):
        compare_with_index(read_index(one))


def test_names_that_no_header_holds_whole_are_not_taken_for_faults(tmp_path: Path) -> None:
    for name in ("x" * 130, "caf\u00e9", "what?", "plain"):
        picture(tmp_path / "photos" / "cat" / f"{name}.png")
    assert make(tmp_path / "photos", tmp_path / "shards") == 0
    compare_with_index(read_index(tmp_path / "shards"))
    verify_shards(tmp_path / "shards", progress=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_says_what_it_cannot_read_in_one_line(tmp_path: Path, workers: int) -> None:
    shards = of_grey(tmp_path, "one", 1)
    (path, *_), sample = sorted(shards.glob("*.tar")), samples_of(read_index(shards))[1]
    data = bytearray(path.read_bytes())
    place, size = sample.members["bmp"]
    data[place : place + size] = bytes(size)
    path.write_bytes(data)
    dataset = ShardDataset(shards, FIELDS, PLAIN)
    with pytest.raises(UserError) as error:
        list(batches(dataset, [[(0, 0), (0, 1)]], workers))
    text = str(error.value)
    assert text.startswith(f"{path}: sample '{sample.key}' cannot be read") and "\n" not in text
