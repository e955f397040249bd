"""Files that are there whole or not at all, what JSON can say in them, and their checksums."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dr2dist.errors import UserError, one_line


def check_new(path: Path, overwrite: bool = False) -> None:
    """Raises UserError for a file that is there and may not be overwritten."""
    if path.exists() and (path.is_dir() or not overwrite):
        more = "is a folder" if path.is_dir() else "exists already, --overwrite replaces it"
        raise UserError(f"{path}: {more}; or name another file")
    check_can_be_made(path.parent)


def check_can_be_made(path: Path, what: str = "") -> None:
    """Raises UserError if no file or folder could be made there. Leaves nothing behind.

    what: the setting that names it, such as "output: ".
    """
    try:
        parent = next(each for each in (path, *path.absolute().parents) if each.exists())
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        how = "written to" if path.is_dir() else "made"
        raise UserError(f"{what}{path} cannot be {how}: {error.strerror}") from None


def check_file_output(path: Path) -> None:
    """Raises UserError for a file that could not be written, before the work that it is for."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    check_can_be_made(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes there: where it cannot, as on a full disk, a UserError says so."""
    try:
        yield
    except OSError as error:
        other = error.filename is not None and not str(error.filename).startswith(str(path))
        more = f" ({error.filename})" if other else ""
        raise UserError(f"{path}: cannot be written: {error.strerror or error}{more}") from None
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written: {one_line(error)}") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which becomes it at the end; folders are made.

    An exception leaves neither. Who may read it is as for any new file, which a library's own
    writer may make private. Raises UserError for what cannot be written.
    """
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.unlink(missing_ok=True)
            aside.touch()
            mode = aside.stat().st_mode
            yield aside
            if aside.stat().st_mode != mode:
                aside.chmod(stat.S_IMODE(mode))
            aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def as_json(value: Any) -> Any:
    """Plain values as JSON has them: null in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {name: as_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256(path: Path) -> str:
    """The checksum of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time has a file, which is made, with folders; others wait. Who has it may
    delete it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with writing(path):
            file = path.open("a+b")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:  # who had it may have renamed or deleted it
                same = path.stat().st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                same = False
            if same:
                try:
                    yield
                finally:  # closing does not do: a process that was forked has the file too
                    fcntl.flock(file, fcntl.LOCK_UN)
                return
