"""Shards, order and streams."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from dr2dist.data.fields import Fields
from dr2dist.data.index import read_index
from dr2dist.data.indexing import index_shards
from dr2dist.data.positions import validation_batches
from dr2dist.data.shards import make_shards, verify_shards
from dr2dist.data.sources import SOURCES
from dr2dist.data.stream import ShardDataset
from dr2dist.errors import UserError
from dr2dist.tasks.transforms import (
    ImageData,
    RandAugment,
    eval_transform,
    to_channels,
    train_transform,
)
from tests.images import FIELDS, batches, make_folder, make_small_shards, on_image, samples_of

NORMAL = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()
    }


def test_shards_are_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    records, classes = SOURCES["imagefolder"](make_folder(tmp_path / "images"))
    for workers in (1, 3):
        make_shards(
            records,
            classes,
            tmp_path / f"made{workers}",
            samples_per_shard=5,
            val_fraction=0.25,
            workers=workers,
            progress=False,
        )
    assert contents(tmp_path / "made1") == contents(tmp_path / "made3")
    train, val = (verify_shards(tmp_path / "made1" / p, progress=False) for p in ("train", "val"))
    assert train.classes == ("bright", "dark")
    keys = [[sample.key for sample in samples_of(index)] for index in (train, val)]
    assert not set(keys[0]) & set(keys[1]) and len(keys[0] + keys[1]) == 23
    assert val.class_counts() == [4, 2]


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    shards = make_small_shards(tmp_path) / "train"
    index = read_index(shards)
    paths = [str(shards / shard.name) for shard in index.shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil"))
    assert [s["__key__"] for s in samples] == [sample.key for sample in samples_of(index)]
    assert list(np.bincount([s["cls"] for s in samples])) == index.class_counts()


def test_sources(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", 6)
    (tmp_path / "table.csv").write_text(
        "path,label\nimages/dark/cell.0.jpg,10\nimages/bright/cell.1.png,9\n"
    )
    records, classes = SOURCES["csv"](tmp_path / "table.csv")
    assert classes == ["9", "10"] and [record.label for record in records] == [1, 0]
    (tmp_path / "labels.csv").write_text(
        "images/dark/cell.0.jpg 0.6666 mono\nimages/bright/cell.1.png 0.3333 poly\n"
    )
    records, classes = SOURCES["elpv"](tmp_path)
    assert [record.label for record in records] == [1, 0] and classes[1] == "defective"
    with pytest.raises(UserError, match=r"no column 'label' .*; did you mean 'lable'"):
        (tmp_path / "bad.csv").write_text("path,lable\n")
        SOURCES["csv"](tmp_path / "bad.csv")
    with pytest.raises(UserError, match="holds no images"):
        (tmp_path / "empty").mkdir()
        SOURCES["imagefolder"](tmp_path / "empty")
    assert len({record.key for record in SOURCES["imagefolder"](folder)[0]}) == 6


def test_a_failed_making_leaves_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images")
    (folder / "dark" / "broken.png").write_bytes(b"no image")
    records, classes = SOURCES["imagefolder"](folder)
    with pytest.raises(UserError, match=r"broken\.png: cannot be read"):
        make_shards(records, classes, tmp_path / "made", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "precious").touch()
    with pytest.raises(UserError, match="exists already"):
        make_shards(records, classes, tmp_path / "made", progress=False)


def test_verify_names_the_fault(tmp_path: Path) -> None:
    good = make_small_shards(tmp_path) / "train"
    verify_shards(good, progress=False)

    def broken(change: Any) -> str:
        folder = tmp_path / "broken"
        shutil.copytree(good, folder)
        change(folder)
        with pytest.raises(UserError) as caught:
            verify_shards(folder, progress=False)
        shutil.rmtree(folder)
        return str(caught.value)

    def flip(folder: Path) -> None:
        path = folder / "shard-000001.tar"
        data = bytearray(path.read_bytes())
        data[2000] ^= 1
        path.write_bytes(bytes(data))

    def relabel(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        index["classes"].pop()
        (folder / "index.json").write_text(json.dumps(index))

    assert "shard-000001.tar: checksum differs" in broken(flip)
    assert "shard-000002.tar: is missing" in broken(
        lambda folder: (folder / "shard-000002.tar").unlink()
    )
    assert "label 1, allowed is 0 to 0" in broken(relabel)
    assert "index.json" in broken(lambda folder: (folder / "index.json").write_text("{}"))
    with pytest.raises(UserError, match=r"shard-000009\.tar is not in .*; did you mean"):
        read_index(str(good / "shard-00000{1,9}.tar"))
    assert len(read_index(str(good / "shard-{000000..000001}.tar")).shards) == 2


def test_pickles_in_a_shard_are_never_loaded(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "a", "pickle": b"cos\nsystem\n(S'exit'\ntR.", "cls": b"0"})
    index_shards([str(tmp_path / "a.tar")], tmp_path / "index.json", progress=False)
    fields = Fields({"image": "pickle", "label": "cls"})
    dataset = ShardDataset(tmp_path, fields, eval_transform((8, 8), *NORMAL))
    with pytest.raises(UserError, match=r"\.pickle: allowed types are"):
        dataset[0, 0]


@pytest.mark.parametrize("samples", [1, 7, 16, 23])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_validation_counts_each_sample_once(samples: int, ranks: int) -> None:
    shares = [validation_batches(samples, batch=3, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    found = sorted(index for share in shares for batch in share for index in batch)
    assert found == list(range(samples))


def test_augmentation_is_keyed_by_the_sample(tmp_path: Path) -> None:
    shards = make_small_shards(tmp_path) / "train"
    said = ImageData(train="", vflip=True, scale=(0.3, 1.0))
    transform = train_transform((16, 16), *NORMAL, said)
    dataset = ShardDataset(shards, FIELDS, transform, seed=1)
    items = [[(0, 3), (1, 3)], [(0, 5)], []]
    state = torch.get_rng_state()
    runs = [list(batches(dataset, items, workers)) for workers in (0, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one.inputs["image"], other.inputs["image"]) and one.keys == other.keys
    first, second, empty = runs[0]
    images = first.inputs["image"]
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32
    assert not torch.equal(images[0], images[1])
    assert (first.count, second.count, empty.count) == (2, 1, 0)
    other = ShardDataset(shards, FIELDS, transform, seed=2)
    assert not torch.equal(other[0, 3].values["image"], dataset[0, 3].values["image"])


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    shards = make_small_shards(tmp_path) / "train"
    sample = samples_of(read_index(shards))[2]
    broken_at(shards, [2])
    dataset = ShardDataset(shards, FIELDS, eval_transform((8, 8), *NORMAL))
    with pytest.raises(UserError, match=rf"shard-000000\.tar: sample '{sample.key}' cannot"):
        dataset[0, 2]


def broken_at(shards: Path, places: list[int]) -> None:
    """Overwrites samples of the first shard."""
    index = read_index(shards)
    with (shards / index.shards[0].name).open("r+b") as file:
        for place in places:
            members = samples_of(index)[place].members
            (image,) = set(members) - {"cls"}
            file.seek(members[image][0])
            file.write(b"x" * 50)


def test_unreadable_images_are_replaced_in_training_and_left_out_of_validation(
    tmp_path: Path,
) -> None:
    shards = make_small_shards(tmp_path) / "train"
    transform = eval_transform((8, 8), *NORMAL)
    whole = ShardDataset(shards, FIELDS, transform)
    samples = {index: whole[0, index] for index in range(len(whole))}
    broken_at(shards, [2, 3, 6])
    items = [[(0, 1), (0, 2)], [(0, 3), (0, 5)], [(0, 2), (0, 3)]]
    replaced = ShardDataset(shards, FIELDS, transform, unreadable="other")
    first, second, third = batches(replaced, items)
    readable = {samples[index].key: samples[index] for index in samples if index not in (2, 3, 6)}
    assert first.keys[0] == samples[1].key and second.keys[1] == samples[5].key
    for batch, place in ((first, 1), (second, 0), (third, 0), (third, 1)):
        other = readable[batch.keys[place]]
        assert torch.equal(batch.inputs["image"][place], other.values["image"])
        assert int(batch.targets["label"][place]) == other.values["label"]
    assert third.keys == [first.keys[1], second.keys[0]]  # by the sample alone
    assert [batch.skipped for batch in (first, second, third)] == [1, 1, 2]
    assert [batch.count for batch in (first, second, third)] == [2, 2, 2]
    dropped = ShardDataset(shards, FIELDS, transform, unreadable="drop")
    first, second, third = batches(dropped, items, 2)
    assert [batch.keys for batch in (first, second)] == [[samples[1].key], [samples[5].key]]
    assert [batch.skipped for batch in (first, second, third)] == [1, 1, 2]
    assert [batch.count for batch in (first, second, third)] == [1, 1, 0]
    assert third.inputs["image"].shape == (1, 3, 8, 8)


def test_strong_augmentation_is_keyed_by_the_sample_too(tmp_path: Path) -> None:
    shards = make_small_shards(tmp_path) / "train"
    plain, strong = (
        train_transform((16, 16), *NORMAL, ImageData(train="", hflip=False, scale=(1, 1), **more))
        for more in ({}, {"rand_augment": RandAugment(), "erase": 0.9})
    )
    items = [[(epoch, index) for index in range(4)] for epoch in range(2)]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    dataset = ShardDataset(shards, FIELDS, strong, 1)
    runs = [list(batches(dataset, items, workers)) for workers in (0, 2)]
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one.inputs["image"], other.inputs["image"])
    strongly = [batch.inputs["image"] for batch in runs[0]]
    assert not torch.equal(strongly[0], strongly[1])
    unchanged = next(iter(batches(ShardDataset(shards, FIELDS, plain, 1), items)))
    assert not torch.equal(unchanged.inputs["image"], strongly[0])


def test_sizes_that_are_not_square() -> None:
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[:, 30:60] = 255  # a white stripe in the middle
    image = Image.fromarray(pixels)
    found = on_image(eval_transform((20, 10), *NORMAL), image)
    assert found.shape == (3, 20, 10) and float(found[:, :, 1:9].min()) > 0.9
    found = on_image(eval_transform((10, 20), *NORMAL), image)
    assert found.shape == (3, 10, 20) and float(found[:, :, :5].max()) < -0.9
    transform = train_transform((12, 28), *NORMAL, ImageData(train="", scale=(0.5, 1)))
    assert on_image(transform, image).shape == (3, 12, 28)


def test_any_image_becomes_rgb() -> None:
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    wanted = (deep / 257).round().astype(np.uint8)
    for image in (
        Image.fromarray(deep),
        Image.fromarray(wanted),
        Image.fromarray(wanted).convert("LA"),
    ):
        found = np.asarray(to_channels(image))
        assert found.shape == (8, 8, 3)
        assert np.array_equal(found[..., 1], wanted)
    palette = Image.fromarray(wanted).convert("P")
    assert to_channels(palette).mode == "RGB"


def test_members_lie_where_the_index_says(tmp_path: Path) -> None:
    shards = make_small_shards(tmp_path) / "train"
    index = read_index(shards)
    for shard in index.shards:
        data = (shards / shard.name).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for sample in (index.members(shard)[number] for number in range(shard.samples)):
                assert sorted(sample.members) in (["cls", "jpg"], ["cls", "png"])
                for extension, (offset, size) in sample.members.items():
                    member = tar.extractfile(f"{sample.key}.{extension}")
                    assert member is not None and member.read() == data[offset : offset + size]
