"""The index of shards: what fixes the order of samples and lets any one be read."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dr2dist.data.cache import Wanted
from dr2dist.data.found import is_tar, open_shard
from dr2dist.data.members import Sample, ShardMembers, load_members
from dr2dist.data.remote import is_remote, read_all
from dr2dist.data.usable import usable
from dr2dist.errors import UserError, nearest
from dr2dist.files import atomic_write

INDEX_NAME = "index.json"
FORMAT: Literal[3] = 3
"""Of what is written; 1 and 2 are read."""
STREAMS_BEFORE = 64
"""Virtual streams of the order before format 3, see `dealt`."""

Count = Annotated[int, Field(ge=0)]


class Shard(NamedTuple):
    """A tar file. number: in the index's file. name: relative to the index, or absolute. samples:
    how many. bytes, sha256: None where they are not known. extensions: of its first sample."""

    number: int
    name: str
    samples: int
    bytes: int | None
    sha256: str | None
    extensions: tuple[str, ...]


@dataclass(frozen=True)
class Index:
    """Shards in order, and the classes of their samples.

    base: the folder or URL that names are relative to. stem: of the index's file. classes: names by
    label, none where samples have no classes. needs, label: see `usable`. unique_keys: whether no
    two shards have a key in common. streams: of the order before format 3. counts: see
    `pack_counts`. given: where samples lie, as an index before format 3 says it.
    """

    base: str
    stem: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    needs: tuple[str, ...] = ()
    label: str | None = None
    unique_keys: bool = True
    streams: int = STREAMS_BEFORE
    counts: str | None = field(default=None, repr=False)
    given: tuple[ShardMembers, ...] | None = field(default=None, repr=False)

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    def bytes_of(self, samples: int) -> float:
        """Of so many samples, as shards are on average."""
        return sum(shard.bytes or 0 for shard in self.shards) * samples / self.num_samples

    @property
    def sources(self) -> tuple[Index, ...]:
        """Those that are joined here: this one alone."""
        return (self,)

    def fields_of(self, shard: Shard) -> dict[str, str]:
        """Where fields of a shard's samples are, of those that an index knows."""
        return {} if self.label is None else {"label": self.label}

    def where(self, shard: Shard) -> str:
        """A shard's path or URL."""
        if is_remote(shard.name):
            return shard.name
        if is_remote(self.base):
            return f"{self.base}/{shard.name}"
        return os.path.join(self.base, shard.name)

    def path(self, shard: Shard) -> Path:
        """Where a shard lies that is here."""
        return Path(self.where(shard))

    def is_remote(self, shard: Shard) -> bool:
        """Whether it must be fetched."""
        return is_remote(self.where(shard))

    def wanted(self, shard: Shard) -> Wanted:
        """What a cache must know of a shard."""
        where = self.where(shard)
        url = where if is_remote(where) else os.path.abspath(where)
        return Wanted(url, shard.bytes, shard.sha256, self.needs, self.label)

    def members(self, shard: Shard) -> ShardMembers:
        """Where a shard's samples lie: as the index says it, or else as its headers do.

        Raises UserError for a shard that does not hold as many as the index says, OSError or
        ValueError for one that cannot be read.
        """
        if self.given is not None:
            return self.given[shard.number]
        try:
            path = sidecar(Path(self.base, f"{self.stem}.json"), shard.number)
            found, facts = load_members(path)
            if facts["sha256"] != shard.sha256:
                raise FileNotFoundError(path)  # of another making
        except FileNotFoundError:
            here = not self.is_remote(shard)
            with open_shard(self.where(shard)) as file:
                found = ShardMembers.of(usable(file, self.needs, self.label, here)[0].samples)
        return self.checked(shard, found)

    def checked(self, shard: Shard, found: ShardMembers) -> ShardMembers:
        """What a shard holds. Raises UserError for another number of samples than is said here."""
        if len(found) != shard.samples:
            raise UserError(
                f"{self.where(shard)}: holds {len(found)} samples, {self.stem}.json says "
                f"{shard.samples}"
            )
        return found

    def class_counts(self) -> list[int] | None:
        """Samples of each class; None where some have no class, or nobody has counted."""
        if self.given is not None:
            return self._counted_before()
        if self.counts is None:
            return None
        numbers, labels, counts = unpack_counts(self.counts)
        own = np.isin(numbers, [shard.number for shard in self.shards])
        totals = np.bincount(labels[own], counts[own], minlength=len(self.classes)).astype(int)
        return None if totals.sum() < self.num_samples else [int(total) for total in totals]

    def _counted_before(self) -> list[int] | None:
        labels = [(self.given or ())[shard.number].labels for shard in self.shards]
        if any(each is None for each in labels):
            return None
        whole = np.concatenate([each for each in labels if each is not None])
        return [int(count) for count in np.bincount(whole, minlength=len(self.classes))]

    def fingerprint(self) -> str:
        """Of all that is said of the samples, but for where the shards lie."""
        said = [
            [source.classes, source.needs, source.label, source.streams, source.counts]
            + [(os.path.basename(shard.name), *shard[2:]) for shard in source.shards]
            for source in self.sources
        ]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def digest(self) -> str:
        """Of what the order of samples depends on: the same wherever the shards lie."""
        said = [[os.path.basename(shard.name), shard.samples] for shard in self.shards]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def sidecar(index: Path, number: int) -> Path:
    """Where it is kept how the samples of a shard lie."""
    return index.with_suffix(".members") / f"{number:06d}.safetensors"


def pack_counts(rows: Sequence[tuple[int, int, int]]) -> str:
    """(shard, label, samples) as a text."""
    table = np.array(rows, "<i4").reshape(-1, 3).T
    return base64.b64encode(zlib.compress(table.tobytes())).decode()


def unpack_counts(text: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Shards, labels and samples of them, int32 each."""
    table = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i4").reshape(3, -1)
    return table[0], table[1], table[2]


class _Columns(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: list[str]
    samples: list[Count]
    bytes: list[Count | None]
    sha256: list[str | None]
    extensions: list[str]

    @model_validator(mode="after")
    def _of_one_length(self) -> _Columns:
        lengths = {len(getattr(self, name)) for name in type(self).model_fields}
        if len(lengths) > 1:
            raise ValueError(f"columns have {', '.join(map(str, sorted(lengths)))} rows each")
        return self


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: Literal[3] = FORMAT
    classes: tuple[str, ...]
    needs: tuple[str, ...] = ()
    label: str | None = None
    unique_keys: bool = True
    class_counts: str | None = None
    shards: _Columns


class _ShardBefore(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    bytes: int
    sha256: str
    samples: tuple[tuple[Any, ...], ...]

    def all(self) -> list[Sample]:
        """Format 1 had [key, extension, offset, size, label] for an image with a class, format 2
        [key, members, label]."""
        return [
            Sample(s[0], {s[1]: (s[2], s[3])}, s[4])
            if len(s) == 5
            else Sample(s[0], {name: (int(o), int(n)) for name, (o, n) in s[1].items()}, s[2])
            for s in self.samples
        ]


class _FileBefore(BaseModel):
    """Formats 1 and 2: an object a sample."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1, 2] = 2
    classes: tuple[str, ...]
    streams: int
    shards: tuple[_ShardBefore, ...]


def write_index(
    path: Path,
    classes: Sequence[str],
    shards: Sequence[Shard],
    counts: str | None,
    needs: Sequence[str] = (),
    label: str | None = None,
    unique_keys: bool = True,
) -> None:
    """Writes an index of format 3; see Index."""
    columns = {
        name: [getattr(shard, name) for shard in shards]
        for name in ("name", "samples", "bytes", "sha256")
    }
    extensions = [" ".join(shard.extensions) for shard in shards]
    file = _File(
        classes=tuple(classes),
        needs=tuple(needs),
        label=label,
        unique_keys=unique_keys,
        class_counts=counts,
        shards=_Columns(**columns, extensions=extensions),
    )
    with atomic_write(path) as aside:
        aside.write_text(file.model_dump_json(), "utf-8")


def _place_of(text: str) -> tuple[str, str]:
    """(folder or URL, file) of the index of shards that a text names: its own file, or the one of
    their folder."""
    folder, _, name = text.rpartition("/")
    if name.endswith(".json"):
        return folder or ("/" if text.startswith("/") else "."), name
    if "{" in text or is_tar(name):
        return folder or ("/" if text.startswith("/") else "."), INDEX_NAME
    return text.rstrip("/") or text, INDEX_NAME


def read_index(pattern: str | Path) -> Index:
    """The index of a folder of shards, of a brace pattern that names some of them, or of a file;
    each may be a URL.

    Raises UserError if there is no valid index or a named shard is not in it.
    """
    text = str(pattern)
    base, name = _place_of(text)
    path = f"{base}/{name}"
    try:
        data = read_all(path) if is_remote(path) else Path(base, name).read_bytes()
        index = _parse(base, name.removesuffix(".json"), data)
    except OSError:
        raise UserError(
            f"{text}: no {name} in {base}; 'dr2dist shards make' makes shards of files, 'dr2dist "
            "shards index' an index of shards"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {place}: {first['msg']}") from None
    except UserError:
        raise
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}: is no index: {type(error).__name__} {error}") from None
    if "{" not in text and not is_tar(text):
        return index
    return _only(index, [Path(each).name for each in braceexpand(text)])


def _parse(base: str, stem: str, data: bytes) -> Index:
    values = json.loads(data)
    if not isinstance(values, dict):
        raise ValueError("holds no object")
    if values.get("format", 2) in (1, 2):
        return _of_before(base, stem, _FileBefore.model_validate(values))
    file = _File.model_validate(values)
    rows = zip(
        *(file.shards.name, file.shards.samples, file.shards.bytes, file.shards.sha256),
        file.shards.extensions,
        strict=True,
    )
    shards = tuple(Shard(k, *row[:4], tuple(row[4].split())) for k, row in enumerate(rows))
    return Index(
        base,
        stem,
        file.classes,
        shards,
        needs=file.needs,
        label=file.label,
        unique_keys=file.unique_keys,
        counts=file.class_counts,
    )


def _of_before(base: str, stem: str, file: _FileBefore) -> Index:
    samples = [shard.all() for shard in file.shards]
    shards = tuple(
        Shard(k, s.name, len(all_), s.bytes, s.sha256, tuple(all_[0].extensions if all_ else ()))
        for k, (s, all_) in enumerate(zip(file.shards, samples, strict=True))
    )
    given = tuple(ShardMembers.of(all_) for all_ in samples)
    return Index(base, stem, file.classes, shards, streams=file.streams, given=given)


def _only(index: Index, names: list[str]) -> Index:
    known = {os.path.basename(shard.name): shard for shard in index.shards}
    for name in names:
        if name not in known:
            raise UserError(
                f"{index.base}: {name} is not in {index.stem}.json{nearest(name, known)}"
            )
    return replace(index, shards=tuple(known[name] for name in names))
