"""What is found in each shard, kept in a file of its own until all are an index."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dr2dist.data.index import Shard, pack_counts, sidecar, write_index
from dr2dist.data.labels import class_index
from dr2dist.data.members import ShardMembers, load_members
from dr2dist.data.scan import Scanned
from dr2dist.errors import UserError
from dr2dist.files import writing


class Described(NamedTuple):
    """A shard. name, bytes, sha256: of the file. samples: how many. extensions: of the first one.
    labels: samples of each label, as JSON, none where they have none. left: (member or key,
    reason) of what cannot be used."""

    name: str
    bytes: int | None
    sha256: str | None
    samples: int
    extensions: list[str]
    labels: dict[str, int]
    left: list[tuple[str, str]]

    def shard(self, number: int) -> Shard:
        """As the index has it."""
        facts = (self.name, self.samples, self.bytes, self.sha256, tuple(self.extensions))
        return Shard(number, *facts)

    def class_rows(self, number: int, classes: Sequence[str]) -> list[tuple[int, int, int]]:
        """(number, class, samples). Raises UserError for a label that is of none of the classes."""
        try:
            return [
                (number, class_index(json.loads(text), classes), count)
                for text, count in self.labels.items()
            ]
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from None


def describe(name: str, found: Scanned, labels: Mapping[str, Any], note: Path) -> Described:
    """Keeps what was found in a shard in a note. labels: of the samples that have one, by key."""
    first: Sequence[str] = found.samples[0].extensions if found.samples else ()
    described = Described(
        name,
        found.bytes,
        found.sha256 or None,
        len(found.samples),
        list(first),
        dict(Counter(json.dumps(labels[s.key]) for s in found.samples if s.key in labels)),
        found.left,
    )
    ShardMembers.of(found.samples).save(note, described._asdict())
    return described


def read_note(note: Path) -> Described | None:
    """What was described before; None if nothing was, or not wholly."""
    try:
        return Described(**load_members(note)[1])
    except (OSError, UserError, TypeError):
        return None


def finish(
    index: Path,
    described: Sequence[tuple[Described, Path | None]],
    classes: Sequence[str],
    needs: Sequence[str] = (),
    label: str | None = None,
) -> None:
    """Makes shards, in order, an index. Those without samples are left out.

    described: each with its note, None where its samples are found when it is first read. classes:
    names by label; a label is one of them or its number. needs, label: see `usable`. Raises
    UserError for another label.
    """
    shards: list[Shard] = []
    rows: list[tuple[int, int, int]] = []
    hashes = []
    with writing(index):
        sidecar(index, 0).parent.mkdir(parents=True, exist_ok=True)
    for each, note in described:
        number = len(shards)
        if each.samples:
            rows += each.class_rows(number, classes)
            shards.append(each.shard(number))
        if note is None:
            continue
        if each.samples:
            hashes.append(_hashes(load_members(note)[0]))
            note.replace(sidecar(index, number))
        else:
            note.unlink()
    every = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
    unique = len(np.unique(every)) == sum(shard.samples for shard in shards)
    write_index(index, classes, shards, pack_counts(rows) if rows else None, needs, label, unique)


def _hashes(members: ShardMembers) -> Any:
    """Of the keys, 64 bits each."""
    names, starts = members.names[:].tobytes(), members.name_starts[:].tolist()
    each = (names[a:b] for a, b in itertools.pairwise(starts))
    found = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in each)
    return np.frombuffer(found, np.uint64)
