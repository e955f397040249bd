"""Where the members of a shard's samples lie: arrays, with no object a sample."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dr2dist.errors import UserError, one_line
from dr2dist.files import atomic_write

Column = Any
"""An array, or what gives one when it is sliced, such as a file that is mapped."""


class Sample(NamedTuple):
    """Where a sample's members lie in its shard: (byte offset, size) by extension. label: its
    class where the index alone says it, as format 1 did."""

    key: str
    members: dict[str, tuple[int, int]]
    label: int | None = None

    @property
    def extensions(self) -> list[str]:
        """Of what can be read of it."""
        said = [] if self.label is None or "cls" in self.members else ["cls"]
        return [*self.members, *said]


@dataclass(frozen=True)
class ShardMembers:
    """The samples of a shard, S of them with M members together.

    names: uint8, their keys, one after the other; name_starts: int64 [S + 1]. extensions: those
    that there are. first: int64 [S + 1], a sample's first member; kinds: uint16 [M], of
    extensions; offsets, sizes: int64 [M], in bytes. labels: int64 [S], or None.
    """

    samples: int
    names: Column
    name_starts: Column
    extensions: tuple[str, ...]
    first: Column
    kinds: Column
    offsets: Column
    sizes: Column
    labels: Column | None = None

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Self:
        """The arrays of these samples."""
        names: list[bytes] = []
        name_starts, first = [0], [0]
        members: list[tuple[int, int, int]] = []
        kinds: dict[str, int] = {}
        labels: list[int] = []
        for sample in samples:
            names.append(sample.key.encode("utf-8", "surrogateescape"))
            name_starts.append(name_starts[-1] + len(names[-1]))
            for extension, (offset, size) in sample.members.items():
                members.append((kinds.setdefault(extension, len(kinds)), offset, size))
            first.append(len(members))
            if sample.label is not None:
                labels.append(sample.label)
        table = np.array(members, np.int64).reshape(-1, 3)
        return cls(
            samples=len(names),
            names=np.frombuffer(b"".join(names), np.uint8),
            name_starts=np.array(name_starts, np.int64),
            extensions=tuple(kinds),
            first=np.array(first, np.int64),
            kinds=table[:, 0].astype(np.uint16),
            offsets=table[:, 1].copy(),
            sizes=table[:, 2].copy(),
            labels=np.array(labels, np.int64) if names and len(labels) == len(names) else None,
        )

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> Sample:
        start, stop = self.name_starts[number : number + 2]
        key = self.names[start:stop].tobytes().decode("utf-8", "surrogateescape")
        start, stop = (int(place) for place in self.first[number : number + 2])
        columns = (each[start:stop].tolist() for each in (self.kinds, self.offsets, self.sizes))
        members = {
            self.extensions[kind]: (offset, size)
            for kind, offset, size in zip(*columns, strict=True)
        }
        return Sample(key, members, None if self.labels is None else int(self.labels[number]))

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """Writes them and facts of the shard, values of JSON, aside and renamed."""
        # One text: several would come in any order, and make files of other bytes.
        said = {_SAID: json.dumps([facts, self.extensions])}
        with atomic_write(path) as aside:
            save_file({name: getattr(self, name) for name in _COLUMNS}, aside, said)


_SAID = "shard"
_COLUMNS = ("names", "name_starts", "first", "kinds", "offsets", "sizes")


def load_members(path: Path) -> tuple[ShardMembers, dict[str, Any]]:
    """What `ShardMembers.save` wrote, mapped and not read, and the facts.

    Raises UserError for a file that is damaged, FileNotFoundError for one that is not there.
    """
    try:
        with safe_open(path, "np") as file:
            columns = {name: file.get_slice(name) for name in _COLUMNS}
            facts, extensions = json.loads(file.metadata()[_SAID])
        samples = columns["first"].get_shape()[0] - 1
        return ShardMembers(samples, extensions=tuple(extensions), **columns), facts
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is damaged: {one_line(error)}; delete it") from None
