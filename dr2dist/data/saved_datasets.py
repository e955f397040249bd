"""Tables of images as the package datasets keeps them: its folders, and Parquet files."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from dr2dist.data.images import IMAGE_TYPES
from dr2dist.data.listing import shown
from dr2dist.data.records import (
    COLUMNS,
    Members,
    Record,
    Source,
    answer_of,
    check_once,
    classified,
    new_key,
    several,
)
from dr2dist.errors import UserError, one_line

log = logging.getLogger(__name__)

SPLITS = {"validation": "val", "valid": "val", "dev": "val"}
"""Parts that other names are splits of."""


class Cell:
    """An image in a table, read when it is wanted.

    table: of the package datasets; column: its column of images. source: where the table lies.
    place: what messages call the table. row: from 0 on.
    """

    def __init__(self, table: Any, column: str, source: Path, place: str, row: int) -> None:
        self.table, self.column, self.source = table, column, source
        self.place, self.row = place, row

    def read_bytes(self) -> bytes:
        """The image's file."""
        return _bytes_of(self.table[self.row][self.column], self.source)

    def stat(self) -> os.stat_result:
        """The source's."""
        return self.source.stat()

    def __fspath__(self) -> str:
        return f"{self.place}: row {self.row}"


class _Split(NamedTuple):
    """name: as the source calls it, such as train; table: of the package datasets."""

    name: str
    table: Any


def saved_datasets(path: Path) -> Source:
    """A Parquet file, a folder of them, or what `datasets` has saved, with a column of images.

    Images lie in the only column of type Image, or else of bytes, or in files that the column path
    names, relative to the table. What is said of them is label
    (a class), labels (a class, or several) or target (numbers). The other columns can be split and
    grouped by, and so can `split`, where files or folders are called train, validation and test.
    Parquet files are unpacked once into the cache of datasets (HF_DATASETS_CACHE). Raises UserError
    for what cannot be read, and for the first row and column that cannot be used.
    """
    splits = list(_loaded(path))
    records: list[Record] = []
    classes: list[str] = []
    taken: set[str] = set()
    for split in splits:
        place = str(path) if len(splits) == 1 else f"{path}: {split.name}"
        found, names = _records(split, path, place, taken)
        if classes and names != classes:
            raise UserError(f"{place}: its classes differ from those of {splits[0].name}")
        records, classes = [*records, *found], names
    if len(splits) > 1:
        kept = ", ".join(split.name for split in splits)
        log.warning("%s: has the splits %s, which --split-by split keeps apart", path, kept)
    return records, classes


def _loaded(path: Path) -> Iterator[_Split]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "shards make --from datasets needs datasets: pip install 'dr2dist[datasets]'"
        ) from None
    try:
        found = _read(datasets, path)
    except Exception as error:  # of several packages, each with its own
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
    several = found if isinstance(found, dict) else {"train": found}
    return (_Split(name, table) for name, table in several.items())


def _read(datasets: Any, path: Path) -> Any:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return datasets.load_from_disk(str(path))
    if path.is_file():
        return datasets.load_dataset("parquet", data_files=str(path))
    if not path.is_dir():
        raise FileNotFoundError("there is no such file or folder")
    if next(path.rglob("*.parquet"), None) is None:
        raise FileNotFoundError("holds no Parquet file, nor what datasets has saved")
    return datasets.load_dataset(str(path))


def _records(split: _Split, source: Path, place: str, taken: set[str]) -> Source:
    table, features = split.table, split.table.features
    image = _image_column(features, place)
    images = table.select_columns([image])
    if hasattr(features[image], "decode"):  # the file itself, not what a library makes of it
        images = images.cast_column(image, type(features[image])(decode=False))
    described, classes = _described(table, place)
    columns = {name: list(table[name]) for name in features if _is_scalar(features[name])}
    if image == "path":
        _check_files(images, source, place)
    records = []
    rows = enumerate(zip(images, described, strict=True))
    for row, (value, (members, label)) in tqdm(rows, total=len(table), unit="image"):
        cell = Cell(images, image, source, place, row)
        inner = _path_of(value[image])
        ending = Path(inner).suffix.lower().lstrip(".")
        ending = ending if ending in IMAGE_TYPES else _type_of(value[image], source)
        key = new_key(Path(split.name, inner or f"{row:08d}").with_suffix(""), taken)
        values = {"split": SPLITS.get(split.name, split.name)}
        values |= {name: str(column[row]) for name, column in columns.items()}
        records.append(Record(key, {ending: cell}, members, label, inner, values))
    return records, classes


def _check_files(images: Any, source: Path, place: str) -> None:
    """Raises UserError for a path that is no file, or that is there twice."""
    files = []
    for row, each in enumerate(images):
        file = _file_of(each["path"], source)
        if not file.is_file():
            raise UserError(
                f"{place}: row {row}: path: '{shown(_path_of(each['path']))}' is no file"
            )
        files.append((f"row {row}", file, None))
    check_once(place, files)


def _image_column(features: Any, place: str) -> str:
    kinds: Sequence[Callable[[Any], bool]] = (
        lambda feature: type(feature).__name__ == "Image",
        lambda feature: isinstance(feature, dict) and set(feature) == {"bytes", "path"},
        lambda feature: getattr(feature, "dtype", "") in ("binary", "large_binary"),
    )
    for kind in kinds:
        found = [name for name, feature in features.items() if kind(feature)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{place}: has images in {', '.join(found)}; allowed is one column")
    if "path" in features:
        return "path"
    raise UserError(
        f"{place}: has no column of images, nor one of their path; found {', '.join(features)}"
    )


def _described(table: Any, place: str) -> tuple[Sequence[Members], list[str]]:
    """(what is said of each image, names of classes)."""
    name = answer_of(table.features, place)
    if name is None:
        raise UserError(
            f"{place}: has no column {', '.join(COLUMNS)}; found {', '.join(table.features)}"
        )
    feature, values = table.features[name], list(table[name])
    inner = getattr(feature, "feature", None)
    names = getattr(inner or feature, "names", None)
    if names is None:
        kind = "labels" if name == "label" and inner else name
        kind = "label" if name == "labels" and not inner else kind
        texts = [(row, _text(value)) for row, value in enumerate(values)]
        return COLUMNS[kind](Path(place), texts)
    for row, value in enumerate(values):
        for number in value if inner else [value]:
            if number is None or not 0 <= number < len(names):
                last = len(names) - 1
                raise UserError(f"{place}: row {row}: {name} is {number}, allowed is 0 to {last}")
    return [several(sorted(set(value))) if inner else classified(value) for value in values], list(
        names
    )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ";".join(map(str, value))
    return "" if value is None else str(value)


def _is_scalar(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    return dtype.endswith("string") or dtype.startswith(("bool", "int", "uint", "float"))


def _path_of(value: Any) -> str:
    path = value.get("path") if isinstance(value, dict) else value
    return path if isinstance(path, str) else ""


def _bytes_of(value: Any, source: Path) -> bytes:
    """Of an image: its bytes, or those of the file that it names."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        return data
    return _file_of(value, source).read_bytes()


def _file_of(value: Any, source: Path) -> Path:
    """A file that a table names, relative to it."""
    return source.parent / os.path.expanduser(_path_of(value).strip())


def _type_of(value: Any, source: Path) -> str:
    """The ending of an image's type, by its first bytes."""
    try:
        with Image.open(io.BytesIO(_bytes_of(value, source))) as image:
            found = (image.format or "").lower()
    except Exception:  # whatever Pillow's readers raise: it is named where it is read
        found = ""
    return {"jpeg": "jpg", "tiff": "tif"}.get(found, found if found in IMAGE_TYPES else "jpg")
