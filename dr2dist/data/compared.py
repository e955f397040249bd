"""Whether shards are still those that their index was made of, at little cost."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

from dr2dist.data.index import INDEX_NAME, Sample, Shard, read_index
from dr2dist.errors import UserError

LOOKED_AT = 16
"""Samples of a shard whose headers are read at most."""


def compare_with_index(pattern: str | Path) -> None:
    """Raises UserError for a shard that is missing, has another size, or other samples.

    Of each shard the size is asked for, and the headers of some samples are read where the index
    says that they lie; `verify_shards` reads all of it.
    """
    folder, index = read_index(pattern)
    missing = [shard.name for shard in index.shards if not (folder / shard.name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more of {len(index.shards)}" if len(missing) > 1 else ""
        raise UserError(f"{folder}: {missing[0]}{more} is missing, which {INDEX_NAME} names")
    for shard in index.shards:
        _compare(folder / shard.name, shard)


def _compare(path: Path, shard: Shard) -> None:
    size = path.stat().st_size
    if size != shard.bytes:
        raise UserError(f"{path}: has {size} bytes, {INDEX_NAME} says {shard.bytes}")
    step = max(1, len(shard.samples) // LOOKED_AT)
    for sample in shard.samples[::step]:
        name, offset = _first_member(sample)
        found = _name_at(path, offset - tarfile.BLOCKSIZE)
        if found is not None and found != name:
            raise UserError(
                f"{path}: holds {found} where {INDEX_NAME} says {name}: it is a shard of another "
                "making; 'dr2dist shards verify' tells more"
            )


def _first_member(sample: Sample) -> tuple[str, int]:
    extension, (offset, _) = next(iter(sample.members.items()))
    return f"{sample.key}.{extension}", offset


def _name_at(path: Path, offset: int) -> str | None:
    """The name in a header; None for one that is not whole in it: a long one, or not ASCII."""
    with path.open("rb") as file:
        file.seek(offset)
        header = file.read(tarfile.BLOCKSIZE)
    try:
        name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    except tarfile.HeaderError:
        return "no file"
    whole = len(name) < tarfile.LENGTH_NAME and name.isascii() and "?" not in name
    return name if whole else None


def compare_all(patterns: Sequence[str | None]) -> None:
    """`compare_with_index` for each that is not None."""
    for pattern in patterns:
        if pattern is not None:
            compare_with_index(os.fspath(pattern))
