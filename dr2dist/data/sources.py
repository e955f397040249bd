"""Where samples come from: each source lists records of files with what is said of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from dr2dist.data.annotated_films import annotated_films
from dr2dist.data.fields import split_name
from dr2dist.data.film import FILM_TYPES
from dr2dist.data.frames import FrameFolder
from dr2dist.data.images import IMAGE_TYPES
from dr2dist.data.listing import list_files, shown
from dr2dist.data.records import (
    COLUMNS,
    Members,
    Record,
    Source,
    answer_of,
    check_once,
    classified,
    new_key,
)
from dr2dist.data.saved_datasets import saved_datasets
from dr2dist.data.tables import read_table
from dr2dist.data.video_records import OF_FRAMES, frames_in, frames_joined, span_of, with_spans
from dr2dist.errors import UserError, nearest, one_line


def image_folder(path: Path) -> Source:
    """PATH/class name/**/image: classes in the order of their names. What is left out is said."""
    return _class_folders(path, IMAGE_TYPES, "image")


def video_folder(path: Path) -> Source:
    """PATH/class name/**/film, and folders of a film's frames, PATH/class name/**/film/image."""
    records, classes = _class_folders(path, (*FILM_TYPES, *IMAGE_TYPES), "film")
    return frames_joined(records), classes


def _class_folders(path: Path, types: Sequence[str], kind: str) -> Source:
    found = list_files(path, partial(_why_not, root=path, types=types, kind=kind))
    own: dict[str, list[Path]] = {}
    for file in found.files:
        own.setdefault(file.relative_to(path).parts[0], []).append(file)
    classes = sorted(own)
    if empty := _empty_classes(path, classes):
        found.left[f"folders without {kind}s, which are no classes"] = empty
    found.tell()
    if not classes and BESIDE in found.left:
        raise UserError(
            f"{shown(path)}: holds {kind}s but no folders of them; allowed is "
            f"{shown(path)}/CLASS/{kind.upper()}"
        )
    images = [(image, classified(n)) for n, name in enumerate(classes) for image in own[name]]
    return _one_part_each(_records(path, images, types, kind)), list(map(shown, classes))


def _one_part_each(records: list[Record]) -> list[Record]:
    """The records, of which those of one file, by links, are a group: what is learnt from is not
    held out."""
    files = [os.path.realpath(file) for record in records for file in record.files.values()]
    counts = Counter(files)
    each = zip(records, files, strict=True)
    return [replace(record, group=file) if counts[file] > 1 else record for record, file in each]


BESIDE = "not in the folder of a class"
LOOSE = "images in the folder of a class: a film's frames lie in a folder of their own in it"


def _why_not(file: Path, root: Path, types: Sequence[str], kind: str) -> str | None:
    ending = file.suffix.lower().lstrip(".")
    if ending not in types:
        return (
            f"no {kind}s by their ending {file.suffix.lower()}" if ending else "without an ending"
        )
    if file.parent == root:
        return BESIDE
    loose = kind == "film" and ending in IMAGE_TYPES and file.parent.parent == root
    return LOOSE if loose else None


def _empty_classes(path: Path, classes: Sequence[str]) -> list[Path]:
    return [
        entry
        for entry in sorted(path.iterdir())
        if os.path.isdir(entry) and not entry.name.startswith(".") and entry.name not in classes
    ]


def csv_table(path: Path) -> Source:
    """A table with a header, the column `path` (relative to the table), and one more.

    label: a class's name. labels: any number of names, between semicolons. target: numbers, one
    or more between semicolons. A film may have start and stop, in seconds: what lies between is the
    sample. A file, or a span of one, has one row. The table is of UTF-8, separated by commas.
    Raises UserError for the first row and column that cannot be used; all are looked at.
    """
    rows, columns = read_table(path)
    column = answer_of(columns, path)
    if column is None or "path" not in columns:
        raise _lacks_column(path, columns)
    if not rows:
        raise UserError(f"{path}: has a header and no rows")
    files = [_file_of(path, row.number, row.values["path"]) for row in rows]
    cells = [(row.number, row.values[column].strip()) for row in rows]
    described, classes = COLUMNS[column](path, cells)
    records = _records(path.parent, list(zip(files, described, strict=True)))
    each = zip(records, rows, strict=True)
    records = [replace(record, columns=row.values) for record, row in each]
    records = with_spans(path, rows, columns, records)
    names = [f"row {row.number}" for row in rows]
    check_once(path, zip(names, files, map(span_of, records), strict=True))
    return records, classes


def _lacks_column(path: Path, columns: Sequence[str]) -> UserError:
    column = "path" if "path" not in columns else "label"
    hint, found = nearest(column, columns), ", ".join(columns)
    if any(separator in found for separator in ";\t|"):
        hint = "; columns are separated by commas"
    more = "" if column == "path" else " (nor labels, nor target)"
    return UserError(f"{path}: has no column '{column}'{more}{hint}; found {found}")


def _file_of(table: Path, row: int, text: str) -> Path | FrameFolder:
    """The image or film of a row, or the folder of a film's frames, relative to the table."""
    for name in (text, text.strip(), os.path.expanduser(text.strip())):
        file = table.parent / name
        if name and os.path.isfile(file):
            ending = file.suffix.lower().lstrip(".")
            if ending in IMAGE_TYPES or ending in FILM_TYPES:
                return file
            raise UserError(
                f"{table}: row {row}: path: '{shown(name)}' has "
                f"{f'the ending .{ending}, which is none' if ending else 'no ending'} of an image "
                "or film"
            )
        if name and (frames := frames_in(file)):
            return FrameFolder(file, frames)
    raise UserError(f"{table}: row {row}: path: '{shown(text)}' is no file")


def elpv(path: Path) -> Source:
    """The folder of the elpv-dataset package: defective where the probability is over 0.5."""
    try:
        lines = (path / "labels.csv").read_text("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path / 'labels.csv'}: cannot be read: {error.strerror}") from None
    rows = [line.split() for line in lines if line.strip()]
    found = [
        (path / name, classified(int(float(probability) > 0.5))) for name, probability, *_ in rows
    ]
    return _records(path, found), ["functional", "defective"]


def folder_of_files(path: Path) -> Source:
    """PATH/**: files of one name, less their extensions, are the members of one sample, as in
    webdataset's shards. A .cls file holds a class's number."""
    samples: dict[Path, dict[str, Path]] = {}
    found = list_files(path, lambda file: None if split_name(file)[1] else "without an ending")
    found.tell()
    for file in found.files:
        name, extension = split_name(file)
        own = samples.setdefault(file.relative_to(path).parent / name, {})
        if own.setdefault(extension, file) != file:
            raise UserError(
                f"{shown(file)}: is .{extension} of its sample as {shown(own[extension])} is: "
                "endings are taken in small letters"
            )
        if extension.startswith("__"):
            raise UserError(f"{shown(file)}: allowed are endings that do not begin with __")
    if not samples:
        raise UserError(f"{path}: holds no files with extensions")
    taken: set[str] = set()
    records = [
        Record(new_key(inner, taken), files, {}, _class_of(files), inner.as_posix())
        for inner, files in samples.items()
    ]
    count = max((record.label + 1 for record in records if record.label is not None), default=0)
    return records, list(map(str, range(count)))


def _class_of(files: dict[str, Path]) -> int | None:
    if "cls" not in files:
        return None
    try:
        return int(files["cls"].read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{files['cls']}: is no class's number: {one_line(error)}") from None


SOURCES: dict[str, Callable[[Path], Source]] = {
    "imagefolder": image_folder,
    "videofolder": video_folder,
    "csv": csv_table,
    "activitynet": annotated_films,
    "files": folder_of_files,
    "datasets": saved_datasets,
    "elpv": elpv,
}


def _records(
    root: Path,
    found: Sequence[tuple[Path | FrameFolder, Members]],
    types: Sequence[str] = IMAGE_TYPES,
    kind: str = "image",
) -> list[Record]:
    """Records with keys from their paths. A key holds no dot: shards end it at the first."""
    if not found:
        raise UserError(f"{root}: holds no {kind}s of the types {', '.join(types)}")
    taken: set[str] = set()
    records = []
    for file, (members, label) in found:
        path, folder = Path(file), isinstance(file, FrameFolder)
        inner = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        key = new_key(inner.with_suffix(""), taken)
        extension = OF_FRAMES if folder else path.suffix.lower().lstrip(".")
        records.append(Record(key, {extension: file}, members, label, inner.as_posix()))
    return records
