"""A folder that is there whole or not at all, and whose making goes on where it broke off."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from dr2dist.errors import UserError
from dr2dist.files import check_can_be_made, writing
from dr2dist.locks import is_still, take

log = logging.getLogger(__name__)

PLAN = ".plan"
"""Says what is being made, and is locked by who makes it."""


def check_output(output: Path) -> Path:
    """The folder as an absolute path; an empty one is replaced. Raises UserError for one that could
    not be made, before the work that it is for."""
    output = Path(os.path.abspath(output))
    if output.is_symlink():
        raise UserError(f"{output}: is a link; name the folder itself")
    if output.is_dir() and os.path.ismount(output):
        raise UserError(f"{output}: is where a file system is mounted; name a folder inside")
    if output == Path.cwd() or output in Path.cwd().parents:
        raise UserError(f"{output}: is the present folder or above it; name a folder inside")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists already and is not empty")
    check_can_be_made(output.parent)
    return output


@contextmanager
def unfinished(output: Path, digest: str) -> Iterator[Path]:
    """A folder OUTPUT.part that becomes the output at the end.

    What is in it when the work breaks off stays, and is there again when the same is made; what
    another digest has begun is deleted. Raises UserError if another process is at work there, or
    the folder cannot be made.
    """
    folder = output.with_name(f"{output.name}.part")
    with _locked(folder) as plan:
        try:
            with writing(folder):
                plan.seek(0)
                if plan.read() != digest:
                    _empty(folder)
                    plan.truncate(0)
                    plan.write(digest)
                    plan.flush()
                yield folder
        except BaseException:
            if any(folder.rglob("*.tar")):
                log.warning("%s: what is made so far; the same command goes on there", folder)
            else:
                shutil.rmtree(folder)
            raise
        try:
            if output.exists():
                output.rmdir()
            folder.rename(output)
        except OSError as error:
            raise UserError(f"{output}: {error.strerror}; what is made is {folder}") from None
        (output / PLAN).unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[TextIO]:
    """The plan of a folder, which no other process has. The folder is made."""
    path = folder / PLAN
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists() and any(folder.iterdir()):
                raise UserError(f"{folder}: is in the way: it holds something else; move it")
            plan = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
        try:
            try:
                if not take(plan):
                    raise UserError(f"{folder}: another process is at work there")
            except OSError as error:
                raise UserError(f"{path}: cannot be locked: {error.strerror}") from None
            if is_still(plan, path):
                yield plan
                return
        finally:
            with suppress(OSError):  # what could not be written has been told
                plan.close()


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != PLAN:
            entry.unlink()
