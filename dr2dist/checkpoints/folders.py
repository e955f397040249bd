"""The folder of a run's checkpoints: which folders in it are some, and what else lies there."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "checkpoint.json"

ASIDE, BEFORE, OLD = ".tmp", ".before.tmp", ".old.tmp"
"""Ends of names: of a checkpoint that is being written, of one that another one of the same step
is about to replace, and of one that is being deleted."""

_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(f"(?:{_NAME.pattern})(?:{'|'.join(map(re.escape, (ASIDE, BEFORE, OLD)))})")


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` applied steps lies in a run's folder."""
    return run / "checkpoints" / f"step-{step:08d}"


def written(run: Path) -> list[Path]:
    """The checkpoints that a run has written, oldest first, whatever has become of them since.

    Copies and links that a person has put beside them under names of their own are none.
    """
    found = {path: _NAME.fullmatch(path.name) for path in _entries(run)}
    steps = {path: int(name[1]) for path, name in found.items() if name and not path.is_symlink()}
    return sorted(steps, key=lambda path: steps[path])


def checkpoints(run: Path) -> list[Path]:
    """Those that are complete, at first sight, oldest first."""
    return [path for path in written(run) if (path / MANIFEST).exists()]


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint, so that none takes it for one; where it is now."""
    endings = itertools.chain([""], (f"-{count}" for count in itertools.count(2)))
    places = (folder.with_name(f"{folder.name}.damaged{ending}") for ending in endings)
    return folder.rename(next(place for place in places if not place.exists()))


def put_back(run: Path) -> None:
    """Gives checkpoints their names again that another one of the same step was about to replace
    when the run was killed."""
    for path in _entries(run):
        whole = path.with_name(path.name.removesuffix(BEFORE))
        if whole != path and _NAME.fullmatch(whole.name) and not whole.exists():
            path.rename(whole)


def clear_unfinished(run: Path) -> None:
    """Deletes what a run that was killed has left of checkpoints; only who has the run's lock may
    call it."""
    for path in _entries(run):
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def delete_old(run: Path) -> None:
    """Deletes those that are named so."""
    for path in _entries(run):
        if _UNFINISHED.fullmatch(path.name) and path.name.endswith(OLD):
            shutil.rmtree(path, ignore_errors=True)


def _entries(run: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        yield from sorted((run / "checkpoints").iterdir())
