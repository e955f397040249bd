"""Files that are there whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dr2dist.errors import UserError


def check_new(path: Path, overwrite: bool = False) -> None:
    """Raises UserError for a file that is there and may not be overwritten."""
    if path.exists() and (path.is_dir() or not overwrite):
        more = "is a folder" if path.is_dir() else "exists already, --overwrite replaces it"
        raise UserError(f"{path}: {more}; or name another file")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which becomes it at the end; folders are made.

    An exception leaves neither.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    try:
        yield aside
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    aside.replace(path)


def sha256(path: Path) -> str:
    """The checksum of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
