"""Where samples come from: each source lists records of image files with labels."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from dr2dist.errors import UserError, nearest

IMAGE_TYPES = ("bmp", "gif", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp")


def image_files(folder: Path) -> list[Path]:
    """All files under a folder that are images by their names, in order."""
    files = sorted(folder.rglob("*"))
    return [file for file in files if file.suffix.lower().lstrip(".") in IMAGE_TYPES]


def open_image(source: Path | BinaryIO) -> Image.Image:
    """A whole image, decoded. Raises ValueError for whatever is wrong with it."""
    try:
        with Image.open(source) as image:
            image.load()
            return image
    except (OSError, SyntaxError) as error:
        raise ValueError(str(error)) from None


@dataclass(frozen=True)
class Record:
    """One sample: a key that is unique in its source, an image file, a class."""

    key: str
    path: Path
    label: int


Source = tuple[list[Record], list[str]]
"""Records, and the names of the classes that labels count."""


def image_folder(path: Path) -> Source:
    """PATH/class name/**/image: classes in the order of their names."""
    if not path.is_dir():
        raise UserError(f"{path}: is not a folder of images")
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    found = [
        (image, label) for label, name in enumerate(classes) for image in image_files(path / name)
    ]
    return _records(path, found), classes


def csv_table(path: Path) -> Source:
    """A table with a header and the columns `path` (relative to the table) and `label`."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = reader.fieldnames or []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    for column in ("path", "label"):
        if column not in columns:
            hint = nearest(column, columns)
            raise UserError(f"{path}: has no column '{column}'{hint}; found {', '.join(columns)}")
    names = {row["label"] for row in rows}
    numeric = all(name.isdecimal() for name in names)
    classes = sorted(names, key=lambda name: (int(name), name) if numeric else (0, name))
    found = [(path.parent / row["path"], classes.index(row["label"])) for row in rows]
    return _records(path.parent, found), classes


def elpv(path: Path) -> Source:
    """The folder of the elpv-dataset package: defective where the probability is over 0.5."""
    try:
        lines = (path / "labels.csv").read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path / 'labels.csv'}: cannot be read: {error.strerror}") from None
    rows = [line.split() for line in lines if line.strip()]
    found = [(path / name, int(float(probability) > 0.5)) for name, probability, *_ in rows]
    return _records(path, found), ["functional", "defective"]


SOURCES: dict[str, Callable[[Path], Source]] = {
    "imagefolder": image_folder,
    "csv": csv_table,
    "elpv": elpv,
}


def _records(root: Path, found: list[tuple[Path, int]]) -> list[Record]:
    """Records with keys from their paths. A key holds no dot: shards end it at the first."""
    if not found:
        raise UserError(f"{root}: holds no images of the types {', '.join(IMAGE_TYPES)}")
    taken: set[str] = set()
    records = []
    for path, label in found:
        inner = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        base = inner.with_suffix("").as_posix().replace("/", "-").replace(".", "_")
        key, number = base, 1
        while key in taken:
            key, number = f"{base}-{number}", number + 1
        taken.add(key)
        records.append(Record(key, path, label))
    return records
