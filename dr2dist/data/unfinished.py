"""A folder that is there whole or not at all, and whose making goes on where it broke off."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dr2dist.errors import UserError
from dr2dist.files import check_can_be_made

log = logging.getLogger(__name__)

PLAN = ".plan"
"""Says what is being made, and is locked by who makes it."""


def check_output(output: Path) -> None:
    """Raises UserError for a folder that could not be made, before the work that it is for.

    output: absolute; an empty folder is replaced.
    """
    if output.is_symlink():
        raise UserError(f"{output}: is a link; name the folder itself")
    if output.is_dir() and os.path.ismount(output):
        raise UserError(f"{output}: is where a file system is mounted; name a folder inside")
    if output == Path.cwd() or output in Path.cwd().parents:
        raise UserError(f"{output}: is the present folder or above it; name a folder inside")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists already and is not empty")
    check_can_be_made(output.parent)


@contextmanager
def unfinished(output: Path, digest: str) -> Iterator[Path]:
    """A folder OUTPUT.part that becomes the output at the end.

    What is in it when the work breaks off stays, and is there again when the same is made; what
    another digest has begun is deleted. Raises UserError if another process is at work there.
    """
    folder = output.with_name(f"{output.name}.part")
    _begin(folder, digest)
    with (folder / PLAN).open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{output}: another process is making it") from None
        try:
            yield folder
        except BaseException:
            if any(folder.rglob("*.tar")):
                log.warning("%s: what is made so far; the same command goes on there", folder)
            else:
                shutil.rmtree(folder)
            raise
        (folder / PLAN).unlink()
        if output.exists():
            output.rmdir()
        folder.rename(output)


def _begin(folder: Path, digest: str) -> None:
    plan = folder / PLAN
    if folder.exists() and not plan.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is in the way: it holds something else; move it")
    if plan.exists() and plan.read_text("utf-8") != digest:
        with plan.open("r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{folder}: another process is making another one there") from None
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not plan.exists():
        plan.write_text(digest, "utf-8")
