"""Small image folders and shards for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dr2dist.data.batch import Batch
from dr2dist.data.fields import Fields
from dr2dist.data.index import Index
from dr2dist.data.members import Sample
from dr2dist.data.order import Order
from dr2dist.data.shards import make_shards
from dr2dist.data.sources import image_folder
from dr2dist.data.stream import ShardDataset, loader
from dr2dist.tasks.classification import Classification, ClassificationOptions
from dr2dist.tasks.images import IMAGE

BRIGHT_OR_DARK = ("bright", "dark")


def make_folder(
    root: Path, count: int = 23, size: int = 40, classes: tuple[str, str] = BRIGHT_OR_DARK
) -> Path:
    """root/{bright,dark}/N.png|jpg with a class that can be seen."""
    generator = np.random.default_rng(0)
    for index in range(count):
        label = index % 3 == 0
        folder = root / classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 90, (size, size, 3)) + (0 if label else 150)
        extension = "png" if index % 2 else "jpg"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"cell.{index}.{extension}")
    return root


def make_small_shards(
    root: Path, count: int = 60, size: int = 40, classes: tuple[str, str] = BRIGHT_OR_DARK
) -> Path:
    """root/shards/{train,val} from such a folder."""
    records, names = image_folder(make_folder(root / "images", count, size, classes))
    output = root / "shards"
    make_shards(records, names, output, samples_per_shard=16, val_fraction=0.3, progress=False)
    return output


def samples_of(index: Index) -> list[Sample]:
    """Of all shards, in order."""
    members = [index.members(shard) for shard in index.shards]
    return [each[number] for each in members for number in range(len(each))]


def place_of(index: Index, position: int, seed: int = 0) -> int:
    """Which of `samples_of` a run of the usual order takes at a position."""
    order = Order([shard.samples for shard in index.shards], index.digest(), seed=seed)
    return order.items(np.array([position]))[0][1]


FIELDS = Fields({"image": IMAGE, "label": "cls"})


def classification(num_classes: int, **options: Any) -> Classification:
    """The task with options."""
    return Classification(ClassificationOptions(num_classes=num_classes, **options))


def collate(samples: Any) -> Any:
    """Images and labels, stacked."""
    return classification(2).collate(samples)


def labelled(labels: Any, outputs: Any = None) -> Batch:
    """A batch of labels, with or without images."""
    inputs = {} if outputs is None else {"image": outputs}
    return Batch(inputs, {"label": labels}, [str(k) for k in range(len(labels))], len(labels))


def batches(dataset: ShardDataset, items: Any, workers: int = 0) -> Any:
    """The loader of a dataset of images with labels."""
    return loader(dataset, items, workers, collate)


def on_image(transform: Any, image: Any) -> Any:
    """What a transform of samples makes of an image alone."""
    return transform({"image": image})["image"]
