"""Small image folders and shards for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dr2dist.data.shards import make_shards
from dr2dist.data.sources import image_folder


def make_folder(root: Path, count: int = 23, size: int = 40) -> Path:
    """root/{bright,dark}/N.png|jpg with a class that can be seen."""
    generator = np.random.default_rng(0)
    for index in range(count):
        label = index % 3 == 0
        folder = root / ("dark" if label else "bright")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 90, (size, size, 3)) + (0 if label else 150)
        extension = "png" if index % 2 else "jpg"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"cell.{index}.{extension}")
    return root


def make_small_shards(root: Path, count: int = 60, size: int = 40) -> Path:
    """root/shards/{train,val} from such a folder."""
    records, classes = image_folder(make_folder(root / "images", count, size))
    output = root / "shards"
    make_shards(records, classes, output, samples_per_shard=16, val_fraction=0.3, progress=False)
    return output
