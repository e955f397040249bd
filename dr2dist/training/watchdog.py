"""A limit on a step: what hangs, such as a file that never opens, is named and ends the run."""

from __future__ import annotations

import logging
import os
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dr2dist.status import GOES_ON, Status, say

TIMES, LEAST = 10.0, 300.0
"""The limit of a step: so many times the median one, and so many seconds at least."""
LONG = 1800.0
"""The least limit of what has no step before it to be compared with: the first one, and writing."""
PERIOD = 1.0
FIRST = 10.0
"""Seconds that a rank which waits for others leaves them, to say what they wait for."""
REMEMBERED = 50
"""Steps whose median counts."""

log = logging.getLogger(__name__)


class Watchdog:
    """Watches this process's main thread from another one, while it is entered.

    limit: seconds of a step; None: as TIMES and LEAST say. tell: leaves word for other ranks. rank:
    in words. When a limit is over the process ends with Status.LOST, and one line says what the
    main thread was in; its whole stack is in the log.
    """

    def __init__(self, rank: str, limit: float | None, tell: Callable[[str], object]) -> None:
        self._rank, self._limit, self._tell = rank, limit, tell
        self._times: deque[float] = deque(maxlen=REMEMBERED)
        self._now: tuple[str, float] | None = None
        self._spare = 0.0
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step of a number."""
        begin = time.monotonic()
        with self._during(f"step {number}", self._limit or self._usual()):
            yield
        self._times.append(time.monotonic() - begin)

    @contextmanager
    def other(self, what: str, least: float = LONG) -> Iterator[None]:
        """Around something that is no step, of at least so many seconds."""
        with self._during(what, max(least, self._limit or 0.0)):
            yield

    def _usual(self) -> float:
        return max(LEAST, TIMES * statistics.median(self._times)) if self._times else LONG

    @contextmanager
    def _during(self, what: str, limit: float) -> Iterator[None]:
        text = f"{what} did not end within {limit:.0f} s"
        self._now = text, time.monotonic() - self._spare + limit
        try:
            yield
        finally:
            self._now = None

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(PERIOD):
            before, looked = looked, time.monotonic()
            # A process that was suspended has not used that time.
            self._spare += max(0.0, looked - before - 2 * PERIOD)
            now = self._now
            if now is not None and looked - self._spare > now[1]:
                self._end(now)

    def _end(self, now: tuple[str, float]) -> None:
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        log.error("%s; stack of the main thread:\n%s", now[0], "".join(stack.format()))
        if any("torch/distributed" in frame.filename for frame in stack):
            if self._over.wait(FIRST) or self._now is not now:
                return
            where = "other ranks"
        else:
            where = _place(stack)
        line = f"{self._rank}: {now[0]}: it waits for {where}"
        self._tell(line)
        say(f"dr2dist: {line}; {GOES_ON}")
        os._exit(Status.LOST)


def _place(stack: traceback.StackSummary) -> str:
    """The last line of dr2dist's own, and what was called there."""
    own = [frame for frame in stack if f"{os.sep}dr2dist{os.sep}" in frame.filename]
    frame = own[-1] if own else stack[-1]
    place = frame.filename.rpartition(f"{os.sep}dr2dist{os.sep}")[2]
    return f"'{frame.line}' ({place}:{frame.lineno})"
