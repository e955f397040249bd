"""Whether shards are still those that their index was made of, at little cost."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import NamedTuple

from dr2dist.data.index import INDEX_NAME, Index, Shard, folder_of
from dr2dist.errors import UserError, one_line

LOOKED_AT = 16
"""Samples of a shard whose headers are read at most."""


def compare_with_index(pattern: str | Path, index: Index) -> None:
    """Raises UserError for a shard that is missing, has another size, or other samples.

    Of each shard the size is asked for, and the headers of some samples are read where the index
    says that they lie; `verify_shards` reads all of it.
    """
    folder = folder_of(pattern)
    missing = [shard.name for shard in index.shards if not (folder / shard.name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more of {len(index.shards)}" if len(missing) > 1 else ""
        raise UserError(f"{folder}: {missing[0]}{more} is missing, which {INDEX_NAME} names")
    for shard in index.shards:
        try:
            _compare(folder / shard.name, shard)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / shard.name}: cannot be read: {one_line(error)}") from None


def _compare(path: Path, shard: Shard) -> None:
    size = path.stat().st_size
    if size != shard.bytes:
        raise UserError(f"{path}: has {size} bytes, {INDEX_NAME} says {shard.bytes}")
    step = max(1, -(-len(shard.samples) // LOOKED_AT))
    for sample in shard.samples[::step]:
        extension, (offset, length) = next(iter(sample.members.items()))
        name, found = f"{sample.key}.{extension}", _header_at(path, offset - tarfile.BLOCKSIZE)
        if (found.name, found.length) not in ((name, length), (None, length)):
            raise UserError(
                f"{path}: holds {found.name or 'another file'} of {found.length} bytes where "
                f"{INDEX_NAME} says {name} of {length}: it is a shard of another making; 'dr2dist "
                "shards verify' tells more"
            )


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
