"""An index of shards that others have made: what is taken, what is named, and that it trains."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from dr2dist.data.compared import compare_with_index
from dr2dist.data.fields import Fields
from dr2dist.data.found import find_shards
from dr2dist.data.index import read_index
from dr2dist.data.indexing import Indexed, Part, index_shards
from dr2dist.data.shards import verify_shards
from dr2dist.data.stream import ShardDataset
from dr2dist.errors import UserError
from dr2dist.tasks.images import IMAGE
from tests.commands import dr2dist
from tests.images import make_small_shards, samples_of
from tests.pool import Pool
from tests.test_versions import as_format_1

NAMES = ("dark", "bright")


def picture(label: int, number: int = 0, kind: str = "PNG") -> bytes:
    noise = np.random.default_rng(number).integers(0, 90, (24, 24, 3))
    stream = io.BytesIO()
    Image.fromarray((noise + 150 * label).astype(np.uint8)).save(stream, kind)
    return stream.getvalue()


def sample(style: str, number: int) -> dict[str, Any]:
    """As a writer of webdataset is given it."""
    label = int(number % 3 == 0)
    image = picture(label, number)
    return {
        "cls": {"__key__": f"s{number:05d}", "jpg": picture(label, number, "JPEG"), "cls": label},
        "json": {"__key__": f"{number}", "PNG": image, "json": {"kind": {"name": NAMES[label]}}},
        "txt": {"__key__": f"a.b/{number}", "png": image, "seg.png": image, "txt": NAMES[label]},
    }[style]


LABELS = {"cls": None, "json": "json#kind.name", "txt": "txt"}


def write(folder: Path, style: str, numbers: Iterable[int] = range(50)) -> Path:
    folder.mkdir(parents=True)
    pattern = str(folder / "train-%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=12, verbose=0) as writer:
        for number in numbers:
            writer.write(sample(style, number))
    return folder


def index(folder: Path, **options: Any) -> Indexed:
    return index_shards([str(folder)], folder / "index.json", progress=False, workers=1, **options)


@pytest.mark.parametrize("style", LABELS)
def test_what_its_writer_wrote_is_read_as_webdataset_reads_it(style: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", style)
    found = index(folder, label=LABELS[style])
    assert found.index is not None and not found.unusable
    assert found.index.num_samples == 50 and sum(found.index.class_counts() or ()) == 50
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(paths, shardshuffle=False))
    fields = Fields({"image": IMAGE, "label": "cls;txt;json#label"})
    dataset = ShardDataset(folder, fields, lambda values: values)
    assert len(dataset) == len(theirs)
    for number, wanted in enumerate(theirs):
        read = dataset[0, number]
        assert read.key == wanted["__key__"]
        image = next(wanted[name] for name in ("jpg", "png") if name in wanted)
        assert read.values["image"].tobytes() == Image.open(io.BytesIO(image)).tobytes()
        label = int(int(number) % 3 == 0)
        assert read.values["label"] == (label if style == "cls" else NAMES[label])
    assert verify_shards(folder, progress=False).num_samples == 50
    compare_with_index(found.index)


def add(tar: tarfile.TarFile, name: str, data: bytes, **header: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in header.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


ODD = {
    "alone.jpg": "has no cls",
    "lonely.cls": "has no image",
    "noending": "a name without an ending",
    "badlabel.jpg badlabel.cls=dog": "its label cannot be read",
    "torn.jpg between.jpg between.cls=0 torn.cls": "its members do not follow each other",
    "k3.jpg k3.cls": "the key is there already",
    "twice.jpg twice.JPG twice.cls": "holds .jpg twice",
}
SOUND = "/abs.jpg /abs.cls ../up.jpg ../up.cls dir.v2/x.jpg dir.v2/x.cls __meta__/x.json"


def test_what_cannot_be_used_is_named_by_its_reason(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        names = [f"k{number}.{end}" for number in range(9) for end in ("jpg", "cls")]
        for text in [*names, *" ".join(ODD).split(), *SOUND.split()]:
            name, _, content = text.partition("=")
            data = (content or "1").encode()
            add(tar, name, picture(1) if name.lower().endswith("jpg") else data)
        add(tar, "link.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        long = "x" * 150
        add(tar, f"{long}/y.jpg", picture(1))
        add(tar, f"{long}/y.cls", b"1")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    found = index(tmp_path)
    assert found.index is not None
    keys = [each.key for each in samples_of(found.index)]
    assert keys == [
        *(f"k{n}" for n in range(9)),
        "between",
        "/abs",
        "../up",
        "dir.v2/x",
        f"{long}/y",
    ]
    reasons = [reason for _, _, reason in found.unusable]
    for reason in [*ODD.values(), "no regular file", "holds no samples"]:
        assert any(reason in each for each in reasons), reason
    assert len(reasons) == len(ODD) + 3  # what is torn counts twice
    assert verify_shards(tmp_path, progress=False).num_samples == len(keys)
    # Without the arrays beside it, its shard's headers say the same.
    shutil.rmtree(tmp_path / "index.members")
    assert [each.key for each in samples_of(read_index(tmp_path))] == keys


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:9000], "unexpected end of data"),
        (lambda data: data[:2048] + b"x" * 512 + data[2560:], "no sound tar file: at byte"),
        (lambda data: b"", "is empty"),
        (lambda data: b"\x1f\x8b" + data, "is compressed"),
        (lambda data: b"no tar" * 1000, "no sound tar file"),
    ],
)
def test_a_damaged_shard_is_named_and_nothing_written(
    damage: Any, message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "shards", "cls")
    path = folder / "train-0002.tar"
    sound = path.read_bytes()
    path.write_bytes(damage(sound))
    with pytest.raises(UserError, match=rf"train-0002\.tar: .*{message}") as caught:
        index(folder)
    assert "\n" not in str(caught.value) and not (folder / "index.json").exists()
    path.write_bytes(sound)
    done = {note: note.stat().st_mtime_ns for note in folder.glob("*.part/*.safetensors")}
    assert len(done) == 2  # those before it, which are not read again
    found = index(folder)
    assert found.index is not None and found.index.num_samples == 50
    assert not list(folder.glob("*.part"))


def test_parts_of_many_machines_make_the_same_index(tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", "json")
    found = [index(folder, label="json#kind.name", part=Part(k, 3)) for k in (2, 0, 1)]
    assert [each.left for each in found[:2]] == [4, 2] and found[2].index is not None
    parts = (folder / "index.json").read_bytes()
    index(folder, label="json#kind.name", overwrite=True)
    assert (folder / "index.json").read_bytes() == parts
    for text in ("0/3", "4/3", "1", "a/b", "1/0"):
        with pytest.raises(UserError, match="--part is"):
            Part.parse(text)


def test_sources_are_found_or_named(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, "cls", range(30))
    one, two = tmp_path / "one", tmp_path / "two"
    brace = f"{one}/train-{{0000..0001}}.tar"
    assert len(find_shards([brace])) == 2
    assert len(find_shards([f"{brace}::{two}/*.tar"])) == len(find_shards([brace, str(two)])) == 5
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    for source, message in (
        (str(tmp_path / "none"), "is not there"),
        (str(tmp_path), "holds no .tar files"),
        (f"{one}/*.tgz", "matches no file"),
        (f"{one}/train-{{0000..0009.tar", "braces are not balanced"),
        (f"{one}/train-{{0000..0009}}.tar", "is not there"),
        (f"{brace}::{one}", "is named twice"),
        (str(tmp_path / "a.tar.gz"), "is compressed: unpack it"),
    ):
        with pytest.raises(UserError, match=message):
            find_shards([source])
    found = index_shards([str(one), str(two)], tmp_path / "all.json", progress=False, workers=2)
    assert found.index is not None and not found.index.unique_keys
    dataset = ShardDataset(tmp_path / "all.json", Fields({"label": "cls"}), lambda values: values)
    assert dataset[0, 0].key == "one/train-0000/s00000"
    assert any("SHARD/KEY" in note for note in found.notes)


def test_classes_have_names(tmp_path: Path) -> None:
    folder, names = write(tmp_path / "shards", "cls"), tmp_path / "names.txt"
    names.write_text("dark\nbright\nunseen\n")
    found = index(folder, classes=names)
    assert found.index is not None and found.index.classes == ("dark", "bright", "unseen")
    assert found.index.class_counts() == [33, 17, 0]
    assert any("without samples: unseen" in note for note in found.notes)
    names.write_text("dark\n")
    with pytest.raises(UserError, match="label 1, allowed is 0 to 0"):
        index(folder, classes=names, overwrite=True)
    assert read_index(folder).classes == ("dark", "bright", "unseen")  # what was there stays
    names.write_text("dark\ndark\n")
    with pytest.raises(UserError, match=r"names\.txt: line 2: 'dark' is there twice"):
        index(folder, classes=names, overwrite=True)
    with pytest.raises(UserError, match="exists already, --overwrite"):
        index(folder)


def test_shards_sorted_by_class_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for label in range(8):
        with tarfile.open(folder / f"{label}.tar", "w") as tar:
            for number in range(4):
                add(tar, f"{label}-{number}.png", picture(0))
                add(tar, f"{label}-{number}.cls", str(label).encode())
    assert any("sorted by class: 1.0 of 8 classes" in note for note in index(folder).notes)


def test_an_index_of_before_is_upgraded_in_place(tmp_path: Path) -> None:
    folder = make_small_shards(tmp_path) / "train"
    wanted = [each.key for each in samples_of(read_index(folder))]
    counts = read_index(folder).class_counts()
    as_format_1(folder)
    assert read_index(folder).given is not None
    found = index(folder)
    assert found.index is not None and found.index.given is None
    assert found.index.classes == ("bright", "dark")  # which only the index before knows
    assert [each.key for each in samples_of(found.index)] == wanted
    assert found.index.class_counts() == counts


def test_what_follows_a_tars_end_or_lacks_it_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", "cls", range(10))
    (path,) = folder.glob("*.tar")
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[8].offset
    for data, message in (
        (whole[:cut], f"ends at byte {cut} without a tar's end"),
        (whole[:cut] + bytes(1024) + whole[cut + 1024 :], "holds something after a tar's end"),
        (whole + whole, "holds something after a tar's end"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            index(folder)


def test_a_repeated_key_has_its_first_label(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, label in (("x", b"1"), ("y", b"0"), ("x", b"3")):
            add(tar, f"{key}.png", picture(0))
            add(tar, f"{key}.cls", label)
    found = index(tmp_path).index
    assert found is not None and found.class_counts() == [1, 1]


def test_arrays_of_another_making_are_not_used(tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", "cls", range(24))
    index(folder)
    one, other = sorted(folder.glob("index.members/*"))
    shutil.copy(other, one)
    assert [each.key for each in samples_of(read_index(folder))] == [f"s{k:05d}" for k in range(24)]


def test_parts_do_not_take_each_others_work(tmp_path: Path, monkeypatch: Any) -> None:
    folder = write(tmp_path / "shards", "cls", range(24))
    monkeypatch.chdir(tmp_path)
    output = folder / "index.json"
    index_shards(["shards"], output, part=Part(0, 2), progress=False, workers=1)
    with pytest.raises(UserError, match="was begun with other shards or labels"):
        index(folder, part=Part(1, 2), label="none")
    assert index(folder, part=Part(1, 2)).index is not None
    assert sorted(path.name for path in folder.iterdir() if "part" in path.name) == []
    with pytest.raises(UserError, match="is no place on this machine"):
        index_shards([str(folder)], Path("s3://bucket/index.json"), progress=False)


HELD = {f"train-{number:04d}": 12 if number < 4 else 2 for number in range(5)}
COUNTS: dict[str, dict[str, Any]] = {
    "img2dataset": {f"{name}_stats.json": {"successes": held} for name, held in HELD.items()},
    "wids": {
        "wids.json": {
            "shardlist": [{"url": f"{name}.tar", "nsamples": held} for name, held in HELD.items()]
        }
    },
    "energon": {
        ".nv-meta/.info.json": {
            "shard_counts": {f"{name}.tar": held for name, held in HELD.items()}
        }
    },
    "DALI": {f"{name}.idx": f"v1.2 {held}\njpg 512 9\n" for name, held in HELD.items()},
}


@pytest.mark.parametrize("kind", COUNTS)
def test_counts_of_others_are_taken_and_verified_at_first_use(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", "cls")
    for name, content in COUNTS[kind].items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    (tmp_path / "names").write_text("dark\nbright\n")
    with pytest.raises(UserError, match="--classes FILE"):
        index(folder, take_counts=True)
    found = index(folder, take_counts=True, classes=tmp_path / "names").index
    assert found is not None and [shard.samples for shard in found.shards] == [12] * 4 + [2]
    assert not list(folder.glob("index.members/*")) and found.class_counts() is None
    dataset = ShardDataset(folder, Fields({"label": "cls"}), lambda values: values)
    assert [dataset[0, k].values["label"] for k in range(50)] == [
        int(k % 3 == 0) for k in range(50)
    ]
    write(tmp_path / "other", "cls", range(7))
    shutil.copy(tmp_path / "other" / "train-0000.tar", folder / "train-0001.tar")
    dataset = ShardDataset(folder, Fields({"label": "cls"}), lambda values: values)
    with pytest.raises(UserError, match=r"train-0001\.tar: holds 7 samples, index\.json says 12"):
        dataset[0, 12]


CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 1}}
task: {num_classes: 2}
data: {train: SHARDS, val: SHARDS}
optim: {lr: 1.0e-3}
train: {steps: 2, micro_batch: 4}
output: OUTPUT
"""


@pytest.mark.parametrize("style", LABELS)
def test_it_trains_with_no_step_but_the_index(style: str, tmp_path: Path, one_rank: Pool) -> None:
    folder = write(tmp_path / "shards", style, range(24))
    label = [] if LABELS[style] is None else ["--label", str(LABELS[style])]
    made = dr2dist("shards", "index", str(folder), "--output", str(folder / "index.json"), *label)
    assert made.returncode == 0 and "24 samples of 2 classes in 2 shard(s)" in made.stdout
    path = tmp_path / "config.yaml"
    text = CONFIG.replace("SHARDS", str(folder)).replace("OUTPUT", str(tmp_path / "run"))
    path.write_text(text)
    (summary,) = one_rank.run("tests.cases:run_config", path=str(path), overrides=[])
    assert summary["status"] == "finished" and summary["last"]["samples"] == 24
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
