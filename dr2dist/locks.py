"""Locks on open files that nobody waits for, and that the system takes back with their process.

They are of open file descriptions (fcntl(2), F_OFD_SETLK). A POSIX lock proper is lost when its
process closes any descriptor of the file, be it one that it has only read the file by; these are
not, and on file systems that several nodes share they are the same locks between nodes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import IO

_FLOCK = struct.Struct("hhqqi4x")
"""struct flock on 64 bits: type, whence, start, length, process."""


def take(file: IO[str]) -> bool:
    """Whether the lock of a file open for writing could be had; it goes when all who have the file
    open, processes forked since too, have closed it.

    Raises OSError where the file system has no locks.
    """
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _whole(fcntl.F_WRLCK))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def is_taken(file: IO[str]) -> bool:
    """Whether another open file has the lock. Takes nothing.

    Raises OSError where the file system has no locks.
    """
    found = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _whole(fcntl.F_WRLCK))
    kind: int = _FLOCK.unpack(found)[0]
    return kind != fcntl.F_UNLCK


def is_still(file: IO[str], path: str | os.PathLike[str]) -> bool:
    """Whether an open file is the one of that name: who had its lock before may have removed it."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(file.fileno())
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _whole(kind: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)
