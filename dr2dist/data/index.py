"""The index of a folder of shards: what fixes the order of samples and lets any one be read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from braceexpand import braceexpand
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from dr2dist.errors import UserError, nearest

INDEX_NAME = "index.json"


class Sample(NamedTuple):
    """Where a sample's members lie in its shard: (byte offset, size) by extension. label: its
    class, where it has one."""

    key: str
    members: dict[str, tuple[int, int]]
    label: int | None = None

    @property
    def extensions(self) -> list[str]:
        """Of what can be read of it: an index of format 1 says its class, not where it lies."""
        said = [] if self.label is None or "cls" in self.members else ["cls"]
        return [*self.members, *said]


class Shard(BaseModel):
    """A tar file of the folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    bytes: int
    sha256: str
    samples: tuple[Sample, ...]

    @field_validator("samples", mode="before")
    @classmethod
    def _of_format_1(cls, samples: Any) -> Any:
        """Format 1 had [key, extension, offset, size, label] for an image with a class."""
        return [
            (s[0], {s[1]: (s[2], s[3])}, s[4]) if isinstance(s, list) and len(s) == 5 else s
            for s in samples
        ]


class Index(BaseModel):
    """All shards of a folder.

    classes: names by label, none where samples have no classes. streams:
    virtual streams that the order is dealt over, fixed when the shards are made, so
    that the order does not depend on ranks or workers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1, 2] = 2
    classes: tuple[str, ...]
    streams: int
    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(len(shard.samples) for shard in self.shards)

    def class_counts(self) -> list[int] | None:
        """Samples of each class; None where some have no class."""
        labels = Counter(sample.label for shard in self.shards for sample in shard.samples)
        if None in labels:
            return None
        return [labels[label] for label in range(len(self.classes))]


def folder_of(pattern: str | Path) -> Path:
    """The folder that shards lie in: the pattern itself, unless it names some of them."""
    text = str(pattern)
    return Path(text).parent if "{" in text or text.endswith(".tar") else Path(text)


def read_index(pattern: str | Path) -> tuple[Path, Index]:
    """(folder, index) for a folder of shards or a brace pattern that names some of them.

    Raises UserError if there is no valid index or a named shard is not in it.
    """
    text = str(pattern)
    folder = folder_of(text)
    try:
        index = Index.model_validate_json((folder / INDEX_NAME).read_text("utf-8"))
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
