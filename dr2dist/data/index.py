"""The index of a folder of shards: what fixes the order of samples and lets any one be read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from braceexpand import braceexpand
from pydantic import BaseModel, ConfigDict, ValidationError

from dr2dist.errors import UserError, nearest

INDEX_NAME = "index.json"


class Sample(NamedTuple):
    """Where a sample's image lies in its shard: byte offset and size, and what it shows."""

    key: str
    extension: str
    offset: int
    size: int
    label: int


class Shard(BaseModel):
    """A tar file of the folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    bytes: int
    sha256: str
    samples: tuple[Sample, ...]


class Index(BaseModel):
    """All shards of a folder.

    streams: virtual streams that the order is dealt over, fixed when the shards are made, so
    that the order does not depend on ranks or workers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    classes: tuple[str, ...]
    streams: int
    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(len(shard.samples) for shard in self.shards)


def read_index(pattern: str | Path) -> tuple[Path, Index]:
    """(folder, index) for a folder of shards or a brace pattern that names some of them.

    Raises UserError if there is no valid index or a named shard is not in it.
    """
    text = str(pattern)
    folder = Path(text).parent if "{" in text or text.endswith(".tar") else Path(text)
    try:
        index = Index.model_validate_json((folder / INDEX_NAME).read_text())
    except OSError:
        raise UserError(
            f"{text}: no {INDEX_NAME} in {folder}; make shards with 'dr2dist shards make'"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{folder / INDEX_NAME}: {place}: {first['msg']}") from None
    if folder == Path(text):
        return folder, index
    return folder, _only(index, [Path(name).name for name in braceexpand(text)], folder)


def _only(index: Index, names: list[str], folder: Path) -> Index:
    known = {shard.name: shard for shard in index.shards}
    for name in names:
        if name not in known:
            raise UserError(f"{folder}: {name} is not in {INDEX_NAME}{nearest(name, known)}")
    return index.model_copy(update={"shards": tuple(known[name] for name in names)})
