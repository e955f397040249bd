"""The shards that a person names: folders, patterns and URLs."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from dr2dist.data.listing import left_out, shown
from dr2dist.data.remote import RemoteReader, is_remote, listed, size_of
from dr2dist.errors import UserError

log = logging.getLogger(__name__)


def find_shards(sources: Sequence[str]) -> list[str]:
    """The shards that sources name, in order: folders, brace patterns, globs, `::` between several;
    each may be a URL.

    Raises UserError for what is not there, is no .tar file, or is named twice.
    """
    found: dict[str, str] = {}
    for source in (part for text in sources for part in text.split("::") if part):
        for shard in _of_source(os.path.expanduser(source)):
            same = shard if is_remote(shard) else os.path.realpath(shard)
            if same in found:
                raise UserError(f"{shown(shard)}: is named twice")
            found[same] = shard
    if not found:
        raise UserError(f"{' '.join(sources) or 'no source'}: names no shards")
    return list(found.values())


def open_shard(where: str) -> Any:
    """To read from its beginning. Raises OSError or UserError."""
    return RemoteReader(where) if is_remote(where) else Path(where).open("rb")


def shard_size(where: str) -> int:
    """Bytes of a shard, 0 where its server does not say."""
    return (size_of(where) or 0) if is_remote(where) else os.path.getsize(where)


def _of_source(source: str) -> list[str]:
    try:
        names = list(braceexpand(source))
    except ValueError:
        raise UserError(f"{source}: its braces are not balanced") from None
    return [shard for name in names for shard in _of_name(name)]


def _of_name(name: str) -> list[str]:
    """Of a folder, a glob or a file."""
    single = is_tar(name) and not glob.has_magic(name)
    if is_remote(name):
        return [name] if single else _tars(listed(name), name)
    if os.path.isdir(name):
        return _tars(sorted(os.path.join(name, each) for each in os.listdir(name)), name)
    if glob.has_magic(name):
        matches = sorted(glob.glob(name))
        if not matches:
            raise UserError(f"{name}: matches no file")
        for match in matches:
            _check(match)
        return matches
    if not os.path.lexists(name):
        raise UserError(f"{shown(name)}: is not there")
    _check(name)
    return [name]


def _tars(names: Sequence[str], source: str) -> list[str]:
    """The .tar files among those of a folder. What else may hold samples is named."""
    found: list[str] = []
    left: dict[str, list[Path | str]] = {}
    for name in names:
        if reason := _left(name):
            left.setdefault(reason, []).append(name)
        elif is_tar(name):
            _check(name)
            found.append(name)
    for line in left_out(left):
        log.warning("%s", line)
    if not found:
        raise UserError(f"{source}: holds no .tar files")
    return found


def _left(name: str) -> str | None:
    """Why something of a folder that may hold samples is left out."""
    if os.path.basename(name).startswith("."):
        return "hidden" if is_tar(name) else None
    if _is_compressed(name):
        return "compressed (unpack them)"
    inner = (file for _, _, files in os.walk(name) for file in files)
    own = not is_tar(name) and any(map(is_tar, inner))
    return "in a folder of their own (name it)" if own else None


def is_tar(name: str) -> bool:
    """Whether a file is a shard by its name."""
    return name.lower().endswith(".tar")


def _is_compressed(name: str) -> bool:
    return name.lower().endswith((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def _check(name: str) -> None:
    if not is_tar(name):
        reason = "is compressed: unpack it" if _is_compressed(name) else "is no .tar file"
        raise UserError(f"{shown(name)}: {reason}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{shown(name)}: its name is not UTF-8: rename it") from None
    if not is_remote(name) and not os.path.isfile(name):
        there = "is no file" if os.path.exists(name) else "is a link that leads nowhere"
        raise UserError(f"{shown(name)}: {there}")
