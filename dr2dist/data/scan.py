"""A shard read from its first byte to its last: its samples, what cannot be used, its checksum."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from dr2dist.data.members import Sample
from dr2dist.errors import one_line

BLOCK = 2**20
"""Bytes that are read at a time."""
KEPT = 2**20
"""Bytes of a label at most."""
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""How files of gzip, bzip2, xz and zstd begin."""
_META = re.compile(r"__[^/]*__($|/)")


def member_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a tar's member by webdataset's rule: the key ends at the first dot after
    the last slash, extensions are in small letters. None for what belongs to no sample."""
    match = None if _META.match(name) else _NAME.match(name)
    return None if match is None else (match[1], match[2].lower())


class Readable(Protocol):
    """What a shard is read from, from its beginning on."""

    def read(self, size: int = -1, /) -> bytes:
        """At most so many bytes, none at the end."""


@dataclass
class Scanned:
    """What a shard holds.

    samples: in order, as webdataset groups them. left: (member or key, reason) of what cannot be
    used. contents: of the members that were asked for, by `KEY.EXTENSION`. sha256, bytes: of the
    whole file.
    """

    samples: list[Sample] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)
    sha256: str = ""
    bytes: int = 0


def scan(
    file: Readable, keep: Callable[[str], bool] = lambda extension: False, headers: bool = False
) -> Scanned:
    """Reads a shard, seekable or not. keep: extensions whose contents are wanted. headers: of a
    file here, only these are read, and there is no checksum.

    A sample is the members of one key that follow each other. Raises ValueError where the tar is
    damaged, cut off or compressed.
    """
    reader: Any = file if headers else _Reader(file)
    found = Scanned()
    try:
        kind: Any = {"fileobj": reader, "mode": "r:" if headers else "r|", "tarinfo": _Strict}
        with tarfile.open(**kind, bufsize=BLOCK, errorlevel=2) as tar:
            _group(tar, keep, found)
            end = tar.offset
    except tarfile.ReadError as error:
        reason = f"is no sound tar file: {one_line(error)}"
        if headers:
            raise ValueError(reason) from None
        if reader.start.startswith(_COMPRESSED):
            reason = "is compressed: samples are read by their place, so unpack it"
        raise ValueError(reason if reader.bytes else "is empty") from None
    _drop_repeated(found)
    if not headers:
        reader.drain()
        if reader.filled > end:
            raise ValueError(
                f"holds something after a tar's end at byte {end}: it is damaged, or several in one"
            )
        found.sha256, found.bytes = reader.digest.hexdigest(), reader.bytes
    return found


def _group(tar: tarfile.TarFile, keep: Callable[[str], bool], found: Scanned) -> None:
    key = ""
    members: dict[str, tuple[int, int] | None] = {}
    for name, extension, member in _members(tar, found):
        if name != key:
            _add(key, members, found)
            key, members = name, {}
        if extension in members:
            members[extension] = None
        else:
            members[extension] = member.offset_data, member.size
            if keep(extension) and member.size <= KEPT:
                # The first one's: of samples with the same key that one is kept.
                found.contents.setdefault(f"{name}.{extension}", _content(tar, member))
        tar.members.clear()  # type: ignore[attr-defined]  # which it would keep for ever
    _add(key, members, found)


def _members(tar: tarfile.TarFile, found: Scanned) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    for member in tar:
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            kind = "a sparse file" if member.issparse() else "no regular file"
            found.left.append((member.name, kind))
            continue
        named = member_name(member.name)
        if named is not None:
            yield *named, member
        elif not _META.match(member.name):
            found.left.append((member.name, "a name without an ending"))


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _add(key: str, members: dict[str, Any], found: Scanned) -> None:
    twice = [extension for extension, place in members.items() if place is None]
    if twice:
        found.left.append((key, f"holds .{twice[0]} twice"))
    elif members:
        found.samples.append(Sample(key, members))


def _drop_repeated(found: Scanned) -> None:
    """Leaves out samples whose key has been there: a second one, or parts of one."""
    groups: dict[str, list[Sample]] = {}
    for sample in found.samples:
        groups.setdefault(sample.key, []).append(sample)
    if len(groups) == len(found.samples):
        return
    torn = {
        key
        for key, samples in groups.items()
        if len({frozenset(sample.members) for sample in samples}) > 1
    }
    kept: dict[str, Sample] = {}
    for sample in found.samples:
        if sample.key in torn:
            found.left.append((sample.key, "its members do not follow each other"))
        elif sample.key in kept:
            found.left.append((sample.key, "the key is there already"))
        else:
            kept[sample.key] = sample
    found.samples = list(kept.values())


class _Strict(tarfile.TarInfo):
    """Damaged headers are errors: tarfile takes them for the end, except for the first one."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            if not tar.offset:
                raise
            raise tarfile.ReadError(f"ends at byte {tar.offset} without a tar's end") from None
        except tarfile.HeaderError as error:
            place = tar.offset
            raise tarfile.ReadError(f"at byte {place}: {error}") from None


class _Reader:
    """Sums up what is read."""

    def __init__(self, file: Readable) -> None:
        self.file, self.digest, self.bytes, self.start = file, hashlib.sha256(), 0, b""
        self.filled = 0
        """Bytes up to the last that is not zero."""

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.start = self.start or data[:8]
        self.digest.update(data)
        if held := len(data.rstrip(b"\0")):
            self.filled = self.bytes + held
        self.bytes += len(data)
        return data

    def drain(self) -> None:
        while self.read(BLOCK):
            pass
