"""Shards that are open: a file and where its samples lie, kept from one sample to the next."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from pathlib import Path

from dr2dist.data.decoders import LARGEST
from dr2dist.data.index import Index, Shard
from dr2dist.data.members import ShardMembers
from dr2dist.errors import UserError, one_line

MOST = 1024
"""Shards that a process keeps open at most."""


class OpenShard:
    """A shard to read from: its file stays open as long as this object."""

    def __init__(self, path: Path, members: ShardMembers) -> None:
        self.members = members
        self._file = path.open("rb", buffering=0)

    def read(self, offset: int, size: int) -> bytes:
        """So many bytes from a place. Raises ValueError where there are not so many, or more than a
        member may have."""
        if size > LARGEST:
            raise ValueError(f"has {size} bytes, allowed are {LARGEST}")
        data = os.pread(self._file.fileno(), size, offset)
        while len(data) < size:
            more = os.pread(self._file.fileno(), size - len(data), offset + len(data))
            if not more:
                raise ValueError(f"the shard ends {size - len(data)} bytes before it does")
            data += more
        return data


class OpenShards:
    """The shards of an index, opened when they are asked for, the latest kept open."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._opened: OrderedDict[int, OpenShard] = OrderedDict()
        self._lost: dict[int, str] = {}

    def __getitem__(self, shard: Shard) -> OpenShard:
        """Raises UserError that names the shard if it cannot be opened, now and every time after:
        its samples count as lost, and it is tried once."""
        if shard.number in self._lost:
            raise UserError(self._lost[shard.number])
        found = self._opened.get(shard.number)
        if found is None:
            found = self._opened[shard.number] = self._open(shard)
            if len(self._opened) > _most():
                self._opened.popitem(last=False)
        self._opened.move_to_end(shard.number)
        return found

    def _open(self, shard: Shard) -> OpenShard:
        path = self.index.path(shard)
        try:
            return OpenShard(path, self.index.members(shard))
        except UserError as error:
            self._lost[shard.number] = str(error)
        except (OSError, ValueError) as error:
            self._lost[shard.number] = f"{path}: cannot be read: {one_line(error)}"
        raise UserError(self._lost[shard.number])

    def __getstate__(self) -> Index:
        """Another process opens its own."""
        return self.index

    def __setstate__(self, index: Index) -> None:
        self.__init__(index)  # type: ignore[misc]


def _most() -> int:
    """A half of the files that this process may open."""
    return max(8, min(MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
