"""Shards that are open: a file and where its samples lie, kept from one sample to the next."""

from __future__ import annotations

import os
import resource
import time
from collections import OrderedDict
from typing import BinaryIO

from dr2dist.data.cache import Cache
from dr2dist.data.decoders import LARGEST
from dr2dist.data.index import Index, Shard
from dr2dist.data.members import ShardMembers
from dr2dist.errors import PlaceError, UserError, one_line

MOST = 1024
"""Shards that a process keeps open at most."""
LOST = 300.0
"""Seconds before a shard is tried again that could not be opened."""


class OpenShard:
    """A shard to read from: its file stays open as long as this object."""

    def __init__(self, file: BinaryIO, members: ShardMembers) -> None:
        self.members, self._file = members, file

    @property
    def deleted(self) -> bool:
        """Whether its file has no name any more."""
        return not os.fstat(self._file.fileno()).st_nlink

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


class LostShardError(UserError):
    """A shard that cannot be opened."""


class OpenShards:
    """The shards of an index, opened when they are asked for, the latest kept open.

    cache: where those are kept that are elsewhere. most: how many are open at a time; None: half
    of the files that this process may open, and a thousand.
    """

    def __init__(self, index: Index, cache: Cache | None = None, most: int | None = None) -> None:
        self.index, self.cache, self.most = index, cache, most
        self._opened: OrderedDict[int, OpenShard] = OrderedDict()
        self._lost: dict[int, tuple[float, str]] = {}

    def __getitem__(self, shard: Shard) -> OpenShard:
        """Raises LostShardError that names the shard if it cannot be opened, for some minutes
        without another try; PlaceError for a cache that does not do."""
        found = self._opened.get(shard.number)
        if found is None:
            since, fault = self._lost.get(shard.number, (0.0, ""))
            if fault and time.monotonic() - since < LOST:
                raise LostShardError(fault)
            self._close_deleted()
            found = self._opened[shard.number] = self._open(shard)
            if len(self._opened) > min(self.most or MOST, _allowed()):
                self._opened.popitem(last=False)
        self._opened.move_to_end(shard.number)
        return found

    def _open(self, shard: Shard) -> OpenShard:
        try:
            if self.index.is_remote(shard) or (self.cache is not None and self.cache.of_all):
                return self._fetched(shard)
            file = self.index.path(shard).open("rb", buffering=0)
            return OpenShard(file, self.index.members(shard))
        except PlaceError:
            raise
        except UserError as error:
            fault = str(error)
        except (OSError, ValueError) as error:
            fault = f"{self.index.where(shard)}: cannot be read: {one_line(error)}"
        self._lost[shard.number] = time.monotonic(), fault
        raise LostShardError(fault)

    def _close_deleted(self) -> None:
        """What a cache has deleted takes its room on the disk until nobody has it open."""
        if self.cache is not None:
            for number in [key for key, each in self._opened.items() if each.deleted]:
                del self._opened[number]

    def _fetched(self, shard: Shard) -> OpenShard:
        if self.cache is None:
            raise PlaceError(
                f"{self.index.where(shard)}: is not on this machine: say where shards are kept, by "
                "data.cache={folder: /scratch/shards, limit: 200GB}, or --cache of evaluate"
            )
        file, members = self.cache.open(self.index.wanted(shard))
        return OpenShard(file, self.index.checked(shard, members))

    def __getstate__(self) -> tuple[Index, Cache | None, int | None]:
        """Another process opens its own."""
        return self.index, self.cache, self.most

    def __setstate__(self, state: tuple[Index, Cache | None, int | None]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def _allowed() -> int:
    """A half of the files that this process may open."""
    return max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
