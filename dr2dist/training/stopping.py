"""What asks a rank to stop, heard by a thread: the main one may be held up in a collective."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time

from dr2dist.launching.launcher import own_launcher
from dr2dist.status import APART, GOES_ON, Status, handled, say, take_signals

PERIOD = 1.0
"""Seconds between two looks at the process that has started this one."""
GRACE = 60.0
"""Seconds until the configuration says how many."""


class StopRequest:
    """Made in a rank's main thread, as early as can be; `asked` is what the loop looks at.

    The first signal, or the end of the launcher, is a request. A second signal, or `grace` seconds,
    end the process at once, with what was written last.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        """What has asked, in words."""
        self.grace = GRACE
        self.speaks = True
        """Whether this rank says what all of them do."""
        self._since = 0.0
        self._launcher = own_launcher()
        self._ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        self._mouth = mouth
        signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        for number in handled():
            signal.signal(number, lambda number, frame: None)
        take_signals()
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _listen(self) -> None:
        while True:
            for number in self._heard():
                self._ask(signal.Signals(number).name)
            if self.asked is None and self._launcher not in (None, os.getppid()):
                self._ask("the end of the command")
            if self.asked is not None and time.monotonic() - self._since > self.grace:
                self._end(f"the step did not end within {self.grace:g} s")

    def _heard(self) -> bytes:
        if not select.select([self._ear], [], [], PERIOD)[0]:
            return b""
        numbers = {int(number) for number in handled()}
        return bytes(number for number in self._ear.recv(64) if number in numbers)

    def _ask(self, what: str) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked, self._since = what, now
        elif now - self._since > APART:
            self._end(what)

    def _end(self, why: str) -> None:
        if self.speaks:
            say(f"dr2dist: stopped at once ({why}); {GOES_ON}")
        os._exit(Status.STOPPED)
