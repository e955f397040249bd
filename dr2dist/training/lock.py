"""One run folder, one run: a lock that the file system takes back when its owner is gone."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import time
import weakref
from pathlib import Path
from typing import IO, Any

from dr2dist.errors import UserError
from dr2dist.launching.launcher import own_launcher
from dr2dist.locks import is_still, is_taken, take
from dr2dist.status import lives, say

LOCK = "run.lock"
"""A file in the run's folder that names host, process and start of who holds it."""
ENDING = 60.0
"""Seconds beyond train.grace that a run may take to end after its command has."""

log = logging.getLogger(__name__)


class RunLock:
    """The lock of a file of the run's folder, held by rank 0 until it ends.

    What is relied on: that the file system has locks (see locks.py). Local ones have them; NFS (4,
    or 3 with lockd), Lustre and GPFS have them between nodes, and give the lock of a process or a
    node that died to the next who asks. Where there are none a warning says so.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._file: IO[str] | None = None
        itself = weakref.ref(self)
        # A data worker that outlives a killed rank would keep the lock.
        os.register_at_fork(after_in_child=lambda: _leave(itself()))

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
            if is_still(file, self.path):
                self._file = file
            else:
                file.close()
        self._file.seek(0)
        self._file.truncate()
        start = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        own = {"host": socket.gethostname(), "process": os.getpid(), "command": own_launcher()}
        self._file.write(json.dumps({**own, "start": start}) + "\n")
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self.path.unlink(missing_ok=True)  # while it is locked
        self.leave()

    def leave(self) -> None:
        """Closes the file if it is open: gives the lock back, or in a child leaves it with the
        parent."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _locked(self, file: IO[str]) -> bool:
        try:
            return take(file)
        except OSError as error:
            log.warning(
                "%s: this file system has no locks (%s): take care that no other run has the "
                "same output",
                self.path,
                error.strerror,
            )
        return True


def check_free(folder: Path, grace: float) -> None:
    """Waits for a run whose command is gone, since it ends, within `grace` seconds and ENDING more;
    raises UserError if a run has the folder. Neither takes the lock nor leaves anything."""
    end, told = time.monotonic() + grace + ENDING, False
    with contextlib.suppress(OSError):  # RunLock says what is wrong
        while True:
            with (folder / LOCK).open() as file:
                if not _is_held(file):
                    return
                if time.monotonic() > end or not _ends(_told(file)):
                    raise UserError(f"output: {folder} is in use by {_owner(file)}")
                if not told:
                    say(f"dr2dist: {folder}: waits for {_owner(file)}, to end as its command has")
                    told = True
            time.sleep(0.2)


def _ends(told: dict[str, Any] | None) -> bool:
    """Whether the command that watches over a rank is gone, which the rank then notices, and stops
    in order. One that was started otherwise goes on, whatever has become of who started it."""
    if told is None or told.get("host") != socket.gethostname() or not told.get("command"):
        return False
    return not lives(told["command"])


def holder(folder: Path) -> dict[str, Any] | None:
    """host, process and start of the run that has a folder; None where none has. Where the file
    system has no locks it is the one that had it last and did not end by itself."""
    try:
        with (folder / LOCK).open() as file:
            return _told(file) if _is_held(file) is not False else None
    except OSError:
        return None


def _leave(lock: RunLock | None) -> None:
    if lock is not None:
        lock.leave()


def _is_held(file: IO[str]) -> bool | None:
    """None where the file system has no locks."""
    try:
        return is_taken(file)
    except OSError:
        return None


def _told(file: IO[str]) -> dict[str, Any] | None:
    """None while it is being written."""
    try:
        file.seek(0)
        found = json.loads(file.read())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _owner(file: IO[str]) -> str:
    told = _told(file)
    if told is None or not {"host", "process", "start"} <= told.keys():
        return "another run"
    return f"process {told['process']} of {told['host']}, a run since {told['start']}"
