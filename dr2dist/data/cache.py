"""Shards of elsewhere, whole, in a bounded folder that all processes of a node share."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

from dr2dist.data.members import ShardMembers, load_members
from dr2dist.data.remote import PATIENCE, RemoteReader
from dr2dist.data.scan import Scanned
from dr2dist.data.usable import usable
from dr2dist.errors import PlaceError, UserError, one_line
from dr2dist.files import locked

log = logging.getLogger(__name__)

PREFIX = "dr2dist-"
"""How the names of all files begin that a cache writes, and may delete."""
MEMBERS, PART, LOCK = ".members", ".part", f"{PREFIX}lock"
LONGEST = 80
"""Letters of a shard's own name, at its end, in that of its file."""
WAIT = 0.05
"""Seconds between two looks for room."""
FAR = 2**31 - 1
"""The last time that a file can say."""
ATTEMPTS = 3
"""How often a folder that is deleted meanwhile is made again."""


@dataclass(frozen=True)
class Wanted:
    """A shard. bytes, sha256: as an index says them, None where it does not. needs, label: see
    `usable`."""

    url: str
    bytes: int | None
    sha256: str | None
    needs: tuple[str, ...] = ()
    label: str | None = None

    @property
    def name(self) -> str:
        """Of its file in a cache: another where the shard, or what is taken of it, is another."""
        digest = hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:24]
        return f"{PREFIX}{digest}-{os.path.basename(self.url)[-LONGEST:]}"


@dataclass(frozen=True)
class Cache:
    """A folder of fetched shards.

    limit: bytes that its shards never exceed together. patience: see `persistent`. of_all: whether
    shards are fetched that lie in local folders too, such as those of mounted file systems. A
    file's time of change says how soon it is used next (see `plan`): the latest goes first when
    room is wanted. Files that are open can be read on when they are deleted.
    """

    folder: Path
    limit: int
    patience: float = PATIENCE
    of_all: bool = False

    def open(self, wanted: Wanted) -> tuple[BinaryIO, ShardMembers]:
        """A shard's file and where its samples lie; fetched, if it is not there, while others wait.

        Raises UserError, in one line, for what cannot be fetched or kept.
        """
        path = self.folder / wanted.name
        while True:
            try:
                file = path.open("rb", buffering=0)
                return file, load_members(_beside(path, MEMBERS))[0]
            except FileNotFoundError:
                self.fetch(wanted)
            except OSError as error:
                raise PlaceError(f"data.cache.folder: {path}: {error.strerror}") from None
            except UserError:  # its arrays are damaged
                _delete(path)

    def holds(self, wanted: Wanted) -> bool:
        """Whether a shard is there."""
        path = self.folder / wanted.name
        return path.exists() and _beside(path, MEMBERS).exists()

    def fetch(self, wanted: Wanted, next_use: int = 0) -> None:
        """Fetches a shard, unless it is there. next_use: see `plan`."""
        path = self.folder / wanted.name
        part = _beside(path, PART)
        for _ in range(ATTEMPTS):
            try:
                with locked(part):
                    if self.holds(wanted):
                        part.unlink()
                    else:
                        self._fetch(wanted, path, part, next_use)
                    return
            except FileNotFoundError:  # somebody has deleted the folder
                continue
            except OSError as error:
                fault = error.strerror or one_line(error)
                raise PlaceError(f"data.cache.folder: {self.folder}: {fault}") from None
        raise PlaceError(f"data.cache.folder: {self.folder}: is deleted")

    def _fetch(self, wanted: Wanted, path: Path, part: Path, next_use: int) -> None:
        try:
            for attempt in range(2):
                found, fault = self._read(wanted, part)
                if not fault:
                    ShardMembers.of(found.samples).save(_beside(path, MEMBERS), {})
                    os.utime(part, (time.time(), next_use))
                    part.rename(path)
                    return
                if not attempt:
                    log.warning("%s: %s: fetched again", wanted.url, fault)
            raise UserError(f"{wanted.url}: {fault}, and again when it was fetched anew")
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _read(self, wanted: Wanted, part: Path) -> tuple[Scanned, str]:
        """Fetches into a file; what the shard holds, and what is wrong with it."""
        with RemoteReader(wanted.url, self.patience) as source, part.open("r+b") as file:
            if wanted.bytes not in (None, source.size):
                return Scanned(), f"has {source.size} bytes, the index says {wanted.bytes}"
            while not self._make_room(part, source.size, wanted.url):
                time.sleep(WAIT)
            try:
                found, _ = usable(_Copying(source, file), wanted.needs, wanted.label)
                file.truncate()  # to what it is; until now it has held the room
            except UserError:
                raise
            except ValueError as error:
                return Scanned(), one_line(error)
        if wanted.sha256 not in (None, found.sha256):
            return found, "its checksum differs from the index"
        return found, ""

    def _make_room(self, part: Path, size: int, url: str) -> bool:
        """Deletes what is used last, and takes the room, so that others count it; False where what
        others are fetching leaves none yet. Raises UserError where there never is."""
        room = room_for(size)
        with locked(self.folder / LOCK):
            self._forget_dead()
            used = {path: _size(path) for path in self._files() if path != part}
            left = self.limit - sum(used.values())
            for path in sorted(self._shards(), key=_next_use, reverse=True):
                if left >= room:
                    break
                left += used.get(path, 0)
                _delete(path)
            if left < room and any(used[path] for path in used if path.suffix == PART):
                return False
            if left < room:
                raise PlaceError(
                    f"data.cache.limit: {self.limit} bytes leave {max(left, 0)} for {url}, which "
                    f"takes {size}: allowed are more"
                )
            with part.open("r+b") as file:
                file.truncate(room)
            return True

    def _files(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.name.startswith(PREFIX)]

    def _shards(self) -> list[Path]:
        ends = (PART, MEMBERS, ".tmp")
        return [p for p in self._files() if p.suffix not in ends and p.name != LOCK]

    def _forget_dead(self) -> None:
        """Deletes what runs have left that are no more."""
        for path in self._files():
            shard = path.with_name(path.name.removesuffix(".tmp").removesuffix(MEMBERS))
            if shard != path and not shard.exists() and not _beside(shard, PART).exists():
                path.unlink(missing_ok=True)
            if path.suffix == PART:
                try:
                    with path.open("r+b") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink(missing_ok=True)
                except (BlockingIOError, FileNotFoundError):
                    continue  # it is being fetched, or has just been

    def plan(self, next_uses: dict[str, int], others: int) -> None:
        """Says how soon shards are used next, in samples, by their files' names; and of all others,
        which validation or another run may need."""
        for path in self._shards() if self.folder.is_dir() else ():
            with contextlib.suppress(OSError):  # another process has deleted it, or owns it
                os.utime(path, (time.time(), min(next_uses.get(path.name, others), FAR)))

    def used(self) -> int:
        """Bytes of all files."""
        return sum(map(_size, self._files())) if self.folder.is_dir() else 0


def room_for(size: int) -> int:
    """Bytes of a shard of this size and of where its samples lie: of a tar's 1,024 for a member at
    least, that takes less than an eighth."""
    return size + size // 8 + 4096


class _Copying:
    """Writes what is read."""

    def __init__(self, source: RemoteReader, target: BinaryIO) -> None:
        self.source, self.target = source, target

    def read(self, size: int = -1) -> bytes:
        data = self.source.read(size)
        self.target.write(data)
        return data


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _next_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    _beside(path, MEMBERS).unlink(missing_ok=True)
