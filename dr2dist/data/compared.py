"""Whether shards are still those that their index was made of, at little cost."""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dr2dist.data.fields import Fields
from dr2dist.data.index import Index, Shard
from dr2dist.data.members import ShardMembers
from dr2dist.data.scan import member_name
from dr2dist.errors import UserError, one_line

log = logging.getLogger(__name__)

LOOKED_AT = 16
"""Samples of a shard whose headers are read at most."""
LOOKED_AT_TOGETHER = 4096
"""Of all shards."""


def compare_with_index(index: Index, skip: bool = False) -> None:
    """Raises UserError for a shard that is missing, has another size, or other samples.

    skip: those that are missing are only named: their samples count as unreadable. Of each shard
    the size is asked for, and the headers of some samples are read where the index says that they
    lie; `verify_shards` reads all of it.
    """
    said = f"{index.stem}.json"
    here = [shard for shard in index.shards if not index.is_remote(shard)]
    missing = [shard for shard in here if not index.path(shard).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more of {len(index.shards)}" if len(missing) > 1 else ""
        fault = f"{index.base}: {missing[0].name}{more} is missing, which {said} names"
        if not skip:
            raise UserError(fault)
        log.warning("%s: what they hold counts as unreadable", fault)
    looked_at = max(1, min(LOOKED_AT, LOOKED_AT_TOGETHER // max(1, len(index.shards))))
    gone = {shard.number for shard in missing}
    for shard in (each for each in here if each.number not in gone):
        path = index.path(shard)
        try:
            size = path.stat().st_size
            if shard.bytes is not None and size != shard.bytes:
                raise UserError(f"{path}: has {size} bytes, {said} says {shard.bytes}")
            _compare_headers(path, index.members(shard), said, looked_at)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def check_fields(index: Index, fields: Fields, source: str) -> None:
    """Raises UserError if a shard's first sample lacks a field, or it is not clear what carries it.

    source: the shards' name.
    """
    for shard in _one_of_each(index):
        told = fields.as_told(index.fields_of(shard))
        for field in told.all if shard.extensions else ():
            if not field.optional and field.choose(shard.extensions) is None:
                found = ", ".join(f".{name}" for name in shard.extensions)
                raise UserError(
                    f"{source}: the first sample of {shard.name} has no {field.name} "
                    f"({field.text}), only {found}; data.fields says what else carries it"
                )
    check_clear(index, fields, source)


def check_clear(index: Index, fields: Fields, source: str) -> None:
    """Raises UserError if several members of a shard's first sample may carry a field, and nobody
    has said which does. source: the shards' name."""
    for shard in _one_of_each(index):
        for fault in fields.as_told(index.fields_of(shard)).unclear(shard.extensions):
            raise UserError(f"{source}: the first sample of {shard.name} has {fault}")


def _one_of_each(index: Index) -> Iterator[Shard]:
    """The first of the shards that have the same members, and labels at the same place: there may
    be ten thousands of them."""
    seen = set()
    for shard in index.shards:
        kind = (shard.extensions, *index.fields_of(shard).items())
        if kind not in seen:
            seen.add(kind)
            yield shard


def _compare_headers(path: Path, members: ShardMembers, said: str, looked_at: int) -> None:
    step = max(1, -(-len(members) // looked_at))
    for number in range(0, len(members), step):
        sample = members[number]
        extension, (offset, length) = next(iter(sample.members.items()))
        name, found = f"{sample.key}.{extension}", _header_at(path, offset - tarfile.BLOCKSIZE)
        if (_lower(found.name), found.length) not in ((name, length), (None, length)):
            raise UserError(
                f"{path}: holds {found.name or 'another file'} of {found.length} bytes where "
                f"{said} says {name} of {length}: it is a shard of another making; 'dr2dist "
                "shards verify' tells more"
            )


def _lower(name: str | None) -> str | None:
    """With its extension in small letters, as an index has it."""
    named = member_name(name) if name else None
    return ".".join(named) if named else name


class _Header(NamedTuple):
    """name: None where it is not whole in the header: a long one, or not ASCII."""

    name: str | None
    length: int


def _header_at(path: Path, offset: int) -> _Header:
    with path.open("rb") as file:
        file.seek(offset)
        header = file.read(tarfile.BLOCKSIZE)
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return _Header("no file", 0)
    name = found.name
    whole = len(name) < tarfile.LENGTH_NAME and name.isascii() and "?" not in name
    return _Header(name if whole else None, found.size)
