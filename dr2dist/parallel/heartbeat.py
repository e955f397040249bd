"""A rank that is lost is named by all others, which then end: collectives would wait for it.

Every rank tells in the process group's store that it lives, from a thread of its own, since the
main one may be held up in a collective. Rank 0 listens to all, all listen to rank 0.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch.distributed as dist

from dr2dist.errors import UserError
from dr2dist.parallel.processes import ranks_of_node
from dr2dist.status import GOES_ON, Status, lives, say

SILENCE = 20.0
"""Seconds without a sign of life after which a rank is lost."""
PERIOD = 2.0
"""Seconds between two signs of life."""
GRACE = 5.0
"""Seconds that a rank has to end by itself, as when all have found the same mistake."""
NO_STORE = "the store of the process group does not answer"
"""How rank 0 was lost where it held the store."""
_LOST, _LEFT = "lost", "left"


class Heartbeat:
    """Around a run in the process group; every rank must enter it.

    name: how messages call a rank. agreed: exceptions that all ranks raise together. silence:
    see SILENCE. Leaving it by another exception of this rank ends the other ranks too; one that
    comes of a broken connection waits until it is known who was lost, and the process then ends
    with one line and status 4; with 2 where another rank has found a mistake (UserError).
    """

    def __init__(
        self,
        name: Callable[[int], str] = "rank {}".format,
        agreed: tuple[type[Exception], ...] = (),
        silence: float = SILENCE,
    ) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._name, self._agreed, self._silence = name, agreed, silence
        self.name = name(self.rank)

    def __enter__(self) -> Heartbeat:
        if self.ranks == 1:
            return self
        try:
            self._board = _Board(self.rank, self._silence)
            self._board.set(f"host/{self.rank}", f"{socket.gethostname()} {os.getpid()}")
            self._board.set(f"alive/{self.rank}", "0")
            self._board.set_first(_LOST, "")
        except GoneError:  # rank 0 has ended between the forming of the group and here
            say(f"dr2dist: rank {self.rank}: {self._lost(0, NO_STORE)[1]}")
            os._exit(Status.LOST)
        self._heard: dict[int, tuple[str, float]] = {}
        self._looked = time.monotonic()
        self._here: dict[int, int] = {}
        self._has_left = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self.ranks == 1:
            return
        if error is not None and _of_a_connection(error):
            # Which ends the process, unless nobody was lost: the connection was one of its own.
            self._thread.join(self._silence + 4 * GRACE)
        if error is not None and not isinstance(error, self._agreed):
            last = str(error).strip().rpartition("\n")[2] or type(error).__name__
            last = last.removeprefix(f"rank {self.rank}: ")
            # A mistake stays one however often the run is started.
            status = Status.USER_ERROR if isinstance(error, UserError) else Status.LOST
            self.tell(f"{self._name(self.rank)} ended: {last}", status)
        self._over.set()
        self._thread.join()
        self._leave(2 * GRACE)

    def _listen(self) -> None:
        """The thread: ends with the watch, or ends the process."""
        count, word = 0, None
        while word is None:
            if self._over.wait(PERIOD):
                return
            count += 1
            word = self._look(count)
        if self.rank:
            self._leave()  # rank 0 need not wait until this process ends
        if self._over.wait(GRACE):
            return
        status, found = word
        status, found = self.tell(found, status)
        say(f"dr2dist: rank {self.rank}: {found}")
        self._leave(2 * PERIOD)
        os._exit(status)

    def _look(self, count: int) -> tuple[Status, str] | None:
        """Tells that this rank lives; what is known of one that does not, and with which status the
        others end."""
        try:
            self._board.set(f"alive/{self.rank}", str(count))
            others = range(1, self.ranks) if self.rank == 0 else (0,)
            told, *counts = self._board.get_all([_LOST, *map("alive/{}".format, others)])
            if told:
                return _read(told)
            for rank, process in self._neighbours().items():
                if not lives(process):
                    return self._lost(rank, "its process has ended")
            if self._was_stopped():
                self._heard.clear()
            for rank, count_of_rank in zip(others, counts, strict=True):
                if self._silent(rank, count_of_rank):
                    return self._lost(rank, f"no sign of life for {self._silence:.0f} s")
        except GoneError:
            return self._lost(0, NO_STORE)
        return None

    def _was_stopped(self) -> bool:
        """Whether this process itself did not run for a while: then it knows nothing of others."""
        before, self._looked = self._looked, time.monotonic()
        return self._looked - before > 3 * PERIOD

    def _silent(self, rank: int, count: str | None) -> bool:
        """Whether a rank that was heard once is heard no more."""
        now = time.monotonic()
        if count is None:
            return False
        known, since = self._heard.get(rank, (None, now))
        if count != known:
            self._heard[rank] = count, now
        return count == known and now - since > self._silence

    def _neighbours(self) -> dict[int, int]:
        """The processes of the ranks of this host, as far as they have told theirs."""
        for rank in ranks_of_node(self.rank, self.ranks):
            place = self._board.get(f"host/{rank}") if rank not in self._here else None
            if place is not None:
                host, process = place.split()
                if host == socket.gethostname():
                    self._here[rank] = int(process)
        return self._here

    def _lost(self, rank: int, how: str) -> tuple[Status, str]:
        said = f"{self._name(rank)} was lost ({how})"
        return Status.LOST, f"{said}; {GOES_ON}"

    def tell(self, found: str, status: Status = Status.LOST) -> tuple[Status, str]:
        """Leaves word for all others, if none has; they end with that status. The word that is
        there then: a rank may have told its mistake, and ended, while this one looked after it."""
        if self.ranks > 1:
            with contextlib.suppress(GoneError):
                return _read(self._board.set_first(_LOST, f"{int(status)} {found}"))
        return status, found

    def _leave(self, seconds: float = 0.0) -> None:
        """Says that this rank needs the store no more. Rank 0, with whom it goes, waits so long for
        the others, who may have to read why they end."""
        with contextlib.suppress(GoneError):
            if not self._has_left:
                self._has_left = True
                self._board.add(_LEFT, 1)
            end = time.monotonic() + seconds
            while self.rank == 0 and time.monotonic() < end:
                if self._board.add(_LEFT, 0) == self.ranks:
                    return
                time.sleep(0.01)


class GoneError(Exception):
    """The store does not answer: it goes with the process that holds it, rank 0's."""


class _Board:
    """The process group's store, by a connection that nothing else waits on.

    A host that is frozen leaves whoever asks it without an answer for ever, so each question is
    asked in a thread of its own, for `patience` seconds; after that the store counts as gone.
    """

    def __init__(self, rank: int, patience: float) -> None:
        self._patience, self._gone = patience, False
        self._store: dist.Store = self._ask(lambda: _own_store(rank))

    def get(self, key: str) -> str | None:
        """None where nobody has set it."""
        found: str | None = self._ask(
            lambda: self._store.get(key).decode() if self._store.check([key]) else None
        )
        return found

    def get_all(self, keys: Sequence[str]) -> list[str | None]:
        """The same of several, in two messages however many they are, once all have been set."""
        if not self._ask(lambda: self._store.check(list(keys))):
            return [self.get(key) for key in keys]
        return [value.decode() for value in self._ask(lambda: self._store.multi_get(list(keys)))]

    def set(self, key: str, value: str) -> None:
        """For all to read."""
        self._ask(lambda: self._store.set(key, value))

    def set_first(self, key: str, value: str) -> str:
        """The same, unless somebody has done so; what is there then."""
        return str(self._ask(lambda: self._store.compare_set(key, "", value)).decode())

    def add(self, key: str, amount: int) -> int:
        """The sum of all that was added."""
        return int(self._ask(lambda: self._store.add(key, amount)))

    def _ask(self, question: Callable[[], Any]) -> Any:
        answers: list[Any] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(question())

        if not self._gone:
            thread = threading.Thread(target=ask, daemon=True)
            thread.start()
            thread.join(self._patience)
        if not answers:
            self._gone = True
            raise GoneError
        return answers[0]


def _own_store(rank: int) -> dist.Store:
    world: Any = dist.group.WORLD
    store = world.get_group_store().clone()
    # Every rank counts its own watches, and all come to the same number.
    return dist.PrefixStore(f"watch/{store.add(f'watches/{rank}', 1)}", store)


def _read(word: str) -> tuple[Status, str]:
    """What `tell` has left."""
    status, _, found = word.partition(" ")
    return Status(int(status)), found


def _of_a_connection(error: BaseException) -> bool:
    """Whether an exception tells of a peer that does not answer; gloo's are plain RuntimeErrors."""
    known = isinstance(error, (dist.DistError, ConnectionError))
    return known or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
