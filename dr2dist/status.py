"""How processes end: the exit statuses of the command and of ranks, and what asks them to stop."""

from __future__ import annotations

import signal
from enum import IntEnum

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""What a person, a service manager, a terminal that closes, and a scheduler send."""
APART = 1.0
"""Seconds within which further signals count as the same one: a process group gets it at once, and
what is sent on by a launcher again."""


class Status(IntEnum):
    """An exit status."""

    DONE = 0
    USER_ERROR = 2
    """A setting, a file or a call that cannot work."""
    UNPROVEN = 3
    """A step that could not be proven, and was not applied."""
    LOST = 4
    """A rank was lost."""
    STOPPED = 75
    """Asked to stop, and able to go on (EX_TEMPFAIL of sysexits.h)."""


def handled() -> tuple[signal.Signals, ...]:
    """The signals that this process answers: not SIGHUP under nohup, which has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(each for each in STOP_SIGNALS if not (ignored and each == signal.SIGHUP))
