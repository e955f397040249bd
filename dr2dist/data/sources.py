"""Where samples come from: each source lists records of files with what is said of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dr2dist.data.decoders import IMAGE_TYPES
from dr2dist.data.fields import split_name
from dr2dist.errors import UserError, nearest


def image_files(folder: Path) -> list[Path]:
    """All files under a folder that are images by their names, in order."""
    files = sorted(folder.rglob("*"))
    return [file for file in files if file.suffix.lower().lstrip(".") in IMAGE_TYPES]


@dataclass(frozen=True)
class Record:
    """One sample: a key that is unique in its source, its files by extension, further members, and
    its class where it has one."""

    key: str
    files: dict[str, Path]
    members: dict[str, bytes] = field(default_factory=dict)
    label: int | None = None


Source = tuple[list[Record], list[str]]
"""Records, and the names of the classes that labels count."""

Members = tuple[dict[str, bytes], int | None]
"""What is said of an image: further members by extension, and its class."""

Described = tuple[Sequence[Members], list[str]]
"""That of all images, and the names of the classes."""


def image_folder(path: Path) -> Source:
    """PATH/class name/**/image: classes in the order of their names."""
    if not path.is_dir():
        raise UserError(f"{path}: is not a folder of images")
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    found = [
        (image, _classified(label))
        for label, name in enumerate(classes)
        for image in image_files(path / name)
    ]
    return _records(path, found), classes


def csv_table(path: Path) -> Source:
    """A table with a header, the column `path` (relative to the table), and one more.

    label: a class's name. labels: any number of names, between semicolons. target: numbers, one
    or more between semicolons.
    """
    rows, columns = _read_table(path)
    for column, read in _COLUMNS.items():
        if column in columns and "path" in columns:
            files = [path.parent / row["path"] for row in rows]
            described, classes = read(path, [row[column] for row in rows])
            return _records(path.parent, list(zip(files, described, strict=True))), classes
    column = "path" if "path" not in columns else "label"
    hint, found = nearest(column, columns), ", ".join(columns)
    more = "" if column == "path" else " (nor labels, nor target)"
    raise UserError(f"{path}: has no column '{column}'{more}{hint}; found {found}")


def _read_table(path: Path) -> tuple[list[dict[str, str]], Sequence[str]]:
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    for number, row in enumerate(rows, 2):
        for column in columns:
            if row[column] is None:
                raise UserError(f"{path}: row {number} has no value in the column '{column}'")
    return rows, columns


def _class_names(names: set[str]) -> list[str]:
    numeric = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name) if numeric else (0, name))


def _one_class(path: Path, values: list[str]) -> Described:
    classes = _class_names(set(values))
    return [_classified(classes.index(value)) for value in values], classes


def _many_classes(path: Path, values: list[str]) -> Described:
    each = [[name.strip() for name in value.split(";") if name.strip()] for value in values]
    classes = _class_names({name for names in each for name in names})
    labels = [sorted({classes.index(name) for name in names}) for names in each]
    return [({"json": json.dumps({"labels": found}).encode()}, None) for found in labels], classes


def _numbers(path: Path, values: list[str]) -> Described:
    described = []
    for row, value in enumerate(values):
        try:
            numbers = [float(part) for part in value.split(";")]
        except ValueError:
            raise UserError(
                f"{path}: row {row + 2}: target is '{value}', allowed are numbers between ';'"
            ) from None
        described.append(({"json": json.dumps({"target": numbers}).encode()}, None))
    return described, []


_COLUMNS: dict[str, Callable[[Path, list[str]], Described]] = {
    "label": _one_class,
    "labels": _many_classes,
    "target": _numbers,
}


def _classified(label: int) -> Members:
    return {"cls": str(label).encode()}, label


def elpv(path: Path) -> Source:
    """The folder of the elpv-dataset package: defective where the probability is over 0.5."""
    try:
        lines = (path / "labels.csv").read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path / 'labels.csv'}: cannot be read: {error.strerror}") from None
    rows = [line.split() for line in lines if line.strip()]
    found = [
        (path / name, _classified(int(float(probability) > 0.5))) for name, probability, *_ in rows
    ]
    return _records(path, found), ["functional", "defective"]


def folder_of_files(path: Path) -> Source:
    """PATH/**: files of one name, less their extensions, are the members of one sample, as in
    webdataset's shards. A .cls file holds a class's number."""
    if not path.is_dir():
        raise UserError(f"{path}: is not a folder of files")
    samples: dict[Path, dict[str, Path]] = {}
    for file in sorted(path.rglob("*")):
        name, extension = split_name(file)
        if file.is_file() and name and extension:
            inner = file.relative_to(path).parent / name
            samples.setdefault(inner, {})[extension] = file
    if not samples:
        raise UserError(f"{path}: holds no files with extensions")
    taken: set[str] = set()
    records = [
        Record(_new_key(inner, taken), files, {}, _class_of(files))
        for inner, files in samples.items()
    ]
    count = max((record.label + 1 for record in records if record.label is not None), default=0)
    return records, list(map(str, range(count)))


def _class_of(files: dict[str, Path]) -> int | None:
    if "cls" not in files:
        return None
    try:
        return int(files["cls"].read_text())
    except ValueError as error:
        raise UserError(f"{files['cls']}: is no class's number: {error}") from None


SOURCES: dict[str, Callable[[Path], Source]] = {
    "imagefolder": image_folder,
    "csv": csv_table,
    "files": folder_of_files,
    "elpv": elpv,
}


def _new_key(inner: Path, taken: set[str]) -> str:
    """A key from a path that no other has, without a dot: shards end it at the first."""
    base = inner.as_posix().replace("/", "-").replace(".", "_")
    key, number = base, 1
    while key in taken:
        key, number = f"{base}-{number}", number + 1
    taken.add(key)
    return key


def _records(root: Path, found: list[tuple[Path, Members]]) -> list[Record]:
    """Records with keys from their paths. A key holds no dot: shards end it at the first."""
    if not found:
        raise UserError(f"{root}: holds no images of the types {', '.join(IMAGE_TYPES)}")
    taken: set[str] = set()
    records = []
    for path, (members, label) in found:
        inner = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        key = _new_key(inner.with_suffix(""), taken)
        extension = path.suffix.lower().lstrip(".")
        records.append(Record(key, {extension: path}, members, label))
    return records
