"""One run folder, one run: a lock that the file system takes back when its owner is gone."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import logging
import os
import socket
from pathlib import Path
from typing import IO

from dr2dist.errors import UserError

LOCK = "run.lock"
"""A file in the run's folder that names host, process and start of who holds it."""

log = logging.getLogger(__name__)


class RunLock:
    """A POSIX lock (fcntl) on a file of the run's folder, held by rank 0 until it ends.

    What is relied on: that the file system has such locks. Local ones have them; NFS (4, or 3 with
    lockd), Lustre and GPFS have them between nodes, and give the lock of a process or a node that
    died to the next who asks. Where there are none a warning says so.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        """Raises UserError if another run has it, or the folder cannot be made."""
        while self._file is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = self.path.open("a+")
            except OSError as error:
                raise UserError(f"output: {self.path}: cannot be made: {error.strerror}") from None
            if not self._locked(file):
                owner = _owner(file)
                file.close()
                raise UserError(f"output: {self.path.parent} is in use by {owner}")
            if _is_still(file, self.path):
                self._file = file
            else:  # its owner has removed it meanwhile
                file.close()
        self._file.seek(0)
        self._file.truncate()
        start = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        told = {"host": socket.gethostname(), "process": os.getpid(), "start": start}
        self._file.write(json.dumps(told) + "\n")
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self.path.unlink(missing_ok=True)  # while it is locked
        self._file.close()
        self._file = None

    def _locked(self, file: IO[str]) -> bool:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            log.warning(
                "%s: this file system has no locks (%s): take care that no other run has the "
                "same output",
                self.path,
                error.strerror,
            )
        return True


def check_free(folder: Path) -> None:
    """Raises UserError if a run has the folder. Leaves nothing behind."""
    if (folder / LOCK).exists():
        with RunLock(folder):
            pass


def _owner(file: IO[str]) -> str:
    try:
        file.seek(0)
        told = json.loads(file.read())
        return f"process {told['process']} of {told['host']}, a run since {told['start']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"


def _is_still(file: IO[str], path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(file.fileno())
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)
