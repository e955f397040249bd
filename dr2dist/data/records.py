"""Samples before they are in shards: files, and what is said of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dr2dist.data.labels import check_named_once
from dr2dist.data.listing import shown
from dr2dist.errors import UserError


class Readable(Protocol):
    """A file of a sample: a Path, or what lies in another file. Its path is what messages say."""

    def read_bytes(self) -> bytes:
        """All of it. Raises OSError."""
        ...

    def stat(self) -> os.stat_result:
        """Of the file that it is in. Raises OSError."""
        ...

    def __fspath__(self) -> str: ...


@dataclass(frozen=True)
class Record:
    """One sample: a key that is unique in its source, its files by extension, further members, its
    class where it has one, where it lies under the source, what a table says of it by column, and
    what it must stay in one part with, if there is anything: other spans of its film.
    """

    key: str
    files: Mapping[str, Readable]
    members: dict[str, bytes] = field(default_factory=dict)
    label: int | None = None
    place: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    group: str = ""


Source = tuple[list[Record], list[str]]
"""Records, and the names of the classes that labels count."""

Members = tuple[dict[str, bytes], int | None]
"""What is said of an image: further members by extension, and its class."""

Described = tuple[Sequence[Members], list[str]]
"""That of all images, and the names of the classes."""

Cells = list[tuple[int, str]]
"""(row, value) of a column."""


def class_names(names: set[str]) -> list[str]:
    """In their order; numbers by their values."""
    numeric = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name) if numeric else (0, name))


def _one_class(path: Path, cells: Cells) -> Described:
    for row, value in cells:
        if not value:
            raise UserError(f"{path}: row {row}: label is empty")
    classes = class_names({value for _, value in cells})
    return [classified(classes.index(value)) for _, value in cells], classes


def _many_classes(path: Path, cells: Cells) -> Described:
    each = [[name.strip() for name in value.split(";") if name.strip()] for _, value in cells]
    for (row, value), names in zip(cells, each, strict=True):
        try:
            check_named_once(value, names)
        except ValueError as error:
            raise UserError(f"{path}: row {row}: {error}") from None
    classes = class_names({name for names in each for name in names})
    if not classes:
        raise UserError(f"{path}: the column labels is empty in every row: no class is named")
    labels = [sorted(classes.index(name) for name in names) for names in each]
    return [several(found) for found in labels], classes


def _numbers(path: Path, cells: Cells) -> Described:
    described, count = [], 0
    for row, value in cells:
        try:
            numbers = [float(part) for part in value.split(";")]
            if not all(map(math.isfinite, numbers)):
                raise ValueError(value)
        except ValueError:
            raise UserError(
                f"{path}: row {row}: target is '{value}', allowed are finite numbers between ';'"
            ) from None
        count = count or len(numbers)
        if len(numbers) != count:
            raise UserError(
                f"{path}: row {row}: target has {len(numbers)} number(s), the first row {count}"
            )
        described.append(({"json": json.dumps({"target": numbers}).encode()}, None))
    return described, []


COLUMNS: dict[str, Callable[[Path, Cells], Described]] = {
    "label": _one_class,
    "labels": _many_classes,
    "target": _numbers,
}
"""Columns that say something of an image, and how they are read."""


def answer_of(columns: Iterable[str], table: object) -> str | None:
    """Which of COLUMNS a table has. Raises UserError for several: which is learnt, nobody said."""
    found = [name for name in COLUMNS if name in columns]
    if len(found) > 1:
        raise UserError(
            f"{table}: has the columns {' and '.join(found)}, allowed is one of them: leave what "
            "is not learnt out, or give it another name"
        )
    return found[0] if found else None


def classified(label: int) -> Members:
    """What is said of an image of a class."""
    return {"cls": str(label).encode()}, label


def several(labels: Sequence[int]) -> Members:
    """What is said of an image of any number of classes."""
    return {"json": json.dumps({"labels": list(labels)}).encode()}, None


def check_once(
    source: object, named: Iterable[tuple[str, os.PathLike[str], Sequence[float] | None]]
) -> None:
    """Raises UserError for a sample that is there twice: it could be learnt from and held out.

    named: (where it is named, such as a row, its file, and which span of it, None for all).
    """
    seen: dict[tuple[str, Sequence[float]], str] = {}
    for place, file, span in named:
        first = seen.setdefault((os.path.realpath(file), tuple(span or ())), place)
        if first != place:
            part = f" from {span[0]:g} to {span[1]:g} seconds" if span else ""
            raise UserError(
                f"{source}: {first} and {place} both name {shown(os.path.realpath(file))}{part}; "
                "allowed is once"
            )


def new_key(inner: Path, taken: set[str]) -> str:
    """A key from a path that no other has, without a dot: shards end it at the first."""
    base = shown(inner.as_posix()).replace("/", "-").replace(".", "_")
    key, number = base, 1
    while key in taken:
        key, number = f"{base}-{number}", number + 1
    taken.add(key)
    return key
