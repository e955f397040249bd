"""Long films and what happens in them, as ActivityNet, THUMOS and others say it in JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dr2dist.data.film import FILM_TYPES
from dr2dist.data.frames import FrameFolder
from dr2dist.data.images import IMAGE_TYPES
from dr2dist.data.listing import left_out, list_files, shown
from dr2dist.data.records import Readable, Record, Source, check_once, class_names, new_key
from dr2dist.data.video_records import OF_FRAMES, frames_in
from dr2dist.errors import UserError, one_line

log = logging.getLogger(__name__)

PREFIX = "v_"
"""Before a film's name in ActivityNet's files."""


def annotated_films(path: Path) -> Source:
    """{"database": {NAME: {"subset": ..., "annotations": [{"label": ..., "segment": [start, stop]},
    ...]}}}, with films NAME.mp4 (or v_NAME.mp4), or folders NAME of their frames, under the file's
    folder.

    A subset can be split by: --split-by subset. Films that are not there are left out, and said.
    Raises UserError for a file that is no such JSON, and where no film is there.
    """
    entries = _entries(path)
    films = _films(path.parent)
    missing = [name for name in entries if _named(name, films) is None]
    for line in left_out({f"named by {shown(path)}, without a film": missing}) if missing else ():
        log.warning("%s", line)
    if len(missing) == len(entries):
        raise UserError(
            f"{path}: none of its {len(entries)} films is under {shown(path.parent)}; allowed are "
            f"files NAME.{FILM_TYPES[4]} and the like, and folders NAME of frames"
        )
    there = {name: value for name, value in entries.items() if name not in missing}
    actions = {name: _annotations(path, name, value) for name, value in there.items()}
    labels = class_names({each["label"] for found in actions.values() for each in found})
    files = {name: _named(name, films) for name in there}
    check_once(path, ((name, file, None) for name, file in files.items()))
    taken: set[str] = set()
    records = []
    for name, value in there.items():
        file = files[name]
        extension = OF_FRAMES if isinstance(file, FrameFolder) else Path(file).suffix.lower()[1:]
        said = json.dumps({"annotations": actions[name]}).encode()
        columns = {"subset": str(value.get("subset", ""))}
        place = Path(file).relative_to(path.parent).as_posix()
        key = new_key(Path(name), taken)
        record = Record(key, {extension: file}, {"json": said}, None, place, columns)
        records.append(record)
    return records, labels


def _entries(path: Path) -> dict[str, Mapping[str, Any]]:
    try:
        whole = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
    found = whole.get("database") if isinstance(whole, dict) else None
    if not isinstance(found, dict) or not found:
        raise UserError(f'{path}: has no "database" of films; ActivityNet\'s layout is allowed')
    for name, value in found.items():
        if not isinstance(value, dict):
            raise UserError(f"{path}: {name}: is {value!r:.40}, allowed is an object")
    return found


def _films(folder: Path) -> dict[str, list[Readable]]:
    """Films under a folder by their names."""
    found: dict[str, list[Readable]] = {}
    folders: dict[Path, None] = {}
    for file in list_files(folder).files:
        ending = file.suffix.lower()[1:]
        if ending in FILM_TYPES:
            found.setdefault(file.stem, []).append(file)
        elif ending in IMAGE_TYPES:
            folders[file.parent] = None
    for own in folders:
        found.setdefault(own.name, []).append(FrameFolder(own, frames_in(own)))
    return found


def _named(name: str, films: Mapping[str, list[Readable]]) -> Any:
    """The film of a name; None if there is none. Raises UserError for several."""
    found = films.get(name) or films.get(PREFIX + name) or []
    if len(found) > 1:
        raise UserError(f"{name}: is the name of {' and '.join(map(shown, found))}")
    return found[0] if found else None


def _annotations(path: Path, name: str, value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """label, a text, and segment. Raises UserError for another."""
    found = []
    for each in value.get("annotations") or ():
        try:
            start, stop = map(float, each["segment"])
            label = str(each["label"]).strip()
        except (KeyError, TypeError, ValueError):
            start, stop, label = 1.0, 0.0, ""
        if not label or not 0 <= start <= stop < float("inf"):
            raise UserError(
                f"{path}: {name}: has the annotation {each!r:.80}; allowed is "
                '{"label": ..., "segment": [start, stop]} with 0 <= start <= stop, in seconds'
            )
        found.append({"label": label, "segment": [start, stop]})
    return found
