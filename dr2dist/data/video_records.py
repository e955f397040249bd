"""Records of films: folders of frames as one film, and spans of films that a table names."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dr2dist.data.broken import BrokenError
from dr2dist.data.film import FILM_TYPES, Footage
from dr2dist.data.frames import FrameFolder, at_rate
from dr2dist.data.images import is_image
from dr2dist.data.records import Record, new_key
from dr2dist.data.tables import Row
from dr2dist.errors import UserError

log = logging.getLogger(__name__)

COLUMNS = ("start", "stop")
"""Of a table, in seconds of a film's own time."""
OF_FRAMES = "zip"
"""The extension of a folder of frames in a shard."""


def frames_joined(records: Sequence[Record]) -> list[Record]:
    """The records, of which images in one folder are one film."""
    folders: dict[Path, list[tuple[Path, Record]]] = {}
    films = []
    for record in records:
        ((extension, file),) = record.files.items()
        if extension in FILM_TYPES:
            films.append(record)
        else:
            folders.setdefault(Path(file).parent, []).append((Path(file), record))
    taken = {record.key for record in films}
    return films + [_joined(folder, found, taken) for folder, found in folders.items()]


def _joined(folder: Path, found: list[tuple[Path, Record]], taken: set[str]) -> Record:
    first, place = found[0][1], Path(found[0][1].place).parent
    files = {OF_FRAMES: FrameFolder(folder, tuple(file for file, _ in found))}
    return replace(first, key=new_key(place, taken), files=files, place=place.as_posix())


def frames_in(folder: Path) -> tuple[Path, ...]:
    """The images of a folder, which are a film's frames; none of what is no folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ()
    return tuple(folder / name for name in names if not name.startswith(".") and is_image(name))


def with_frame_rate(records: Sequence[Record], rate: float) -> list[Record]:
    """The records, whose folders of frames are `rate` frames a second; see `at_rate`."""
    files = iter(at_rate([file for record in records for file in record.files.values()], rate))
    return [
        replace(record, files={name: next(files) for name in record.files}) for record in records
    ]


def with_spans(
    path: Path, rows: Sequence[Row], columns: Sequence[str], records: Sequence[Record]
) -> list[Record]:
    """The records of a table's rows, with the spans that it says, if it says any.

    A row's sample holds its whole film; those of one film are a group. Raises UserError for the
    first row whose span is none, or whose file is no film.
    """
    for name in columns:
        if name not in COLUMNS and name.lower() in COLUMNS:
            raise UserError(f"{path}: has the column '{name}'; allowed is '{name.lower()}'")
    there = [name for name in COLUMNS if name in columns]
    if not there:
        return list(records)
    if len(there) == 1:
        (other,) = set(COLUMNS) - set(there)
        raise UserError(f"{path}: has the column '{there[0]}' and no column '{other}'")
    found = [_with_span(path, row, each) for row, each in zip(rows, records, strict=True)]
    films = [os.path.realpath(file) for record in found for file in record.files.values()]
    if len(set(films)) < len(found):
        log.warning(
            "%s: %d spans are of %d films, and each is a sample with its whole film: cut long "
            "films first where shards grow too large",
            path,
            len(found),
            len(set(films)),
        )
        return [replace(record, group=film) for record, film in zip(found, films, strict=True)]
    return found


def span_of(record: Record) -> list[float] | None:
    """[start, stop] in seconds, where a table's row says it."""
    span: list[float] | None = _said(record).get("span")
    return span


def late_actions(record: Record, film: Footage) -> int:
    """How many of a film's annotations begin after its end."""
    annotations = _said(record).get("annotations", ())
    return sum(each["segment"][0] >= film.seconds for each in annotations)


def check_span(span: Sequence[float], film: Footage) -> None:
    """Raises BrokenError for one that begins after its film's end."""
    if span[0] >= film.seconds:
        raise BrokenError(f"span is {list(span)}, the film ends at {film.seconds:.3f} seconds")


def _said(record: Record) -> dict[str, Any]:
    """What its JSON member says."""
    said: dict[str, Any] = json.loads(record.members.get("json", b"{}"))
    return said


def _with_span(path: Path, row: Row, record: Record) -> Record:
    values = [row.values[name].strip() for name in COLUMNS]
    if not any(values):  # a member as its neighbours have, for all samples of a shard are alike
        return replace(record, members={"json": b"{}", **record.members})
    try:
        start, stop = map(float, values)
    except ValueError:
        start = stop = 0.0
    if not 0 <= start < stop < float("inf"):
        raise UserError(
            f"{path}: row {row.number}: start is '{values[0]}' and stop '{values[1]}'; allowed is "
            "0 <= start < stop in seconds, or nothing in both"
        )
    if not any(name in FILM_TYPES or name == OF_FRAMES for name in record.files):
        raise UserError(f"{path}: row {row.number}: start and stop are of films, this is none")
    said = {**_said(record), "span": [start, stop]}
    return replace(record, members={**record.members, "json": json.dumps(said).encode()})
