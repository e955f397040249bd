"""The files under a folder: which are taken, and which are left out, for what reason."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dr2dist.errors import UserError

log = logging.getLogger(__name__)

Why = Callable[[Path], str | None]
"""Why a file is left out, None for one that is taken."""
CIRCLE = "links that lead in a circle"
NAMED = 8
"""Paths that a message names for each reason at most."""


class Listing(NamedTuple):
    """files: in the order of their names. left: paths by the reason for which they are left out."""

    files: list[Path]
    left: dict[str, list[Path]]

    def tell(self) -> None:
        """Says what is left out, a line for each reason, with how many and which."""
        for line in left_out(self.left):
            log.warning("%s", line)


def left_out(by_reason: Mapping[str, Sequence[Path | str]]) -> list[str]:
    """What is left out, a line for each reason, with how many and which."""
    lines = []
    for reason, names in by_reason.items():
        named = ", ".join(shown(name) for name in names[:NAMED])
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        lines.append(f"left out, {reason}: {len(names)}: {named}{more}")
    return lines


def shown(path: os.PathLike[str] | str) -> str:
    """A path as any terminal can show it: bytes that are no UTF-8 and line breaks are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def list_files(folder: Path, why: Why = lambda path: None) -> Listing:
    """All files under a folder and under the folders that links lead to.

    Left out are hidden files and folders (their names begin with a dot), links that lead nowhere or
    in a circle, folders that may not be read, and files for which `why` gives a reason. Raises
    UserError for a folder that cannot be read.
    """
    left: dict[str, list[Path]] = {}
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise UserError(f"{shown(folder)}: cannot be read: {error.strerror}") from None
    files = []
    for path in _walk(folder, (), left):
        reason = why(path)
        if reason is None:
            files.append(path)
        else:
            left.setdefault(reason, []).append(path)
    return Listing(sorted(files), left)


def _walk(
    folder: Path, above: tuple[tuple[int, int], ...], left: dict[str, list[Path]]
) -> Iterator[Path]:
    """above: the folders that lead here, by device and number."""
    try:
        info = folder.stat()
        names = sorted(os.listdir(folder))
    except OSError:
        left.setdefault("folders that may not be read", []).append(folder)
        return
    here = (info.st_dev, info.st_ino)
    if here in above:
        left.setdefault(CIRCLE, []).append(folder)
        return
    for name in names:
        path = folder / name
        reason = _unusable(path)
        if reason is not None:
            left.setdefault(reason, []).append(path)
        elif path.is_dir():
            yield from _walk(path, (*above, here), left)
        else:
            yield path


def _unusable(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "links that lead nowhere"
    except OSError as error:
        return CIRCLE if error.errno == errno.ELOOP else "may not be read"
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        return "neither files nor folders"
    return None
